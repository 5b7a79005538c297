"""The strategies against hand-worked numbers, the paper's equations in float64, and what is promised of them.

Axis letters: E experts, L layers.
"""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import excitation_optax
from excitation_optax import _strategies, exp_diff, global_exp, inverted, positive_sum, random_boost, zero_sum

E = 5  # one width for all generated layers, so that each strategy compiles once
DETERMINISTIC = (zero_sum, positive_sum, exp_diff, global_exp, inverted)
ALL = (*DETERMINISTIC, random_boost)
# `[..., E]` of u and a scalar g in float64, word for word as the paper prints them.
EQUATIONS = {
    zero_sum: lambda u, g: u**g / np.mean(u**g, axis=-1, keepdims=True),
    positive_sum: lambda u, g: np.maximum(1.0, u**g / np.mean(u**g, axis=-1, keepdims=True)),
    exp_diff: lambda u, g: np.exp(g * u) / np.mean(np.exp(g * u), axis=-1, keepdims=True),
    global_exp: lambda u, g: (
        np.mean(np.exp(g * np.maximum(u - np.mean(u, axis=-1, keepdims=True), 0.0)), axis=-1, keepdims=True)
        * np.ones_like(u)
    ),
    inverted: lambda u, g: u**-g / np.mean(u**-g, axis=-1, keepdims=True),
}


@functools.cache
def compiled(strategy):
    return jax.jit(strategy)


def phi(strategy, u, gamma, seed=0):
    """The excitation as NumPy float32, compiled; a random strategy gets the key of `seed`."""
    key = {"key": jax.random.key(seed)} if strategy is random_boost else {}
    return np.asarray(compiled(strategy)(np.asarray(u, np.float32), np.float32(gamma), **key))


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def layers_of(element):
    return st.lists(element, min_size=E, max_size=E)


def generated(max_examples=50):
    return hypothesis.settings(max_examples=max_examples, deadline=None)


# Fractions as a router gives them (zero, or at least a millionth), and everything that float32 can hold in [0, 1].
FRACTIONS = layers_of(st.just(0.0) | st.floats(2**-20, 1, width=32))
POSITIVE_FRACTIONS = layers_of(st.floats(2**-20, 1, width=32))
ANYTHING = layers_of(st.sampled_from([0.0, 1.0, 1e-45, 1e-40, 2**-126]) | st.floats(0, 1, width=32))
GAMMAS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 10.0]) | st.floats(0, 10, width=32)

each_strategy = pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.__name__)
each_deterministic = pytest.mark.parametrize("strategy", DETERMINISTIC, ids=lambda s: s.__name__)
each_mean_one = pytest.mark.parametrize(
    "strategy", [zero_sum, exp_diff, inverted, random_boost], ids=lambda s: s.__name__
)


# Numbers worked by hand.


@pytest.mark.parametrize(
    ("u", "gamma", "expected"),
    [
        ([0.1, 0.2, 0.3], 1.0, [0.5, 1.0, 1.5]),  # mean 0.2
        ([0.1, 0.2, 0.3], 2.0, [3 / 14, 12 / 14, 27 / 14]),  # squares 1, 4, 9 hundredths, mean 14/3
        ([0.25, 1.0], 0.5, [2 / 3, 4 / 3]),  # roots 1/2, 1, mean 3/4
        ([0.5, 1.0], 3.0, [2 / 9, 16 / 9]),  # cubes 1/8, 8/8, mean 9/16
        ([0.5, 1.0], 10.0, [2 / 1025, 2048 / 1025]),  # 1/1024, 1, mean 1025/2048
        ([0.0, 0.5, 0.5, 1.0], 1.0, [0.0, 1.0, 1.0, 2.0]),  # mean 1/2
        ([0.0, 0.0, 0.0, 1.0], 2.0, [0.0, 0.0, 0.0, 4.0]),  # mean 1/4
        ([0.7], 3.0, [1.0]),  # one expert is its own mean
    ],
)
def test_zero_sum_by_hand(u, gamma, expected):
    assert_close(zero_sum(jnp.array(u), gamma), expected)


