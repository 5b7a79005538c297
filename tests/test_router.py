"""The router: scores, selection and gates by hand, the selection bias and its updates, the losses' denominators."""

import functools

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from models import router

D, E, T = 6, 4, 14
X = jax.random.normal(jax.random.key(1), (T, D))
SIZES = {"d_model": D, "num_experts": E, "experts_per_token": 2}


def make(**options):
    return router.Router(router.RouterConfig(**SIZES | options), rngs=nnx.Rngs(0))


def route_logits(logits, bias=None, **options):
    """Routes one token with these logits."""
    options = {"d_model": 1, "num_experts": len(logits), "selection_bias": bias is not None} | options
    layer = make(**options)
    layer.kernel[...] = jnp.array([logits], jnp.float32)
    if bias is not None:
        layer.bias[...] = jnp.array(bias, jnp.float32)
    return layer(jnp.ones((1, 1)))


def counts_of(*loads, tokens=8.0):
    return excitation_optax.RoutingCounts(jnp.array(loads, jnp.float32), jnp.array(tokens))


# Scores and gates.

# exp gives 4, 2, 1, 1; softmax 1/2, 1/4, 1/8, 1/8; sigmoid 4/5, 2/3, 1/2, 1/2.
LOGITS = list(np.log([4, 2, 1, 1]))


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        ({}, [2 / 3, 1 / 3]),  # 1/2 and 1/4, over 3/4
        ({"normalize_gates": False}, [1 / 2, 1 / 4]),
        ({"experts_per_token": 1}, [1 / 2]),
        ({"experts_per_token": 1, "normalize_gates": True}, [1.0]),
        ({"scores": "sigmoid"}, [6 / 11, 5 / 11]),  # 12/15 and 10/15, over 22/15
        ({"scores": "sigmoid", "gate_scale": 2.5}, [15 / 11, 12.5 / 11]),
        ({"scores": "sigmoid", "normalize_gates": False}, [4 / 5, 2 / 3]),
        ({"scores": "sigmoid", "normalize_gates": False, "gate_scale": 0.5}, [2 / 5, 1 / 3]),
        ({"scores": "sigmoid", "experts_per_token": 1}, [4 / 5]),
    ],
)
def test_gates_by_hand(options, gates):
    routes = route_logits(LOGITS, **options)
    np.testing.assert_allclose(routes.gates[0], gates, rtol=1e-6)
    np.testing.assert_array_equal(routes.indices[0], [0, 1][: len(gates)])
    sigmoid = options.get("scores") == "sigmoid"
    # 24/30, 20/30, 15/30, 15/30, over 74/30
    p = np.array([24, 20, 15, 15]) / 74 if sigmoid else np.array([4, 2, 1, 1]) / 8
    np.testing.assert_allclose(routes.probabilities[0], p, rtol=1e-6)
    np.testing.assert_allclose(routes.logits[0], LOGITS, rtol=1e-6)
    assert (routes.gates.dtype, routes.indices.dtype, routes.probabilities.dtype) == ("float32", "int32", "float32")


@pytest.mark.parametrize(
    ("options", "indices", "gates"),
    [
        # Scores + bias: 4/5, 2/3, 7/10, 1/2. Gates are of the scores 4/5 and 1/2, over 13/10.
        ({"scores": "sigmoid", "bias": [0, 0, 0.2, 0]}, [0, 2], [8 / 13, 5 / 13]),
        # The bias decides the order too, and a negative one sends away: 0.3, 2/3, 1/2, 1/2
        ({"scores": "sigmoid", "bias": [-0.5, 0, 0, 0]}, [1, 2], [4 / 7, 3 / 7]),
        # Softmax + bias: 1/2, 1/4, 1/8, 5/8. Gates are of 1/8 and 1/2, over 5/8.
        ({"bias": [0, 0, 0, 0.5]}, [3, 0], [1 / 5, 4 / 5]),
    ],
)
def test_a_bias_changes_the_selection_and_not_the_gates(options, indices, gates):
    routes = route_logits(LOGITS, **options)
    np.testing.assert_array_equal(routes.indices[0], indices)
    np.testing.assert_allclose(routes.gates[0], gates, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({}, [0, 5]),
        # Best two of each group of two: 0.9 + 0.1, 0.6 + 0.6, 0.2 + 0.8
        ({"num_groups": 3, "groups_per_token": 1}, [2, 3]),
        ({"num_groups": 3, "groups_per_token": 2}, [0, 2]),  # ties within 1.0 and 1.0: the first group
        ({"num_groups": 3, "groups_per_token": 3}, [0, 5]),
        # Of each group of three: 0.9 + 0.6 = 1.5, 0.8 + 0.6 = 1.4; a bias turns that to 1.5, 1.8
        ({"num_groups": 2, "groups_per_token": 1}, [0, 2]),
        ({"num_groups": 2, "groups_per_token": 1, "bias": [0, 0, 0, 0.4, 0, 0]}, [3, 5]),
        ({"num_groups": 6, "groups_per_token": 2}, [0, 5]),  # a group of one is its expert
    ],
)
def test_groups_by_hand(options, indices):
    options = dict(options)
    bias = jnp.array(options.pop("bias", [0] * 6), jnp.float32)
    scores = jnp.array([[0.9, 0.1, 0.6, 0.6, 0.2, 0.8]])
    np.testing.assert_array_equal(router.select_experts(scores, 2, bias, **options), [indices])
    # All scores may be negative, after a bias: an excluded expert is still behind them.
    np.testing.assert_array_equal(router.select_experts(scores, 2, bias - 5, **options), [indices])


