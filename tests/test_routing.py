"""Routing counts against hand-worked numbers, a plain loop over the tokens, and the same batch in parts.

Axis letters: B batch, S sequence, T tokens, E experts, K experts per token, L layers.
"""

import functools
import math
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import jax_versions
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from excitation_optax import RoutingCounts, count_active, count_logits, count_routing
from excitation_optax._routing import check_utilization

E = 5


def loop_over_tokens(chosen, num_experts, where=None):
    """Equation 1, one token at a time: `chosen` [T..., K] and `where` give (counts [E], tokens)."""
    chosen = np.asarray(chosen)
    where = np.broadcast_to(True if where is None else where, chosen.shape[:-1])
    counts, tokens = np.zeros(num_experts), 0
    for token in np.ndindex(chosen.shape[:-1]):
        if where[token]:
            tokens += 1
            for expert in set(chosen[token].tolist()) & set(range(num_experts)):
                counts[expert] += 1
    return counts, tokens


def assert_counts(actual, counts, tokens):
    assert isinstance(actual, RoutingCounts)
    assert actual.counts.dtype == actual.tokens.dtype == jnp.float32
    np.testing.assert_array_equal(actual.counts, counts)
    np.testing.assert_array_equal(actual.tokens, tokens)


def random_indices(seed, *shape, low=0):
    return np.random.default_rng(seed).integers(low, E, shape, dtype=np.int32)


def random_mask(seed, *shape):
    return np.random.default_rng(seed).random(shape) < 0.6


def counts_of(*counts, tokens):
    return RoutingCounts(jnp.array(counts, jnp.float32), jnp.array(tokens, jnp.float32))


# RoutingCounts.


@pytest.mark.parametrize(
    ("counts", "tokens", "utilization"),
    [
        ([3.0, 1.0, 0.0], 4.0, [0.75, 0.25, 0.0]),
        ([1.0, 0.0], 1.0, [1.0, 0.0]),
        ([4.0, 4.0], 4.0, [1.0, 1.0]),
        ([0.0, 0.0], 0.0, [0.0, 0.0]),  # no tokens
        ([[1.0, 3.0], [0.0, 0.0], [5.0, 0.0]], [4.0, 0.0, 5.0], [[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]]),  # layers
    ],
)
def test_utilization_by_hand(counts, tokens, utilization):
    actual = RoutingCounts(jnp.array(counts), jnp.array(tokens)).utilization
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, utilization)


def test_adding_weighs_by_tokens():
    # 3 of 4 and 0 of 1 tokens are 3 of 5; the mean of the fractions would be 3/8
    total = counts_of(3, 1, tokens=4) + counts_of(0, 1, tokens=1)
    assert_counts(total, [3, 2], 5)
    np.testing.assert_allclose(total.utilization, [0.6, 0.4], rtol=1e-6)
    assert_counts(sum([counts_of(1, 0, tokens=1), counts_of(0, 2, tokens=2), counts_of(1, 1, tokens=2)]), [2, 3], 5)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "bfloat16", "float16", "float32"])
def test_narrow_counts_are_added_in_float32(dtype):
    # int8 overflows at 128, int32 at 2**31; bfloat16 cannot count past 256; float16 has no 65,536
    largest = {"int8": 100, "int32": 2**30, "uint32": 2**31, "bfloat16": 256, "float16": 60_000, "float32": 1000}[dtype]
    one = RoutingCounts(jnp.array([largest, 1], dtype), jnp.array(largest, dtype))
    assert_counts(sum([one, one, one, one]), [4.0 * largest, 4], 4.0 * largest)
    many = jax.lax.fori_loop(0, 300, lambda _, total: total + RoutingCounts(*jax.tree.map(jnp.sign, one)), one + one)
    assert_counts(many, [2.0 * largest + 300 if largest < 2**24 else 2.0 * largest, 302], many.tokens)


@pytest.mark.parametrize("other", ["float64", "float32", "int32"])
def test_float64_stays_under_x64(other):
    with jax_versions.enable_x64(True):
        wide = RoutingCounts(jnp.array([2.0**53, 1.0], "float64"), jnp.array(2.0**53, "float64"))
        total = wide + RoutingCounts(jnp.array([2, 2], other), jnp.array(2, other))
        assert total.counts.dtype == total.tokens.dtype == total.utilization.dtype == "float64"
        assert total.counts[0] == total.tokens == 2.0**53 + 2


