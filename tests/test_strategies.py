"""The strategies against hand-worked numbers, the paper's equations in float64, and their documented properties.

Axis letters: E experts, L layers.
"""

import functools
import inspect
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import jax_versions
import numpy as np
import pytest
import strategy_table
from hypothesis import strategies as st

import excitation_optax
from excitation_optax import _strategies, exp_diff, global_exp, inverted, positive_sum, random_boost, zero_sum

E = 5  # one width for all generated layers, so that each strategy compiles once


def each(holds=lambda row: True):
    """Parametrizes a test with the rows for which `holds` is true."""
    rows = [row for row in strategy_table.ROWS if holds(row)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.strategy.__name__)


def is_random(row):
    return row.equation is None


each_strategy = each()
each_deterministic = each(lambda row: not is_random(row))
each_mean_one = each(lambda row: row.mean_one)


@functools.cache
def compiled(strategy):
    return jax.jit(strategy)


def phi(strategy, u, gamma, seed=0):
    """The excitation as NumPy float32, compiled; a random strategy receives the key of `seed`."""
    key = {"key": jax.random.key(seed)} if _strategies.is_random(strategy) else {}
    return np.asarray(compiled(strategy)(np.asarray(u, np.float32), np.float32(gamma), **key))


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def layers_of(element):
    return st.lists(element, min_size=E, max_size=E)


def generated(max_examples=50):
    return hypothesis.settings(max_examples=max_examples, deadline=None)


# FRACTIONS: those of a router, zero or at least a millionth. ANYTHING: every float32 in [0, 1].
FRACTIONS = layers_of(st.just(0.0) | st.floats(2**-20, 1, width=32))
POSITIVE_FRACTIONS = layers_of(st.floats(2**-20, 1, width=32))
ANYTHING = layers_of(st.sampled_from([0.0, 1.0, 1e-45, 1e-40, 2**-126]) | st.floats(0, 1, width=32))
GAMMAS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 10.0]) | st.floats(0, 10, width=32)


# The table.


def test_every_exported_strategy_has_a_row():
    """A strategy is a public function in _strategies.py whose first parameters are (utilization, gamma)."""
    public = [getattr(excitation_optax, name) for name in excitation_optax.__all__]
    functions = [f for f in public if inspect.isfunction(f) and f.__module__ == _strategies.__name__]
    exported = {f.__name__ for f in functions if list(inspect.signature(f).parameters)[:2] == ["utilization", "gamma"]}
    assert exported == set(strategy_table.NAMES)
    defined = {name for name, f in vars(_strategies).items() if inspect.isfunction(f) and "Phi" in (f.__doc__ or "")}
    assert defined - {"clipped"} == exported, "a strategy is not exported by excitation_optax/__init__.py"


@each_strategy
def test_a_row_is_random_if_its_strategy_is(row):
    assert is_random(row) == _strategies.is_random(row.strategy)


# Numbers worked by hand.


@pytest.mark.parametrize(
    ("row", "u", "gamma", "expected"),
    [(row, *numbers) for row in strategy_table.ROWS for numbers in row.by_hand],
    ids=lambda value: value.strategy.__name__ if isinstance(value, strategy_table.Row) else None,
)
def test_by_hand(row, u, gamma, expected):
    if is_random(row):
        assert_close(np.sort(row.strategy(jnp.array(u), gamma, key=jax.random.key(0))), expected)
    else:
        assert_close(row.strategy(jnp.array(u), gamma), expected)


@each_strategy
def test_every_row_has_numbers_by_hand(row):
    assert any(gamma != 1 for _, gamma, _ in row.by_hand)
    assert any(expected != len(u) * [1.0] for u, _, expected in row.by_hand)


# The paper's equations.


@each_deterministic
@generated(100)
@hypothesis.given(u=POSITIVE_FRACTIONS, gamma=GAMMAS)
def test_the_papers_equation(row, u, gamma):
    assert_close(phi(row.strategy, u, gamma), row.equation(np.array(u), gamma), rtol=3e-5)


@each(lambda row: not is_random(row) and row.at_zero)
@generated()
@hypothesis.given(u=FRACTIONS.filter(any), gamma=GAMMAS)
def test_the_papers_equation_with_idle_experts(row, u, gamma):
    assert_close(phi(row.strategy, u, gamma), row.equation(np.array(u), gamma), rtol=3e-5)


