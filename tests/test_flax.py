"""The bridge to Flax NNX and Linen."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import excitation_optax
from excitation_optax import flax as excitation_flax


class Neurons(nnx.Linear):
    """Two inputs, three neurons; sows which were positive."""

    def __call__(self, x):
        h = nnx.relu(super().__call__(x))
        excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
        return h


class Model(nnx.Module):
    def __init__(self, rngs, calls=1):
        self.layers = nnx.List([Neurons(2, 3, rngs=rngs), Neurons(3, 3, rngs=rngs)])
        self.head = nnx.Linear(3, 1, rngs=rngs)
        self.calls = calls

    def __call__(self, x):
        for _ in range(self.calls):
            h = self.layers[0](x)
        return self.head(self.layers[1](h))

    def encode(self, x):
        return self.layers[0](x)


X = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, -2.0], [3.0, 1.0]])


def expected_counts(model, x=X):
    h = jnp.maximum(x @ model.layers[0].kernel[...] + model.layers[0].bias[...][None], 0)
    return np.sum(h > 0, axis=0)


def test_capture_returns_output_and_counts_and_leaves_nothing_behind():
    model = Model(nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(model))
    output, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, expected_counts(model))
    assert utilization["layers"][1].tokens == 4
    assert set(utilization) == {"layers"}
    assert jax.tree.structure(nnx.state(model)) == before
    again, _ = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(output, again)


def test_capture_of_a_method_and_of_a_function():
    model = Model(nnx.Rngs(0))
    _, of_method = excitation_flax.capture_routing(model.encode)(X)
    assert set(of_method["layers"]) == {0}
    _, of_function = excitation_flax.capture_routing(lambda model, x: model(2 * x) + 1)(model, X)
    assert set(of_function["layers"]) == {0, 1}


def test_several_calls_of_a_layer_add_up():
    _, once = excitation_flax.capture_routing(Model(nnx.Rngs(0)))(X)
    _, twice = excitation_flax.capture_routing(Model(nnx.Rngs(0), calls=2))(X)
    chex.assert_trees_all_equal(twice["layers"][0], once["layers"][0] + once["layers"][0])
    chex.assert_trees_all_equal(twice["layers"][1], once["layers"][1])


def test_plain_sow_of_flax_is_understood():
    class Plain(nnx.Linear):
        def __call__(self, x):
            self.sow(excitation_flax.Routing, "load", excitation_optax.count_active(x > 0))
            return super().__call__(x)

    model = nnx.Sequential(Plain(2, 2, rngs=nnx.Rngs(0)))
    _, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, [2, 3])


def test_a_root_module_of_experts_only():
    _, utilization = excitation_flax.capture_routing(Neurons(2, 3, rngs=nnx.Rngs(0)))(X)
    assert isinstance(utilization, excitation_optax.RoutingCounts)


class AuxiliaryLoss(nnx.Variable):
    pass


def test_other_variable_types_are_recorded_on_request():
    class WithLoss(Model):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(AuxiliaryLoss, "loss", jnp.mean(y))
            return y

    model = WithLoss(nnx.Rngs(0))
    output, utilization, losses = excitation_flax.capture_routing(model, AuxiliaryLoss)(X)
    assert utilization["layers"][0].tokens == 4
    np.testing.assert_array_equal(losses["loss"].get_value()[0], jnp.mean(output))


def test_a_call_that_fails_leaves_nothing_behind_either():
    model = Model(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    for call in (model, model.encode, lambda model, x: model(x)):
        args = (model,) if call not in (model, model.encode) else ()
        with pytest.raises(TypeError, match="dot_general"):
            excitation_flax.capture_routing(call)(*args, jnp.ones((4, 7)))
        assert nnx.graphdef(model) == graphdef
    _, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, expected_counts(model))


def test_routing_that_an_inner_capture_would_swallow_is_an_error():
    class Tapped(Model):
        def __call__(self, x):
            return nnx.capture(self.layers[1], nnx.Intermediate)(self.layers[0](x))[0]

    with pytest.raises(ValueError, match="routing of a Neurons would be lost"):
        excitation_flax.capture_routing(Tapped(nnx.Rngs(0)))(X)


def test_pop_takes_what_calls_left_and_leaves_nothing():
    model = Model(nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(model))
    model(X)
    np.testing.assert_array_equal(excitation_flax.pop_routing(model)["layers"][0].counts, expected_counts(model))
    assert jax.tree.structure(nnx.state(model)) == before
    model(X)
    model(X)  # nobody popped in between: counts double, as documented
    assert excitation_flax.pop_routing(model)["layers"][0].tokens == 8
    with pytest.raises(ValueError, match="no routing"):
        excitation_flax.pop_routing(model)


def test_pop_inside_nnx_jit_and_grad():
    model = Model(nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x)))(model)
        return grads, excitation_flax.pop_routing(model)

    _, utilization = step(model, X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, expected_counts(model))


def test_capture_inside_grad_jit_and_vmap():
    model = Model(nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss_fn(params, x):
        output, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(x)
        return jnp.mean(output), utilization

    _, utilization = jax.jit(jax.grad(loss_fn, has_aux=True))(params, X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, expected_counts(model))
    stacked = jax.vmap(lambda x: loss_fn(params, x)[1])(jnp.stack([X, -X]))
    np.testing.assert_array_equal(stacked["layers"][0].counts[1], expected_counts(model, -X))


def test_nnx_optimizer_takes_utilization_as_it_is():
    model = Model(nnx.Rngs(0))
    kernels = [layer.kernel[...] for layer in model.layers] + [model.head.kernel[...]]
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=-1)
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1.0), excitation), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            output, utilization = excitation_flax.capture_routing(model)(X)
            return jnp.mean(output**2), utilization

        grads, utilization = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, utilization=utilization)
        return grads, utilization

    grads, utilization = step(model, optimizer)
    for number in range(2):
        u = utilization["layers"][number].utilization
        expected = kernels[number] - grads.layers[number].kernel[...] * (u / jnp.mean(u))[None]
        np.testing.assert_allclose(model.layers[number].kernel[...], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.head.kernel[...], kernels[2] - grads.head.kernel[...], rtol=1e-6)


class Quiet(nnx.Module):
    """A model whose layer heeds model.eval()."""

    def __init__(self, rngs):
        self.neurons = Neurons(2, 3, rngs=rngs)
        self.neurons.deterministic = False
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.neurons(x))


def test_in_evaluation_calls_leave_nothing_behind_and_capture_still_counts():
    model = Quiet(nnx.Rngs(0))
    model.eval()
    before = jax.tree.structure(nnx.state(model))
    output = model(X)
    for call in (nnx.jit(lambda m, x: m(x)), nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))):
        np.testing.assert_allclose(call(model, X), output, rtol=1e-6)
    assert jax.tree.structure(nnx.state(model)) == before
    _, utilization = excitation_flax.capture_routing(model)(X)
    assert utilization["neurons"].tokens == 4
    model.train()
    model(X)
    assert excitation_flax.pop_routing(model)["neurons"].tokens == 4


def test_a_model_that_jit_closed_over_runs_but_cannot_be_recorded():
    model = Model(nnx.Rngs(0))
    expected, _ = excitation_flax.capture_routing(model)(X)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: model(x[None])[0])(X), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"nnx.jit, or by nnx.split outside and nnx.merge inside"):
        jax.jit(lambda x: excitation_flax.capture_routing(model)(x)[0])(X)


class OneModule(nnx.Module):
    """Experts beside their router, and one in a submodule's submodule."""

    def __init__(self, rngs):
        self.router = nnx.Param(rngs.params.normal((2, 3)))
        self.w = nnx.Param(jnp.ones((3, 2)))
        self.mlps = nnx.Dict(up=nnx.Linear(2, 3, rngs=rngs), norm=nnx.Linear(2, 3, rngs=rngs))

    def __call__(self, x):
        counts = excitation_optax.count_logits(x @ self.router[...], experts_per_token=2)
        excitation_flax.sow_routing(self, counts, "w", "mlps/up")
        return x