def test_tokens_may_be_a_number():
    assert_counts(RoutingCounts(np.array([3.0, 1.0]), 4) + RoutingCounts(jnp.array([0, 1]), 1.0), [3, 2], 5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (jnp.ones(2), jnp.ones(1), r"their counts are float32\[2\] and float32\[1\]"),
        (jnp.ones((3, 2)), jnp.ones(2), r"their counts are float32\[3, 2\] and float32\[2\]"),
        (jnp.ones(2), jnp.ones(3), r"their counts are float32\[2\] and float32\[3\]"),
        ([1.0, 0.0], [1.0, 0.0], r"their counts are \[1.0, 0.0\] and \[1.0, 0.0\]"),
        (jnp.ones(2), [1.0, 0.0], r"their counts are float32\[2\] and \[1.0, 0.0\]"),
        (jnp.ones(2), None, r"their counts are float32\[2\] and None"),
        (jnp.ones(2), jax.ShapeDtypeStruct((2,), "float32"), ""),
    ],
)
def test_addition_requires_arrays_of_equal_shapes(a, b, message):
    tokens = jnp.ones(())
    with pytest.raises(ValueError, match="Adding RoutingCounts requires arrays of equal shapes; .*" + message):
        RoutingCounts(a, tokens) + RoutingCounts(b, tokens)


def test_tokens_of_other_shapes_cannot_be_added():
    with pytest.raises(ValueError, match=r"their tokens are float32\[\] and float32\[1\]"):
        counts_of(1, 0, tokens=1) + RoutingCounts(jnp.ones(2), jnp.ones(1))


@pytest.mark.parametrize("other", [1, 0.5, None, (1, 2), np.ones(2), jnp.ones(2), np.float32(1)], ids=repr)
def test_only_counts_can_be_added(other):
    """A tuple would concatenate or repeat, and NumPy would broadcast."""
    counts = counts_of(1, 0, tokens=1)
    for a, b in [(counts, other), (other, counts)]:
        with pytest.raises(ValueError, match="Only RoutingCounts can be added to RoutingCounts; got "):
            a + b
        with pytest.raises(TypeError):
            a * b


def test_counts_are_frozen():
    with pytest.raises(AttributeError):
        counts_of(1, 0, tokens=1).tokens = 2.0


def test_utilization_of_nan_counts_is_nan():
    assert np.isnan(counts_of(math.nan, 1, tokens=2).utilization[0])


# count_routing.


@pytest.mark.parametrize(
    ("chosen", "where", "counts", "tokens"),
    [
        ([[0, 1], [0, 2], [0, 1]], None, [3, 2, 1, 0], 3),
        ([[0, 1], [0, 2], [0, 1]], [True, True, False], [2, 1, 1, 0], 2),
        ([[3]], None, [0, 0, 0, 1], 1),
        ([1, 2], None, [0, 1, 1, 0], 1),  # one token, no token axis
        ([1, 2], False, [0, 0, 0, 0], 0),
        ([[2, 2], [2, 0]], None, [1, 0, 2, 0], 2),  # named twice, counted once
        ([[0, 4], [-1, 1], [-4, 99]], None, [1, 1, 0, 0], 3),  # out of range, but tokens all the same
        ([[[0], [1]], [[1], [3]]], None, [1, 2, 0, 1], 4),  # B and S
        ([[[0], [1]], [[1], [3]]], [[True], [False]], [1, 1, 0, 0], 2),  # [B, 1] against [B, S]
        ([[[0], [1]], [[1], [3]]], [[True, False]], [1, 1, 0, 0], 2),  # [1, S] against [B, S]: experts 0 and 1
        ([[[0], [1]], [[1], [3]]], [False, True], [0, 1, 0, 1], 2),  # [S] against [B, S]: experts 1 and 3
        ([[[0], [1]], [[1], [3]]], True, [1, 2, 0, 1], 4),
    ],
)
def test_count_routing_by_hand(chosen, where, counts, tokens):
    where = None if where is None else jnp.array(where)
    assert_counts(count_routing(jnp.array(chosen), num_experts=4, where=where), counts, tokens)


