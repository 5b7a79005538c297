"""Utilization of more than one batch: of the micro-batches of an update, or averaged over updates.

Axis letters: E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from excitation_optax import _experts, _routing


class AccumulateUtilizationState(NamedTuple):
    """State of `accumulate_utilization`."""

    multi_steps: optax.MultiStepsState
    utilization: Any  # tree of RoutingCounts, of the micro-batches since the last update


def accumulate_utilization(multi_steps: optax.MultiSteps, like: Any) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an `optax.MultiSteps` so that its update is excited by the utilization of **all** its micro-batches.

    .. math::
      u_k = \frac{\sum_{i=1}^{n} c_k^{(i)}}{\sum_{i=1}^{n} t^{(i)}}

    with the counts c and the tokens t of the n micro-batches of an update. By itself, `optax.MultiSteps` hands its
    inner optimizer the extra arguments of the **last** micro-batch, and says nothing. Micro-batches that its
    `should_skip_update_fn` rejects do not count here either; it sees gradients only, so that a NaN in the counts of one
    micro-batch stays until the update and reaches the parameters. `apply_if_all_finite`, around all of this, leaves
    such a micro-batch out.

    Where you can write the loop over micro-batches yourself, as a `jax.lax.scan` that adds up gradients and
    `RoutingCounts`, you need neither of the two: see the page on gradient accumulation.

    Args:
      multi_steps: the `optax.MultiSteps` around the whole optimizer, Excitation in it; not its
        `gradient_transformation()`.
      like: the tree of `RoutingCounts` that every update will be given, or their shapes, since a state's structure is
        fixed by `init`. In Flax NNX, `excitation_optax.flax.routing_like(model, *inputs)` makes it.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. Its state's `multi_steps` is what `multi_steps.has_updated`
      takes.

    Raises:
      ValueError: here, if `multi_steps` is none or `like` holds anything but `RoutingCounts`; while tracing an update,
        if utilization is missing or is not like `like`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import excitation_optax
      >>> params = {"experts": jnp.ones((2, 1))}
      >>> counts = lambda a, b: {"experts": excitation_optax.RoutingCounts(jnp.array([a, b]), jnp.array(4.0))}
      >>> tx = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> tx = excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 2), like=counts(0.0, 0.0))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, utilization=counts(4.0, 0.0))
      >>> updates, state = tx.update(params, state, params, utilization=counts(2.0, 2.0))
      >>> updates["experts"]  # utilization 6/8 and 2/8
      Array([[-1.5],
             [-0.5]], dtype=float32)
    """
    if not isinstance(multi_steps, optax.MultiSteps):
        raise ValueError(
            "accumulate_utilization takes the optax.MultiSteps itself, as in accumulate_utilization(optax.MultiSteps("
            f"tx, 4), like=...); got {type(multi_steps).__name__}."
        )
    _counts_by_path(like, "like")

    def init_fn(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), _float_of(leaf)), like)
        return AccumulateUtilizationState(multi_steps.init(params), zeros)

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        before = state.multi_steps
        add = lambda a, b: jax.tree.map(lambda x, y: x + jnp.asarray(y, x.dtype), a, b)
        total = _map(add, state.utilization, utilization, "like")
        updates, after = multi_steps.update(updates, before, params, utilization=total, **extra_args)
        emitted = after.gradient_step != before.gradient_step
        skipped = ~emitted & (after.mini_step == before.mini_step)
        keep = lambda old, new: jnp.where(emitted, 0, jnp.where(skipped, old, new))
        return updates, AccumulateUtilizationState(after, jax.tree.map(keep, state.utilization, total))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ema(previous: Any, counts: Any, decay: float | jax.Array) -> Any:
    r"""An exponential moving average of routing, for batches too small to be a consensus.

    .. math::
      \bar{c}_t = \beta \bar{c}_{t-1} + (1 - \beta) c_t, \qquad \bar{u}_t = \bar{c}_t / \bar{t}_t

    Tokens are averaged as counts are, so that a batch weighs as much as it has tokens, and utilization, their
    quotient, has no bias towards the zeros that the average starts from. A pure function: carry what it returns to the
    next step, and give it to `utilization=`. A NaN stays in it for good; a training loop that skips a step keeps
    `previous` too.

    Args:
      previous: a tree of `RoutingCounts`: what the last step returned; before the first, zeros of float32, as
        `jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), counts)`.
      counts: a tree of `RoutingCounts`, of this step.
      decay: beta, in [0, 1); 0 is no average. About 1 / (1 - decay) steps count.

    Returns:
      A tree of `RoutingCounts`, like `previous`, in float32 or wider.

    Raises:
      ValueError: if the trees differ or hold anything but `RoutingCounts`, or decay is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> average = {"experts": excitation_optax.RoutingCounts(jnp.zeros(2), jnp.array(0.0))}
      >>> for counts in ([4.0, 0.0], [0.0, 4.0]):
      ...     counts = {"experts": excitation_optax.RoutingCounts(jnp.array(counts), jnp.array(4.0))}
      ...     average = excitation_optax.ema(average, counts, decay=0.5)
      >>> average["experts"].utilization
      Array([0.33333334, 0.6666667 ], dtype=float32)
    """
    if not isinstance(decay, jax.core.Tracer) and not 0 <= float(decay) < 1:
        raise ValueError(f"ema: decay must be in [0, 1); got {decay!r}.")

    def decayed(x, y):
        dtype = _float_of(x)
        return jnp.asarray(decay * jnp.asarray(x, dtype) + (1 - decay) * jnp.asarray(y, dtype), dtype)

    return _map(lambda a, b: jax.tree.map(decayed, a, b), previous, counts, "previous")


def _float_of(leaf: Any) -> Any:
    """The dtype for sums and averages of it: an average of integers would be cut off, and be zero."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _map(function: Any, like: Any, utilization: Any, name: str) -> Any:
    """A function of the `RoutingCounts` of two trees, by path; the result has the structure of the first."""
    ours, theirs = _counts_by_path(like, name), _counts_by_path(utilization, "utilization")
    if different := ours.keys() ^ theirs.keys():
        path = min(different, key=_experts.show)
        raise ValueError(
            f"The utilization must have the layers of `{name}`: {_experts.show(path)} is "
            f"{'missing from the utilization' if path in ours else f'not in `{name}`'}."
        )
    for path in ours:
        shapes = [jnp.shape(tree[path].counts) for tree in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The utilization at {_experts.show(path)} has counts of shape {list(shapes[1])}; in `{name}` they are "
                f"{list(shapes[0])}."
            )
    treedef = jax.tree.structure(like, is_leaf=_routing.is_counts)
    return treedef.unflatten([function(counts, theirs[path]) for path, counts in ours.items()])


def _counts_by_path(tree: Any, name: str) -> dict[_experts.Path, _routing.RoutingCounts]:
    """The leaves of a tree that holds `RoutingCounts` only."""
    if name != "utilization" and not jax.tree.leaves(tree):
        raise ValueError(f"{name} must be a tree of RoutingCounts, of at least one layer; got {tree!r}.")
    entries = _experts.utilization_by_path(tree)
    for path, leaf in entries.items():
        if not isinstance(leaf, _routing.RoutingCounts):
            raise ValueError(
                f"{name} at {_experts.show(path)} is {_experts.show_value(leaf)}: pass RoutingCounts, as from "
                "count_routing. Fractions of batches of unequal size cannot be added up."
            )
    return entries
