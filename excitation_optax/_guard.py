"""Steps that must not be taken: those whose gradients, utilization or loss are not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ApplyIfAllFiniteState(NamedTuple):
    """State of `apply_if_all_finite`, with the names that Optax gives to that of `apply_if_finite`."""

    notfinite_count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, steps skipped in a row, up to the last one
    total_notfinite: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, steps skipped in all
    inner_state: Any


def apply_if_all_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips a step if anything that it is made of is not finite: gradients, utilization, or what else is passed.

    `optax.apply_if_finite` looks at gradients only: a NaN in the utilization passes it, and reaches the parameters.
    This wrapper looks at every floating-point extra argument too; pass it the loss as `value`, Optax's name for it. A
    step that is skipped has updates of zero and leaves the inner state as it was. It never gives in: how many skips in
    a row are too many is for the training loop to say, which reads `notfinite_count` from the state.

    The choice is made entry by entry, by a select that XLA fuses into the update, with no branch and no transfer. Under
    `jax.pmap` and `jax.shard_map` pass it what is reduced over the devices already, or replicas choose differently.

    Args:
      inner: the whole optimizer, Excitation in it.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if `inner` is no optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import excitation_optax
      >>> params = {"experts": jnp.ones((2, 1))}
      >>> tx = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation())
      >>> tx = excitation_optax.apply_if_all_finite(tx)
      >>> utilization = {"experts": jnp.array([0.5, jnp.nan])}
      >>> updates, state = tx.update(params, tx.init(params), params, utilization=utilization, value=1.25)
      >>> updates["experts"].sum(), state.notfinite_count, state.total_notfinite
      (Array(0., dtype=float32), Array(1, dtype=int32), Array(1, dtype=int32))
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise ValueError(f"apply_if_all_finite takes an optimizer, with init and update; got {inner!r}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return ApplyIfAllFiniteState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        finite = _all_finite((updates, extra_args))
        new_updates, new_inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        return jax.tree.map(lambda update: jnp.where(finite, update, 0), new_updates), ApplyIfAllFiniteState(
            notfinite_count=jnp.where(finite, 0, optax.safe_increment(state.notfinite_count)),
            total_notfinite=jnp.where(finite, state.total_notfinite, optax.safe_increment(state.total_notfinite)),
            inner_state=jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_inner_state, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number in it is; other leaves, such as functions and integers, are passed over."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, float) or _is_inexact(leaf)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
