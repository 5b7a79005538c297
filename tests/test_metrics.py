"""The metrics against hand-worked numbers and plain NumPy loops.

Axis letters: T tokens, E experts, C classes, L layers.
"""

import functools
import inspect
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from excitation_optax import RoutingCounts, count_active, metrics

E, C = 5, 3
PER_LAYER = (metrics.load_entropy, metrics.max_over_mean_load, metrics.dead_experts)

each_per_layer = pytest.mark.parametrize("metric", PER_LAYER, ids=lambda metric: metric.__name__)
fractions = st.lists(st.just(0.0) | st.floats(2**-20, 1, width=32), min_size=E, max_size=E)
generated = hypothesis.settings(max_examples=50, deadline=None)


@functools.cache
def compiled(metric):
    return jax.jit(metric)


def computed(metric, *args):
    return np.asarray(compiled(metric)(*(np.asarray(x, np.float32) for x in args)))


def assert_close(actual, expected):
    assert np.asarray(actual).dtype == np.float32
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-6)


def entropy_loop(weights):
    """The entropy, in nats, of one token's weights divided by their sum."""
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0)


# class_counts.


def test_class_counts_by_hand():
    active = jnp.array([[True, False], [True, True], [True, False], [False, True]])
    labels = jnp.array([0, 1, 1, 2])
    # expert 0: classes 0, 1, 1; expert 1: classes 1, 2
    assert_close(metrics.class_counts(active, labels, num_classes=4), [[1, 2, 0, 0], [0, 1, 1, 0]])


@pytest.mark.parametrize("label", [-1, 2, 100])
def test_a_label_out_of_range_leaves_the_sample_out(label):
    counts = metrics.class_counts(jnp.array([[True, True], [False, True]]), jnp.array([label, 1]), num_classes=2)
    assert_close(counts, [[0, 0], [0, 1]])


def test_class_counts_equal_a_loop_and_add_up_over_batches():
    random = np.random.default_rng(0)
    active, labels = random.random((50, E)) < 0.4, random.integers(0, C, 50)
    expected = np.zeros((E, C))
    for sample, label in enumerate(labels):
        expected[active[sample], label] += 1
    assert_close(metrics.class_counts(active, labels, C), expected)
    batches = [metrics.class_counts(active[part], labels[part], C) for part in (slice(0, 13), slice(13, 50))]
    assert_close(sum(batches), expected)


def test_class_counts_over_all_classes_are_the_routing_counts():
    random = np.random.default_rng(1)
    active, labels = random.random((50, E)) < 0.4, random.integers(0, C, 50)
    assert_close(metrics.class_counts(active, labels, C).sum(axis=-1), count_active(active).counts)


def test_no_samples_are_no_class_counts():
    assert_close(metrics.class_counts(jnp.zeros((0, E), bool), jnp.zeros(0, int), C), np.zeros((E, C)))


# specialization_score.


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]], 0.75),  # 1 and 1/2, the third is not active
        ([[7.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 1.0),  # one class each
        ([[5.0, 5.0, 5.0, 5.0]], 0.25),  # all 4 classes alike
        ([[1.0, 3.0]], 0.625),  # 1/16 + 9/16
        ([[1.0, 3.0], [2.0, 0.0]], 0.8125),  # (10/16 + 1) / 2
        ([[3.0], [0.0]], 1.0),  # a single class
    ],
)
def test_specialization_score_by_hand(counts, expected):
    assert_close(metrics.specialization_score(jnp.array(counts)), expected)
    assert_close(metrics.specialization_score(jnp.array(counts, jnp.int32)), expected)


def test_specialization_score_of_no_active_expert_is_nan():
    assert np.isnan(metrics.specialization_score(jnp.zeros((E, C))))


def score_loop(counts):
    active = [row for row in counts if row.sum() > 0]
    return sum(((row / row.sum()) ** 2).sum() for row in active) / len(active)


COUNTS = st.lists(st.integers(0, 100), min_size=E * C, max_size=E * C).filter(any)


@generated
@hypothesis.given(counts=COUNTS, factor=st.integers(1, 9))
def test_specialization_score_equals_a_loop_within_its_bounds(counts, factor):
    counts = np.array(counts, np.float32).reshape(E, C)
    score = computed(metrics.specialization_score, counts)
    assert_close(score, score_loop(counts))
    assert 1 / C - 1e-6 <= score <= 1 + 1e-6
    assert_close(computed(metrics.specialization_score, factor * counts), score)


@generated
@hypothesis.given(counts=COUNTS, experts=st.permutations(range(E)), classes=st.permutations(range(C)))
def test_specialization_score_ignores_the_order_of_experts_and_of_classes(counts, experts, classes):
    counts = np.array(counts).reshape(E, C)
    reordered = counts[np.ix_(experts, classes)]
    score = computed(metrics.specialization_score, counts)
    assert_close(computed(metrics.specialization_score, reordered), score)


