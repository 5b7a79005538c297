"""Sends rows of tokens to their experts and brings the weighted results back: the costly part of an MoE layer.

`apply_experts` is the one function; how the experts' matrix products are done is its *backend*. An expert is written
once, as a function of `linear`, its parameters and its rows (`models.moe.gelu_mlp`), and every backend brings its own
`linear(rows, kernel, bias)`: the product of each row with the kernel of the expert that the row belongs to.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token, N = K T assignments of a
token to an expert, C rows of an expert in a padded buffer, M rows of a block. Assignment `a` is token `a % T` and its
choice number `a // T`: all first choices come before all second ones.
"""

import functools
import importlib.util
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# linear(rows, kernel, bias or None) -> rows
Linear = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
# expert(linear, params, rows) -> rows, with every leaf of params led by an axis of experts unless linear is `dense`
Expert = Callable[[Linear, Any, jax.Array], jax.Array]

Backend = Literal["padded", "ragged_dot", "tokamax", "one_hot"]
BACKENDS = ("padded", "ragged_dot", "tokamax", "one_hot")

# Rows that the padded buffer holds for an expert, over the mean. More wastes products on empty rows, less sends more
# rows through the loop. From 1 to 1.25 the difference is within the noise (`python -m benchmarks.moe_layer`).
HEADROOM = 1.125
# M: smaller blocks waste fewer rows, larger ones copy each kernel less often.
BLOCK_ROWS = 64


def default_backend() -> Backend:
    """The backend for the platform that JAX runs on: "tokamax" on GPU and TPU where it is installed, else "padded".

    "ragged_dot" is never the default. XLA lowers it to E dense products on CPU, and by default on GPU too; on TPU its
    forward pass is native, but the gradient of the kernels is E dense products there as well
    (`python -m benchmarks.tpu_flops`). On CPU the choice was measured by `python -m benchmarks.moe_layer`.

    Example:
      >>> from models import dispatch
      >>> dispatch.default_backend() in dispatch.BACKENDS
      True
    """
    installed = importlib.util.find_spec("tokamax") is not None
    return "tokamax" if jax.default_backend() != "cpu" and installed else "padded"


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
    r"""The gated sum of each token's experts.

    .. math::
      y_t = \sum_{k=1}^{K} g_{tk} \, f_{e_{tk}}(x_t)

    Memory is in proportion to K T rows, not to E T, except with "one_hot", and "ragged_dot" where it is not native.

    Args:
      expert: f, as in `models.moe.gelu_mlp`: a module-level function, or one that is hashed by what it does.
      params: its parameters, every leaf `[E, ...]`.
      x: `[T, D]`.
      indices: e, `[T, K]` integers; one out of range sends the token nowhere, and adds nothing.
      gates: g, `[T, K]` floats.
      backend: "padded" (a padded buffer and a batched product, then a loop over blocks of what did not fit),
        "ragged_dot" (`jax.lax.ragged_dot`), "tokamax" (`tokamax.ragged_dot`), or "one_hot" (every expert on every
        token: for tests and tiny models). By default `default_backend()`. All give the same numbers, up to rounding.
      capacity: the rows that an expert takes at most. Assignments beyond it are dropped, last choices and last tokens
        first. It goes with the padded buffer alone. None, the default, drops nothing.
      mean_load: the assignments that an expert is expected to get; by default `K T / E`. It sizes the padded buffer,
        and changes no result.

    Returns:
      `[T, D]`, float32 or wider; the sum over K is taken in it.

    Raises:
      ValueError: for a backend that is unknown, not installed, or does not go with a capacity.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import dispatch
      >>> def expert(linear, params, rows):
      ...     return linear(rows, params["kernel"], None)
      >>> params = {"kernel": jnp.array([[[1.0]], [[10.0]], [[100.0]]])}
      >>> x, indices = jnp.array([[1.0], [2.0]]), jnp.array([[0, 2], [1, 0]])
      >>> dispatch.apply_experts(expert, params, x, indices, gates=jnp.full((2, 2), 0.5))
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
    if backend == "one_hot":
        return _one_hot(expert, params, x, indices, gates)
    plan = sort_assignments(indices.reshape(-1), num_experts)
    backend = "padded" if capacity is not None else backend or default_backend()
    if backend != "padded":
        return _sorted_rows(expert, params, x, gates, plan, backend)
    if capacity is not None:
        return _padded(expert, capacity, params, x, gates, plan)
    mean_load = tokens * choices / num_experts if mean_load is None else mean_load
    # Fewer rows than experts, as when text is generated: not every kernel needs to be read.
    buffer_rows = math.ceil(HEADROOM * mean_load) if mean_load >= 1 else 0
    return _padded_dropless(expert, buffer_rows, params, x, gates, plan)


def expert_capacity(factor: float | None, tokens: int, choices: int, num_experts: int) -> int | None:
    """C, the rows that an expert takes: `factor` times `K T / E`, rounded up. None for no limit.

    Example:
      >>> from models import dispatch
      >>> dispatch.expert_capacity(1.25, tokens=100, choices=2, num_experts=8)
      32
    """
    return None if factor is None else math.ceil(factor * tokens * choices / num_experts)


def check_backend(backend: str | None, capacity_limited: bool) -> None:
    """Raises ValueError for a backend that is unknown, not installed, or does not go with a capacity."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None for the platform's; got {backend!r}.")
    if capacity_limited and backend not in (None, "padded"):
        raise ValueError(f'a capacity goes with backend="padded" or None; got {backend!r}.')
    if backend == "tokamax" and not importlib.util.find_spec("tokamax"):
        raise ValueError('backend="tokamax" needs the package tokamax: pip install tokamax. Or leave backend at None.')


