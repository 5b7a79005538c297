"""The MoE layer: against the loop of `moe_oracle`, padding, dtypes, transformations, what Excitation scales."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import moe_oracle
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import moe

D, F, E, K, T = 6, 5, 4, 2, 14
X = jax.random.normal(jax.random.key(1), (T, D))
DY = jax.random.normal(jax.random.key(2), (T, D), jnp.bfloat16).astype(jnp.float32)  # no rounding in bfloat16
WHERE = jnp.arange(T) % 5 != 3  # three tokens are padding
WEIGHTS = (0.7, 0.3)  # of the load-balancing loss and the z loss


def make(seed=0, **options):
    config = moe.MoEConfig(**{"d_model": D, "d_ff": F, "num_experts": E, "experts_per_token": K} | options)
    model = moe.MoE(config, rngs=nnx.Rngs(seed))
    # Biases start at zero, which would hide errors in them.
    for number, (path, param) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if path[-1].startswith("bias"):
            param[...] = 0.5 * jax.random.normal(jax.random.key(number), param.shape)
    return model


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, params, rest, x, where, key, weights):
    """Output, counts, losses, and the gradients of params and x for DY and the weighted losses."""

    def loss_fn(params, x):
        model = nnx.merge(graphdef, params, rest)
        y, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(x, where, key=key)
        losses = moe.auxiliary_losses(sown)
        weighted = weights[0] * losses.load_balancing + weights[1] * losses.router_z
        # In float32, so that this sum loses nothing if the layer is in bfloat16.
        return jnp.sum(DY * y.astype(jnp.float32)) + weighted, (y, utilization["experts"], losses)

    (_, aux), gradients = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(params, x)
    return *aux, nnx.to_pure_dict(gradients[0]), gradients[1]


def run(model, x=X, where=None, key=None, weights=WEIGHTS):
    return step(*nnx.split(model, nnx.Param, ...), x, where, key, weights)


@functools.partial(jax.jit, static_argnums=0)
def call(graphdef, params, x, where=None, key=None):
    """Output and counts."""
    y, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(x, where, key=key)
    return y, utilization["experts"]


def assert_agrees(model, where=None, normalize=True, capacity=None, tolerance=1e-5, x=X):
    y, counts, losses, d_params, dx = run(model, x, where)
    assert y.dtype == dx.dtype == x.dtype
    config = model.config
    of_router = {name: getattr(config, name) for name in ("scores", "num_groups", "groups_per_token", "gate_scale")}
    of_router |= {} if model.router.bias is None else {"bias": model.router.bias[...]}
    expected = moe_oracle.moe(params_of(model), x, config.experts_per_token, normalize, where, capacity, **of_router)
    expected_params, expected_x = expected.backward(DY, *WEIGHTS)
    moe_oracle.assert_close(y, expected.y, tolerance)
    moe_oracle.assert_close(d_params, expected_params, tolerance)
    moe_oracle.assert_close(dx, expected_x, tolerance)
    np.testing.assert_array_equal(counts.counts, expected.route.counts)
    assert int(counts.tokens) == (T if where is None else int(np.sum(where)))
    np.testing.assert_allclose(losses.load_balancing, expected.route.load_balancing, rtol=1e-5)
    np.testing.assert_allclose(losses.router_z, expected.route.router_z, rtol=1e-5)
    np.testing.assert_allclose(losses.entropy, expected.route.entropy, rtol=1e-5)


def test_the_oracle_has_the_gradients_of_finite_differences():
    x, dy, rng = moe_oracle.float64(X[:6]), moe_oracle.float64(DY[:6]), np.random.default_rng(0)
    for options, of_router in [
        ({}, {"normalize": True}),
        ({"gated": True, "num_shared_experts": 1}, {"normalize": False}),
        ({}, {"normalize": True, "scores": "sigmoid", "gate_scale": 2.5, "num_groups": 2}),
    ]:
        params = moe_oracle.float64(params_of(make(**options)))
        layer = functools.partial(moe_oracle.moe, choices=K, where=WHERE[:6], capacity=2, **of_router)

        def slope(params_at, x_at, layer=layer):
            """Of the loss, along a line."""
            ahead, behind = (layer(params_at(h), x_at(h)) for h in (1e-6, -1e-6))
            change = np.sum(dy * (ahead.y - behind.y))
            change += WEIGHTS[0] * (ahead.route.load_balancing - behind.route.load_balancing)
            return (change + WEIGHTS[1] * (ahead.route.router_z - behind.route.router_z)) / 2e-6

        d_params, dx = layer(params, x).backward(dy, *WEIGHTS)
        way = rng.normal(size=x.shape)
        along_x = slope(lambda h, params=params: params, lambda h, way=way: x + h * way)
        np.testing.assert_allclose(along_x, np.sum(dx * way), rtol=1e-6, atol=1e-7)
        for group, name, p in [(group, name, p) for group, leaves in params.items() for name, p in leaves.items()]:
            way = rng.normal(size=p.shape)
            moved = lambda h: params | {group: params[group] | {name: p + h * way}}  # noqa: B023
            expected = np.sum(d_params[group][name] * way)
            np.testing.assert_allclose(slope(moved, lambda h: x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "where", "normalize", "capacity"),
    [
        ({}, None, True, None),
        ({"normalize_gates": False, "backend": "dense"}, WHERE, False, None),
        ({"gated": True, "use_bias": False, "num_shared_experts": 2}, WHERE, True, None),
        ({"gated": True, "num_shared_experts": 1, "experts_per_token": 1}, None, False, None),
        ({"capacity_factor": 0.5, "num_shared_experts": 1}, WHERE, True, 4),  # 3.5 rows: masked tokens count for it
        ({"scores": "sigmoid", "gate_scale": 2.5}, WHERE, True, None),
        (
            {"scores": "sigmoid", "selection_bias": True, "normalize_gates": False, "gate_scale": 0.5},
            WHERE,
            False,
            None,
        ),
        ({"selection_bias": True, "num_groups": 2}, None, True, None),
        ({"num_experts": 12, "experts_per_token": 3, "num_groups": 4, "groups_per_token": 2}, WHERE, True, None),
        (
            {"scores": "sigmoid", "num_experts": 6, "num_groups": 3, "groups_per_token": 2, "selection_bias": True},
            WHERE,
            True,
            None,
        ),
    ],
)
def test_forward_and_backward_by_hand(options, where, normalize, capacity):
    assert_agrees(make(**options), where, normalize, capacity)


def test_bfloat16_by_hand():
    """The router is in float32, so routing is the same. Parameters are such that their cast loses nothing."""
    model = make(dtype=jnp.bfloat16, gated=True, num_shared_experts=1)
    for group in (model.experts, model.shared):
        for _, param in nnx.to_flat_state(nnx.state(group)):
            param[...] = param[...].astype(jnp.bfloat16).astype(jnp.float32)
    assert_agrees(model, WHERE, tolerance=2e-2, x=X.astype(jnp.bfloat16))


@pytest.mark.parametrize("choices", [1, 2])
def test_the_router_learns_from_the_gates(choices):
    *_, d_params, _ = run(make(experts_per_token=choices), weights=(0.0, 0.0))
    assert np.all(np.linalg.norm(d_params["router"]["kernel"], axis=0) > 1e-3)


def test_leading_axes_are_tokens():
    model = make()
    y, counts = call(*nnx.split(model), X, WHERE)
    folded, folded_counts = call(*nnx.split(model), X.reshape(2, 7, D), WHERE.reshape(2, 7))
    np.testing.assert_array_equal(folded, y.reshape(2, 7, D))
    np.testing.assert_array_equal(folded_counts.counts, counts.counts)
    one, _ = call(*nnx.split(model), X[0])
    np.testing.assert_allclose(one, y[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.1}])
def test_utilization_is_counted_before_any_drop(options):
    model = make(**options)
    chosen = np.argsort(-np.asarray(X @ model.router.kernel[...]), axis=1)[:, :K]
    y, counts = call(*nnx.split(model), X, WHERE)
    assert np.any(np.all(y[WHERE] == 0, axis=1)) == ("capacity_factor" in options)
    np.testing.assert_array_equal(counts.counts, np.bincount(chosen[WHERE].ravel(), minlength=E))
    np.testing.assert_allclose(jnp.sum(counts.utilization), K, rtol=1e-6)


def test_padding_changes_nothing():
    """Whatever stands there: outputs of tokens, zeros at padding, losses, counts, and all gradients."""
    model = make(num_shared_experts=1)
    expected = run(model, X, WHERE)
    np.testing.assert_array_equal(expected[0][~WHERE], np.zeros((3, D)))
    np.testing.assert_array_equal(expected[-1][~WHERE], np.zeros((3, D)))
    for padding in (0.0, 1e3, -1e6):
        got = run(model, jnp.where(WHERE[:, None], X, padding), WHERE)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("padding", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"num_shared_experts": 1}, {"backend": "dense"}, {"capacity_factor": 1.0}])
def test_padding_that_is_no_number_changes_nothing(options, padding):
    model = make(**options)
    expected = run(model, X, WHERE)
    got = run(model, jnp.where(WHERE[:, None], X, padding), WHERE)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_all_tokens_are_padding():
    y, counts, losses, d_params, dx = run(make(num_shared_experts=1), where=jnp.zeros(T, bool))
    assert float(counts.tokens) == float(losses.load_balancing) == float(losses.router_z) == 0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.zeros_like(leaf)), (y, counts, d_params, dx))


def test_auxiliary_losses_are_means_over_layers():
    model = nnx.Sequential(make(0), make(1))
    _, _, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(X)
    h, losses = X, []
    for layer in model.layers:
        expected = moe_oracle.moe(params_of(layer), h, K, normalize=True)
        losses.append((expected.route.load_balancing, expected.route.router_z, expected.route.entropy))
        h = expected.y
    np.testing.assert_allclose(moe.auxiliary_losses(sown), np.mean(losses, axis=0), rtol=1e-5)


def test_jitter_needs_a_key_in_training_and_is_off_in_evaluation():
    model = make(router_jitter=0.5)
    with pytest.raises(ValueError, match="router_jitter requires a key in training"):
        call(*nnx.split(model), X)
    first, again, other = (call(*nnx.split(model), X, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    model.eval()
    np.testing.assert_array_equal(call(*nnx.split(model), X)[0], call(*nnx.split(make()), X)[0])
    model.train()
    with pytest.raises(ValueError, match="router_jitter requires a key in training"):
        call(*nnx.split(model), X)


def test_evaluation_leaves_nothing_behind():
    model = make()
    before = jax.tree.structure(nnx.state(model))
    model.eval()
    model(X)
    assert jax.tree.structure(nnx.state(model)) == before


def test_capture_leaves_nothing_behind():
    model = make()
    before = jax.tree.structure(nnx.state(model))
    excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(X)
    assert jax.tree.structure(nnx.state(model)) == before


@pytest.mark.parametrize("gated", [False, True])
def test_no_two_experts_start_alike_and_each_has_the_variance_of_its_fan_in(gated):
    config = moe.MoEConfig(d_model=64, d_ff=128, num_experts=6, experts_per_token=2, gated=gated)
    params = params_of(moe.MoE(config, rngs=nnx.Rngs(0)))["experts"]
    for name, fan_in in {"kernel_in": 64, "kernel_gate": 64, "kernel_out": 128}.items():
        if name in params:
            kernel = np.asarray(params[name]).reshape(6, -1)
            assert len(np.unique(kernel[:, 0])) == 6
            assert np.max(np.abs(np.corrcoef(kernel) - np.eye(6))) < 0.05
            np.testing.assert_allclose(np.var(kernel, axis=1), 1 / fan_in, rtol=0.05)
    assert "kernel_gate" in params or not gated
    for name in ("bias_in", "bias_out"):
        np.testing.assert_array_equal(params[name], np.zeros_like(params[name]))
    if gated:
        assert not np.allclose(params["kernel_in"], params["kernel_gate"])
    other = params_of(moe.MoE(config, rngs=nnx.Rngs(1)))["experts"]
    assert not np.allclose(params["kernel_in"], other["kernel_in"])


def test_parameters_and_their_shapes():
    model = make(num_shared_experts=3, gated=True)
    shapes = jax.tree.map(jnp.shape, params_of(model), is_leaf=lambda x: isinstance(x, jax.Array))
    assert shapes["router"] == {"kernel": (D, E)}
    assert shapes["experts"] == {
        "kernel_in": (E, D, F),
        "kernel_gate": (E, D, F),
        "kernel_out": (E, F, D),
        "bias_in": (E, F),
        "bias_gate": (E, F),
        "bias_out": (E, D),
    }
    assert shapes["shared"] == {
        "kernel_in": (D, 3 * F),
        "kernel_gate": (D, 3 * F),
        "kernel_out": (3 * F, D),
        "bias_in": (3 * F,),
        "bias_gate": (3 * F,),
        "bias_out": (D,),
    }
    assert set(params_of(make(use_bias=False))["experts"]) == {"kernel_in", "kernel_out"}


def dots(jaxpr):
    """The types of operands and result of all matrix products, those in loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in (*eqn.invars[:2], eqn.outvars[0])), eqn.invars[1].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from dots(inner)