def test_names_say_what_in_a_module_is_experts():
    model = nnx.Sequential(OneModule(nnx.Rngs(0)), OneModule(nnx.Rngs(1)))
    _, captured = excitation_flax.capture_routing(model)(X)
    model(X)
    chex.assert_trees_all_equal(captured, excitation_flax.pop_routing(model))
    chosen = np.argsort(-(X @ model.layers[0].router[...]))[:, :2]
    counts = captured["layers"][0]["{w,mlps/up}"]  # one layer, of two children
    np.testing.assert_array_equal(counts.counts, np.bincount(chosen.reshape(-1), minlength=3))
    expert_axis = {"layers": {n: {"mlps": -1} for n in range(2)}}
    described = excitation_optax.describe(nnx.state(model, nnx.Param), captured, expert_axis)
    scaled = {p.path.removesuffix("/value") for p in described.parameters if p.scaled_by}
    assert scaled == {f"layers/{n}/{name}" for n in range(2) for name in ("w", "mlps/up/kernel", "mlps/up/bias")}


def test_names_in_linen():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            scores = linen.Dense(3, name="router")(x)
            w = self.param("w", linen.initializers.ones, (3, 2))
            for _ in range(2):
                excitation_flax.sow_routing(self, excitation_optax.count_logits(scores, experts_per_token=1), "w")
            return x + jnp.sum(w)

    variables = Layer().init(jax.random.key(0), X)
    _, sown = Layer().apply(variables, X, mutable=["intermediates"])
    utilization = excitation_flax.routing_from_intermediates(sown["intermediates"])
    assert list(utilization) == ["w"]
    assert utilization["w"].tokens == 2 * len(X)
    described = excitation_optax.describe(variables["params"], utilization)
    assert {p.path for p in described.parameters if p.scaled_by} == {"w"}