@generated()
@hypothesis.given(u=FRACTIONS, gamma=st.floats(0.25, 2.5, width=32))
def test_inverted_is_the_equations_limit_at_zero(u, gamma):
    # 1e-100 ** -2.5 = 1e250 fits into float64; the others get about (1e-100 / 2**-20) ** 0.25 = 1e-24.
    equation = next(row.equation for row in strategy_table.ROWS if row.strategy is inverted)
    limit = equation(np.maximum(np.array(u), 1e-100), gamma)
    assert_close(phi(inverted, u, gamma), limit, rtol=3e-5)


# Properties.


@each_mean_one
@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_mean_is_one(row, u, gamma):
    assert_close(phi(row.strategy, u, gamma).mean(), 1.0)


@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_positive_sum_is_zero_sum_but_never_below_one(u, gamma):
    np.testing.assert_array_equal(phi(positive_sum, u, gamma), np.maximum(phi(zero_sum, u, gamma), 1))


@each_strategy
@generated(100)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_finite_and_within_its_bounds(row, u, gamma):
    excitation = phi(row.strategy, u, gamma)
    assert np.isfinite(excitation).all()
    assert (excitation >= row.lowest * (1 - 1e-5)).all()
    assert (excitation <= row.highest(E, gamma) * (1 + 1e-5)).all()


@each_strategy
@generated(25)
@hypothesis.given(u=ANYTHING)
def test_gamma_zero_is_the_identity(row, u):
    np.testing.assert_array_equal(phi(row.strategy, u, 0.0), np.ones(E))


@each_strategy
@pytest.mark.parametrize("gamma", [0.0, 1.0, 10.0])
def test_a_layer_that_is_zero_everywhere_is_excited_by_one(row, gamma):
    np.testing.assert_array_equal(phi(row.strategy, np.zeros(E), gamma), np.ones(E))


@each_mean_one
@pytest.mark.parametrize("gamma", [0.5, 10.0])
@pytest.mark.parametrize("u", [1e-45, 1e-40, 2**-126, 0.2, 1.0])
def test_a_layer_that_is_the_same_everywhere_is_excited_by_one(row, gamma, u):
    assert_close(phi(row.strategy, np.full(E, u), gamma), np.ones(E))


@each_deterministic
@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS, order=st.permutations(range(E)))
def test_permuting_the_experts_permutes_the_excitation(row, u, gamma, order):
    u, order = np.array(u, np.float32), np.array(order)
    assert_close(phi(row.strategy, u[order], gamma), phi(row.strategy, u, gamma)[order])


@each(lambda row: row.scale_free)
@generated(25)
@hypothesis.given(u=FRACTIONS, gamma=GAMMAS, factor=st.floats(2**-20, 1, width=32))
def test_what_goes_by_ratios_does_not_change_with_the_scale(row, u, gamma, factor):
    u = np.array(u, np.float32)
    assert_close(phi(row.strategy, np.float32(factor) * u, gamma), phi(row.strategy, u, gamma), rtol=3e-5)


@each(lambda row: row.shift_free)
@generated(25)
@hypothesis.given(u=layers_of(st.floats(0, 0.5, width=32)), gamma=GAMMAS, shift=st.floats(0, 0.5, width=32))
def test_what_goes_by_differences_does_not_change_with_a_shift(row, u, gamma, shift):
    u = np.array(u, np.float32)
    assert_close(phi(row.strategy, np.float32(shift) + u, gamma), phi(row.strategy, u, gamma), rtol=3e-5)


def test_exp_diff_changes_with_the_scale():
    # exp 1, e against 1, e**2: the busy one gets 2e/(1 + e) = 1.46 and 2e**2/(1 + e**2) = 1.76
    assert_close(exp_diff(jnp.array([0.0, 0.5]), 2.0)[1], 2 * math.e / (1 + math.e))
    assert_close(exp_diff(jnp.array([0.0, 1.0]), 2.0)[1], 2 * math.e**2 / (1 + math.e**2))


@each(lambda row: row.order)
@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_busier_experts_get_no_less_or_no_more(row, u, gamma):
    u = np.sort(np.array(u, np.float32))
    assert (row.order * np.diff(phi(row.strategy, u, gamma)) >= -1e-5).all()


@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_global_exp_is_the_same_for_all_experts(u, gamma):
    assert np.ptp(phi(global_exp, u, gamma)) == 0


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("busy", [1e-30, 0.3, 1.0])
def test_the_only_busy_expert_gets_all_of_zero_sum_and_nothing_of_inverted(gamma, busy):
    one_hot = np.eye(E)[2]
    assert_close(phi(zero_sum, busy * one_hot, gamma), E * one_hot)
    assert_close(phi(inverted, busy * one_hot, gamma), E / (E - 1) * (1 - one_hot))  # the idle E - 1 share E


