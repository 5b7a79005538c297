"""How the modules of Flax NNX and Linen keep the routing that they sow, and how lost routing is noticed.

A module keeps a dict of `RoutingCounts` by path pattern, where "" is the module itself. Only `flax.py` imports it.
"""

import contextlib
import contextvars
import re
import traceback
import types
import weakref
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import jax.extend
from flax import core, linen, nnx, traverse_util

from excitation_optax import _paths, _routing

_SOWN = "sown_routing"  # the name that the dict is kept under
# Its neighbour during a capture: a tuple with one None for each sow. Transforms keep its length and trace nothing.
_TIMES = "sow_times"

CONTAINERS = nnx.List | nnx.Dict  # modules to Flax, but not layers

_ADVICE = (
    "Call the module itself, and equally often in all branches of nnx.cond and nnx.switch. In nnx.scan and nnx.vmap, "
    "give a module without an axis of its own in_axes=nnx.StateAxes({excitation_optax.flax.Routing: 0, ...: None}) and "
    "sum its counts over axis 0. Use nnx.scan instead of nnx.fori_loop, nnx.while_loop, and modules in nnx.Carry."
)
_CLOSED_OVER = (
    "cannot leave the JAX transform that closed over the module (jax.checkpoint, jit, vmap, grad, lax.scan, shard_map, "
    "...). Use Flax's transform, and pass the module as an argument"
)


class Routing(nnx.Intermediate):
    """The type of the NNX variables that hold the counts of `sow_routing`."""


def _pattern(module: Any, names: tuple[Any, ...], state: Any) -> str:
    """The path pattern of children of a module, each of which its state must have, if that is known."""
    tree = _paths.Tree(state)
    for name in names:
        if not isinstance(name, str) or not all(name.split("/")):
            raise ValueError(f"sow_routing: a name must be a non-empty string, such as 'w_in'; got {name!r}.")
        if len(names) > 1 and set(name) & set("/{},"):
            raise ValueError(f"sow_routing: several names must be children of one module; got {names}.")
        if state is not None and not tree.find(name):
            raise ValueError(f"sow_routing: {type(module).__name__} has no {name!r}. {tree.nearest(name)}")
    return f"{{{','.join(names)}}}" if len(names) > 1 else "".join(names)


def _merged(sown: dict[Any, Any], more: dict[Any, Any]) -> dict[Any, Any]:
    """The counts of both, added where both have some."""
    return {**sown, **{key: sown[key] + counts if key in sown else counts for key, counts in more.items()}}


# NNX. During nnx.capture, each module has an attribute `__captures__`, a tuple of one variable for each type.

_running: contextvars.ContextVar["Capture | None"] = contextvars.ContextVar("running", default=None)


def captured(module: Any) -> Any:
    """The variable that records this module's routing, if a capture is running."""
    return next((variable for variable in getattr(module, "__captures__", ()) if type(variable) is Routing), None)