def test_specialization_score_of_stacked_layers():
    stack = np.random.default_rng(0).integers(0, 4, (2, 3, E, C)).astype(np.float32)
    stack[1, 2] = 0
    expected = [[computed(metrics.specialization_score, counts) for counts in row] for row in stack]
    assert_close(metrics.specialization_score(stack), expected)
    assert np.isnan(expected[1][2])
    assert np.isfinite(np.ravel(expected)[:-1]).all()


# routing_entropy.


@pytest.mark.parametrize(
    ("weights", "where", "expected"),
    [
        ([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0]], None, math.log(2) / 2),  # 0 and log 2
        ([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0]], [False, True], math.log(2)),
        ([[1.0, 1.0, 1.0, 1.0]], None, math.log(4)),
        ([[1.0, 1.0], [0.0, 0.0]], None, math.log(2)),  # the second has no distribution, and is left out
        ([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]], [True, True, False], math.log(2)),
        ([1.0, 3.0], None, 2 * math.log(2) - 0.75 * math.log(3)),  # log 4 / 4 + 3 (log 4 - log 3) / 4
        ([[[1.0, 1.0]], [[5.0, 0.0]], [[0.0, 9.0]]], None, math.log(2) / 3),  # two token axes
    ],
)
def test_routing_entropy_by_hand(weights, where, expected):
    where = None if where is None else jnp.array(where)
    assert_close(metrics.routing_entropy(jnp.array(weights), where), expected)


@pytest.mark.parametrize(
    ("weights", "where"),
    [
        (np.zeros((2, 3)), None),  # no token has a distribution
        (np.ones((2, 3)), [False, False]),  # all are padding
        (np.zeros((2, 3)), [True, False]),
        (np.ones((0, 3)), None),  # no tokens
        ([[math.nan, 1.0], [1.0, 1.0]], None),
    ],
)
def test_routing_entropy_of_nothing_or_of_nan_is_nan(weights, where):
    where = None if where is None else jnp.array(where)
    assert np.isnan(metrics.routing_entropy(jnp.array(weights, jnp.float32), where))


def test_routing_entropy_ignores_nan_in_padding():
    weights = jnp.array([[math.nan, 1.0], [1.0, 1.0]])
    assert_close(metrics.routing_entropy(weights, jnp.array([False, True])), math.log(2))


@generated
@hypothesis.given(
    weights=st.lists(fractions, min_size=4, max_size=4),
    where=st.lists(st.booleans(), min_size=4, max_size=4),
    order=st.permutations(range(E)),
    factor=st.floats(2**-10, 2**10, width=32),
)
def test_routing_entropy_equals_a_loop_within_its_bounds(weights, where, order, factor):
    counted = [entropy_loop(w) for w, kept in zip(weights, where, strict=True) if kept and any(w)]
    weights, where = np.array(weights, np.float32), np.array(where)
    entropy = np.asarray(compiled(metrics.routing_entropy)(weights, where))
    if not counted:
        assert np.isnan(entropy)
        return
    assert_close(entropy, np.mean(counted))
    assert -1e-6 <= entropy <= math.log(E) + 1e-6
    assert_close(compiled(metrics.routing_entropy)(np.float32(factor) * weights[:, order], where), entropy)


@pytest.mark.parametrize("k", [1, 2, E])
def test_routing_entropy_of_k_retained_weights_is_at_most_log_k(k):
    weights = np.random.default_rng(0).random((20, E)).astype(np.float32)
    retained = np.where(weights >= np.sort(weights)[:, [-k]], weights, 0)
    assert computed(metrics.routing_entropy, retained) <= math.log(k) + 1e-6
    assert_close(computed(metrics.routing_entropy, np.sign(retained)), math.log(k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_routing_entropy_of_many_narrow_weights(dtype):
    # 70,001 tokens of log 8 each: more than float16 can add up, or bfloat16 count
    entropy = metrics.routing_entropy(jnp.ones((70_001, 8), dtype))
    np.testing.assert_allclose(float(entropy), math.log(8), rtol=5e-3)


# load_entropy, max_over_mean_load, dead_experts.


@pytest.mark.parametrize(
    ("u", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.5, 0.5, 0.0, 0.0], 0.5),  # log 2 / log 4
        ([0.0, 0.9, 0.0], 0.0),
        ([1.0, 1.0], 1.0),  # K = 2: utilization sums to 2
        ([0.25, 0.75], 2 - 0.75 * math.log2(3)),  # (2 log 2 - 3/4 log 3) / log 2
        ([0.0, 0.0, 0.0], math.nan),  # no load
        ([0.5], math.nan),  # one expert
        ([math.nan, 0.5], math.nan),
    ],
)
def test_load_entropy_by_hand(u, expected):
    assert_close(metrics.load_entropy(jnp.array(u)), expected)