@pytest.mark.parametrize("backend", ["padded", "dense"])
def test_products_are_in_bfloat16_and_the_routers_in_float32(backend):
    model = make(dtype=jnp.bfloat16, backend=backend, num_shared_experts=2, use_bias=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(model))} == {jnp.dtype("float32")}
    graphdef, params = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda params, x: excitation_flax.capture_routing(nnx.merge(graphdef, params))(x)[0])
    products = set(dots(jaxpr(params, X).jaxpr))
    routers = {product for product in products if product[1] == (D, E)}
    combined = {product for product in products if backend == "dense" and product[1] == (E, T, D)}
    assert {types for types, _ in routers} == {("float32",) * 3}
    assert {types for types, _ in products - routers - combined} == {("bfloat16",) * 3}
    y, counts, _, d_params, dx = jax.eval_shape(functools.partial(run, model))
    assert y.dtype == dx.dtype == counts.counts.dtype == jnp.float32  # as x
    assert {leaf.dtype for leaf in jax.tree.leaves(d_params)} == {jnp.dtype("float32")}


def test_remat_counts_once():
    model = make()
    expected = run(model)

    class Rematted(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x, where=None, *, key=None):
            return nnx.remat(lambda layer, x: layer(x))(self.layer, x)

    @jax.jit
    def gradients(params):
        def loss_fn(params):
            run = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)
            y, utilization, sown = run(X)
            losses = moe.auxiliary_losses(sown)
            weighted = WEIGHTS[0] * losses.load_balancing + WEIGHTS[1] * losses.router_z
            return jnp.sum(DY * y) + weighted, (utilization["layer"]["experts"], losses)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    graphdef, params = nnx.split(Rematted(model))
    (_, (counts, losses)), d_params = gradients(params)
    np.testing.assert_array_equal(counts.counts, expected[1].counts)
    assert counts.tokens == T
    np.testing.assert_allclose(losses, expected[2], rtol=1e-6)
    moe_oracle.assert_close(nnx.to_pure_dict(d_params)["layer"], moe_oracle.float64(expected[3]), 1e-5)