def test_scores_that_round_to_the_same_number_keep_their_order():
    np.testing.assert_array_equal(route_logits([30, 40, 50, 60], scores="sigmoid").indices, [[3, 2]])
    routes = route_logits([-300, -200, -201, -400], scores="sigmoid")
    np.testing.assert_array_equal(routes.indices, [[1, 2]])
    np.testing.assert_allclose(routes.gates, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]], rtol=1e-5)


def test_jitter_multiplies_the_input_by_1_minus_to_1_plus_jitter():
    layer = make(router_jitter=0.25, num_experts=2, experts_per_token=1)
    layer.kernel[...] = jnp.zeros((D, 2)).at[0, 0].set(1.0)
    noise = layer(jnp.ones((1000, D)), key=jax.random.key(0)).logits[:, 0]
    assert 0.7499 <= noise.min() < 0.76
    assert 1.24 < noise.max() <= 1.2501
    np.testing.assert_allclose(noise.mean(), 1, atol=0.02)


# The selection bias.


def test_a_bias_is_there_only_if_asked_for_and_no_optimizer_touches_it():
    assert set(nnx.to_pure_dict(nnx.state(make()))) == {"kernel"}
    layer = make(selection_bias=True)
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {"kernel"}
    layer.bias[...] = jnp.arange(4.0)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    kernel = layer.kernel[...]
    grads = nnx.grad(lambda layer: jnp.sum(layer(X).gates[:, 0]))(layer)
    optimizer.update(layer, grads)
    np.testing.assert_array_equal(layer.bias[...], jnp.arange(4.0))
    assert jnp.any(layer.kernel[...] != kernel)


def test_the_bias_has_no_gradient_where_a_loop_differentiates_the_whole_state():
    graphdef, state = nnx.split(make(selection_bias=True, scores="sigmoid", num_groups=2))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graphdef, state)(X).gates ** 2))(state)
    np.testing.assert_array_equal(gradient["bias"][...], np.zeros(E))
    assert np.all(np.any(gradient["kernel"][...] != 0, axis=0))


@pytest.mark.parametrize(
    ("bias", "loads", "expected"),
    [
        # The mean load is 4: + + - 0 gives 0.5, 0.5, -0.5, 0, less their mean 0.125.
        ([0.0] * 4, [1.0, 3.0, 8.0, 4.0], [0.375, 0.375, -0.625, -0.125]),
        ([1.0, 0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, -1.0]),  # an even load changes nothing
        ([3.0, 2.0, 2.0, 1.0], [0.0] * 4, [1.0, 0.0, 0.0, -1.0]),  # nor do no tokens; the mean 2 is removed
        # Two layers. In the second + + + - gives 0.5, 0.5, 0.5, -0.5, less their mean 0.25.
        (
            [[0.0] * 4] * 2,
            [[1.0, 3.0, 8.0, 4.0], [0.0, 0.0, 0.0, 8.0]],
            [[0.375, 0.375, -0.625, -0.125], [0.25] * 3 + [-0.75]],
        ),
    ],
)
def test_bias_updates_by_hand(bias, loads, expected):
    counts = excitation_optax.RoutingCounts(jnp.array(loads), jnp.sum(jnp.array(loads), axis=-1) / 2)
    updated = router.update_router_bias(jnp.array(bias), counts, 0.5)
    np.testing.assert_allclose(updated, expected, atol=1e-7)
    assert updated.dtype == jnp.float32