@pytest.mark.parametrize(
    ("u", "gamma", "expected"),
    [
        ([0.1, 0.2, 0.3], 1.0, [1.0, 1.0, 1.5]),  # zero-sum 0.5, 1, 1.5
        ([0.1, 0.2, 0.3], 2.0, [1.0, 1.0, 27 / 14]),  # zero-sum 3/14, 12/14, 27/14
        ([0.25, 1.0], 0.5, [1.0, 4 / 3]),  # zero-sum 2/3, 4/3
        ([0.0, 0.0, 0.0, 1.0], 5.0, [1.0, 1.0, 1.0, 4.0]),  # zero-sum 0, 0, 0, 4
    ],
)
def test_positive_sum_by_hand(u, gamma, expected):
    assert_close(positive_sum(jnp.array(u), gamma), expected)


@pytest.mark.parametrize(
    ("u", "gamma", "expected"),
    [
        ([0.0, 1.0], 1.0, [2 / (1 + math.e), 2 * math.e / (1 + math.e)]),  # exp 1, e, mean (1 + e)/2
        ([0.0, 0.5, 0.5], 2 * math.log(2), [0.6, 1.2, 1.2]),  # exp 1, 2, 2, mean 5/3
        ([0.5, 1.0], 2 * math.log(3), [0.5, 1.5]),  # exp 3, 9, mean 6
        ([0.2, 0.2, 0.2], 10.0, [1.0, 1.0, 1.0]),  # all alike
    ],
)
def test_exp_diff_by_hand(u, gamma, expected):
    assert_close(exp_diff(jnp.array(u), gamma), expected)


@pytest.mark.parametrize(
    ("u", "gamma", "expected"),
    [
        ([0.0, 1.0], 2 * math.log(3), 2.0),  # above the mean: 0, 1/2; exp 1, 3; mean 2
        ([0.1, 0.2, 0.3], 10.0, (2 + math.e) / 3),  # above the mean: 0, 0, 0.1; exp 1, 1, e
        ([0.2, 0.2, 0.2, 1.0], math.log(5) / 0.6, 2.0),  # above the mean 0.4: 0, 0, 0, 0.6; exp 1, 1, 1, 5
        ([0.3, 0.3], 7.0, 1.0),  # nobody is above the mean
    ],
)
def test_global_exp_by_hand(u, gamma, expected):
    assert_close(global_exp(jnp.array(u), gamma), [expected] * len(u))


@pytest.mark.parametrize(
    ("u", "gamma", "expected"),
    [
        ([0.1, 0.3], 1.0, [1.5, 0.5]),  # 1/u: 10, 10/3, mean 20/3
        ([0.5, 1.0], 2.0, [1.6, 0.4]),  # 4, 1, mean 5/2
        ([0.25, 1.0], 0.5, [4 / 3, 2 / 3]),  # 2, 1, mean 3/2
        ([0.2, 0.4, 0.4], 1.0, [1.5, 0.75, 0.75]),  # 5, 5/2, 5/2, mean 10/3
        ([0.0, 0.5, 0.5], 1.0, [3.0, 0.0, 0.0]),  # the idle one takes all
        ([0.0, 0.0, 0.4, 0.6], 2.0, [2.0, 2.0, 0.0, 0.0]),  # the idle two share all
    ],
)
def test_inverted_by_hand(u, gamma, expected):
    assert_close(inverted(jnp.array(u), gamma), expected)


@pytest.mark.parametrize(
    ("u", "gamma", "shuffled"),
    [
        ([0.3, 0.1, 0.2], 1.0, [0.5, 1.0, 1.5]),  # zero-sum, in ascending order
        ([1.0, 0.25], 0.5, [2 / 3, 4 / 3]),
    ],
)
def test_random_boost_by_hand(u, gamma, shuffled):
    assert_close(np.sort(random_boost(jnp.array(u), gamma, key=jax.random.key(0))), shuffled)