@functools.cache
def compiled_routing():
    return jax.jit(lambda chosen, where: count_routing(chosen, E, where))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    chosen=st.lists(st.integers(-2, E + 1), min_size=24, max_size=24),
    where=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_count_routing_equals_a_loop(chosen, where):
    chosen, where = np.array(chosen, np.int32).reshape(4, 3, 2), np.array(where).reshape(4, 3)
    assert_counts(compiled_routing()(chosen, where), *loop_over_tokens(chosen, E, where))


@pytest.mark.parametrize("shape", [(2,), (7, 3), (4, 3, 2), (2, 3, 2, 1), (2, 1, 3, 2, 4), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_count_routing_takes_any_number_of_token_axes(shape, masked):
    chosen = random_indices(0, *shape, low=-1)
    where = random_mask(1, *shape[:-1]) if masked else None
    assert_counts(compiled_routing()(chosen, where), *loop_over_tokens(chosen, E, where))


@pytest.mark.parametrize("where_shape", [(4, 1, 1), (1, 3, 1), (4, 3, 2), (3, 2), (2,), ()])
def test_where_broadcasts_as_in_numpy(where_shape):
    chosen, where = random_indices(0, 4, 3, 2, 2), random_mask(2, *where_shape)
    assert_counts(compiled_routing()(chosen, where), *loop_over_tokens(chosen, E, where))


@pytest.mark.parametrize("k", [1, 2, E])
def test_utilization_sums_to_the_experts_per_token(k):
    chosen = np.argsort(np.random.default_rng(k).random((7, 3, E)), axis=-1)[..., :k]  # K different experts per token
    for where in (None, random_mask(0, 7, 1)):
        np.testing.assert_allclose(compiled_routing()(chosen, where).utilization.sum(), k, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2), (0, 3, 2)])
def test_no_tokens_is_no_utilization(shape):
    assert_counts(count_routing(jnp.zeros(shape, int), E), np.zeros(E), 0)
    np.testing.assert_array_equal(count_routing(jnp.zeros(shape, int), E).utilization, np.zeros(E))


def test_masking_every_token_is_no_utilization():
    counts = count_routing(jnp.array([[0, 1], [2, 3]]), E, where=jnp.array([False, False]))
    assert_counts(counts, np.zeros(E), 0)
    np.testing.assert_array_equal(counts.utilization, np.zeros(E))


def test_no_experts_per_token_still_counts_tokens():
    assert_counts(count_routing(jnp.zeros((3, 0), int), E), np.zeros(E), 3)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_narrow_indices_do_not_wrap_around(dtype):
    # counted as 8-bit numbers, expert 256 would be expert 0, and 255 be -1
    counts = count_routing(jnp.array([[0], [1], [1]], dtype), num_experts=300)
    assert_counts(counts, np.bincount([0, 1, 1], minlength=300), 3)
    if dtype.startswith("int"):
        assert_counts(count_routing(jnp.array([[-1]], dtype), num_experts=300), np.zeros(300), 1)


# count_active.


@pytest.mark.parametrize(
    ("active", "where", "counts", "tokens"),
    [
        ([[True, False, False], [True, True, False]], None, [2, 1, 0], 2),
        ([[True, False, False], [True, True, False]], [False, True], [1, 1, 0], 1),
        ([True, False, True], None, [1, 0, 1], 1),  # no token axis
        ([[[True, True, True]], [[False, False, True]]], [[True], [True]], [1, 1, 2], 2),
        ([[[True, True, True]], [[False, False, True]]], [[False], [True]], [0, 0, 1], 1),
        (np.zeros((0, 3), bool), None, [0, 0, 0], 0),
    ],
)
def test_count_active_by_hand(active, where, counts, tokens):
    where = None if where is None else jnp.array(where)
    assert_counts(count_active(jnp.array(active), where), counts, tokens)


@pytest.mark.parametrize("shape", [(E,), (7, E), (4, 3, E), (2, 1, 3, 2, E)])
def test_count_active_equals_numpy(shape):
    active, where = random_mask(0, *shape), random_mask(1, *shape[:-1])
    counts = (active & where[..., None]).reshape(-1, E).sum(axis=0)
    assert_counts(jax.jit(count_active)(active, where), counts, where.sum())


