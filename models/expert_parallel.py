"""Expert parallelism: experts are split over an axis of the mesh, tokens over all of its axes.

Axis letters: T tokens, D model width, E experts, K experts per token, P devices along the axis, C rows of an expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from models import dispatch, grouped


def apply_experts(
    expert: grouped.Expert,
    params: Any,
    x: jax.Array,
    indices: jax.Array,
    gates: jax.Array,
    *,
    axis: str,
    backend: grouped.Backend | None = None,
    capacity_factor: float | None = None,
) -> jax.Array:
    """`models.grouped.apply_experts`, where every device along `axis` of the mesh holds E / P experts.

    Without a capacity, the tokens are gathered along the axis, every device computes its experts' part of the sum for
    each token, and the sums are scattered back. This sends 2 T D numbers in each group of P devices, whatever the
    routing. With a capacity, every device fills a buffer of its own, `[E, C, D]`, and two all-to-alls bring it to the
    experts and back.

    Args:
      expert: as in `grouped.apply_experts`.
      params: every leaf `[E, ...]`: whole arrays, of which each device holds a part.
      x: `[T, D]`.
      indices: `[T, K]` integers.
      gates: `[T, K]` floats.
      axis: the axis of the mesh that `jax.set_mesh` set.
      backend: the backend on each device.
      capacity_factor: an expert takes at most this times K T / E assignments of each device's T tokens.

    Returns:
      `[T, D]`, as `grouped.apply_experts` on one device, except that a capacity counts for each device.

    Raises:
      ValueError: if no such mesh is set, or E cannot be split evenly.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from models import expert_parallel
      >>> def expert(linear, params, rows):
      ...     return linear(rows, params, None)
      >>> x, kernels = jnp.array([[1.0], [2.0]]), jnp.array([[[1.0]], [[10.0]]])
      >>> indices, gates = jnp.array([[0], [1]]), jnp.ones((2, 1))
      >>> with jax.set_mesh(jax.make_mesh((1,), ("expert",))):
      ...     expert_parallel.apply_experts(expert, kernels, x, indices, gates, axis="expert")
      Array([[ 1.],
             [20.]], dtype=float32)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"expert_parallel_axis={axis!r} must name an axis of the mesh; the mesh that is set has {mesh.axis_names}. "
            f"Set one with jax.set_mesh(jax.make_mesh((8,), ({axis!r},)))."
        )
    num_experts = jax.tree.leaves(params)[0].shape[0]
    if num_experts % mesh.shape[axis]:
        raise ValueError(f"{num_experts} experts cannot be split over {mesh.shape[axis]} devices along {axis!r}.")
    # Text generation has few tokens at a time: rows that go to no expert fill up the last devices.
    tokens = x.shape[0]
    fill = -tokens % mesh.size
    spec = jax.typeof(x).sharding.spec
    x, gates = (jnp.pad(a, ((0, fill), (0, 0))) for a in (x, gates))
    indices = jnp.pad(indices, ((0, fill), (0, 0)), constant_values=num_experts)
    capacity = dispatch.expert_capacity(capacity_factor, x.shape[0] // mesh.size, indices.shape[-1], num_experts)

    def on_each_device(params, x, indices, gates):
        # The experts' gradient is a sum over the other axes. Declare it here, outside of the custom gradient.
        others = tuple(name for name in mesh.axis_names if name != axis)
        params = jax.tree.map(lambda p: lax.pcast(p, others, to="varying") if others else p, params)
        if capacity is not None:
            return _exchange(expert, capacity, axis, params, x, indices, gates)
        return _gather(expert, backend, axis, params, x, indices, gates)

    by_token = PartitionSpec(mesh.axis_names)
    specs = (PartitionSpec(axis), by_token, by_token, by_token)
    arguments = (params, x, indices, gates)
    if mesh.explicit_axes:  # shard_map does this itself on a mesh of automatic axes
        arguments = tuple(
            jax.tree.map(lambda a, spec=spec: jax.reshard(a, spec), argument)
            for argument, spec in zip(arguments, specs, strict=True)
        )
    y = jax.shard_map(on_each_device, in_specs=specs, out_specs=by_token)(*arguments)
    if mesh.explicit_axes:  # back to the sharding of x
        y = jax.reshard(y, spec)
    return y[:tokens]


def _gather(expert, backend, axis, params, x, indices, gates):
    """Brings every token of the group to every device, which computes its own experts' part of the sum."""
    x, indices, gates = (lax.all_gather(a, axis, tiled=True) for a in (x, indices, gates))
    held = jax.tree.leaves(params)[0].shape[0]
    mine = indices - held * lax.axis_index(axis)
    mine = jnp.where((mine >= 0) & (mine < held), mine, held)
    mean_load = indices.size / (held * lax.axis_size(axis))
    y = grouped.apply_experts(expert, params, x, mine, gates, backend=backend, mean_load=mean_load)
    return lax.psum_scatter(y, axis, tiled=True)


def _exchange(expert, capacity, axis, params, x, indices, gates):
    """Fills a buffer for all experts on each device; all-to-alls bring its parts to their experts' devices and back."""
    num_experts = jax.tree.leaves(params)[0].shape[0] * lax.axis_size(axis)
    plan = dispatch.sort_assignments(indices.T.reshape(-1), num_experts)

    def compute(buffer):  # [E, C, D]
        buffer = lax.all_to_all(buffer, axis, split_axis=0, concat_axis=1, tiled=True)  # [E / P, P C, D]
        buffer = jax.vmap(functools.partial(expert, grouped.linear))(params, buffer)
        return lax.all_to_all(buffer, axis, split_axis=1, concat_axis=0, tiled=True)

    return dispatch.through_buffer(compute, capacity, x, gates.T, plan)
