"""Utilization over the micro-batches of an update, and utilization that is held in the optimizer state."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from excitation_optax import _arrays, _experts, _paths, _routing


class AccumulateUtilizationState(NamedTuple):
    """State of `accumulate_utilization`."""

    multi_steps: optax.MultiStepsState
    accumulated: Any  # tree of RoutingCounts, of the micro-batches since the last update


class HoldUtilizationState(NamedTuple):
    """State of `hold_utilization`."""

    utilization: Any  # like the tree `like`; set by the user, used by the next updates
    inner_state: Any


def accumulate_utilization(
    multi_steps: optax.MultiSteps, like: Any, axis_name: Hashable | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an `optax.MultiSteps` so that its update is excited by the utilization of **all** its micro-batches.

    .. math:: u_k = \frac{\sum_{i=1}^{n} c_k^{(i)}}{\sum_{i=1}^{n} t^{(i)}}

    with the counts c and the tokens t of the n micro-batches, without those that `should_skip_update_fn` rejects.
    Alone, `optax.MultiSteps` passes only the **last** micro-batch's extra arguments to its inner optimizer.

    Args:
      multi_steps: the `optax.MultiSteps` around optimizer and Excitation. Its `has_updated` takes `state.multi_steps`.
      like: the tree of `RoutingCounts` that every update is given, or of their shapes; see `flax.routing_like`.
      axis_name: as for `scale_by_excitation`. The state holds the sums, so it is the same on all devices.

    Raises:
      ValueError: here, if an argument is malformed; while tracing an update, if the utilization does not fit `like`.

    Example:
      >>> params = {"experts": jnp.ones(2)}
      >>> counts = lambda a, b: {"experts": excitation_optax.RoutingCounts(jnp.array([a, b]), jnp.array(4.0))}
      >>> tx = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> tx = excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 2), like=counts(0.0, 0.0))
      >>> updates, state = tx.update(params, tx.init(params), params, utilization=counts(4.0, 0.0))
      >>> updates, state = tx.update(params, state, params, utilization=counts(2.0, 2.0))
      >>> updates["experts"]  # utilization 6/8 and 2/8
      Array([-1.5, -0.5], dtype=float32)
    """
    if not isinstance(multi_steps, optax.MultiSteps):
        raise ValueError(f"accumulate_utilization takes the optax.MultiSteps itself; got {type(multi_steps).__name__}.")
    expected = _Like(like)
    _routing.check_counts("like", expected.entries, "micro-batches")

    def init_fn(params):
        zeros = lambda leaf: jnp.zeros_like(jax.eval_shape(_arrays.float32_or_wider, leaf))
        return AccumulateUtilizationState(multi_steps.init(params), jax.tree.map(zeros, like))

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        received = _experts.entries_of(utilization, other_arguments=extra_args)
        _routing.check_counts("utilization", received, "micro-batches")
        if axis_name is not None:
            received = _routing.sum_over(axis_name, received)
        before = state.multi_steps
        add = lambda total, counts: total + jnp.asarray(counts, total.dtype)
        total = jax.tree.map(add, state.accumulated, expected.conform(received))
        updates, after = multi_steps.update(updates, before, params, utilization=total, **extra_args)
        emitted = after.gradient_step != before.gradient_step
        skipped = after.mini_step == before.mini_step  # unless it was emitted
        keep = lambda old, new: jnp.where(emitted, 0, jnp.where(skipped, old, new))
        return updates, AccumulateUtilizationState(after, jax.tree.map(keep, state.accumulated, total))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hold_utilization(tx: optax.GradientTransformationExtraArgs, like: Any) -> optax.GradientTransformationExtraArgs:
    """Holds the utilization in the optimizer state, for trainers that call `tx.update` themselves.

    Set it inside the jitted step: `opt_state = optax.tree.set(opt_state, utilization=counts)`. It starts as zeros,
    which is no excitation, and stays until you set it again. A `utilization=` that is passed is used and not stored.

    Args:
      tx: the optimizer, Excitation included.
      like: the tree of `RoutingCounts` or fractions that you will set, or their shapes.

    Raises:
      ValueError: as for `accumulate_utilization`, and here, if `tx` takes no extra arguments.

    Example:
      >>> params = {"experts": jnp.ones(2)}
      >>> tx = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> tx = excitation_optax.hold_utilization(tx, like={"experts": jnp.zeros(2)})
      >>> state = optax.tree.set(tx.init(params), utilization={"experts": jnp.array([0.75, 0.25])})
      >>> updates, state = tx.update(params, state, params)
      >>> updates["experts"]
      Array([-1.5, -0.5], dtype=float32)
    """
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        raise ValueError(
            f"hold_utilization passes utilization= to its optimizer, which takes none: {_arrays.show_value(tx)}. If it "
            "comes from optax.MultiSteps, put hold_utilization inside of optax.MultiSteps."
        )
    expected = _Like(like)

    def init_fn(params):
        return HoldUtilizationState(jax.tree.map(jnp.zeros_like, like), tx.init(params))

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        # A user may set another kind of tree; the structure of the state must not change.
        held = expected.conform(_experts.entries_of(state.utilization), dtypes=True)
        used = held if utilization is None else expected.conform(_experts.entries_of(utilization))
        updates, inner_state = tx.update(updates, state.inner_state, params, utilization=used, **extra_args)
        return updates, HoldUtilizationState(held, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Like:
    """The tree `like`, which every utilization must fit."""

    def __init__(self, like: Any):
        if not jax.tree.leaves(like):
            raise ValueError(f"like must be a tree of RoutingCounts or fractions, of at least one layer; got {like!r}.")
        self.entries = _experts.entries_of(like)
        self.structure = jax.tree.structure(like, is_leaf=_routing.is_counts)

    def conform(self, received: Mapping[str, Any], dtypes: bool = False) -> Any:
        """A tree with the structure of `like`, if the entries have its paths, its shapes, and its dtypes if asked."""
        if different := received.keys() ^ self.entries.keys():
            path = min(different)
            where = "missing from the utilization" if path in self.entries else "not in `like`"
            raise ValueError(f"The utilization must have the layers of `like`: {path or _paths.ROOT} is {where}.")
        kind = lambda entry: [(_arrays.shape_of(x), x.dtype if dtypes else None) for x in jax.tree.leaves(entry)]
        for path, entry in self.entries.items():
            if kind(received[path]) != kind(entry):
                got, should = (", ".join(map(_arrays.show_value, jax.tree.leaves(x))) for x in (received[path], entry))
                raise ValueError(f"The utilization at {path or _paths.ROOT} is {got}; in `like` it is {should}.")
        return self.structure.unflatten([received[path] for path in self.entries])