def test_count_active_of_everything_is_full_utilization():
    np.testing.assert_array_equal(count_active(jnp.ones((3, 2, E), bool)).utilization, np.ones(E))


# count_logits.


@pytest.mark.parametrize(
    ("logits", "k", "where", "counts", "tokens"),
    [
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], 1, None, [1, 1, 0], 2),
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], 2, None, [1, 2, 1], 2),
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], 3, None, [2, 2, 2], 2),
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], 2, [False, True], [0, 1, 1], 1),
        ([-5.0, -math.inf, -7.0], 2, None, [1, 0, 1], 1),  # no token axis
        ([[1.0, 1.0, 1.0]], 2, None, [1, 1, 0], 1),  # of equals, the first
    ],
)
def test_count_logits_by_hand(logits, k, where, counts, tokens):
    where = None if where is None else jnp.array(where)
    assert_counts(count_logits(jnp.array(logits), k, where), counts, tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_count_logits_ranks_probabilities_as_it_does_logits(dtype):
    logits = jnp.asarray(np.random.default_rng(0).permutation(4 * 3 * E).reshape(4, 3, E) / 8, dtype)
    chosen = np.argsort(-np.asarray(logits, np.float32), axis=-1)[..., :2]
    where = random_mask(1, 4, 1)
    assert_counts(count_logits(logits, 2, where), *loop_over_tokens(chosen, E, where))
    assert_counts(
        count_logits(jax.nn.softmax(logits.astype(jnp.float32)), 2, where), *loop_over_tokens(chosen, E, where)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_counts_of_non_finite_logits_are_finite(bad):
    counts = count_logits(jnp.full((3, 4), bad).at[0, 0].set(1.0), 2)
    assert counts.tokens == 3
    assert counts.counts.sum() == 6  # every token has two experts, whichever they are


# In parts: micro-batches, layers, devices.


@pytest.mark.parametrize("masked", [False, True])
def test_unequal_micro_batches_add_up_to_the_whole_batch(masked):
    chosen, where = random_indices(0, 11, 3, 2), random_mask(1, 11, 3) if masked else None
    parts = [slice(0, 1), slice(1, 7), slice(7, 7), slice(7, 11)]
    total = sum(count_routing(chosen[part], E, None if where is None else where[part]) for part in parts)
    whole = count_routing(chosen, E, where)
    assert_counts(total, whole.counts, whole.tokens)
    np.testing.assert_array_equal(total.utilization, whole.utilization)


def test_a_scan_over_micro_batches_adds_up_to_the_whole_batch():
    chosen, where = random_indices(0, 4, 3, 2), random_mask(1, 4, 3)
    start = RoutingCounts(jnp.zeros(E), jnp.zeros([]))
    total, _ = jax.lax.scan(lambda sum_, x: (sum_ + count_routing(x[0], E, x[1]), None), start, (chosen, where))
    assert_counts(total, *loop_over_tokens(chosen, E, where))


def test_vmap_stacks_layers():
    chosen, where = random_indices(0, 3, 4, 2), random_mask(1, 3, 4)  # L = 3
    stacked = jax.vmap(lambda c, w: count_routing(c, E, w))(chosen, where)
    one_by_one = [loop_over_tokens(c, E, w) for c, w in zip(chosen, where, strict=True)]
    assert_counts(stacked, [counts for counts, _ in one_by_one], [tokens for _, tokens in one_by_one])
    expected = [counts / max(tokens, 1) for counts, tokens in one_by_one]
    np.testing.assert_allclose(stacked.utilization, expected, rtol=1e-6)


def mesh_of_eight(axis_type):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


each_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
each_mask = pytest.mark.parametrize("where_shape", [None, (16, 3), (16, 1)], ids=str)


def sharded(mesh, where_shape):
    """Indices [16, 3, 2] and a mask, split over eight devices, and what a loop counts in all of them."""
    chosen, where = random_indices(0, 16, 3, 2), None if where_shape is None else random_mask(1, *where_shape)
    split = jax.device_put((chosen, where), jax.NamedSharding(mesh, P("data")))
    return split, loop_over_tokens(chosen, E, where)


@each_axis_type
@each_mask
def test_jit_counts_a_sharded_batch_globally(axis_type, where_shape):
    mesh = mesh_of_eight(axis_type)
    with jax_versions.set_mesh(mesh):
        (chosen, where), expected = sharded(mesh, where_shape)
        assert len(chosen.sharding.device_set) == 8
        counts = compiled_routing()(chosen, where)
        assert_counts(counts, *expected)
        assert counts.counts.sharding.is_fully_replicated
        np.testing.assert_allclose(counts.utilization, expected[0] / expected[1], rtol=1e-6)


@each_axis_type
def test_jit_counts_sharded_logits_globally(axis_type):
    mesh = mesh_of_eight(axis_type)
    logits = np.random.default_rng(0).permutation(16 * E).reshape(16, E).astype(np.float32)
    with jax_versions.set_mesh(mesh):
        split = jax.device_put(logits, jax.NamedSharding(mesh, P("data")))
        counts = jax.jit(lambda x: count_logits(x, 2))(split)
        assert_counts(counts, *loop_over_tokens(np.argsort(-logits, axis=-1)[:, :2], E))


@each_axis_type
def test_a_mask_on_every_device_fits_a_sharded_batch(axis_type):
    mesh, where = mesh_of_eight(axis_type), np.array([True, False, True])
    with jax_versions.set_mesh(mesh):
        (chosen, _), _ = sharded(mesh, None)
        assert_counts(compiled_routing()(chosen, where), *loop_over_tokens(chosen, E, where))


@each_axis_type
@each_mask
def test_psum_in_shard_map_is_global(axis_type, where_shape):
    mesh = mesh_of_eight(axis_type)
    (chosen, where), expected = sharded(mesh, where_shape)
    body = lambda chosen, where: jax.lax.psum(count_routing(chosen, E, where), "data")
    assert_counts(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P())(chosen, where), *expected)


def test_without_psum_every_shard_has_its_own():
    mesh = mesh_of_eight(AxisType.Auto)
    (chosen, where), expected = sharded(mesh, (16, 3))
    body = lambda chosen, where: jax.tree.map(lambda x: x[None], count_routing(chosen, E, where))
    local = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(chosen, where)
    assert len(np.unique(local.utilization, axis=0)) > 1
    assert_counts(jax.tree.map(lambda x: x.sum(axis=0), local), *expected)


def test_psum_in_vmap_is_global():
    chosen = random_indices(0, 4, 3, 2)
    body = lambda chosen: jax.lax.psum(count_routing(chosen, E), "data")
    counts, tokens = loop_over_tokens(chosen, E)
    assert_counts(jax.vmap(body, axis_name="data")(chosen), np.tile(counts, (4, 1)), np.full(4, tokens))


# As a pytree.


def test_tree_map_reaches_counts_and_tokens():
    doubled = jax.tree.map(lambda x: 2 * x, {"layer": counts_of(3, 1, tokens=4)})["layer"]
    assert_counts(doubled, [6, 2], 8)


def test_the_names_of_its_leaves():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(counts_of(3, 1, tokens=4))]
    assert paths == [".counts", ".tokens"]