# ------------------------------------------------------------------------------------------------------------ sorting


class Plan(NamedTuple):
    """Assignments in the order of their experts; those that go nowhere come last."""

    order: jax.Array  # [N] int32, which assignment stands at each place
    rank: jax.Array  # [N] int32, at which place each assignment stands
    expert: jax.Array  # [N] int32, the expert of each assignment; E for those that go nowhere
    starts: jax.Array  # [E] int32, the first place of each expert
    sizes: jax.Array  # [E] int32, the assignments of each expert


def sort_assignments(expert: jax.Array, num_experts: int) -> Plan:
    """The plan for the experts `[N]` of all assignments. A stable sort: earlier assignments come first."""
    places = jnp.arange(expert.shape[0], dtype=jnp.int32)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(places).at[order].set(places, unique_indices=True)
    ends = jnp.searchsorted(expert[order], jnp.arange(num_experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return Plan(order, rank, expert, starts, ends - starts)


@jax.custom_vjp
def take_rows(x: jax.Array, rows: jax.Array, takers: jax.Array) -> jax.Array:
    """`x[rows]`, zeros for rows out of range, where each row of x is taken by few and known takers.

    Knowing them, the gradient is a gather too, not the scatter that JAX would make of it.

    Args:
      x: `[R, D]`.
      rows: `[S]` integers; R stands for none.
      takers: `[n, R]` integers, the places in `rows` where each row of x stands; S stands for none.
    """
    return _take(x, rows)


def _take_rows_fwd(x, rows, takers):
    return _take(x, rows), takers


def _take_rows_bwd(takers, cotangent):
    return functools.reduce(operator.add, [_take(cotangent, places) for places in takers]), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def _take(x, rows):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


def _through_slots(compute, x, gates, slot_of_assignment, assignment_of_slot):
    """Puts rows of x `[T, D]` into slots, computes on these rows `[S, D]`, and sums what comes back, weighted by gates.

    Args:
      compute: rows `[S, D]` to rows `[S, D]`.
      x: `[T, D]`.
      gates: `[K, T]`.
      slot_of_assignment: `[N]`; S for none.
      assignment_of_slot: `[S]`; N for none.
    """
    (choices, tokens), (assignments,) = gates.shape, slot_of_assignment.shape
    token_of_slot = jnp.where(assignment_of_slot < assignments, assignment_of_slot % tokens, tokens)
    rows = take_rows(x, token_of_slot, slot_of_assignment.reshape(choices, tokens))
    rows = take_rows(compute(rows), slot_of_assignment, assignment_of_slot[None])
    return _weigh(gates, rows.reshape(choices, tokens, rows.shape[-1]))


def _weigh(gates, rows):
    """The sum over K of gates `[K, T]` times rows `[K, T, D]`. One term at a time: XLA's CPU code is 10x faster so."""
    return functools.reduce(operator.add, [g[:, None] * r.astype(g.dtype) for g, r in zip(gates, rows, strict=True)])


# ----------------------------------------------------------------------------------------------------------- backends


def dense(rows: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`linear` of one expert: rows `[..., D]`, kernel `[D, F]`, bias `[F]` or None."""
    rows = rows @ kernel
    return rows if bias is None else rows + jnp.broadcast_to(bias, rows.shape)


def _one_hot(expert, params, x, indices, gates):
    """Every expert on every token, and a sum that takes what was asked for."""
    num_experts = jax.tree.leaves(params)[0].shape[0]
    weights = jnp.sum(gates[..., None] * jax.nn.one_hot(indices, num_experts, dtype=gates.dtype), axis=0)  # [T, E]
    rows = jax.vmap(functools.partial(expert, dense), in_axes=(0, None))(params, x)  # [E, T, D]
    return jnp.einsum("te,etd->td", weights, rows.astype(gates.dtype), precision=lax.Precision.HIGHEST)


def _sorted_rows(expert, params, x, gates, plan, backend):
    """All rows in the order of their experts, and a grouped matrix product over them."""
    assignments = plan.order.shape[0]
    expert_of_row = plan.expert[plan.order]
    num_experts = plan.sizes.shape[0]
    is_row = (expert_of_row < num_experts)[:, None]

    def linear(rows, kernel, bias):
        if backend == "tokamax":
            rows = importlib.import_module("tokamax").ragged_dot(rows, kernel, plan.sizes)
        else:
            rows = lax.ragged_dot(rows, kernel, plan.sizes)
        if bias is not None:
            # A product: the sum over rows in its gradient is then one too, where a gather's would be a scatter.
            rows += jax.nn.one_hot(expert_of_row, num_experts, dtype=bias.dtype) @ bias
        return jnp.where(is_row, rows, 0)  # what a product leaves past the last expert's rows is not defined

    slot_of_assignment = jnp.where(plan.expert < num_experts, plan.rank, assignments)
    assignment_of_slot = jnp.where(is_row[:, 0], plan.order, assignments)
    compute = functools.partial(expert, linear, params)
    return _through_slots(compute, x, gates, slot_of_assignment, assignment_of_slot)


def _padded(expert, buffer_rows, params, x, gates, plan):
    """A buffer of C rows for every expert and one batched product; what does not fit adds nothing."""
    if buffer_rows == 0:
        return jnp.zeros_like(x, gates.dtype)
    return through_buffer(jax.vmap(functools.partial(expert, dense)), buffer_rows, params, x, gates, plan)


def through_buffer(experts, buffer_rows, params, x, gates, plan):
    """Puts rows of x into a buffer `[E, C, D]`, calls `experts(params, buffer)`, and sums what comes back, gated."""
    num_experts = plan.sizes.shape[0]

    def compute(rows):
        rows = experts(params, rows.reshape(num_experts, buffer_rows, rows.shape[-1]))
        return rows.reshape(num_experts * buffer_rows, rows.shape[-1])

    return _through_slots(compute, x, gates, *_buffer_slots(plan, buffer_rows))


def _buffer_slots(plan: Plan, buffer_rows: int) -> tuple[jax.Array, jax.Array]:
    """Where each assignment stands in a buffer of C rows per expert, `[N]`, and which stands at each slot, `[E C]`.

    E C stands for an assignment that does not fit, N for a slot that is empty.
    """
    num_experts, assignments = plan.sizes.shape[0], plan.order.shape[0]
    place = jnp.arange(buffer_rows, dtype=jnp.int32)[None]
    sorted_place = jnp.minimum(plan.starts[:, None] + place, assignments - 1)
    assignment_of_slot = jnp.where(place < plan.sizes[:, None], plan.order[sorted_place], assignments)  # [E, C]
    place = plan.rank - _take(plan.starts, plan.expert)
    fits = (place < buffer_rows) & (plan.expert < num_experts)
    return jnp.where(fits, plan.expert * buffer_rows + place, num_experts * buffer_rows), assignment_of_slot.reshape(-1)


# The dropless form: what does not fit into the buffer goes through a loop over blocks of rows, as many as there are.
# Autodiff cannot turn a loop of unknown length around, so its gradient is written out: the same loop, on top of the
# gradients that the buffer gave.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _padded_dropless(expert, buffer_rows, params, x, gates, plan):
    out = _padded(expert, buffer_rows, params, x, gates, plan)
    return _add_overflow(expert, buffer_rows, params, x, gates, plan, out)


def _padded_dropless_fwd(expert, buffer_rows, params, x, gates, plan):
    buffered = lambda params, x, gates: _padded(expert, buffer_rows, params, x, gates, plan)
    out, vjp = jax.vjp(buffered, params, x, gates)
    return _add_overflow(expert, buffer_rows, params, x, gates, plan, out), (vjp, params, x, gates, plan)


def _padded_dropless_bwd(expert, buffer_rows, residuals, cotangent):
    vjp, params, x, gates, plan = residuals
    blocks, read = _overflow_blocks(plan, buffer_rows, x.shape[0])

    def add_block(i, gradients):
        d_params, d_x, d_gates = gradients
        number, choice, token, is_row = read(i)
        x_rows = jnp.where(is_row[:, None], x[token], 0)
        rows, vjp = jax.vjp(functools.partial(expert, dense), _expert_params(params, number), x_rows)
        d_out = jnp.where(is_row[:, None], cotangent[token], 0)
        d_expert, d_rows = vjp((gates[choice, token][:, None] * d_out).astype(rows.dtype))
        # Read, add, and write one expert's slice in place; .at[number].add would be a scatter.
        d_params = jax.tree.map(
            lambda total, d: lax.dynamic_update_index_in_dim(total, _slice(total, number) + d, number, axis=0),
            d_params,
            d_expert,
        )
        d_gate = jnp.sum(d_out * rows.astype(d_out.dtype), axis=-1)
        return d_params, d_x.at[token].add(d_rows), d_gates.at[choice, token].add(d_gate)

    return *lax.fori_loop(0, blocks, add_block, vjp(cotangent)), None


_padded_dropless.defvjp(_padded_dropless_fwd, _padded_dropless_bwd)


def _add_overflow(expert, buffer_rows, params, x, gates, plan, out):
    """Adds to out `[T, D]` what the assignments give that did not fit into the buffer."""
    blocks, read = _overflow_blocks(plan, buffer_rows, x.shape[0])

    def add_block(i, out):
        number, choice, token, is_row = read(i)
        rows = expert(dense, _expert_params(params, number), jnp.where(is_row[:, None], x[token], 0))
        gate = jnp.where(is_row, gates[choice, token], 0)
        return out.at[token].add(gate[:, None] * rows.astype(out.dtype))

    return lax.fori_loop(0, blocks, add_block, out)


def _overflow_blocks(plan, buffer_rows, tokens):
    """The blocks, of at most M rows of one expert each, that hold what did not fit into the buffer.

    Returns:
      How many blocks there are, and a function of a block's number that gives the expert, the choices and the tokens of
      its rows, `[M]`, and which of these are rows.
    """
    num_experts, assignments = plan.sizes.shape[0], plan.order.shape[0]
    block_rows = min(BLOCK_ROWS, assignments)
    left = jnp.maximum(plan.sizes - buffer_rows, 0)
    blocks = -(-left // block_rows)  # [E]
    last = jnp.cumsum(blocks)
    order = jnp.pad(plan.order, (0, block_rows))  # so that the last block can be read

    def read(i):
        expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
        done = (i - last[expert] + blocks[expert]) * block_rows
        assignment = lax.dynamic_slice_in_dim(order, plan.starts[expert] + buffer_rows + done, block_rows)
        is_row = jnp.arange(block_rows, dtype=jnp.int32) < left[expert] - done
        return expert, assignment // tokens, assignment % tokens, is_row

    return last[num_experts - 1], read


def _slice(x, number):
    return lax.dynamic_index_in_dim(x, number, axis=0, keepdims=False)


def _expert_params(params, number):
    return jax.tree.map(functools.partial(_slice, number=number), params)