def test_vmap_over_batches():
    model = make()
    graphdef, params = nnx.split(model)
    x = X.reshape(2, 7, D)
    y, of_each = jax.vmap(lambda x: call(graphdef, params, x))(x)
    expected, counts, *_ = run(model)
    np.testing.assert_allclose(y.reshape(T, D), expected, rtol=1e-5, atol=1e-6)
    assert of_each.counts.shape == (2, E)
    np.testing.assert_array_equal(of_each.counts.sum(axis=0), counts.counts)


def test_scan_over_layers():
    """Layers of stacked parameters, made by nnx.vmap; utilization comes out as `[L, E]`."""
    layers = [make(seed) for seed in range(3)]
    graphdef = nnx.split(layers[0])[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(layer)[1] for layer in layers))

    @jax.jit
    def scanned(stacked):
        def layer(h, params):
            y, utilization, sown = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)(h)
            return h + y, (utilization["experts"], moe.auxiliary_losses(sown))

        return jax.lax.scan(layer, X, stacked)

    y, (counts, losses) = scanned(stacked)
    h = moe_oracle.float64(X)
    for i, layer in enumerate(layers):
        expected = moe_oracle.moe(params_of(layer), h, K, normalize=True)
        h = h + expected.y
        np.testing.assert_array_equal(counts.counts[i], expected.route.counts)
        np.testing.assert_allclose(losses.load_balancing[i], expected.route.load_balancing, rtol=1e-5)
    moe_oracle.assert_close(y, h, 1e-5)