def test_nothing_sown_is_an_error_and_so_is_what_is_no_counts():
    with pytest.raises(ValueError, match="sowed no routing"):
        excitation_flax.capture_routing(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))(X)
    with pytest.raises(ValueError, match="RoutingCounts"):
        excitation_flax.sow_routing(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones(3))
    with pytest.raises(ValueError, match="takes the module"):
        excitation_flax.sow_routing(jnp.ones(3), excitation_optax.count_active(jnp.ones((2, 3), bool)))
    with pytest.raises(ValueError, match="no RoutingCounts"):
        excitation_flax.routing_from_intermediates({"dense": {"activations": (jnp.ones(3),)}})


def test_routing_sown_above_routing_is_an_error():
    class Nested(nnx.Module):
        def __init__(self, rngs):
            self.neurons = Neurons(2, 3, rngs=rngs)

        def __call__(self, x):
            h = self.neurons(x)
            excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0))
            return h

    with pytest.raises(ValueError, match="above"):
        excitation_flax.capture_routing(Nested(nnx.Rngs(0)))(X)


# Linen


class LinenLayer(linen.Module):
    plain: bool = False

    @linen.compact
    def __call__(self, x):
        dense = linen.Dense(3, name="experts")
        h = linen.relu(dense(x))
        counts = excitation_optax.count_active(h > 0)
        if self.plain:  # Flax's own sow appends to a tuple, and on the parent there are other intermediates
            dense.sow("intermediates", "load", counts)
            self.sow("intermediates", "mean", jnp.mean(h))
        else:
            excitation_flax.sow_routing(dense, counts)
        return h


class LinenModel(linen.Module):
    plain: bool = False

    @linen.compact
    def __call__(self, x):
        layer = LinenLayer(self.plain, name="layer")
        return linen.Dense(1, name="head")(layer(x) + layer(2 * x))


@pytest.mark.parametrize("plain", [False, True])
def test_linen(plain):
    model = LinenModel(plain)
    params = model.init(jax.random.key(0), X)["params"]
    _, sown = model.apply({"params": params}, X, mutable=["intermediates"])
    utilization = excitation_flax.routing_from_intermediates(sown["intermediates"])
    dense = params["layer"]["experts"]
    active = [np.maximum(x @ dense["kernel"] + dense["bias"][None], 0) > 0 for x in (X, 2 * X)]
    np.testing.assert_array_equal(utilization["layer"]["experts"].counts, sum(a.sum(0) for a in active))
    assert utilization["layer"]["experts"].tokens == 8
    described = excitation_optax.describe(params, utilization, expert_axis=-1)
    assert {p.path for p in described.parameters if p.scaled_by} == {"layer/experts/kernel", "layer/experts/bias"}


def test_linen_scanned_layers_give_stacked_counts():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            dense = linen.Dense(2, name="experts")
            h = linen.relu(dense(x))
            excitation_flax.sow_routing(dense, excitation_optax.count_active(h > 0))
            return h, None

    stack = linen.scan(Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=5)
    model = stack(name="blocks")
    params = model.init(jax.random.key(0), X, None)["params"]
    _, sown = model.apply({"params": params}, X, None, mutable=["intermediates"])
    utilization = excitation_flax.routing_from_intermediates(sown["intermediates"])
    counts = utilization["experts"]
    assert (counts.counts.shape, counts.tokens.shape) == ((5, 2), (5,))
    excitation = excitation_optax.scale_by_excitation(expert_axis=(0, -1))
    updates, _ = excitation.update(params, excitation.init(params), utilization=utilization)
    phi = excitation_optax.excitation(utilization)["experts"]
    np.testing.assert_allclose(updates["experts"]["kernel"], params["experts"]["kernel"] * phi[:, None], rtol=1e-6)


def test_linen_train_state_hands_extra_arguments_on():
    class State(excitation_flax.TrainState):
        batch_stats: jax.Array

    params = {"experts": jnp.ones((2, 3)), "router": jnp.ones(2)}
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum)
    tx = optax.chain(optax.sgd(0.5), excitation)
    state = State.create(apply_fn=None, params=params, tx=tx, batch_stats=jnp.zeros(1))
    step = jax.jit(lambda s: s.apply_gradients(grads=params, batch_stats=s.batch_stats + 1, utilization={"experts": u}))
    u = jnp.array([0.75, 0.25])
    state = step(step(state))
    np.testing.assert_allclose(state.params["experts"], [[-0.5] * 3, [0.5] * 3])
    np.testing.assert_allclose(state.params["router"], [0.0, 0.0])
    assert (state.step, state.batch_stats, state.tx) == (2, 2, tx)
    with pytest.raises(ValueError, match="utilization"):
        state.apply_gradients(grads=params)
    assert state.apply_gradients(grads=params, utilization={"experts": u}, tx=optax.sgd(1.0)).tx is not tx