@each_deterministic
def test_larger_gamma_spreads_the_excitation_further(row):
    u = [0.1, 0.2, 0.4, 0.6, 0.7]
    highest = [phi(row.strategy, u, gamma).max() for gamma in (0.0, 0.5, 1.0, 2.0, 10.0)]
    assert (np.diff(highest) > 0).all()


# NaN: it must neither disappear nor spread to other layers.


@each_strategy
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("rest", [[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]], ids=["busy", "idle"])
def test_nan_stays_in_its_layer(row, gamma, rest):
    stack = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [*rest, math.nan], [0.0, 0.9, 0.0, 0.1, 0.5]])
    excitation = phi(row.strategy, stack, gamma)
    assert np.isnan(excitation[1]).all()
    np.testing.assert_array_equal(excitation[[0, 2]], phi(row.strategy, np.nan_to_num(stack), gamma)[[0, 2]])


@each_strategy
def test_nan_gamma_is_nan(row):
    assert np.isnan(phi(row.strategy, [0.1, 0.2, 0.3, 0.4, 0.5], math.nan)).all()


# Random boost.


@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS, seed=st.integers(0, 2**31 - 1))
def test_random_boost_is_a_permutation_of_zero_sum(u, gamma, seed):
    np.testing.assert_array_equal(np.sort(phi(random_boost, u, gamma, seed)), np.sort(phi(zero_sum, u, gamma)))


def test_random_boost_repeats_with_its_key_and_changes_with_another():
    u = np.arange(32) / 32  # two of the 32! orders do not agree by chance
    np.testing.assert_array_equal(phi(random_boost, u, 1.0, seed=3), phi(random_boost, u, 1.0, seed=3))
    assert not np.array_equal(phi(random_boost, u, 1.0, seed=3), phi(random_boost, u, 1.0, seed=4))
    assert not np.array_equal(phi(random_boost, u, 1.0, seed=3), phi(zero_sum, u, 1.0))


def test_random_boost_shuffles_stacked_layers_independently():
    shuffled = phi(random_boost, np.tile(np.arange(32) / 32, (3, 1)), 1.0)
    assert len(np.unique(shuffled, axis=0)) == 3
    np.testing.assert_array_equal(np.sort(shuffled), np.tile(np.sort(shuffled[0]), (3, 1)))


def test_random_boost_favours_no_expert():
    # 600 shuffles of a one-hot layer: each of E = 5 places is hit 120 times, with a standard deviation below 10
    boost = lambda key: random_boost(jnp.eye(E)[0], 1.0, key=key)
    hits = np.sum(jax.jit(jax.vmap(boost))(jax.random.split(jax.random.key(0), 600)) == E, axis=0)
    assert hits.sum() == 600
    assert (abs(hits - 120) < 50).all()


# Stacked layers, transformations and dtypes.

STACK = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.1, 0.5]], np.float32)


@each_deterministic
@pytest.mark.parametrize("shape", [(3, E), (1, 3, E), (3, 1, E)])
def test_stacked_layers_equal_one_layer_at_a_time(row, shape):
    one_by_one = np.stack([phi(row.strategy, layer, 2.0) for layer in STACK])
    np.testing.assert_allclose(phi(row.strategy, STACK.reshape(shape), 2.0), one_by_one.reshape(shape), rtol=1e-6)


@each_deterministic
def test_vmap_over_layers_with_a_gamma_each(row):
    gammas = np.array([0.5, 1.0, 2.0], np.float32)
    one_by_one = [phi(row.strategy, layer, gamma) for layer, gamma in zip(STACK, gammas, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(row.strategy))(STACK, gammas), one_by_one, rtol=1e-6)


@each_deterministic
@pytest.mark.parametrize("gamma", [2, np.float64(2), np.array(2), jnp.bfloat16(2)], ids=lambda g: type(g).__name__)
def test_gamma_of_any_type_gives_the_same_float32(row, gamma):
    excitation = row.strategy(STACK, gamma)
    assert excitation.dtype == jnp.float32
    np.testing.assert_array_equal(excitation, row.strategy(STACK, 2.0))


