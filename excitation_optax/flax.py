"""The bridge to Flax: collects the routing of NNX and Linen layers as a nested dict of `RoutingCounts`.

Layers call `sow_routing`. Training code passes the result of `capture_routing`, `pop_routing` (both for NNX), or
`routing_from_intermediates` (for Linen) as `utilization=`. `import excitation_optax` does not import this module, which
needs Flax. The examples import it as `excitation_flax`, and use a layer whose neurons are experts:

    >>> class Neurons(nnx.Linear):
    ...     def __call__(self, x):
    ...         h = nnx.relu(super().__call__(x))
    ...         excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
    ...         return h
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import optax
from flax import linen, nnx
from flax.training import train_state

from excitation_optax import _routing, _sow
from excitation_optax._sow import Routing

__all__ = ["Routing", "TrainState", "capture_routing", "is_capturing", "pop_routing", "routing_from_intermediates"]
__all__ += ["routing_like", "sow_routing"]


def sow_routing(module: nnx.Module | linen.Module, counts: _routing.RoutingCounts, *names: str) -> None:
    """Records a layer's routing from inside its call. Several calls in one forward pass add up.

    In NNX, without `capture_routing`, the counts stay on the module until `pop_routing`. The module keeps nothing if
    `module.deterministic` is True, as after `model.eval()`, or if a JAX transform closed over the model.

    Args:
      module: the module that holds the experts.
      counts: the router's decisions `[E]`, before any token is dropped.
      *names: the parameters or submodules that are experts; by default, all of them. One name can be a path pattern,
        such as `"expert_{expert}"`. Several names are one layer: `"{w_in,w_out}"`.

    Raises:
      ValueError: if an argument has the wrong type, the module has no such name, or the routing would be lost.

    Example:
      >>> layer, counts = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), excitation_optax.count_active(jnp.ones((5, 3), bool))
      >>> excitation_flax.sow_routing(layer, counts, "kernel", "bias")
      >>> list(excitation_flax.pop_routing(layer))
      ['{kernel,bias}']
    """
    if not isinstance(counts, _routing.RoutingCounts):
        raise ValueError(f"sow_routing takes RoutingCounts, as from count_routing; got {type(counts).__name__}.")
    if not isinstance(module, nnx.Module | linen.Module) or isinstance(module, _sow.CONTAINERS):
        raise ValueError(
            f"sow_routing takes the module that holds the experts; got {type(module).__name__}. For a list of experts, "
            "call sow_routing(self, counts, 'experts/{expert}') on the module that holds the list."
        )
    sow = _sow.sow_linen if isinstance(module, linen.Module) else _sow.sow_nnx
    sow(module, counts, names)


def is_capturing(module: nnx.Module) -> bool:
    """Whether `capture_routing` records this NNX module now. Other calls must leave nothing behind in the module.

    Example:
      >>> excitation_flax.is_capturing(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      False
    """
    return _sow.captured(module) is not None


def capture_routing(model: Any, *other_types: type[nnx.Variable]) -> Callable[..., tuple[Any, ...]]:
    """Wraps an NNX model so that a call also returns its routing and leaves nothing behind in the model.

    The result is a function of the same inputs that returns `(output, utilization, *others)`, with an `nnx.State` for
    each of the other types. Inside a loss function, return the routing as auxiliary output.

    Args:
      model: a module, a bound method of one, or a function whose first argument is one.
      *other_types: other variable types to record, such as the type of an auxiliary loss. All others are dropped.

    Raises:
      ValueError: if `model` is not an NNX model; from the call, if no layer sowed, or if routing was lost.

    Example:
      >>> output, utilization = excitation_flax.capture_routing(Neurons(2, 8, rngs=nnx.Rngs(0)))(jnp.ones((5, 2)))
      >>> utilization.utilization.shape
      (8,)
    """
    owner = model if isinstance(model, nnx.Module) else getattr(model, "__self__", None)
    if not callable(model) or isinstance(model, linen.Module) or isinstance(owner, linen.Module):
        raise ValueError(
            "capture_routing takes an NNX module, a bound method of one, or a function whose first argument is one; "
            f"got {type(model).__name__}. In Linen, use routing_from_intermediates."
        )
    if not all(isinstance(other, type) and issubclass(other, nnx.Variable) for other in other_types):
        raise ValueError(
            "capture_routing: the other types must be subclasses of nnx.Variable; "
            f"got {reprlib.repr(other_types)}. To call the model: capture_routing(model)(x)."
        )

    @functools.wraps(model, updated=())
    def with_routing(*args, **kwargs):
        root: Any = owner if isinstance(owner, nnx.Module) else args[0] if args else None
        call = functools.partial(model, *args, **kwargs)
        output, routing, *others = _sow.Capture(root).record(root, call, *other_types)
        return output, _sow.collected(routing, "The call sowed no routing.", root), *others

    return with_routing


def routing_like(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """Returns the shapes of the routing that a call of an NNX model would sow, and computes nothing.

    Pass them as `like` to `accumulate_utilization`. The model can be abstract, as from `nnx.eval_shape`, and arguments
    can be `jax.ShapeDtypeStruct`. For other models, apply `jax.eval_shape` to a function that returns the routing.

    Example:
      >>> excitation_flax.routing_like(Neurons(2, 8, rngs=nnx.Rngs(0)), jnp.ones((5, 2))).counts
      ShapeDtypeStruct(shape=(8,), dtype=float32)
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {number: leaf for number, leaf in enumerate(leaves) if hasattr(leaf, "shape")}  # others can be branched on

    def call(model, arrays):
        args, kwargs = treedef.unflatten([arrays.get(number, leaf) for number, leaf in enumerate(leaves)])
        return capture_routing(model)(*args, **kwargs)[1]

    return nnx.eval_shape(call, model, arrays)


def pop_routing(model: nnx.Module) -> Any:
    """Takes the routing that calls left on an NNX model, and returns it.

    Pop after every call, also in evaluation: counts that remain are added to the next, change checkpoints, and make
    `nnx.jit` compile again. A model without routing is a `ValueError`; only `capture_routing` detects lost routing.

    Example:
      >>> layer = Neurons(2, 3, rngs=nnx.Rngs(0))
      >>> output = layer(jnp.ones((5, 2)))
      >>> excitation_flax.pop_routing(layer).tokens
      Array(5., dtype=float32)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"pop_routing takes the nnx.Module that was called; got {type(model).__name__}.")
    return _sow.collected(nnx.pop(model, Routing), "The model holds no routing that was not popped already.", model)


def routing_from_intermediates(intermediates: Any) -> Any:
    """Returns the routing in the `intermediates` collection of a Linen model.

    Args:
      intermediates: the collection, from `model.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]`. It
        can also hold counts from Flax's own `self.sow("intermediates", name, counts)`.

    Raises:
      ValueError: if it holds no routing, or some would be counted twice.

    Example:
      >>> class LinenNeurons(linen.Dense):
      ...     def __call__(self, x):
      ...         h = linen.relu(super().__call__(x))
      ...         excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
      ...         return h
      >>> output, sown = LinenNeurons(3).init_with_output(jax.random.key(0), jnp.ones((5, 2)), mutable=True)
      >>> excitation_flax.routing_from_intermediates(sown["intermediates"]).tokens
      Array(5., dtype=float32)
    """
    if not isinstance(intermediates, Mapping) or "intermediates" in intermediates:
        raise ValueError(
            "routing_from_intermediates takes the collection: sown['intermediates'] of output, sown = model.apply(..., "
            f"mutable=['intermediates']); got {reprlib.repr(intermediates)}."
        )
    return _sow.collected(intermediates, "The intermediates hold no RoutingCounts.")


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, with an `apply_gradients` that forwards extra arguments to `tx.update`; Flax's drops them.

    Example:
      >>> params = {"experts": jnp.ones(2)}
      >>> tx = optax.chain(optax.sgd(0.5), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> state = excitation_flax.TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> state = state.apply_gradients(grads=params, utilization={"experts": jnp.array([0.75, 0.25])})
      >>> state.params["experts"]
      Array([0.25, 0.75], dtype=float32)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """As in Flax, keywords that are fields of the state replace them; all others are arguments of `tx.update`."""
        extra_args = {name: kwargs.pop(name) for name in kwargs.keys() - {f.name for f in dataclasses.fields(self)}}
        update = functools.partial(self.tx.update, **extra_args)
        state: Any = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        return super(TrainState, state).apply_gradients(grads=grads, **{"tx": self.tx, **kwargs})
