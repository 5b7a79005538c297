"""How Flax modules keep the routing that they sow, and how lost routing is noticed. Only `flax.py` imports this."""

import contextlib
import contextvars
import re
import traceback
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
from flax import linen, nnx, traverse_util
from flax.core import tracers

from excitation_optax import _paths, _routing

CONTAINERS = nnx.List | nnx.Dict  # modules to Flax, but not layers
_SOWN = "sown_routing"  # the name that counts are kept under, in dicts by path pattern; "" is the module itself
_ADVICE = (
    "Call the module itself, and equally often in all branches of nnx.cond. In nnx.scan and nnx.vmap, give a module "
    "without an axis of its own in_axes=nnx.StateAxes({excitation_optax.flax.Routing: 0, ...: None}) and sum its "
    "counts over axis 0. Use nnx.scan instead of nnx.fori_loop, nnx.while_loop, and modules in nnx.Carry."
)


class Routing(nnx.Intermediate):
    """The type of the NNX variables that hold the counts of `sow_routing`."""


def _pattern(module: Any, names: tuple[Any, ...], state: Any) -> str:
    """The path pattern of children of a module. Its state, if known, must have each of them."""
    tree = _paths.Tree(state)
    for name in names:
        if not isinstance(name, str) or not all(name.split("/")):
            raise ValueError(f"sow_routing: a name must be a non-empty string, such as 'w_in'; got {name!r}.")
        if len(names) > 1 and set(name) & set("/{},"):
            raise ValueError(f"sow_routing: several names must be children of one module; got {names}.")
        if state is not None and not tree.find(name):
            raise ValueError(f"sow_routing: {type(module).__name__} has no {name!r}. {tree.nearest(name)}")
    return f"{{{','.join(names)}}}" if len(names) > 1 else "".join(names)


# NNX. During nnx.capture, each module has an attribute `__captures__`, a tuple of one variable for each type.

_running: contextvars.ContextVar["Capture | None"] = contextvars.ContextVar("running", default=None)


def captured(module: Any) -> Any:
    """The variable that records this module's routing, if a capture is running."""
    return next((variable for variable in getattr(module, "__captures__", ()) if type(variable) is Routing), None)


class Capture:
    """One call of capture_routing. It counts each module's sows, and compares with what arrives in the model."""

    def __init__(self, root: Any):
        self.modules = {"/".join(map(str, path)) or "the model": module for path, module in nnx.iter_modules(root)}
        if not self.modules:
            raise ValueError(f"capture_routing: the first argument must be the model; got {type(root).__name__}.")
        if _running.get() and any(captured(module) is not None for module in self.modules.values()):
            raise ValueError("capture_routing: another capture of this model is running and would lose the routing.")
        self.trace = tracers.current_trace()
        self.sows: dict[str, int] = {}  # the most that a variable of a module received, by the module's path
        self.latest: str | None = None  # the path of the module that sowed last; None before the call

    def record(self, root: Any, call: Callable[[], Any], *other_types: Any) -> Any:
        """Runs the call, and returns its output and a state of what it sowed for each type. Explains Flax's errors."""
        token = _running.set(self)
        try:
            return nnx.capture(lambda _: self._run(call), Routing, *other_types)(root)
        except Exception as error:
            if isinstance(error, flax.errors.TraceContextError) and self.latest is None:
                raise ValueError(
                    "capture_routing cannot record on a model that was made outside of this jax.jit, vmap or scan. "
                    "Pass it through nnx.jit, or by nnx.split outside and nnx.merge inside."
                ) from error
            if "__captures__" not in str(error):
                raise
            jax.clear_caches()
            frames = " ".join(frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__))
            name = ["jit", *re.findall(r"cond|switch|fori_loop|while_loop|scan|[vp]map", frames)][-1]
            raise ValueError(f"The routing of {self.latest} cannot leave nnx.{name}. {_ADVICE}") from error
        finally:
            _running.reset(token)
            for module in self.modules.values():
                if hasattr(module, "__captures__"):  # nnx.capture leaves it there if the call fails
                    del module.__captures__

    def _run(self, call: Callable[[], Any]) -> Any:
        self.latest = "the model"
        for path, module in self.modules.items():
            if (variable := captured(module)) is None:
                continue  # a container, to later versions of Flax
            variable.set_metadata(module_path=path)  # which copies of the module keep
            if isinstance(module, CONTAINERS):
                del module.__captures__  # iteration over an nnx.Dict would find it, and sorting an nnx.List fails
        output = call()
        for path in self.sows:
            self._check_kept(path, len(captured(self.modules[path]).get_value().get(_SOWN, ())))
        return output

    def note(self, variable: Any) -> None:
        """Notes a sow. Each lengthens the tuple in the variable, whose length all transforms keep."""
        self.latest = path = variable.get_metadata("module_path")
        sows = len(variable[_SOWN])
        if self.trace == tracers.current_trace():  # another one may be repeated, and then begins without these counts
            self._check_kept(path, sows - 1)
        self.sows[path] = max(self.sows.get(path, 0), sows)

    def _check_kept(self, path: str, sows: int) -> None:
        if sows < self.sows.get(path, 0):
            jax.clear_caches()  # otherwise JAX reuses the trace of a scan, and nobody notes its sows the next time
            raise ValueError(
                f"The routing of {path} was lost in a copy (nnx.clone, nnx.merge, nnx.scan(in_axes=None)). {_ADVICE}"
            )