# The paper's equations.


@each_deterministic
@generated(100)
@hypothesis.given(u=POSITIVE_FRACTIONS, gamma=GAMMAS)
def test_the_papers_equation(strategy, u, gamma):
    assert_close(phi(strategy, u, gamma), EQUATIONS[strategy](np.array(u), gamma), rtol=3e-5)


@pytest.mark.parametrize("strategy", DETERMINISTIC[:4], ids=lambda s: s.__name__)
@generated()
@hypothesis.given(u=FRACTIONS.filter(any), gamma=GAMMAS)
def test_the_papers_equation_with_idle_experts(strategy, u, gamma):
    assert_close(phi(strategy, u, gamma), EQUATIONS[strategy](np.array(u), gamma), rtol=3e-5)


@generated()
@hypothesis.given(u=FRACTIONS, gamma=st.floats(0.25, 2.5, width=32))
def test_inverted_is_the_equations_limit_at_zero(u, gamma):
    # 1e-100 ** -2.5 = 1e250, which float64 holds; (1e-100 / 2**-20) ** 0.25 = 1e-24 is what is left to the others.
    limit = EQUATIONS[inverted](np.maximum(np.array(u), 1e-100), gamma)
    assert_close(phi(inverted, u, gamma), limit, rtol=3e-5)


# Properties.


@each_mean_one
@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_mean_is_one(strategy, u, gamma):
    assert_close(phi(strategy, u, gamma).mean(), 1.0)


@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_positive_sum_is_zero_sum_but_never_below_one(u, gamma):
    np.testing.assert_array_equal(phi(positive_sum, u, gamma), np.maximum(phi(zero_sum, u, gamma), 1))


@each_strategy
@generated(100)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_finite_and_within_its_bounds(strategy, u, gamma):
    lowest = 1.0 if strategy in (positive_sum, global_exp) else 0.0
    highest = math.exp(gamma) if strategy is global_exp else E
    excitation = phi(strategy, u, gamma)
    assert np.isfinite(excitation).all()
    assert (excitation >= lowest * (1 - 1e-5)).all()
    assert (excitation <= highest * (1 + 1e-5)).all()


@each_strategy
@generated(25)
@hypothesis.given(u=ANYTHING)
def test_gamma_zero_is_the_identity(strategy, u):
    np.testing.assert_array_equal(phi(strategy, u, 0.0), np.ones(E))


@each_strategy
@pytest.mark.parametrize("gamma", [0.0, 1.0, 10.0])
def test_a_layer_that_is_zero_everywhere_is_excited_by_one(strategy, gamma):
    np.testing.assert_array_equal(phi(strategy, np.zeros(E), gamma), np.ones(E))


@each_mean_one
@pytest.mark.parametrize("gamma", [0.5, 10.0])
@pytest.mark.parametrize("u", [1e-45, 1e-40, 2**-126, 0.2, 1.0])
def test_a_layer_that_is_the_same_everywhere_is_excited_by_one(strategy, gamma, u):
    assert_close(phi(strategy, np.full(E, u), gamma), np.ones(E))


@each_deterministic
@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS, order=st.permutations(range(E)))
def test_permuting_the_experts_permutes_the_excitation(strategy, u, gamma, order):
    u, order = np.array(u, np.float32), np.array(order)
    assert_close(phi(strategy, u[order], gamma), phi(strategy, u, gamma)[order])


@pytest.mark.parametrize("strategy", [zero_sum, positive_sum, inverted], ids=lambda s: s.__name__)
@generated(25)
@hypothesis.given(u=FRACTIONS, gamma=GAMMAS, factor=st.floats(2**-20, 1, width=32))
def test_power_laws_do_not_change_with_the_scale(strategy, u, gamma, factor):
    assert_close(phi(strategy, np.float32(factor) * np.array(u, np.float32), gamma), phi(strategy, u, gamma), rtol=3e-5)