@each_strategy
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_utilization_is_computed_in_float32(row, dtype):
    key = {"key": jax.random.key(0)} if is_random(row) else {}
    narrow = jnp.asarray(STACK, dtype)
    excitation = compiled(row.strategy)(narrow, 1.5, **key)
    assert excitation.dtype == jnp.float32
    np.testing.assert_array_equal(excitation, compiled(row.strategy)(narrow.astype(jnp.float32), 1.5, **key))


@each_strategy
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_under_x64_float64_is_kept_and_nothing_else_widened(row, dtype):
    with jax_versions.enable_x64(True):
        key = {"key": jax.random.key(0)} if is_random(row) else {}
        excitation = jax.eval_shape(row.strategy, jnp.asarray(STACK, dtype), jnp.float32(1.5), **key)
        assert excitation.dtype == ("float64" if dtype == "float64" else "float32")


@each_deterministic
def test_float64_is_exact_to_float64(row):
    u = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    with jax_versions.enable_x64(True):
        np.testing.assert_allclose(row.strategy(jnp.asarray(u), 1.7), row.equation(u, 1.7), rtol=1e-13)


# clipped.


@pytest.mark.parametrize(
    ("strategy", "u", "maximum", "expected"),
    [
        (zero_sum, [0.0, 0.0, 0.0, 1.0], 2.5, [0.0, 0.0, 0.0, 2.5]),  # zero-sum 0, 0, 0, 4
        (zero_sum, [0.1, 0.2, 0.3], 1.25, [0.5, 1.0, 1.25]),  # zero-sum 0.5, 1, 1.5
        (positive_sum, [0.1, 0.2, 0.3], 1, [1.0, 1.0, 1.0]),  # 1 amplifies nothing
        (inverted, [0.0, 0.5, 0.5], 0.5, [0.5, 0.0, 0.0]),  # inverted 3, 0, 0
        (zero_sum, [0.1, 0.2, 0.3], 100.0, [0.5, 1.0, 1.5]),  # out of reach
    ],
)
def test_clipped_by_hand(strategy, u, maximum, expected):
    assert_close(excitation_optax.clipped(strategy, maximum)(jnp.array(u), 1.0), expected)


@pytest.mark.parametrize("maximum", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)], ids=lambda m: type(m).__name__)
def test_clipped_does_not_change_the_dtype(maximum):
    bounded = excitation_optax.clipped(zero_sum, maximum)
    one_hot = np.eye(E)[0]
    with jax_versions.enable_x64(True):
        for dtype in ("float32", "float64"):
            excitation = bounded(jnp.asarray(one_hot, dtype), 1.0)
            assert excitation.dtype == dtype
            assert excitation.max() == 2


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: excitation_optax.clipped(s, 3.0)], ids=["once", "twice"])
def test_clipped_random_boost_stays_random(wrap):
    bounded = wrap(excitation_optax.clipped(random_boost, 1.25))
    u, key = jnp.array([0.1, 0.2, 0.3]), jax.random.key(1)
    assert _strategies.is_random(bounded)
    np.testing.assert_array_equal(bounded(u, 1.0, key=key), jnp.minimum(random_boost(u, 1.0, key=key), 1.25))


def test_clipped_keeps_nan():
    assert np.isnan(excitation_optax.clipped(zero_sum, 2.0)(jnp.array([0.5, math.nan]), 1.0)).all()


def test_clipped_takes_any_strategy():
    halved = lambda u, gamma, factor: factor * zero_sum(u, gamma)
    bounded = excitation_optax.clipped(functools.partial(halved, factor=0.5), 0.75)  # a partial has no __name__
    assert_close(bounded(jnp.array([0.1, 0.2, 0.3]), 1.0), [0.25, 0.5, 0.75])
    assert not _strategies.is_random(bounded)


@pytest.mark.parametrize(
    "maximum", [0, 0.0, -1.0, math.inf, -math.inf, math.nan, 10**400, True, "2", None, 1j], ids=lambda m: repr(m)[:5]
)
def test_clipped_rejects_other_bounds(maximum):
    with pytest.raises(ValueError, match="clipped: maximum must be a finite number that is positive; got"):
        excitation_optax.clipped(zero_sum, maximum)


