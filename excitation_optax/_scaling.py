"""The arithmetic of one layer: its updates times the excitation of its experts.

A layer is what one utilization entry covers: one array for all experts, several, or a set of arrays per expert. A stack
of layers has leading axes; each of its layers is scaled by itself.

Axis letters: E experts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from excitation_optax import _arrays

Component = Literal["both", "direction", "norm"]
COMPONENTS: tuple[str, ...] = get_args(Component)


class Placement(NamedTuple):
    """Where the axes of the utilization lie in one array.

    `axes` has one element per axis of the utilization, the experts' last. An element names the axes of the array that
    this axis is spread over, the first counting most. If one expert owns the whole array, `axes` has the layers only.
    """

    axes: tuple[tuple[int, ...], ...]
    expert: int | None = None


# jit gives one trace per kind of layer: 48 equal layers of 384 arrays are traced once.
@functools.partial(jax.jit, static_argnums=(2, 3))
def scale_layer(
    phi: jax.Array, updates: Sequence[jax.Array], placements: tuple[Placement, ...], component: Component
) -> list[jax.Array]:
    """Scales the updates of a layer by phi `[..., E]`, by phi / r, or by r, the ratio of norms; dtypes are kept."""
    if component == "both":
        factor = phi
    else:
        ratio = _norm_ratio(phi, updates, placements)
        direction = _arrays.divide(phi.astype(ratio.dtype), ratio)
        factor = direction if component == "direction" else jnp.broadcast_to(ratio, phi.shape)

    def scale(update: jax.Array, place: Placement) -> jax.Array:
        wide = np.promote_types(factor.dtype, update.dtype)
        return (_expand(factor, update, place).astype(wide) * update.astype(wide)).astype(update.dtype)

    return [scale(update, place) for update, place in zip(updates, placements, strict=True)]


def replicated(x: jax.Array) -> jax.Array:
    """Replicates x on a mesh; otherwise XLA shards it like the experts, and sums over them need an all-reduce."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    whole = jax.sharding.PartitionSpec()
    return jax.sharding.reshard(x, whole) if mesh.explicit_axes else jax.lax.with_sharding_constraint(x, whole)


def _norm_ratio(phi: jax.Array, updates: Sequence[jax.Array], placements: tuple[Placement, ...]) -> jax.Array:
    """The ratio r of the norm of phi times the update to the norm of the update, `[..., 1]`; 1 where that is 0.

    With each expert's sum of squares s, r ** 2 = sum(phi ** 2 * s) / sum(s). The largest entries are divided out first,
    since float32 squares overflow above 1e19 and vanish below 1e-23.
    """
    wide = functools.reduce(np.promote_types, [jnp.abs(update).dtype for update in updates], phi.dtype)
    absolute = [jnp.abs(update).astype(wide) for update in updates]
    largest = _per_expert(absolute, placements, phi.shape, jnp.max, jnp.maximum)
    divisor = jnp.where(largest == 0, 1, largest)
    squares = [(a / _expand(divisor, a, p)) ** 2 for a, p in zip(absolute, placements, strict=True)]
    sums = _per_expert(squares, placements, phi.shape, jnp.sum, jnp.add)
    # Both cross the devices at once, and only here.
    largest, sums = replicated(jnp.stack([largest, sums]))

    phi = phi.astype(sums.dtype)
    largest_phi = jnp.max(jnp.abs(phi), axis=-1, keepdims=True)
    relative_phi = _arrays.divide(phi, largest_phi)
    relative = sums * _arrays.divide(largest, jnp.max(largest, axis=-1, keepdims=True)) ** 2
    before = jnp.sum(relative, axis=-1, keepdims=True)
    after = jnp.sum(relative_phi**2 * relative, axis=-1, keepdims=True)
    return jnp.where(before == 0, 1, largest_phi * jnp.sqrt(_arrays.divide(after, before)))


def _per_expert(
    arrays: Sequence[jax.Array],
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
    reduce: Callable[..., jax.Array],
    combine: Callable[..., jax.Array],
) -> jax.Array:
    """Reduces the arrays of a layer to one number per expert, `[..., E]`; 0 for an expert without arrays."""

    def reduced(array: jax.Array, place: Placement) -> jax.Array:
        axes = [axis for group in place.axes for axis in group]
        kept = reduce(array, axis=tuple(axis for axis in range(array.ndim) if axis not in axes))
        kept = jnp.transpose(kept, np.argsort(np.argsort(axes)).tolist())
        if len(axes) == len(place.axes):
            return kept
        return replicated(kept).reshape(shape if place.expert is None else shape[:-1])

    def total(expert: int | None) -> jax.Array:
        parts = [reduced(array, p) for array, p in zip(arrays, placements, strict=True) if p.expert == expert]
        return functools.reduce(combine, parts) if parts else jnp.zeros(shape[:-1], arrays[0].dtype)

    if placements[0].expert is None:
        return total(None)
    return jnp.stack([total(expert) for expert in range(shape[-1])], axis=-1)


def _expand(x: jax.Array, array: jax.Array, place: Placement) -> jax.Array:
    """Reshapes x `[..., E]`, one number per expert, so that it broadcasts against the array."""
    if place.expert is not None:
        x = x[..., place.expert]
    axes = [axis for group in place.axes for axis in group]
    x = jnp.transpose(x.reshape([array.shape[axis] for axis in axes]), np.argsort(axes).tolist())
    return jnp.expand_dims(x, [axis for axis in range(array.ndim) if axis not in axes])