class Capture:
    """One call of capture_routing. It notes each sow, and compares the notes with what arrives in the model."""

    def __init__(self, root: Any):
        self.modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(root)}
        if not self.modules:
            raise ValueError(f"capture_routing: the first argument must be the model; got {type(root).__name__}.")
        if _running.get() and any(captured(module) is not None for module in self.modules.values()):
            raise ValueError("capture_routing: another capture of this model is running and would lose the routing.")
        self.trace = _trace()
        self.times: dict[str, int] = {}  # the most sows that a variable of a module held, by the module's path
        self.latest: str | None = None  # the module that sowed last; None before the call

    def __enter__(self) -> "Capture":
        self.token = _running.set(self)
        return self

    def run(self, root: Any, call: Callable[[], Any]) -> Any:
        """What nnx.capture calls. Marks each module's variable with the path, which copies of the module keep."""
        self.latest = ""
        for path, module in self.modules.items():
            if (variable := captured(module)) is None:
                continue  # a container, to later versions of Flax
            variable.set_metadata(module_path=path)
            if isinstance(module, CONTAINERS):
                del module.__captures__  # iteration over an nnx.Dict would find it, and sorting an nnx.List fails
        output = call()
        for path in self.times:
            self._check_kept(path, captured(self.modules[path]))
        return output

    def note(self, variable: Any) -> None:
        self.latest = _path(variable)
        if self.trace == _trace():  # any other trace may be repeated, and then begins without the counts of the first
            self._check_kept(self.latest, variable)
        self.times[self.latest] = max(self.times.get(self.latest, 0), _times(variable) + 1)

    def _check_kept(self, path: str, variable: Any) -> None:
        if _times(variable) < self.times.get(path, 0):
            jax.clear_caches()  # otherwise JAX reuses the trace of a scan, and nobody notes its sows the next time
            raise ValueError(
                f"The routing of {path or 'the model'} was lost, because it was called through a copy, as nnx.clone, "
                f"nnx.merge, and nnx.scan with in_axes=None make them. {_ADVICE}"
            )

    def __exit__(self, _, error: BaseException | None, tb: types.TracebackType | None) -> None:
        _running.reset(self.token)
        for module in self.modules.values():
            if hasattr(module, "__captures__"):  # nnx.capture leaves it there if the call fails
                del module.__captures__
        if isinstance(error, flax.errors.TraceContextError) and self.latest is None:
            raise ValueError(
                "capture_routing cannot record on a model that was made outside of this jax.jit, vmap or scan. Pass it "
                "in: through nnx.jit, or by nnx.split outside and nnx.merge inside."
            ) from error
        if isinstance(error, TypeError | ValueError) and "__captures__" in str(error):
            jax.clear_caches()
            frames = " ".join(frame.f_code.co_qualname for frame, _ in traceback.walk_tb(tb))
            transforms = re.findall(r"cond|switch|fori_loop|while_loop|scan|[vp]map", frames)
            raise ValueError(
                f"The routing of {self.latest or 'the model'} cannot leave nnx.{('jit', *transforms)[-1]}. {_ADVICE}"
            ) from error


def _path(variable: Any) -> str:
    return variable.get_metadata().get("module_path", "")


def _times(variable: Any) -> int:
    return len(variable.get_value().get(_TIMES, ())) if variable is not None else 0


def _trace(convention: str = "nnx") -> Any:
    """The JAX transform that is being traced."""
    return jax.extend.core.get_opaque_trace_state(convention=convention)


def _check_trace(variable: Any) -> None:
    """Raises if a JAX transform closed over the variable; `set_value` would leak a tracer."""
    variable.set_metadata(variable.get_metadata())


def sow_nnx(module: nnx.Module, counts: _routing.RoutingCounts, names: tuple[str, ...]) -> None:
    """Adds counts to those of an NNX module: to its captured variable, or to an attribute that pop_routing takes."""
    sown = {_pattern(module, names, nnx.as_pure(nnx.state(module)) if names else None): counts}
    capture, variable, name = _running.get(), captured(module), type(module).__name__
    if variable is not None:
        try:
            _check_trace(variable)
        except flax.errors.TraceContextError as error:
            raise ValueError(
                f"The routing of {_path(variable) or 'the model'} ({name}) {_CLOSED_OVER}: "
                "nnx.remat(lambda layer, x: layer(x))(layer, x)."
            ) from error
        if capture and variable.has_metadata("module_path"):  # otherwise an nnx.capture inside the model asked for it
            capture.note(variable)
        value = variable.get_value()
        times = (*value.get(_TIMES, ()), None)
        variable.set_value({**value, _SOWN: _merged(value.get(_SOWN, {}), sown), _TIMES: times})
    elif hasattr(module, "__captures__"):
        raise ValueError(
            f"The routing of a {name} would be lost: an nnx.capture inside the model records only other variable "
            "types. Name excitation_optax.flax.Routing there, or pass its types to capture_routing."
        )
    elif capture and not getattr(module, "deterministic", False):
        raise ValueError(
            f"The routing of a {name} would be lost: the module is not part of the model that capture_routing records. "
            "Make it an attribute of that model, or call it by a capture_routing of its own."
        )
    elif not getattr(module, "deterministic", False):
        with contextlib.suppress(flax.errors.TraceContextError):
            if not hasattr(module, _SOWN):
                setattr(module, _SOWN, Routing({}))
            variable = getattr(module, _SOWN)
            _check_trace(variable)
            variable.set_value(_merged(variable.get_value(), sown))


