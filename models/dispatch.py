"""Dispatch: brings tokens to the rows of their experts' inputs, and the results back.

A *plan* sorts the assignments of tokens to experts by expert. A *slot* is a place for one row: in the sorted order, or
in a buffer of C rows for each expert. `models.grouped` computes the experts on the rows.

Axis letters: T tokens, D model width, E experts, K experts per token, N = K T assignments of a token to an expert,
C rows of an expert in a buffer, S slots, M rows of a block. Assignment `a` is token `a % T` and its choice number
`a // T`: all first choices come before all second choices.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Plan(NamedTuple):
    """Assignments in the order of their experts. Assignments that go to no expert come last."""

    order: jax.Array  # [N] int32, the assignment at each place of the order
    rank: jax.Array  # [N] int32, the place of each assignment
    expert: jax.Array  # [N] int32, the expert of each assignment; E for no expert
    starts: jax.Array  # [E] int32, the first place of each expert
    sizes: jax.Array  # [E] int32, the number of assignments of each expert


def sort_assignments(expert: jax.Array, num_experts: int) -> Plan:
    """Makes the plan for the experts `[N]` of all assignments. The sort is stable: earlier assignments come first.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import dispatch
      >>> dispatch.sort_assignments(jnp.array([1, 0, 1]), num_experts=2).order
      Array([1, 0, 2], dtype=int32)
    """
    places = jnp.arange(expert.shape[0], dtype=jnp.int32)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(places).at[order].set(places, unique_indices=True)
    ends = jnp.searchsorted(expert[order], jnp.arange(num_experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return Plan(order, rank, expert, starts, ends - starts)


def expert_capacity(factor: float | None, tokens: int, choices: int, num_experts: int) -> int | None:
    """Computes C, the rows that an expert takes: `factor` times `K T / E`, rounded up. None is no limit.

    Example:
      >>> from models import dispatch
      >>> dispatch.expert_capacity(1.25, tokens=100, choices=2, num_experts=8)
      32
    """
    return None if factor is None else math.ceil(factor * tokens * choices / num_experts)


@jax.custom_vjp
def take_rows(x: jax.Array, rows: jax.Array, takers: jax.Array) -> jax.Array:
    """Takes `x[rows]`, with zeros for rows out of range.

    `takers` makes the gradient a gather too. JAX's own gradient is a scatter, which is slower.

    Args:
      x: `[R, D]`.
      rows: `[S]` integers; R takes no row.
      takers: `[n, R]` integers, the places in `rows` that take each row of x; S is no place.

    Returns:
      `[S, D]`.
    """
    return _take(x, rows)


def _take_rows_fwd(x, rows, takers):
    return _take(x, rows), takers


def _take_rows_bwd(takers, cotangent):
    return functools.reduce(operator.add, [_take(cotangent, places) for places in takers]), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def _take(x, rows):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


def through_slots(
    compute: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    gates: jax.Array,
    slot_of_assignment: jax.Array,
    assignment_of_slot: jax.Array,
) -> jax.Array:
    """Puts tokens into slots, computes the slots' rows, and sums each token's results, weighted by its gates.

    Args:
      compute: rows `[S, D]` to rows `[S, D]`.
      x: `[T, D]`.
      gates: `[K, T]`.
      slot_of_assignment: `[N]` integers; S is no slot.
      assignment_of_slot: `[S]` integers; N is no assignment.

    Returns:
      `[T, D]`, in the dtype of the gates.
    """
    (choices, tokens), (assignments,) = gates.shape, slot_of_assignment.shape
    token_of_slot = jnp.where(assignment_of_slot < assignments, assignment_of_slot % tokens, tokens)
    rows = take_rows(x, token_of_slot, slot_of_assignment.reshape(choices, tokens))
    rows = take_rows(compute(rows), slot_of_assignment, assignment_of_slot[None])
    rows = rows.reshape(choices, tokens, rows.shape[-1])
    # One term of the sum at a time: XLA's CPU code for this form is ten times faster.
    return functools.reduce(operator.add, [g[:, None] * r.astype(g.dtype) for g, r in zip(gates, rows, strict=True)])


def through_buffer(
    compute: Callable[[jax.Array], jax.Array], buffer_rows: int, x: jax.Array, gates: jax.Array, plan: Plan
) -> jax.Array:
    """Applies `through_slots` to the rows of a buffer `[E, C, D]`. Assignments that do not fit into it add nothing.

    Args:
      compute: `[E, C, D]` to `[E, C, D]`.
      buffer_rows: C.
      x: `[T, D]`.
      gates: `[K, T]`.
      plan: from `sort_assignments`.

    Returns:
      `[T, D]`, in the dtype of the gates.
    """
    num_experts = plan.sizes.shape[0]

    def compute_slots(rows):
        rows = compute(rows.reshape(num_experts, buffer_rows, rows.shape[-1]))
        return rows.reshape(num_experts * buffer_rows, rows.shape[-1])

    return through_slots(compute_slots, x, gates, *_buffer_slots(plan, buffer_rows))


def _buffer_slots(plan, buffer_rows):
    """Returns the slot of each assignment, `[N]`, and the assignment of each slot, `[E C]`, for C rows per expert.

    An assignment that does not fit has slot E C. A slot that stays empty has assignment N.
    """
    num_experts, assignments = plan.sizes.shape[0], plan.order.shape[0]
    place = jnp.arange(buffer_rows, dtype=jnp.int32)[None]
    sorted_place = jnp.minimum(plan.starts[:, None] + place, assignments - 1)
    assignment_of_slot = jnp.where(place < plan.sizes[:, None], plan.order[sorted_place], assignments)  # [E, C]
    place = plan.rank - _take(plan.starts, plan.expert)
    fits = (place < buffer_rows) & (plan.expert < num_experts)
    return jnp.where(fits, plan.expert * buffer_rows + place, num_experts * buffer_rows), assignment_of_slot.reshape(-1)


class Block(NamedTuple):
    """Up to M assignments of one expert."""

    expert: jax.Array  # [] int32
    choice: jax.Array  # [M] int32
    token: jax.Array  # [M] int32
    is_row: jax.Array  # [M] bool; False where the expert has no further assignment


def overflow_blocks(
    plan: Plan, buffer_rows: int, tokens: int, block_rows: int
) -> tuple[jax.Array, Callable[[jax.Array], Block]]:
    """Cuts the assignments that did not fit into the buffer into blocks.

    Args:
      plan: from `sort_assignments`.
      buffer_rows: C, the rows of each expert that are in the buffer.
      tokens: T.
      block_rows: M.

    Returns:
      The number of blocks `[]`, and a function from the number of a block to the block. Blocks past the end are empty.
    """
    num_experts, assignments = plan.sizes.shape[0], plan.order.shape[0]
    block_rows = min(block_rows, assignments)
    left = jnp.maximum(plan.sizes - buffer_rows, 0)
    blocks = -(-left // block_rows)  # [E]
    last = jnp.cumsum(blocks)
    order = jnp.pad(plan.order, (0, block_rows))  # so that the last block stays within it

    def read(i):
        # Experts with 2, 0 and 3 blocks have last = [2, 2, 5]. Block 3 is of expert 2, after 3 - 5 + 3 = 1 block of it.
        expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
        done = (i - last[expert] + blocks[expert]) * block_rows
        assignment = lax.dynamic_slice_in_dim(order, plan.starts[expert] + buffer_rows + done, block_rows)
        is_row = jnp.arange(block_rows, dtype=jnp.int32) < left[expert] - done
        return Block(expert, assignment // tokens, assignment % tokens, is_row)

    return last[num_experts - 1], read