@pytest.mark.parametrize(
    ("u", "expected"),
    [
        ([0.25, 0.75], 1.5),  # mean 1/2
        ([0.4, 0.4, 0.4], 1.0),
        ([0.0, 0.0, 0.0, 0.7], 4.0),  # mean 0.7/4
        ([0.5, 1.0, 0.5, 0.0], 2.0),  # mean 1/2
        ([0.0, 0.0], math.nan),  # no load
        ([math.nan, 0.5], math.nan),
    ],
)
def test_max_over_mean_load_by_hand(u, expected):
    assert_close(metrics.max_over_mean_load(jnp.array(u)), expected)


@pytest.mark.parametrize(
    ("u", "threshold", "expected"),
    [
        ([0.0, 0.5, 0.5, 0.0], 0.0, 0.5),
        ([0.1, 0.5, 0.5], 0.0, 0.0),
        ([0.0, 0.0], 0.0, 1.0),
        ([0.0, 0.125, 0.25, 0.5], 0.125, 0.5),  # up to the threshold, and at it
        ([0.0, 0.125, 0.25, 0.5], 1.0, 1.0),
        ([0.0, 0.5, 0.5, 0.0], -1.0, 0.0),
    ],
)
def test_dead_experts_by_hand(u, threshold, expected):
    assert_close(metrics.dead_experts(jnp.array(u), threshold), expected)


@generated
@hypothesis.given(u=fractions.filter(any))
def test_load_entropy_equals_a_loop_within_its_bounds(u):
    entropy = computed(metrics.load_entropy, u)
    assert_close(entropy, entropy_loop(u) / math.log(E))
    assert -1e-6 <= entropy <= 1 + 1e-6


@generated
@hypothesis.given(u=fractions.filter(any))
def test_max_over_mean_load_equals_numpy_within_its_bounds(u):
    load = computed(metrics.max_over_mean_load, u)
    assert_close(load, max(u) / np.mean(u))
    assert 1 - 1e-6 <= load <= E + 1e-5


@generated
@hypothesis.given(u=fractions)
def test_dead_experts_equal_a_count(u):
    assert_close(computed(metrics.dead_experts, u), u.count(0.0) / E)


@generated
@hypothesis.given(u=fractions, order=st.permutations(range(E)))
def test_load_ignores_the_order_of_the_experts(u, order):
    for metric in PER_LAYER:
        assert_close(computed(metric, np.array(u)[order]), computed(metric, u))


STACK = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.1, 0.5]], np.float32)


@each_per_layer
@pytest.mark.parametrize("shape", [(3, E), (1, 3, E), (3, 1, E)])
def test_stacked_layers_equal_one_layer_at_a_time(metric, shape):
    one_by_one = np.array([computed(metric, layer) for layer in STACK])
    assert_close(computed(metric, STACK.reshape(shape)), one_by_one.reshape(shape[:-1]))
    assert not np.isnan(one_by_one[[0, 2]]).any()  # the idle layer's NaN stays where it is


# Trees, counts and lists.

COUNTS = RoutingCounts(jnp.array([6.0, 2.0, 0.0, 0.0]), jnp.array(8.0))
LOAD = jnp.array([0.75, 0.25, 0.0, 0.0])


@each_per_layer
def test_load_takes_counts_lists_and_trees_of_them(metric):
    expected = computed(metric, LOAD)
    assert_close(metric(COUNTS), expected)
    assert_close(metric([6, 2, 0, 0]), expected)
    assert_close(metric([[6, 2, 0, 0], [6, 2, 0, 0]]), [expected, expected])
    tree = {"a": COUNTS, "b": [LOAD, None, (LOAD, LOAD[None])], "c": [0.75, 0.25, 0.0, 0.0]}
    measured = compiled(metric)(tree)
    shapes = {"a": (), "b": [(), None, ((), (1,))], "c": ()}
    assert jax.tree.map(jnp.shape, measured) == shapes
    assert_close(jnp.stack([x.ravel() for x in jax.tree.leaves(measured)]), np.full((5, 1), expected))


def test_the_threshold_holds_for_every_leaf():
    tree = {"a": COUNTS, "b": LOAD}
    assert jax.tree.map(float, metrics.dead_experts(tree, threshold=0.25)) == {"a": 0.75, "b": 0.75}
    assert metrics.dead_experts(threshold=0.25, utilization=LOAD) == 0.75  # any argument can be named