def test_excitation_scales_the_experts_and_neither_router_nor_shared():
    model = make(num_shared_experts=1, gated=True)
    params = nnx.state(model, nnx.Param)
    _, utilization = excitation_flax.capture_routing(model)(X)
    transform = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=model.expert_axis)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = transform.update(ones, transform.init(params), utilization=utilization)
    updates = nnx.to_pure_dict(updates)
    u = np.asarray(utilization["experts"].utilization)
    assert len(set(u)) > 1
    for update in updates["experts"].values():
        expected = np.broadcast_to((u / np.mean(u)).reshape((E,) + (1,) * (update.ndim - 1)), update.shape)
        np.testing.assert_allclose(update, expected, rtol=1e-6)
    for name in ("router", "shared"):
        jax.tree.map(lambda update: np.testing.assert_array_equal(update, np.ones_like(update)), updates[name])
    description = excitation_optax.describe(params, utilization, expert_axis=model.expert_axis)
    for parameter in description.parameters:
        of_experts = parameter.path.startswith("experts/")
        assert parameter.scaled_by == ("experts" if of_experts else None)
        assert parameter.axes == ((0,) if of_experts else ())
    assert sum(parameter.scaled_by is not None for parameter in description.parameters) == 6


SIZES = {"d_model": 4, "d_ff": 8, "num_experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"MoEConfig: {name} must be an integer of at least 1; got 0") for name in SIZES),
        ({"d_ff": -1}, "MoEConfig: d_ff must be an integer of at least 1; got -1"),
        ({"d_model": 4.0}, "MoEConfig: d_model must be an integer of at least 1; got 4.0"),
        ({"d_model": True}, "MoEConfig: d_model must be an integer of at least 1; got True"),
        ({"num_shared_experts": -1}, "MoEConfig: num_shared_experts must be an integer of at least 0; got -1"),
        ({"num_shared_experts": 1.5}, "MoEConfig: num_shared_experts must be an integer of at least 0; got 1.5"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, such as 1.25, or None .*got 0.0"),
        ({"capacity_factor": float("inf")}, "capacity_factor must be positive, such as 1.25, or None .*got inf"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be positive, such as 1.25, or None .*got nan"),
        ({"backend": "sparse"}, "backend must be one of padded, tokamax, dense, .*got 'sparse'"),
        ({"backend": "dense", "capacity_factor": 1.0}, "a capacity requires backend=\"padded\" or None; got 'dense'"),
        ({"dtype": jnp.int32}, "dtype must be a floating point type, such as jnp.bfloat16; got .*int32"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        moe.MoEConfig(**SIZES | options)


@pytest.mark.parametrize(
    ("x", "where", "message"),
    [
        (jnp.ones((3, 5)), None, r"MoE: x must be an array of floats \[..., 6\]; got float32\[3, 5\]"),
        (1.0, None, r"MoE: x must be an array of floats \[..., 6\]; got float32\[\]"),
        ([1.0, 2.0], None, r"MoE: x must be an array of floats \[..., 6\]; got float32\[2\]"),
        (jnp.ones((3, D), jnp.int32), None, r"MoE: x must be an array of floats \[..., 6\]; got int32\[3, 6\]"),
        (jnp.ones((2, 3, D)), jnp.ones((2, 4), bool), r"MoE: where must be .* booleans \[2, 3\]; got bool\[2, 4\]"),
        (jnp.ones((2, 3, D)), jnp.ones((6,), bool), r"MoE: where must be an array of booleans \[2, 3\]; got bool\[6\]"),
        (jnp.ones((3, D)), jnp.ones((3,), jnp.int32), r"MoE: where must be .* booleans \[3\]; got int32\[3\]"),
        (jnp.ones((3, D)), True, r"MoE: where must be an array of booleans \[3\]; got bool\[\]"),
    ],
)
def test_bad_inputs(x, where, message):
    with pytest.raises(ValueError, match=message):
        make()(x, where)


@pytest.mark.parametrize("options", [{}, {"backend": "dense"}, {"capacity_factor": 1.25}])
def test_numpy_arrays_and_lists_are_arrays(options):
    layer = make(**options)
    layer.eval()
    expected = layer(X, WHERE)
    np.testing.assert_array_equal(layer(np.asarray(X), np.asarray(WHERE)), expected)
    np.testing.assert_array_equal(layer(X.tolist(), WHERE.tolist()), expected)


def test_it_learns():
    """With Excitation and without. Two kinds of tokens, each with a linear map of its own."""
    keys = jax.random.split(jax.random.key(0), 3)
    kind = jnp.arange(64) % 2
    x = jax.random.normal(keys[0], (64, D)) + jnp.where(kind, 2.0, -2.0)[:, None]
    maps = jax.random.normal(keys[1], (2, D, D)) / D**0.5
    target = jnp.einsum("td,tde->te", x, maps[kind])
    graphdef, params = nnx.split(make(d_ff=16))

    @jax.jit
    def gradients(params):
        def loss_fn(params):
            run = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)
            y, utilization, sown = run(x)
            return jnp.mean((y - target) ** 2) + 0.01 * moe.auxiliary_losses(sown).load_balancing, utilization

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    sgd = optax.with_extra_args_support(optax.sgd(0.1))
    for tx in (sgd, optax.chain(sgd, excitation_optax.scale_by_excitation())):

        @jax.jit
        def update(params, state, d_params, utilization, tx=tx):
            updates, state = tx.update(d_params, state, params, utilization=utilization)
            return optax.apply_updates(params, updates), state

        trained, state, losses = params, tx.init(params), []
        for _ in range(50):
            (loss, utilization), d_params = gradients(trained)
            trained, state = update(trained, state, d_params, utilization)
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("sown", [{}, ({}, {}), nnx.State({})])
def test_auxiliary_losses_of_something_else(sown):
    with pytest.raises(
        ValueError, match=r"auxiliary_losses: nothing was sown. Pass the third result of capture_routing"
    ):
        moe.auxiliary_losses(sown)