def test_bias_updates_take_the_sum_of_micro_batches():
    """A padded micro-batch counts for less: its loads are 3, 0, 0, 1, the other's 0, 4, 6, 6."""
    first, second = counts_of(3, 0, 0, 1, tokens=2), counts_of(0, 4, 6, 6, tokens=8)
    whole = counts_of(3, 4, 6, 7, tokens=10)  # mean 5: + + - -
    updated = router.update_router_bias(jnp.zeros(4), first + second, 1.0)
    np.testing.assert_array_equal(updated, [1, 1, -1, -1])
    np.testing.assert_array_equal(updated, router.update_router_bias(jnp.zeros(4), whole, 1.0))


def test_bias_updates_are_the_same_on_a_mesh():
    indices = jnp.asarray(moe_oracle.choose(32, 2, E, seed=0)) * jnp.array([1, 0], jnp.int32)[None]  # uneven
    where = jnp.arange(32) % 5 != 3

    def update(indices, where, axis_name=None):
        counts = excitation_optax.count_routing(indices, E, where)
        return router.update_router_bias(jnp.zeros(E), counts, 0.01, axis_name=axis_name)

    expected = update(indices, where)
    assert len(np.unique(expected)) > 1
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            arguments = jax.device_put((indices, where), jax.NamedSharding(mesh, jax.P("data")))
            np.testing.assert_array_equal(jax.jit(update)(*arguments), expected)
            mapped = jax.shard_map(
                functools.partial(update, axis_name="data"), in_specs=jax.P("data"), out_specs=jax.P()
            )
            np.testing.assert_array_equal(jax.jit(mapped)(*arguments), expected)


def test_updates_balance_a_collapsed_router_and_leave_the_gates_alone():
    """All tokens lean to two of eight experts; the bias spreads them without a change of any score."""
    layer = make(num_experts=8, scores="sigmoid", selection_bias=True)
    x = jax.random.normal(jax.random.key(0), (512, D)).at[:, 0].set(1.0)
    layer.kernel[0] = jnp.array([3.0, 3.0, 0, 0, 0, 0, 0, 0])
    loads, probabilities = [], layer(x).probabilities
    for _ in range(150):
        counts = excitation_optax.count_routing(layer(x).indices, 8)
        loads.append(float(counts.counts.max() / counts.counts.mean()))
        layer.bias[...] = router.update_router_bias(layer.bias[...], counts, 0.01)
    assert loads[0] > 3  # of 4 at most, E / K
    assert max(loads[-20:]) < 1.2
    np.testing.assert_array_equal(layer(x).probabilities, probabilities)
    np.testing.assert_allclose(jnp.sum(layer.bias[...]), 0, atol=1e-5)


# The losses.

P = jnp.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])


@pytest.mark.parametrize(
    ("indices", "where", "expected"),
    [
        # Expert 0 gets two of three tokens, 1 none, 2 one; the mean probabilities are 0.4, 4/15, 1/3.
        ([[0], [0], [2]], None, 3 * (2 / 3 * 0.4 + 1 / 3 * 1 / 3)),
        # K = 2: the shares of six assignments are 2/6, 3/6, 1/6.
        ([[0, 1], [0, 1], [2, 1]], None, 3 * (2 / 6 * 0.4 + 3 / 6 * 4 / 15 + 1 / 6 * 1 / 3)),
        # Without the last token: shares 1, 0, 0; the mean probability of expert 0 is 0.55.
        ([[0], [0], [2]], [True, True, False], 3 * 0.55),
        ([[0], [0], [2]], [False] * 3, 0.0),
    ],
)
def test_load_balancing_loss_by_hand(indices, where, expected):
    where = None if where is None else jnp.array(where)
    counts = excitation_optax.count_routing(jnp.array(indices), 3, where)
    loss = router.load_balancing_loss(counts, P, where)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("choices", [1, 2, 4])