@generated(25)
@hypothesis.given(u=layers_of(st.floats(0, 0.5, width=32)), gamma=GAMMAS, shift=st.floats(0, 0.5, width=32))
def test_exp_diff_does_not_change_with_a_shift(u, gamma, shift):
    assert_close(phi(exp_diff, np.float32(shift) + np.array(u, np.float32), gamma), phi(exp_diff, u, gamma), rtol=3e-5)


def test_exp_diff_changes_with_the_scale():
    # exp 1, e against 1, e**2: the busy one gets 2e/(1 + e) = 1.46 and 2e**2/(1 + e**2) = 1.76
    assert_close(exp_diff(jnp.array([0.0, 0.5]), 2.0)[1], 2 * math.e / (1 + math.e))
    assert_close(exp_diff(jnp.array([0.0, 1.0]), 2.0)[1], 2 * math.e**2 / (1 + math.e**2))


@pytest.mark.parametrize(
    ("strategy", "sign"),
    [(zero_sum, 1), (positive_sum, 1), (exp_diff, 1), (inverted, -1)],
    ids=["zero_sum", "positive_sum", "exp_diff", "inverted"],
)
@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_busier_experts_get_no_less_and_from_inverted_no_more(strategy, sign, u, gamma):
    u = np.sort(np.array(u, np.float32))
    assert (sign * np.diff(phi(strategy, u, gamma)) >= -1e-5).all()


@generated(25)
@hypothesis.given(u=ANYTHING, gamma=GAMMAS)
def test_global_exp_is_the_same_for_all_experts(u, gamma):
    assert np.ptp(phi(global_exp, u, gamma)) == 0


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("busy", [1e-30, 0.3, 1.0])
def test_zero_sum_gives_everything_to_the_only_busy_expert(gamma, busy):
    assert_close(phi(zero_sum, busy * np.eye(E)[2], gamma), E * np.eye(E)[2])


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_inverted_gives_nothing_to_the_only_busy_expert(gamma):
    # the idle E - 1 share E
    assert_close(phi(inverted, np.eye(E)[2], gamma), E / (E - 1) * (1 - np.eye(E)[2]))


@each_deterministic
def test_larger_gamma_spreads_the_excitation_further(strategy):
    u = [0.1, 0.2, 0.4, 0.6, 0.7]
    highest = [phi(strategy, u, gamma).max() for gamma in (0.0, 0.5, 1.0, 2.0, 10.0)]
    assert (np.diff(highest) > 0).all()


# NaN, which must not be hidden, nor spread.


@each_strategy
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("rest", [[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]], ids=["busy", "idle"])
def test_nan_stays_in_its_layer(strategy, gamma, rest):
    stack = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [*rest, math.nan], [0.0, 0.9, 0.0, 0.1, 0.5]])
    excitation = phi(strategy, stack, gamma)
    assert np.isnan(excitation[1]).all()
    np.testing.assert_array_equal(excitation[[0, 2]], phi(strategy, np.nan_to_num(stack), gamma)[[0, 2]])


@each_strategy
def test_nan_gamma_is_nan(strategy):
    assert np.isnan(phi(strategy, [0.1, 0.2, 0.3, 0.4, 0.5], math.nan)).all()


# Random boost.


@generated()
@hypothesis.given(u=ANYTHING, gamma=GAMMAS, seed=st.integers(0, 2**31 - 1))
def test_random_boost_is_a_permutation_of_zero_sum(u, gamma, seed):
    np.testing.assert_array_equal(np.sort(phi(random_boost, u, gamma, seed)), np.sort(phi(zero_sum, u, gamma)))