# is_random.

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("strategy", "random"),
    [
        (excitation_optax.clipped(zero_sum, 2.0), False),
        (lambda u, gamma, *, key: u, True),
        (lambda u, gamma, *, key=None: u, True),  # None stands for a key that is still missing
        (lambda u, gamma, *, key=KEY: u, False),
        (lambda u, gamma, **key: u, False),
        (functools.partial(random_boost, key=KEY), False),
        (functools.partial(lambda u, gamma, *, key, factor: u, factor=2.0), True),
        (excitation_optax.clipped(functools.partial(random_boost, key=KEY), 2.0), False),
        (jax.jit(zero_sum), False),
        (jax.jit(random_boost), True),
        (type, False),  # has no signature
    ],
)
def test_a_strategy_with_an_unbound_key_is_random(strategy, random):
    assert _strategies.is_random(strategy) is random


def test_a_bound_key_shuffles_in_the_same_order_at_every_step():
    strategy, u = functools.partial(random_boost, key=KEY), jnp.arange(1, 9) / 8
    tx = excitation_optax.scale_by_excitation(strategy)
    params = {"experts": jnp.ones(8)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, utilization={"experts": u})
        assert_close(updates["experts"], random_boost(u, 1.0, key=KEY))
    assert not jax.tree.leaves(state)


@pytest.mark.parametrize(
    "check", [_strategies.is_random, lambda s: excitation_optax.clipped(s, 2)], ids=["", "clipped"]
)
@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("zero_sum", "got 'zero_sum'. Pass a function such as excitation_optax.zero_sum, not its name"),
        (None, "got None"),
        (1.0, "got 1.0"),
        (lambda u: u, "<lambda>(u) cannot be called like this: too many positional arguments"),
        (lambda u, gamma, other: u, "missing a required argument: 'other'"),
        (functools.partial(zero_sum, gamma=2.0), "cannot be called like this"),
        (lambda u, *, key: u, "cannot be called like this: too many positional arguments"),
    ],
)
def test_what_is_no_strategy_is_rejected(check, strategy, message):
    with pytest.raises(ValueError, match=r"strategy must be a callable \(utilization, gamma\).*" + re.escape(message)):
        check(strategy)


# Values that cannot be utilization.


@each_strategy
@pytest.mark.parametrize(
    ("u", "message"),
    [
        (np.array([0.5, -0.25, math.nan], np.float32), r"must not be negative; got float32\[3\] with the value -0.25"),
        (jnp.array([0.5, -0.25], jnp.bfloat16), r"must not be negative; got bfloat16\[2\] with the value -0.25"),
        ([0.5, -0.25], "must not be negative"),
        (0.5, r"must be an array of numbers \[..., E\]; got"),
        (np.zeros((2, 0), np.float32), r"must be an array of numbers \[..., E\]; got float32\[2, 0\]"),
        ("u", r"must be an array of numbers \[..., E\]; got 'u'"),
    ],
)
def test_malformed_utilization_is_rejected(row, u, message):
    key = {"key": KEY} if is_random(row) else {}
    with pytest.raises(ValueError, match="Utilization " + message):
        row.strategy(u, 1.0, **key)


def test_values_that_cannot_be_read_are_not_checked():
    negative = jnp.array([0.5, -0.25])
    assert jax.jit(zero_sum)(negative, 1.0).shape == (2,)
    assert jax.eval_shape(zero_sum, negative, 1.0).shape == (2,)
    assert jax.vmap(zero_sum, in_axes=(0, None))(negative[None], 1.0).shape == (1, 2)


# Padded slots for experts.


def six_of_eight(utilization, gamma):
    """As the recipe for padded slots in docs/recipes.md."""
    excitation = positive_sum(utilization[..., :6], gamma)
    return jnp.concatenate([excitation, jnp.ones_like(utilization[..., 6:])], axis=-1)


def test_a_strategy_that_slices_leaves_padded_slots_out_of_the_mean():
    real = np.array([[0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]], np.float32)
    counts = excitation_optax.RoutingCounts(np.pad(real, [(0, 0), (0, 2)]) * 10, np.full(2, 10, np.float32))  # 2 layers
    phi = excitation_optax.excitation({"experts": counts}, six_of_eight)["experts"]
    # means 0.2 and 1/12: 1, 1, 1.5, 1, 1, 1.5 and 1, 1, 1, 1, 1, 6
    assert_close(phi, [[1, 1, 1.5, 1, 1, 1.5, 1, 1], [1, 1, 1, 1, 1, 6, 1, 1]])
    # the two idle slots lower the mean to 0.15: 0.2/0.15 = 4/3
    assert_close(positive_sum(counts.utilization, 1.0)[0], [1, 4 / 3, 2, 1, 4 / 3, 2, 1, 1])