def test_load_balancing_loss_is_1_at_even_load_and_e_over_k_at_collapse(choices):
    even = jnp.full((8, 4), 0.25)
    indices = (jnp.arange(8)[:, None] + jnp.arange(choices)[None]) % 4
    counts = excitation_optax.count_routing(indices, 4)
    np.testing.assert_allclose(router.load_balancing_loss(counts, even), 1, rtol=1e-6)
    collapsed = jnp.tile(jnp.where(jnp.arange(4) < choices, 1 / choices, 0.0)[None], (8, 1))
    counts = excitation_optax.count_routing(jnp.tile(jnp.arange(choices)[None], (8, 1)), 4)
    np.testing.assert_allclose(router.load_balancing_loss(counts, collapsed), 4 / choices, rtol=1e-6)


def test_router_z_loss_by_hand():
    z = jnp.log(jnp.array([[1.0, 2.0], [4.0, 4.0], [0.5, 0.5]]))
    # log 3, log 8, log 1
    np.testing.assert_allclose(router.router_z_loss(z), (np.log(3) ** 2 + np.log(8) ** 2) / 3, rtol=1e-6)
    loss = router.router_z_loss(z, jnp.array([True, False, True]))
    np.testing.assert_allclose(loss, np.log(3) ** 2 / 2, rtol=1e-6)
    assert router.router_z_loss(z, jnp.zeros(3, bool)) == 0
    np.testing.assert_allclose(router.router_z_loss(jnp.array([[3e38, 0.0]]) / 1e30), 9e16, rtol=1e-6)


def test_losses_of_unequal_micro_batches_add_up_to_those_of_the_batch():
    """Their gradients do too, given the counts and the tokens of the whole batch. Seven and three tokens are real."""
    layer = make(scores="sigmoid")
    graphdef, params = nnx.split(layer)
    where = jnp.arange(T) < jnp.where(jnp.arange(T) < 7, 7, 10)  # 7 and 3 tokens
    counts = excitation_optax.count_routing(layer(X).indices, E, where)

    @jax.jit
    @jax.value_and_grad
    def losses(params, rows):
        routes = nnx.merge(graphdef, params)(X[rows])
        options = {"where": where[rows], "tokens": counts.tokens}
        balancing = router.load_balancing_loss(counts, routes.probabilities, **options)
        return balancing + router.router_z_loss(routes.logits, **options)

    @jax.jit
    @jax.value_and_grad
    def whole(params):
        routes = nnx.merge(graphdef, params)(X)
        balancing = router.load_balancing_loss(counts, routes.probabilities, where)
        return balancing + router.router_z_loss(routes.logits, where)

    expected, gradient = whole(params)
    parts = [losses(params, rows) for rows in (jnp.arange(7), jnp.arange(7, 14))]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), expected, rtol=1e-6)
    total = parts[0][1]["kernel"][...] + parts[1][1]["kernel"][...]
    np.testing.assert_allclose(total, gradient["kernel"][...], rtol=1e-4, atol=1e-6)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token must be at most num_experts = 4; got 5"),
        ({"scores": "tanh"}, 'scores must be "softmax" or "sigmoid"; got \'tanh\''),
        ({"num_groups": 3}, "num_groups must divide num_experts; got 3 for 4"),
        ({"num_groups": 0}, "RouterConfig: num_groups must be an integer of at least 1; got 0"),
        ({"num_groups": 2, "groups_per_token": 3}, "groups_per_token must be at most num_groups = 2, .*; got 3"),
        ({"num_groups": 4}, "enough for experts_per_token = 2 of 4 experts; got 1"),
        ({"gate_scale": 0.0}, "gate_scale must be positive and finite; got 0.0"),
        ({"gate_scale": float("nan")}, "gate_scale must be positive and finite; got nan"),
        ({"router_jitter": 1.0}, "router_jitter must be at least 0 and below 1; got 1.0"),
        ({"router_jitter": -0.1}, "router_jitter must be at least 0 and below 1; got -0.1"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        router.RouterConfig(**SIZES | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make()(1.0), r"Router: x must be an array of floats \[T, 6\]; got float32\[\]"),
        (lambda: make()(jnp.ones((2, 3, D))), r"Router: x must be an array of floats \[T, 6\]; got float32\[2, 3, 6\]"),
        (lambda: make(router_jitter=0.1)(X), "router_jitter requires a key in training"),
        (
            lambda: router.update_router_bias(jnp.zeros(4), jnp.ones(4), 0.1),
            "update_router_bias: counts must be RoutingCounts; got ArrayImpl",
        ),
        (
            lambda: router.update_router_bias(jnp.zeros(3), counts_of(1, 2, 3, 4), 0.1),
            r"update_router_bias: bias must be an array of floats \[4\]; got float32\[3\]",
        ),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
