"""Grouped matrix products: every row is multiplied by the kernel of its expert. This is the costly part of a layer.

An expert is written once, as a function of `linear`, its parameters and its rows (`models.mlp.gelu_mlp`). A *backend*
provides its own `linear(rows, kernel, bias)`: the product of each row with the kernel of the row's expert.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token, N = K T assignments,
C rows of an expert in a buffer, M rows of a block, G blocks at a time.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models import dispatch

# linear(rows, kernel, bias or None) -> rows
Linear = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
# expert(linear, params, rows) -> rows. Every leaf of params has a leading axis E, unless `linear` is the one below.
Expert = Callable[[Linear, Any, jax.Array], jax.Array]

Backend = Literal["padded", "tokamax", "dense"]
BACKENDS = ("padded", "tokamax", "dense")


class Buffer(NamedTuple):
    """Sizes of "padded"; they change no result. Figures: `python -m benchmarks.moe_layer`, results/gpu/layer.txt."""

    headroom: float  # rows for an expert over the mean load: more waste products, fewer send more rows through the loop
    block_rows: int  # M: smaller blocks waste fewer rows, larger blocks copy each kernel less often
    blocks: int  # G: how many blocks the loop computes at a time


def default_buffer() -> Buffer:
    """The sizes for this machine."""
    if jax.default_backend() == "cpu":
        return Buffer(1.125, 64, 1)  # with a headroom from 1 to 1.25, the difference is within the noise
    return Buffer(1.5, 256, 32)  # on an H200, one block at a time took up to four times as long


def default_backend(params: Any, x: jax.Array, assignments: int) -> Backend:
    """Chooses the backend: "tokamax" on an accelerator where it is installed and has a kernel, otherwise "padded".

    On a GPU it has kernels for 16-bit floats whose rows, also of the transposed arrays, are multiples of 16 bytes. For
    other dtypes, such as float32, it falls back to `jax.lax.ragged_dot`, which computes every expert on every row.

    Args:
      params: the experts' parameters, every leaf `[E, ...]`.
      x: the tokens, `[T, D]`.
      assignments: N = K T.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import grouped
      >>> params = {"kernel": jnp.ones((4, 8, 8), jnp.bfloat16)}
      >>> grouped.default_backend(params, jnp.ones((16, 8), jnp.bfloat16), assignments=32) in grouped.BACKENDS
      True
    """
    if jax.default_backend() == "cpu" or not importlib.util.find_spec("tokamax"):
        return "padded"
    return "tokamax" if jax.default_backend() != "gpu" or _has_gpu_kernel(params, x, assignments) else "padded"


def _has_gpu_kernel(params, x, assignments):
    """Whether tokamax has a kernel for these arrays. N is the row of the transposed tokens in the kernels' gradient."""
    arrays = (x, *jax.tree.leaves(params))
    return assignments % 8 == 0 and all(array.dtype.itemsize == 2 and array.shape[-1] % 8 == 0 for array in arrays)