def test_the_other_metrics_take_trees_and_lists():
    active = {"a": jnp.array([[True, False], [True, True]]), "b": [[False, True], [True, True]]}
    counted = metrics.class_counts(active, [1, 0], num_classes=2)
    assert_close(counted["a"], [[1, 1], [1, 0]])  # expert 0: classes 1, 0; expert 1: class 0
    assert_close(counted["b"], [[1, 0], [1, 1]])
    score = metrics.specialization_score(counted)
    assert_close([score["a"], score["b"]], [0.75, 0.75])  # 1/2 and 1
    entropy = metrics.routing_entropy([jnp.eye(2), [[1, 1], [1, 0]]], where=[True, False])
    assert_close(entropy, [0, math.log(2)])


def test_integers_of_any_width_are_measured_in_float32():
    assert_close(metrics.load_entropy(jnp.array([200, 200, 0, 0], "uint8")), 0.5)
    assert_close(metrics.max_over_mean_load(RoutingCounts(jnp.array([100, 100], "int8"), jnp.array(100, "int8"))), 1)


# Errors.


LABELS = np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (functools.partial(metric, wrong), metric.__name__ + message)
            for metric in PER_LAYER
            for wrong, message in [
                (0.5, ": Utilization must be an array of numbers \\[..., E"),
                ("u", ": Utilization must be an array of numbers .*; got 'u'"),
                ({}, r" requires an array, or a tree with at least one; got \{\}"),
                ([], r" requires an array, or a tree with at least one; got \[\]"),
                (None, " requires an array, or a tree with at least one; got None"),
                ({"moe": [LOAD, LOAD[0]]}, r" at moe/1: .* \[..., E\]; got float32\[\]"),
                ({"moe": jax.ShapeDtypeStruct((4,), "float32")}, " at moe: Utilization must be an array of numbers"),
                ([[0.5, 0.5], [1.0]], ": Utilization must be an array of numbers"),
                (jnp.array([0.5, -0.5]), r": Utilization must not be negative; got float32\[2\] with the value -0.5"),
                (jax.random.key(0), ": Utilization must be an array of numbers"),
                (RoutingCounts(jnp.ones((2, 4)), jnp.ones(4)), r": Utilization has counts of shape \[2, 4\] and"),
                (RoutingCounts(-jnp.ones(2), -jnp.ones(())), r": Utilization must not be negative; got float32\[2\]"),
            ]
        ],
        (
            lambda: metrics.specialization_score(LOAD),
            r"counts must be an array of numbers \[..., E, C\]; got float32\[4\]",
        ),
        (lambda: metrics.specialization_score({"a": np.zeros((2, 0))}), r"score at a: .* got float\d+\[2, 0\]"),
        (lambda: metrics.specialization_score(COUNTS), "counts must be an array of numbers .*; got RoutingCounts"),
        (lambda: metrics.specialization_score({}), "specialization_score requires an array"),
        (lambda: metrics.routing_entropy(1.0), r"weights must be an array of numbers \[T..., E\]; got"),
        (lambda: metrics.routing_entropy(np.ones((3, 0))), r"weights must be an array of numbers \[T..., E\]; got"),
        (lambda: metrics.routing_entropy(COUNTS), "weights must be an array of numbers .*; got RoutingCounts"),
        (
            lambda: metrics.routing_entropy(np.ones((3, 2)), np.ones(3)),
            r"where must be an array of booleans .*; got float\d+\[3\]",
        ),
        (lambda: metrics.routing_entropy({"a": np.ones((3, 2))}, np.ones(4, bool)), r"at a: where bool\[4\] does not"),
        (
            lambda: metrics.class_counts(np.ones((3, 2)), LABELS, 2),
            r"active must be an array of booleans \[T, E\]; got float",
        ),
        (
            lambda: metrics.class_counts(np.ones(3, bool), LABELS, 2),
            r"active must be an array of booleans \[T, E\]; got bool\[3\]",
        ),
        (
            lambda: metrics.class_counts(np.ones((3, 2), bool), LABELS[:2], 2),
            r"labels must be \[T\] = \[3\], .* int32\[2\]",
        ),
        (
            lambda: metrics.class_counts(np.ones((3, 2), bool), np.zeros(3), 2),
            r"labels must be an array of integers .* got float",
        ),
        (
            lambda: metrics.class_counts(np.ones((3, 2), bool), LABELS, 2.0),
            "num_classes must be an integer, .* got 2.0",
        ),
        (lambda: metrics.class_counts([], LABELS, 2), "class_counts requires an array"),
    ],
)
def test_wrong_input_is_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_metric_is_public():
    functions = {name for name, value in vars(metrics).items() if inspect.isfunction(value) and name[0] != "_"}
    assert functions == set(metrics.__all__)