# Linen. The modules that sowed in one call of a model, by the scope of the model.
_sown_in: weakref.WeakKeyDictionary[core.Scope, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


def sow_linen(module: linen.Module, counts: _routing.RoutingCounts, names: tuple[str, ...]) -> None:
    """Adds counts to those of a Linen module, in the collection "intermediates", if that is mutable."""
    if module.scope is None:
        raise ValueError(f"sow_routing: call it inside a call of {type(module).__name__}.apply or its parent's.")
    if names and isinstance(child := getattr(module, str(names[0]), None), linen.Module) and len(names) == 1:
        module, names = child, ()  # which has another path if another module made it
    state = {name: tree for kind in module.variables.values() for name, tree in kind.items()}
    pattern = _pattern(module, names, state if state and not module.is_initializing() else None)

    def root(module: Any) -> Any:
        return root(module.parent) if isinstance(module.parent, linen.Module) else module

    # Inside a lifted transform modules have new scopes and no parent. Only Flax's stack of modules leads out of it.
    outermost = root(next(filter(None, linen.module._context.module_stack), module))
    path = "/".join(module.path) or "the model"
    if not module.is_mutable_collection("intermediates"):
        if outermost.is_mutable_collection("intermediates") and root(module).path:
            raise ValueError(
                f"The routing of {path} would be lost: a lifted transform, such as nn.scan, does not pass "
                'intermediates on. Set its variable_axes={"params": ..., "intermediates": 0}.'
            )
        return
    scope: Any = module.scope
    if scope.root.trace_level != _trace("flax"):
        raise ValueError(f"The routing of {path} {_CLOSED_OVER}, such as nn.remat or nn.scan.")
    sown_in = _sown_in.setdefault(outermost.scope, set())
    if module.has_variable("intermediates", _SOWN) and module.path not in sown_in:
        raise ValueError(
            f"The variables that were passed to apply hold the routing of {path} from an earlier call, which would be "
            "counted again. Remove it: {name: tree for name, tree in variables.items() if name != 'intermediates'}."
        )
    sown_in.add(module.path)
    module.sow("intermediates", _SOWN, {pattern: counts}, reduce_fn=_merged, init_fn=dict)


# Both.


def collected(sown: Any, none_found: str, model: Any = None) -> Any:
    """The RoutingCounts in a tree of sown values, as a tree by the paths of their parameters.

    A path in an NNX model is the one that its state has: of a module that several share, the first.
    """
    paths = {id(node): path for path, node in nnx.iter_graph(model)}
    modules = dict(nnx.iter_modules(model))
    found: dict[tuple[Any, ...], dict[bool, Any]] = {}  # by whether a module above sowed, or the module itself
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(nnx.as_pure(sown), is_leaf=_routing.is_counts):
        keys = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]  # no positions in a tuple
        if not isinstance(leaf, _routing.RoutingCounts) or keys[-1] == "__call__":  # of Linen's capture_intermediates
            continue
        *above, _, pattern = keys if keys[-2:-1] == [_SOWN] else (*keys, "")
        path, names, module = tuple(above), list(filter(None, pattern.split("/"))), modules.get(tuple(above))
        while names and isinstance(child := getattr(module, "__dict__", {}).get(names[0]), nnx.Module | nnx.Variable):
            path, module = paths[id(child)], child
            del names[0]
        path = (*path, *names)
        found[path] = _merged(found.get(path, {}), {bool(pattern): leaf})
    if not found:
        raise ValueError(
            f"{none_found} Layers record it by sow_routing(self, count_routing(...), 'names', 'of', 'experts'), or by "
            "sow_routing(self.experts, count_routing(...)) where self.experts holds nothing but experts."
        )
    for path, counts in found.items():
        if len(counts) > 1 or any(path[:n] in found for n in range(len(path))):
            raise ValueError(f"Routing was sown at {path} and also at a module above it, so it would be counted twice.")
    utilization = {path: next(iter(counts.values())) for path, counts in found.items()}
    return utilization[()] if () in utilization else traverse_util.unflatten_dict(utilization)