def check_backend(backend: str | None, has_capacity: bool) -> None:
    """Raises ValueError if a backend is unknown, not installed, or does not support the capacity that is set."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(BACKENDS)}, or None for the platform's default; got {backend!r}."
        )
    if has_capacity and backend not in (None, "padded"):
        raise ValueError(f'a capacity requires backend="padded" or None; got {backend!r}.')
    if backend == "tokamax" and not importlib.util.find_spec("tokamax"):
        raise ValueError('backend="tokamax" requires tokamax: pip install tokamax. Or leave backend at None.')


def apply_experts(
    expert: Expert,
    params: Any,
    x: jax.Array,
    indices: jax.Array,
    gates: jax.Array,
    *,
    backend: Backend | None = None,
    capacity: int | None = None,
    mean_load: float | None = None,
) -> jax.Array:
    r"""Computes the gated sum of each token's experts.

    .. math::
      y_t = \sum_{k=1}^{K} g_{tk} \, f_{e_{tk}}(x_t)

    Memory grows with K T rows, not with E T; only "dense" computes E T rows.

    Args:
      expert: f, as in `models.mlp.gelu_mlp`: a function at the top level of a module, or another hashable callable.
      params: the experts' parameters, every leaf `[E, ...]`.
      x: `[T, D]`.
      indices: e, `[T, K]` integers. An index out of range sends the token to no expert and adds nothing.
      gates: g, `[T, K]` floats.
      backend: "padded" (a padded buffer and a batched product, then a loop over blocks of the rows that did not fit),
        "tokamax" (`tokamax.ragged_dot`; on a GPU its 16-bit kernels require D, F and K T to be multiples of 8), or
        "dense" (every expert on every token, for tiny models and for derivatives that "padded" does not support). By
        default the choice of `default_backend`. All give the same numbers up to rounding.
      capacity: the most rows that an expert takes. Assignments beyond it are dropped: last choices first, of these the
        last tokens first. Only "padded" supports it. None, the default, drops nothing.
      mean_load: how many assignments an expert should expect, by default `K T / E`. It sets the size of the padded
        buffer and changes no result.

    Returns:
      `[T, D]`, float32 or wider; the sum over K is taken in this dtype.

    Raises:
      ValueError: if the backend is unknown, not installed, or does not support a capacity.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import grouped
      >>> def expert(linear, params, rows):
      ...     return linear(rows, params["kernel"], None)
      >>> params = {"kernel": jnp.array([[[1.0]], [[10.0]], [[100.0]]])}
      >>> x, indices = jnp.array([[1.0], [2.0]]), jnp.array([[0, 2], [1, 0]])
      >>> grouped.apply_experts(expert, params, x, indices, gates=jnp.full((2, 2), 0.5))
      Array([[50.5],
             [11. ]], dtype=float32)
    """
    check_backend(backend, capacity is not None)
    params, x, indices, gates = jax.tree.map(jnp.asarray, (params, x, indices, gates))
    num_experts = jax.tree.leaves(params)[0].shape[0]
    tokens, choices = indices.shape
    gates = gates.astype(jnp.promote_types(gates.dtype, jnp.float32)).T  # [K, T]
    indices = indices.T.astype(jnp.int32)
    indices = jnp.where((indices >= 0) & (indices < num_experts), indices, num_experts)
    if backend == "dense":
        return _dense(expert, params, x, indices, gates)
    plan = dispatch.sort_assignments(indices.reshape(-1), num_experts)
    if capacity is not None:
        return _padded(expert, capacity, params, x, gates, plan)
    if (backend or default_backend(params, x, tokens * choices)) == "tokamax":
        return _sorted(expert, params, x, gates, plan)
    mean_load = tokens * choices / num_experts if mean_load is None else mean_load
    sizes = default_buffer()
    # With fewer rows than experts, as in text generation, the loop alone reads only the kernels that are needed.
    buffer_rows = math.ceil(sizes.headroom * mean_load) if mean_load >= 1 else 0
    return _padded_dropless(expert, buffer_rows, sizes, params, x, gates, plan)


def linear(rows: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Computes `linear` for one expert: rows `[..., D]`, kernel `[D, F]`, bias `[F]` or None; returns `[..., F]`."""
    rows = rows @ kernel
    return rows if bias is None else rows + jnp.broadcast_to(bias, rows.shape)


def _dense(expert, params, x, indices, gates):
    """Computes every expert on every token, and weights the experts that were not chosen by zero."""
    num_experts = jax.tree.leaves(params)[0].shape[0]
    weights = jnp.sum(gates[..., None] * jax.nn.one_hot(indices, num_experts, dtype=gates.dtype), axis=0)  # [T, E]
    rows = jax.vmap(functools.partial(expert, linear), in_axes=(0, None))(params, x)  # [E, T, D]
    return jnp.einsum("te,etd->td", weights, rows.astype(gates.dtype), precision=lax.Precision.HIGHEST)


def _sorted(expert, params, x, gates, plan):
    """Puts all rows into the order of their experts, and multiplies them by tokamax's grouped product."""
    assignments, num_experts = plan.order.shape[0], plan.sizes.shape[0]
    expert_of_row = plan.expert[plan.order]
    is_row = (expert_of_row < num_experts)[:, None]
    ragged_dot = importlib.import_module("tokamax").ragged_dot

    def linear(rows, kernel, bias):
        rows = ragged_dot(rows, kernel, plan.sizes)
        if bias is not None:
            # The gradient of this matrix product is a matrix product too; the gradient of a gather is a scatter.
            rows += jax.nn.one_hot(expert_of_row, num_experts, dtype=bias.dtype) @ bias
        return jnp.where(is_row, rows, 0)  # the grouped product leaves rows after the last expert's undefined

    slot_of_assignment = jnp.where(plan.expert < num_experts, plan.rank, assignments)
    assignment_of_slot = jnp.where(is_row[:, 0], plan.order, assignments)
    compute = functools.partial(expert, linear, params)
    return dispatch.through_slots(compute, x, gates, slot_of_assignment, assignment_of_slot)