def test_eval_shape_gives_shapes():
    chosen = jax.ShapeDtypeStruct((3, 4, 2), jnp.int32)
    shapes = jax.eval_shape(jax.vmap(lambda chosen: count_routing(chosen, E)), chosen)  # L = 3
    assert shapes == RoutingCounts(jax.ShapeDtypeStruct((3, E), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert jax.eval_shape(lambda counts: counts.utilization, shapes).shape == (3, E)


def test_donated_counts_are_deleted():
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    first = counts_of(3, 1, tokens=4)
    assert_counts(add(first, counts_of(0, 1, tokens=1)), [3, 2], 5)
    assert first.counts.is_deleted()
    assert first.tokens.is_deleted()


def test_no_recompilation_for_the_same_shapes():
    count = jax.jit(lambda chosen: count_routing(chosen, E))
    total = sum(count(random_indices(seed, 4, 2)) for seed in range(3))
    assert count._cache_size() == 1
    assert total.tokens == 12


def test_leaves_may_be_anything_while_a_tree_is_transformed():
    counts = counts_of(3, 1, tokens=4)
    for leaf in (None, "name", jax.ShapeDtypeStruct((2,), "float32"), [1, 2]):
        assert jax.tree.map(lambda x, leaf=leaf: leaf, counts) == RoutingCounts(leaf, leaf)
    assert jax.tree.leaves(RoutingCounts(None, jnp.ones(()))) == [1]


def test_jax_export_serializes_a_function_of_counts():
    double = jax.export.export(jax.jit(lambda counts: {"layer": counts + counts}))(counts_of(3, 1, tokens=4))
    loaded = jax.export.deserialize(double.serialize())
    assert_counts(loaded.call(counts_of(1, 0, tokens=1))["layer"], [2, 0], 2)


def test_flax_serializes_counts():
    serialization = pytest.importorskip("flax.serialization")
    tree = {"layer": counts_of(3, 1, tokens=4)}
    data = serialization.to_bytes(tree)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), data)
    assert_counts(restored["layer"], [3, 1], 4)
    state = serialization.to_state_dict(tree)
    assert state["layer"].keys() == {"counts", "tokens"}


