"""Dispatch: sorting, what a capacity is, rows and their takers, blocks of what does not fit into the buffer."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from hypothesis import strategies as st

from models import dispatch


def test_capacity_is_a_factor_of_the_mean():
    assert dispatch.expert_capacity(1.25, tokens=100, choices=2, num_experts=8) == 32  # 31.25
    assert dispatch.expert_capacity(1.0, tokens=16, choices=1, num_experts=4) == 4
    assert dispatch.expert_capacity(0.01, tokens=4, choices=1, num_experts=8) == 1
    assert dispatch.expert_capacity(None, tokens=100, choices=2, num_experts=8) is None


@pytest.mark.parametrize("block_rows", [1, 4, 26])
def test_every_row_that_does_not_fit_is_in_one_block(block_rows):
    @jax.jit
    def read_all(indices):
        blocks, read = dispatch.overflow_blocks(dispatch.sort_assignments(indices.T.reshape(-1), 5), 2, 13, block_rows)
        return blocks, jax.vmap(read)(jnp.arange(30))

    for indices in moe_oracle.ROUTINGS.values():
        blocks, read = read_all(indices)
        assert not np.any(read.is_row[int(blocks) :]), "a block past the end has rows"
        seen = []
        for expert, choices, tokens, is_row in zip(*(np.asarray(a)[: int(blocks)] for a in read), strict=True):
            assert len(is_row) == block_rows
            assert is_row[0], "a block without rows is a waste"
            seen += [(expert, k, t) for k, t in zip(choices[is_row], tokens[is_row], strict=True)]
        expected = []
        for e in range(5):
            rows = [(e, k, t) for k in range(2) for t in range(13) if indices[t, k] == e]
            expected += rows[2:]  # the buffer holds two
        assert seen == expected


@hypothesis.given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
@hypothesis.settings(max_examples=50, deadline=None)
def test_sort_assignments(experts):
    experts = np.array(experts + [4] * (30 - len(experts)), np.int32)  # one length, to compile once; 4 is no expert
    plan = jax.tree.map(np.asarray, SORT(experts))
    np.testing.assert_array_equal(plan.expert, experts)
    np.testing.assert_array_equal(plan.order, np.argsort(experts, kind="stable"))
    np.testing.assert_array_equal(plan.rank[plan.order], np.arange(30))
    np.testing.assert_array_equal(plan.sizes, np.bincount(experts, minlength=5)[:4])
    np.testing.assert_array_equal(plan.starts, np.cumsum(plan.sizes) - plan.sizes)
    for e in range(4):
        assert np.all(experts[plan.order[plan.starts[e] :][: plan.sizes[e]]] == e)


SORT = jax.jit(functools.partial(dispatch.sort_assignments, num_experts=4))


def test_take_rows_has_the_gradient_of_take():
    """Rows that are taken twice, once and never, and places that take no row."""
    x = jax.random.normal(jax.random.key(0), (4, 3))
    rows = jnp.array([2, 0, 4, 2, 3, 4])  # 4 is no row
    takers = jnp.array([[1, 6, 0, 4], [6, 6, 3, 6]])  # the places of rows 0, 1, 2, 3; 6 is no place
    take = lambda x: jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
    expected, expected_vjp = jax.vjp(take, x)
    y, vjp = jax.vjp(lambda x: dispatch.take_rows(x, rows, takers), x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y[2], np.zeros(3))
    dy = jax.random.normal(jax.random.key(1), (6, 3))
    np.testing.assert_array_equal(vjp(dy)[0], expected_vjp(dy)[0])