def _padded(expert, buffer_rows, params, x, gates, plan):
    """Computes a buffer of C rows for each expert by one batched product. Rows that do not fit add nothing."""
    if buffer_rows == 0:
        return jnp.zeros_like(x, gates.dtype)
    compute = functools.partial(jax.vmap(functools.partial(expert, linear)), params)
    return dispatch.through_buffer(compute, buffer_rows, x, gates, plan)


# The dropless form: rows that do not fit into the buffer go through a loop over blocks, whose number is known only at
# run time. Autodiff cannot reverse such a loop. So its gradient is written here: the same loop, which adds to the
# gradients of the buffer.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _padded_dropless(expert, buffer_rows, sizes, params, x, gates, plan):
    out = _padded(expert, buffer_rows, params, x, gates, plan)
    return _add_overflow(expert, buffer_rows, sizes, params, x, gates, plan, out)


def _padded_dropless_fwd(expert, buffer_rows, sizes, params, x, gates, plan):
    buffered = lambda params, x, gates: _padded(expert, buffer_rows, params, x, gates, plan)
    out, vjp = jax.vjp(buffered, params, x, gates)
    out = _add_overflow(expert, buffer_rows, sizes, params, x, gates, plan, out)
    return out, (vjp, params, x, gates, plan)


def _padded_dropless_bwd(expert, buffer_rows, sizes, residuals, cotangent):
    vjp, params, x, gates, plan = residuals
    blocks, read = dispatch.overflow_blocks(plan, buffer_rows, x.shape[0], sizes.block_rows)

    def differentiate(i):
        number, choice, token, is_row = read(i)
        x_rows = jnp.where(is_row[:, None], x[token], 0)
        rows, vjp = jax.vjp(functools.partial(expert, linear), _one_expert(params, number), x_rows)
        d_out = jnp.where(is_row[:, None], cotangent[token], 0)
        d_gate = jnp.sum(d_out * rows.astype(d_out.dtype), axis=-1)
        return number, choice, token, *vjp((gates[choice, token][:, None] * d_out).astype(rows.dtype)), d_gate

    def add(step, gradients):
        d_params, d_x, d_gates = gradients
        number, choice, token, d_expert, d_rows, d_gate = _at_a_time(sizes.blocks, differentiate, step)
        d_params = jax.tree.map(lambda total, d: total.at[number].add(d), d_params, d_expert)
        return d_params, d_x.at[token].add(d_rows), d_gates.at[choice, token].add(d_gate)

    return *lax.fori_loop(0, -(-blocks // sizes.blocks), add, vjp(cotangent)), None


_padded_dropless.defvjp(_padded_dropless_fwd, _padded_dropless_bwd)


def _add_overflow(expert, buffer_rows, sizes, params, x, gates, plan, out):
    """Adds to out `[T, D]` the results of the assignments that did not fit into the buffer."""
    blocks, read = dispatch.overflow_blocks(plan, buffer_rows, x.shape[0], sizes.block_rows)

    def compute(i):
        number, choice, token, is_row = read(i)
        rows = expert(linear, _one_expert(params, number), jnp.where(is_row[:, None], x[token], 0))
        gate = jnp.where(is_row, gates[choice, token], 0)
        return token, gate[:, None] * rows.astype(out.dtype)

    def add(step, out):
        token, rows = _at_a_time(sizes.blocks, compute, step)
        return out.at[token].add(rows)

    return lax.fori_loop(0, -(-blocks // sizes.blocks), add, out)


def _at_a_time(blocks, function, step):
    """The results for the G blocks of a step."""
    return function(step) if blocks == 1 else jax.vmap(function)(step * blocks + jnp.arange(blocks, dtype=jnp.int32))


def _one_expert(params, number):
    return jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=number, axis=0, keepdims=False), params)