def test_optax_sets_and_averages_counts():
    class State(NamedTuple):
        utilization: RoutingCounts

    old, new = counts_of(4, 0, tokens=4), counts_of(0, 2, tokens=2)
    (state,) = optax.tree.set((State(old),), utilization=new)
    assert_counts(state.utilization, new.counts, new.tokens)
    assert_counts(optax.incremental_update(new, old, 0.5), [2, 1], 3)


# check_utilization.


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.array([0.5, 0.5]),
        np.array([0.5, math.nan], np.float32),  # apply_if_finite handles a NaN
        jnp.zeros((3, 2), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 2), "float32"),
        RoutingCounts(jnp.array([3, 1]), 4),
        RoutingCounts(np.ones((3, 2), np.float16), np.ones(3, np.float16)),
        jax.eval_shape(lambda: counts_of(3, 1, tokens=4)),
    ],
    ids=repr,
)
def test_utilization_that_is_right(leaf):
    check_utilization("Utilization at moe", leaf)
    assert jax.jit(lambda x: check_utilization("Utilization at moe", x) or x)(0 * jnp.ones((2, 2)) - 1).shape == (
        2,
        2,
    )  # not read


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (0.5, r"Utilization at moe must be an array with an axis of experts, \[\.\.\., E\]; got 0\.5\."),
        ("u", "Utilization at moe must be an array with an axis of experts.*got 'u'"),
        (jnp.ones(()), r"Utilization at moe .* got float32\[\]\. .*expert_\{expert\}"),
        (jnp.ones((3, 0)), r"Utilization at moe .* got float32\[3, 0\]"),
        (
            jnp.array([3, 1]),
            r"Utilization at moe must be floating-point .* got int32\[2\]\. Put tokens per expert into",
        ),
        (jnp.array([True]), r"Utilization at moe must be floating-point .* got bool\[1\]"),
        (jnp.array([0.5, -0.25]), r"Utilization at moe must not be negative; got float32\[2\] with the value -0\.25"),
        (np.array([math.nan, -1.0]), r"Utilization at moe must not be negative; got float64\[2\] with the value -1\.0"),
        (RoutingCounts([3, 1], 4), r"Utilization at moe: the counts must be an array .* got \[3, 1\]"),
        (RoutingCounts(None, jnp.ones(())), r"Utilization at moe: the counts must be an array .* got None"),
        (
            RoutingCounts(jnp.ones(2), jnp.ones(2)),
            r"Utilization at moe has counts of shape \[2\] and tokens float32\[2\]; tokens must have the shape \[\]",
        ),
        (RoutingCounts(jnp.ones((3, 2)), 1), r"shape \[3, 2\] and tokens 1; tokens must have the shape \[3\]"),
        (RoutingCounts(jnp.ones(2), None), r"tokens None; tokens must have the shape \[\]"),
        (RoutingCounts(jnp.array([3, -1]), 4), r"Utilization at moe must not be negative; got int32\[2\].*-1"),
        (RoutingCounts(jnp.array([3, 1]), -4), "Utilization at moe must not be negative; got -4"),
    ],
    ids=repr,
)
def test_utilization_that_is_wrong(leaf, message):
    with pytest.raises(ValueError, match=message):
        check_utilization("Utilization at moe", leaf)


# Errors.


