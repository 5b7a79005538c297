"""The bridge to Flax: routing out of NNX and Linen modules, in the form that `utilization=` takes.

A layer hands over its routing by `sow_routing`, called on a submodule that holds **experts only**, or with the names of
those of its own parameters that are experts, so that every expert is covered and no router. Training code gets it back
as a nested dict of `RoutingCounts`:

* NNX: `capture_routing(model)(*inputs)`, which leaves nothing behind in the model; or `pop_routing(model)` where a loop
  calls the model itself. `nnx.Optimizer.update(model, grads, utilization=...)` hands it on.
* Linen: `routing_from_intermediates(...)`; and `TrainState`, whose `apply_gradients` hands it on (Flax's does not).

This is the only file of the library that imports Flax, and `import excitation_optax` does not import it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import operator
import typing
import warnings
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import optax
from flax import linen, nnx
from flax.training import train_state

from excitation_optax import _routing

# How sowing again adds up: from int(), which is 0, by +.
_SUM: dict[str, Any] = {"reduce_fn": operator.add, "init_fn": int}

# What counts are sown under that belong to one of the module's parameters or submodules, whose name follows.
_ROUTING_OF = "routing of "

# Whether a call of capture_routing is under way.
_capturing = contextvars.ContextVar("capturing", default=False)

__all__ = [
    "Routing",
    "TrainState",
    "capture_routing",
    "pop_routing",
    "routing_from_intermediates",
    "routing_like",
    "sow_routing",
]


class Routing(nnx.Intermediate):
    """The NNX variable type that holds the `RoutingCounts` a layer sowed. Several calls add up."""


def sow_routing(module: nnx.Module | linen.Module, counts: _routing.RoutingCounts, *names: str) -> None:
    """Hands over a layer's routing, from inside its call. Several calls in one forward pass add up.

    In NNX, outside of `capture_routing`, the counts stay on the module until `pop_routing` takes them. Not so if the
    module has an attribute `deterministic` that is True, as `model.eval()` sets it, or if the model was closed over by
    `jax.jit` and the like, which forbids it: then nothing is kept.

    Args:
      module: the module whose parameters are the experts, all of them and nothing else; or the one that has `names`.
      counts: what the router decided, before any token was dropped.
      *names: of the parameters and submodules of `module` that are experts, where others, such as the router, stand
        beside them.

    Raises:
      ValueError: if `module` is no module or counts are not `RoutingCounts`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> class Neurons(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.dense = nnx.Linear(2, 3, rngs=rngs)
      ...     def __call__(self, x):
      ...         h = nnx.relu(self.dense(x))
      ...         excitation_flax.sow_routing(self.dense, excitation_optax.count_active(h > 0))
      ...         return h
      >>> output, utilization = excitation_flax.capture_routing(Neurons(nnx.Rngs(0)))(jnp.ones((5, 2)))
      >>> utilization["dense"].tokens
      Array(5., dtype=float32)
    """
    if not isinstance(counts, _routing.RoutingCounts):
        raise ValueError(f"sow_routing takes RoutingCounts, as from count_routing; got {type(counts).__name__}.")
    if not isinstance(module, nnx.Module | linen.Module):
        raise ValueError(f"sow_routing takes the module that holds the experts; got {type(module).__name__}.")
    one_layer = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
    key = _ROUTING_OF + one_layer if names else "routing"
    if isinstance(module, linen.Module):
        module.sow("intermediates", key, counts, **_SUM)
    else:
        _sow(module, key, counts)


def _sow(module: nnx.Module, key: str, counts: _routing.RoutingCounts) -> None:
    if _capturing.get():
        if not module.sow(Routing, key, counts, **_SUM):
            raise ValueError(
                f"The routing of a {type(module).__name__} would be lost: an nnx.capture inside the model records only "
                "other variable types. Name excitation_optax.flax.Routing there, or pass its types to capture_routing."
            )
    elif not getattr(module, "deterministic", False):
        with warnings.catch_warnings(), contextlib.suppress(flax.errors.TraceContextError):
            # Outside nnx.capture Flax warns that this way is deprecated in general; here pop_routing is the way out.
            warnings.filterwarnings("ignore", "Using 'Module.sow", DeprecationWarning)
            module.sow(Routing, key, counts, **_SUM)


def capture_routing(
    model: nnx.Module | Callable[..., Any], *other_types: type[nnx.Variable]
) -> Callable[..., tuple[Any, ...]]:
    """Wraps an NNX model so that a call returns its routing too, and leaves nothing behind in the model.

    The main road, for training and evaluation alike. Inside a loss function, return the routing as auxiliary output.

    Args:
      model: a module, a bound method of one, or a function whose first argument is one.
      *other_types: variable types to record beside the routing, such as that of an auxiliary loss. As under
        `nnx.capture`, what layers sow in types that are not named is dropped.

    Returns:
      A function of the same inputs that returns `(output, utilization)`, the latter a nested dict of `RoutingCounts`;
      and then an `nnx.State` for each of the other types.

    Raises:
      ValueError: from the call, if no layer sowed any routing, or the model was closed over by `jax.jit` or the like.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> class Neurons(nnx.Linear):
      ...     def __call__(self, x):
      ...         h = nnx.relu(super().__call__(x))
      ...         excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
      ...         return h
      >>> model = nnx.Sequential(Neurons(2, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> logits, utilization = excitation_flax.capture_routing(model)(jnp.ones((2, 2)))
      >>> utilization["layers"][0].utilization.shape
      (8,)
    """
    captured = nnx.capture(model, Routing, *other_types)

    @functools.wraps(model, updated=())
    def with_routing(*args, **kwargs):
        token = _capturing.set(True)
        try:
            output, routing, *others = captured(*args, **kwargs)
        except flax.errors.TraceContextError as error:
            raise ValueError(
                "capture_routing cannot record on a model that was made outside of this jax.jit, vmap or scan. Pass it "
                "in: through nnx.jit, or by nnx.split outside and nnx.merge inside."
            ) from error
        except Exception:
            _forget_capture(model, args)
            raise
        finally:
            _capturing.reset(token)
        return output, _by_module(nnx.as_pure(routing), "The call of the model sowed no routing."), *others

    return with_routing


def routing_like(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """The shapes of the routing that a call of an NNX model would sow; nothing is computed.

    What `excitation_optax.accumulate_utilization` takes as `like`, since an optimizer's state is made before the first
    batch is seen. (Of any other model, `jax.eval_shape` of a function that returns its routing does the same.)

    Args:
      model: a module, which may be abstract, as from `nnx.eval_shape`.
      *args: of its call: arrays, their `jax.ShapeDtypeStruct`, or what else it takes.
      **kwargs: of its call.

    Returns:
      A nested dict of `RoutingCounts` of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if no layer sows any routing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> class Neurons(nnx.Linear):
      ...     def __call__(self, x):
      ...         h = nnx.relu(super().__call__(x))
      ...         excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
      ...         return h
      >>> model = nnx.Sequential(Neurons(2, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> excitation_flax.routing_like(model, jnp.ones((2, 2)))["layers"][0].counts
      ShapeDtypeStruct(shape=(8,), dtype=float32)
    """
    plain = lambda value: isinstance(value, bool | int | float | str | None)  # a model may branch on these
    values = [*args, *kwargs.values()]

    def call(model, arrays):
        arrays = iter(arrays)
        given = [value if plain(value) else next(arrays) for value in values]
        named = dict(zip(kwargs, given[len(args) :], strict=True))
        return capture_routing(model)(*given[: len(args)], **named)[1]

    return nnx.eval_shape(call, model, [value for value in values if not plain(value)])


def pop_routing(model: nnx.Module) -> Any:
    """Takes the routing that calls of an NNX model left on it, for loops that call the model themselves.

    Pop after every call: a forward pass that nobody popped doubles the next count, and leaves variables in the model
    that change the tree of a checkpoint and make `nnx.jit` compile again. Evaluation counts too, except after
    `model.eval()` for layers that heed it (see `sow_routing`). `capture_routing` has none of these traps.

    Args:
      model: the module that was called.

    Returns:
      A nested dict of `RoutingCounts`.

    Raises:
      ValueError: if the model holds no routing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> class Neurons(nnx.Linear):
      ...     def __call__(self, x):
      ...         h = nnx.relu(super().__call__(x))
      ...         excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
      ...         return h
      >>> model = nnx.Sequential(Neurons(2, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
      >>> logits = model(jnp.ones((2, 2)))
      >>> excitation_flax.pop_routing(model)["layers"][0].tokens
      Array(2., dtype=float32)
    """
    return _by_module(nnx.as_pure(nnx.pop(model, Routing)), "The model holds no routing that was not popped already.")


def routing_from_intermediates(intermediates: Any) -> Any:
    """Finds the routing in the `intermediates` collection of a Linen model.

    Takes what `sow_routing` put there, and also plain `self.sow("intermediates", name, routing_counts)`.

    Args:
      intermediates: the collection, from `model.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]`.

    Returns:
      A nested dict of `RoutingCounts`, by module.

    Raises:
      ValueError: if there is no routing in it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen, nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> class Neurons(linen.Module):
      ...     @linen.compact
      ...     def __call__(self, x):
      ...         dense = linen.Dense(3, name="dense")
      ...         h = nnx.relu(dense(x))
      ...         excitation_flax.sow_routing(dense, excitation_optax.count_active(h > 0))
      ...         return h
      >>> model = Neurons()
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 2)))
      >>> output, sown = model.apply(variables, jnp.ones((5, 2)), mutable=["intermediates"])
      >>> excitation_flax.routing_from_intermediates(sown["intermediates"])["dense"].tokens
      Array(5., dtype=float32)
    """
    return _by_module(intermediates, "The intermediates hold no RoutingCounts.")


class TrainState(train_state.TrainState):
    """Flax Linen's `TrainState`, whose `apply_gradients` hands extra arguments on to `tx.update`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> params = {"experts": jnp.ones((2, 3))}
      >>> tx = optax.chain(optax.sgd(0.5), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> state = excitation_flax.TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> state = state.apply_gradients(grads=params, utilization={"experts": jnp.array([0.75, 0.25])})
      >>> state.params["experts"]
      Array([[0.25, 0.25, 0.25],
             [0.75, 0.75, 0.75]], dtype=float32)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> typing.Self:
        """Updates parameters, optimizer state and step.

        Args:
          grads: gradients, of the structure of the parameters.
          **kwargs: fields of the state to replace, as in Flax; all others are extra arguments of `tx.update`.

        Returns:
          The new state.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        new_tx = kwargs.pop("tx", self.tx)
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra_args = {name: value for name, value in kwargs.items() if name not in fields}
        update = functools.partial(self.tx.update, **extra_args)
        with_extra_args = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        updated: Any = train_state.TrainState.apply_gradients(with_extra_args, grads=grads, **replaced)
        return updated.replace(tx=new_tx)


def _forget_capture(model: Any, args: tuple[Any, ...]) -> None:
    """Removes what nnx.capture attaches to modules, and leaves there when the call fails."""
    module: Any = model if isinstance(model, nnx.Module) else getattr(model, "__self__", args[0] if args else None)
    for _, submodule in nnx.iter_modules(module):
        if hasattr(submodule, "__captures__"):
            del submodule.__captures__


def _by_module(sown: Any, none_found: str) -> Any:
    """The RoutingCounts in a tree of sown values, added up by the module, or its child, that they were sown on."""
    by_path: dict[tuple[Any, ...], _routing.RoutingCounts] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(sown, is_leaf=_routing.is_counts):
        if isinstance(leaf, _routing.RoutingCounts):
            # The last dictionary key is the name it was sown under; what follows it is a position in a tuple.
            *path, sown_as = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]
            below = sown_as.removeprefix(_ROUTING_OF)
            module = (*path, below) if below != sown_as else tuple(path)
            by_path[module] = by_path[module] + leaf if module in by_path else leaf
    if not by_path:
        raise ValueError(
            f"{none_found} Layers hand it over by sow_routing(self.experts, count_routing(...)), called on a submodule "
            "that holds experts only, or by sow_routing(self, count_routing(...), 'names', 'of', 'experts')."
        )
    for module in by_path:
        if any(module[:n] in by_path for n in range(len(module))):
            raise ValueError(
                f"Routing was sown at {module} and also at a module above it; each parameter must belong to one layer."
            )
    return _nested(by_path)


def _nested(leaves: dict[tuple[Any, ...], Any]) -> Any:
    """The nested dict that has these leaves at these paths; a single leaf at the root is itself."""
    if () in leaves:
        return leaves[()]
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