def test_random_boost_repeats_with_its_key_and_changes_with_another():
    u = np.arange(32) / 32  # that two of the 32! orders agree by chance is out of the question
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
def test_stacked_layers_equal_one_layer_at_a_time(strategy, shape):
    one_by_one = np.stack([phi(strategy, layer, 2.0) for layer in STACK])
    np.testing.assert_allclose(phi(strategy, STACK.reshape(shape), 2.0), one_by_one.reshape(shape), rtol=1e-6)


@each_deterministic
def test_vmap_over_layers_with_a_gamma_each(strategy):
    gammas = np.array([0.5, 1.0, 2.0], np.float32)
    one_by_one = [phi(strategy, layer, gamma) for layer, gamma in zip(STACK, gammas, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(strategy))(STACK, gammas), one_by_one, rtol=1e-6)


@each_deterministic
@pytest.mark.parametrize(
    "gamma", [2, np.float64(2), np.array(2), jnp.array(2), jnp.bfloat16(2)], ids=lambda g: type(g).__name__
)
def test_gamma_of_any_type_gives_the_same_float32(strategy, gamma):
    excitation = strategy(STACK, gamma)
    assert excitation.dtype == jnp.float32
    np.testing.assert_array_equal(excitation, strategy(STACK, 2.0))


@each_strategy
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_utilization_is_computed_in_float32(strategy, dtype):
    key = {"key": jax.random.key(0)} if strategy is random_boost else {}
    narrow = jnp.asarray(STACK, dtype)
    excitation = compiled(strategy)(narrow, 1.5, **key)
    assert excitation.dtype == jnp.float32
    np.testing.assert_array_equal(excitation, compiled(strategy)(narrow.astype(jnp.float32), 1.5, **key))


@each_strategy
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_under_x64_float64_is_kept_and_nothing_else_widened(strategy, dtype):
    with jax.enable_x64(True):
        key = {"key": jax.random.key(0)} if strategy is random_boost else {}
        excitation = jax.eval_shape(strategy, jnp.asarray(STACK, dtype), jnp.float32(1.5), **key)
        assert excitation.dtype == ("float64" if dtype == "float64" else "float32")


@each_deterministic
def test_float64_is_exact_to_float64(strategy):
    u = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    with jax.enable_x64(True):
        np.testing.assert_allclose(strategy(jnp.asarray(u), 1.7), EQUATIONS[strategy](u, 1.7), rtol=1e-13)


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
    with jax.enable_x64(True):
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


def test_clipped_takes_any_callable():
    halved = functools.partial(zero_sum, gamma=0.5)  # has no __name__
    bounded = excitation_optax.clipped(lambda u, gamma: halved(u) * gamma, 1.0)
    assert_close(bounded(jnp.array([0.25, 1.0]), 1.0), [2 / 3, 1.0])
    assert not _strategies.is_random(excitation_optax.clipped(halved, 1.0))


@pytest.mark.parametrize("maximum", [0, 0.0, -1.0, math.inf, -math.inf, math.nan, "2", None, 1j])
def test_clipped_rejects_what_is_no_bound(maximum):
    with pytest.raises(ValueError, match="clipped: maximum must be a positive finite number; got"):
        excitation_optax.clipped(zero_sum, maximum)


# is_random.


@pytest.mark.parametrize(
    ("strategy", "random"),
    [
        *((strategy, strategy is random_boost) for strategy in ALL),
        (excitation_optax.clipped(zero_sum, 2.0), False),
        (lambda u, gamma, *, key: u, True),
        (jax.jit(zero_sum), False),
        (jax.jit(random_boost), True),
        (type, False),  # has no signature
    ],
)
def test_a_strategy_with_a_key_is_random(strategy, random):
    assert _strategies.is_random(strategy) is random


@pytest.mark.parametrize("strategy", ["zero_sum", None, 1.0])
def test_a_strategy_must_be_callable(strategy):
    with pytest.raises(ValueError, match=r"strategy must be a callable .* got .*not its name"):
        _strategies.is_random(strategy)