def sow_nnx(module: Any, counts: _routing.RoutingCounts, names: tuple[str, ...]) -> None:
    """Adds counts to an NNX module: to its captured variable, or to an attribute that pop_routing takes."""
    pattern = _pattern(module, names, nnx.as_pure(nnx.state(module)) if names else None)
    capture, variable, name = _running.get(), captured(module), type(module).__name__
    if variable is not None:
        if not variable._can_update:  # to set it would leak a tracer
            path = variable.get_metadata("module_path", "the model")
            raise ValueError(
                f"The routing of {path} ({name}) cannot leave the JAX transform that closed over it. Use Flax's, and "
                "pass the module as an argument: nnx.remat(lambda layer, x: layer(x))(layer, x)."
            )
        module.sow(Routing, _SOWN, {pattern: counts})
        if capture and variable.has_metadata("module_path"):  # otherwise an nnx.capture inside the model asked for it
            capture.note(variable)
    elif hasattr(module, "__captures__") or (capture and not getattr(module, "deterministic", False)):
        cause = "the module is not part of the model that capture_routing records. Make it an attribute of that model"
        if hasattr(module, "__captures__"):
            cause = "an nnx.capture inside the model does not record it. Name excitation_optax.flax.Routing there"
        raise ValueError(f"The routing of a {name} would be lost: {cause}.")
    elif not getattr(module, "deterministic", False):
        with contextlib.suppress(flax.errors.TraceContextError):
            kept = getattr(module, _SOWN).get_value() if hasattr(module, _SOWN) else {}
            setattr(module, _SOWN, Routing({**kept, pattern: kept.get(pattern, 0) + counts}))


def sow_linen(module: Any, counts: _routing.RoutingCounts, names: tuple[str, ...]) -> None:
    """Adds counts to those of a Linen module, in the collection "intermediates", if that is mutable."""

    def root(module: Any) -> Any:
        return root(module.parent) if isinstance(module.parent, linen.Module) else module

    if len(names) == 1 and isinstance(child := getattr(module, str(names[0]), None), linen.Module):
        module, names = child, ()  # which has another path if another module made it
    state = {name: tree for kind in module.variables.values() for name, tree in kind.items()}
    pattern = _pattern(module, names, state if state and not module.is_initializing() else None)
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
    if module.scope.root.trace_level != tracers.current_trace():
        raise ValueError(f"The routing of {path} cannot leave the JAX transform that closed over it. Use Flax's own.")
    sown_in = vars(outermost.scope).setdefault(_SOWN, set())  # the modules that sowed in this call of apply
    if module.has_variable("intermediates", _SOWN) and module.path not in sown_in:
        raise ValueError(
            f"The variables that were passed to apply hold the routing of {path} from an earlier call, which would be "
            "counted again. Remove it: {name: tree for name, tree in variables.items() if name != 'intermediates'}."
        )
    sown_in.add(module.path)
    module.sow("intermediates", _SOWN, {pattern: counts})


def collected(sown: Any, none_found: str, model: Any = None) -> Any:
    """The RoutingCounts in a tree of sown values, as a tree by the paths of their parameters."""
    paths = {id(node): path for path, node in nnx.iter_graph(model)}  # of a module that several share, the first
    modules = dict(nnx.iter_modules(model))
    found: dict[tuple[tuple[Any, ...], bool], Any] = {}  # by path, and whether a module above sowed
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(nnx.as_pure(sown), is_leaf=_routing.is_counts):
        keys = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]  # no positions in a tuple
        if not isinstance(leaf, _routing.RoutingCounts) or keys[-1] == "__call__":  # of Linen's capture_intermediates
            continue
        *above, _, pattern = keys if keys[-2:-1] == [_SOWN] else (*keys, "")
        path, names, module = tuple(above), list(filter(None, pattern.split("/"))), modules.get(tuple(above))
        while names and isinstance(child := getattr(module, "__dict__", {}).get(names[0]), nnx.Module | nnx.Variable):
            path, module = paths[id(child)], child
            del names[0]
        key = (*path, *names), bool(pattern)
        found[key] = found.get(key, 0) + leaf
    if not found:
        raise ValueError(f"{none_found} Layers record it by sow_routing(self, counts, 'names', 'of', 'experts').")
    utilization = {path: counts for (path, _), counts in found.items()}
    for path, is_above in found:
        if (path, not is_above) in found or any(path[:n] in utilization for n in range(len(path))):
            raise ValueError(f"Routing was sown at {path} and also at a module above it, so it would be counted twice.")
    return utilization[()] if () in utilization else traverse_util.unflatten_dict(utilization)