@pytest.mark.parametrize(
    ("chosen", "num_experts", "message"),
    [
        (
            np.ones((3, 2), np.float32),
            4,
            r"expert_indices must be an array of integers .* got float32\[3, 2\]\. .*use count_logits",
        ),
        (np.ones((3, 2), bool), 4, r"expert_indices must be an array of integers .* got bool\[3, 2\]\. .*count_active"),
        (np.array(1, np.int32), 4, r"expert_indices must be .* got int32\[\]\. K is the number of experts per token"),
        ([[0, 1], [2]], 4, "expert_indices must be an array of integers"),
        (None, 4, "expert_indices must be an array of integers .*; got None"),
        # An argmax over E = 4 experts, [T]: as one token that chose T experts it would count every expert once.
        (
            np.array([0, 3, 3, 1, 3]),
            4,
            r"expert_indices int\d+\[5\] has more .* = 4\. .*expert_indices\[\.\.\., None\]",
        ),
        *[
            (np.ones((3, 2), np.int32), number, "num_experts must be an integer, not traced, and at least 1; got ")
            for number in (0, -3, "4", 4.0, None, True, np.float32(4), np.bool_(True))
        ],
    ],
    ids=repr,
)
def test_count_routing_rejects(chosen, num_experts, message):
    with pytest.raises(ValueError, match="count_routing: " + message):
        count_routing(chosen, num_experts)


def test_a_count_of_experts_may_be_a_numpy_integer_but_not_traced():
    for number in (4, np.int64(4), np.array(4), jnp.array(4)):
        assert_counts(count_routing(jnp.array([[0], [3], [3]]), number), [1, 0, 0, 2], 3)
        assert_counts(count_logits(jnp.eye(4), number), [4, 4, 4, 4], 4)
    with pytest.raises(ValueError, match=r"num_experts must be an integer, not traced, .*; got int32\[\]"):
        jax.jit(count_routing)(jnp.array([[0]]), 4)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (np.ones((3, 2), np.float32), r"got float32\[3, 2\]\. Pass `activations != 0`"),
        (np.ones((3, 2), np.int32), r"got int32\[3, 2\]\. .*count_routing for expert indices"),
        (np.array(True), r"got bool\[\]"),
    ],
)
def test_count_active_rejects(active, message):
    with pytest.raises(
        ValueError, match=r"count_active: active must be an array of booleans \[\.\.\., E\]; " + message
    ):
        count_active(active)


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (np.ones((3, 4), np.float32), 5, r"experts_per_token must be at most E = 4; got 5 for float32\[3, 4\]\."),
        (np.float32(1), 1, r"router_logits must be an array .* got float32\[\]\."),
        (
            np.ones((3, 4), np.int32),
            1,
            r"router_logits must be an array of floating-point .* got int32\[3, 4\]\. .*count_routing",
        ),
        (
            np.ones((3, 4), bool),
            1,
            r"router_logits must be an array of floating-point .* got bool\[3, 4\]\. .*count_active",
        ),
        *[
            (np.ones((3, 4), np.float32), k, "experts_per_token must be an integer, not traced, and at least 1; got ")
            for k in (0, 2.0, "2", False)
        ],
    ],
    ids=repr,
)
def test_count_logits_rejects(logits, k, message):
    with pytest.raises(ValueError, match="count_logits: " + message):
        count_logits(logits, k)


COUNTERS = {
    "count_routing": lambda where: count_routing(np.zeros((4, 3, 2), np.int32), E, where),
    "count_active": lambda where: count_active(np.zeros((4, 3, E), bool), where),
    "count_logits": lambda where: count_logits(np.zeros((4, 3, E), np.float32), 2, where),
}


@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS.keys())
@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 4), (4, 3, 1), (2, 4, 3)])
def test_a_mask_that_does_not_fit_is_rejected(counter, shape):
    message = rf"where bool\[{', '.join(map(str, shape))}\] does not fit the tokens \[4, 3\]"
    with pytest.raises(ValueError, match=message):
        counter(np.ones(shape, bool))


@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS.keys())
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_mask_that_is_not_boolean_is_rejected(counter, dtype):
    with pytest.raises(
        ValueError, match=rf"where must be an array of booleans .*; got {dtype}\[4, 3\]\. Pass `mask != 0`"
    ):
        counter(np.ones((4, 3), dtype))
