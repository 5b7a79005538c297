"""The bridge to Flax NNX and Linen."""

import concurrent.futures
import re
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import excitation_optax
from excitation_optax import flax as excitation_flax

X = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, -2.0], [3.0, 1.0]])
COUNTS = excitation_optax.RoutingCounts(jnp.array([3.0, 1.0]), jnp.array(4.0))


class Neurons(nnx.Linear):
    """Two inputs, `out` neurons; sows which were positive."""

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


def active(layer, x=X):
    return np.sum(np.asarray(x @ layer.kernel[...] + layer.bias[...][None] > 0), axis=0)


def test_capture_returns_output_and_counts_and_leaves_nothing_behind():
    model = Model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    output, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, active(model.layers[0]))
    assert utilization["layers"][1].tokens == 4
    assert set(utilization) == {"layers"}
    assert nnx.graphdef(model) == before
    np.testing.assert_array_equal(output, excitation_flax.capture_routing(model)(X)[0])


def test_capture_of_a_method_of_a_function_and_of_a_root_of_experts():
    model = Model(nnx.Rngs(0))
    _, of_method = excitation_flax.capture_routing(model.encode)(X)
    assert set(of_method["layers"]) == {0}
    _, of_function = excitation_flax.capture_routing(lambda model, x: model(2 * x) + 1)(model, X)
    assert set(of_function["layers"]) == {0, 1}
    _, of_root = excitation_flax.capture_routing(model.layers[0])(X)
    np.testing.assert_array_equal(of_root.counts, active(model.layers[0]))


def test_several_calls_of_a_layer_add_up():
    _, once = excitation_flax.capture_routing(Model(nnx.Rngs(0)))(X)
    _, twice = excitation_flax.capture_routing(Model(nnx.Rngs(0), calls=2))(X)
    chex.assert_trees_all_equal(twice["layers"][0], once["layers"][0] + once["layers"][0])
    chex.assert_trees_all_equal(twice["layers"][1], once["layers"][1])


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


def test_flax_own_sow_is_understood():
    class Plain(nnx.Linear):
        def __call__(self, x):
            self.sow(excitation_flax.Routing, "load", excitation_optax.count_active(x > 0))
            return super().__call__(x)

    model = nnx.Sequential(Plain(2, 2, rngs=nnx.Rngs(0)))
    _, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, [2, 3])


def test_a_call_that_fails_leaves_nothing_behind_either():
    model = Model(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    for call in (model, model.encode, lambda model, x: model(x)):
        args = (model,) if call not in (model, model.encode) else ()
        with pytest.raises(TypeError, match="dot_general"):
            excitation_flax.capture_routing(call)(*args, jnp.ones((4, 7)))
        assert nnx.graphdef(model) == graphdef
        assert not excitation_flax.is_capturing(model.layers[0])
    _, utilization = excitation_flax.capture_routing(model)(X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, active(model.layers[0]))


# Transforms around a layer that sows


class Around(nnx.Module):
    """Calls `call(layer, h)`, between another layer that sows and its output."""

    def __init__(self, call):
        self.first = Neurons(2, 3, rngs=nnx.Rngs(0))
        self.layer = Neurons(3, 3, rngs=nnx.Rngs(1))
        self.call = call

    def __call__(self, x):
        return self.call(self.layer, self.first(x))


STRANGER = Neurons(3, 3, rngs=nnx.Rngs(2))
BY_STEP = nnx.StateAxes({excitation_flax.Routing: 0, ...: None})


def call_layer(layer, x):
    return layer(x)


def call_row(layer, x):
    return layer(x[None])[0]


def scan_over(axes, length=3):
    """Runs a layer several times by nnx.scan, its state along `axes`."""
    scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry, length=length)
    return lambda layer, x: scan(x, layer)


def merged(layer):
    return nnx.merge(*nnx.split(layer))


def with_layer(x, state):
    return state[0], state[0](state[1])


LOST = {
    "clone": lambda layer, x: nnx.clone(layer)(x),
    "clone, then the module": lambda layer, x: layer(nnx.clone(layer)(x)),
    "the module, then a clone": lambda layer, x: nnx.clone(layer)(layer(x)),
    "merged under jax.jit": lambda layer, x: jax.jit(lambda state, x: nnx.merge(nnx.graphdef(layer), state)(x))(
        nnx.state(layer), x
    ),
    "broadcast into scan": scan_over(None),
    "broadcast into scan, then the module": lambda layer, x: layer(scan_over(None)(layer, x)),
    "eval_shape alone": lambda layer, x: x + jnp.zeros(nnx.eval_shape(call_layer, layer, x).shape),
}


@pytest.mark.parametrize("call", LOST.values(), ids=LOST)
@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
def test_a_sow_into_a_copy_of_the_module_is_an_error(call, outer):
    model = Around(call)
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match="routing of layer was lost"):
        outer(lambda model, x: excitation_flax.capture_routing(model)(x))(model, X)
    assert nnx.graphdef(model) == graphdef


MESH = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
DATA = jax.sharding.PartitionSpec("data")
CLOSED_OVER = {
    "checkpoint": lambda layer, x: jax.checkpoint(lambda x: layer(x))(x),
    "jit": lambda layer, x: jax.jit(lambda x: layer(x))(x),
    "grad": lambda layer, x: jax.grad(lambda x: jnp.sum(layer(x)))(x),
    "vmap": lambda layer, x: jax.vmap(lambda x: call_row(layer, x))(x),
    "map": lambda layer, x: jax.lax.map(lambda x: call_row(layer, x), x),
    "scan": lambda layer, x: jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0],
    "cond": lambda layer, x: jax.lax.cond(jnp.sum(x) > 0, lambda x: layer(x), lambda x: x, x),
    "while": lambda layer, x: jax.lax.while_loop(lambda x: jnp.sum(x) > 9.0, lambda x: layer(x), x),
    "shard_map": lambda layer, x: jax.shard_map(lambda x: layer(x), mesh=MESH, in_specs=DATA, out_specs=DATA)(x),
    "nnx.remat": lambda layer, x: nnx.remat(lambda x: layer(x))(x),
}


@pytest.mark.parametrize("call", CLOSED_OVER.values(), ids=CLOSED_OVER)
@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
def test_a_transform_that_closed_over_the_module_is_an_error(call, outer):
    model = Around(call)
    graphdef = nnx.graphdef(model)
    with pytest.raises(
        ValueError, match=r"routing of layer \(Neurons\) cannot leave .* pass the module as an argument"
    ):
        outer(lambda model, x: excitation_flax.capture_routing(model)(x))(model, X)
    assert nnx.graphdef(model) == graphdef


CANNOT_CARRY = {
    "cond": lambda layer, x: nnx.cond(jnp.sum(x) > 0, call_layer, lambda layer, x: x, layer, x),
    "switch": lambda layer, x: nnx.switch(0, [call_layer, lambda layer, x: x], layer, x),
    "fori_loop": lambda layer, x: nnx.fori_loop(0, 2, with_layer, (layer, x))[1],
    "while_loop": lambda layer, x: nnx.while_loop(
        lambda state: jnp.sum(state[1]) > 9.0, lambda state: with_layer(None, state), (layer, x)
    )[1],
    "vmap": lambda layer, x: nnx.vmap(call_row, in_axes=(None, 0))(layer, x),
    "scan": lambda layer, x: nnx.scan(
        lambda state, _: with_layer(None, state), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )((layer, x), jnp.arange(2))[1],
}


@pytest.mark.parametrize("name", CANNOT_CARRY)
def test_an_nnx_transform_that_cannot_carry_routing_is_named(name):
    model = Around(CANNOT_CARRY[name])
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match=rf"routing of layer cannot leave nnx\.{name}\."):
        excitation_flax.capture_routing(model)(X)
    assert nnx.graphdef(model) == graphdef


SPECS = {"in_specs": (jax.sharding.PartitionSpec(), DATA), "out_specs": DATA}


def call_summed(layer, x):
    """As a layer does that is written for nnx.shard_map: it sums its counts over the devices."""
    h = nnx.relu(nnx.Linear.__call__(layer, x))
    excitation_flax.sow_routing(layer, jax.lax.psum(excitation_optax.count_active(h > 0), "data"))
    return h


# and how often the layer is called
CARRIES = {
    "nnx.jit": (lambda layer, x: nnx.jit(call_layer)(layer, x), 1),
    "nnx.jit, from its cache": (lambda layer, x: (f := nnx.jit(call_layer))(layer, f(layer, x)), 2),
    "nnx.remat": (lambda layer, x: nnx.remat(call_layer)(layer, x), 1),
    "nnx.remat, then the module": (lambda layer, x: layer(nnx.remat(call_layer)(layer, x)), 2),
    "nnx.cond": (lambda layer, x: nnx.cond(jnp.sum(x) > 0, call_layer, call_layer, layer, x), 1),
    "nnx.grad of nnx.remat": (
        lambda layer, x: x * nnx.value_and_grad(lambda m, x: jnp.sum(nnx.remat(call_layer)(m, x)))(layer, x)[0],
        1,
    ),
    "nnx.shard_map": (lambda layer, x: nnx.shard_map(call_summed, mesh=MESH, **SPECS)(layer, x), 1),
    "nnx.scan": (scan_over(BY_STEP), 3),
    "nnx.vmap": (lambda layer, x: nnx.vmap(call_row, in_axes=(BY_STEP, 0))(layer, x), 1),
}


@pytest.mark.parametrize("name", CARRIES)
def test_transforms_that_carry_routing_count_every_call_once(name):
    call, calls = CARRIES[name]

    def loss(model, x):
        output, utilization = excitation_flax.capture_routing(model)(x)
        return jnp.sum(output), utilization

    model = Around(call)
    _, utilization = loss(model, X)
    _, under_grad = nnx.jit(nnx.grad(loss, has_aux=True))(model, X)
    chex.assert_trees_all_equal(utilization, under_grad)
    assert np.sum(utilization["layer"].tokens) == calls * len(X)  # nnx.scan and nnx.vmap give an axis of steps
    if calls == 1:
        expected = active(model.layer, nnx.relu(X @ model.first.kernel[...]))
        np.testing.assert_array_equal(utilization["layer"].counts.reshape(-1, 3).sum(0), expected)


def test_routing_that_is_not_recorded_is_an_error():
    quiet = Neurons(3, 3, rngs=nnx.Rngs(2))
    quiet.deterministic = True
    wrong = {
        "Neurons would be lost: the module is not part of the model": lambda layer, x: STRANGER(x),
        "Neurons would be lost: an nnx.capture inside": lambda layer, x: nnx.capture(layer, nnx.Intermediate)(x)[0],
        "another capture of this model": lambda layer, x: excitation_flax.capture_routing(layer)(x)[0],
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            excitation_flax.capture_routing(Around(call))(X)
    for call in (
        lambda layer, x: quiet(x),
        lambda layer, x: excitation_flax.capture_routing(STRANGER)(x)[0],
        lambda layer, x: nnx.capture(layer, excitation_flax.Routing)(x)[0],
    ):
        _, utilization = excitation_flax.capture_routing(Around(call))(X)
        assert set(utilization) == {"first"}
    assert nnx.graphdef(STRANGER) == nnx.graphdef(Neurons(3, 3, rngs=nnx.Rngs(2)))


def test_an_error_of_the_model_itself_comes_through():
    def call(layer, x):
        raise ValueError("of the user")

    with pytest.raises(ValueError, match=r"^of the user$"):
        excitation_flax.capture_routing(Around(call))(X)


def test_containers_work_as_in_any_other_call():
    class Containers(nnx.Module):
        def __init__(self):
            self.blocks = nnx.Dict(a=Neurons(2, 3, rngs=nnx.Rngs(0)), b=Neurons(3, 3, rngs=nnx.Rngs(1)))
            self.listed = nnx.List([Neurons(3, 3, rngs=nnx.Rngs(2))])

        def __call__(self, x):
            for layer in self.blocks.values():
                x = layer(x)
            return nnx.remat(lambda model, x: model.listed[0](x))(self, x)

    _, utilization = excitation_flax.capture_routing(Containers())(X)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.shape, utilization),
        {
            "blocks": {name: excitation_optax.RoutingCounts((3,), ()) for name in "ab"},
            "listed": {0: excitation_optax.RoutingCounts((3,), ())},
        },
    )


def test_threads_capture_their_own_models_and_no_others():
    def run(seed):
        model = Model(nnx.Rngs(seed))
        for _ in range(5):
            _, utilization = excitation_flax.capture_routing(model)(X)
            np.testing.assert_array_equal(utilization["layers"][0].counts, active(model.layers[0]))
        return True

    def plain(layer, x):
        """Of another thread, in which no capture runs."""
        other = Neurons(3, 3, rngs=nnx.Rngs(3))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(other, x).result()
        assert excitation_flax.pop_routing(other).tokens == len(x)
        return layer(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))
    _, utilization = excitation_flax.capture_routing(Around(plain))(X)
    assert set(utilization) == {"first", "layer"}


def test_is_capturing():
    seen = []

    def call(layer, x):
        seen.append([excitation_flax.is_capturing(module) for module in (layer, STRANGER)])
        return layer(x)

    model = Around(call)
    excitation_flax.capture_routing(model)(X)
    model(X)
    assert seen == [[True, False], [False, False]]


# What calls leave behind


def test_pop_takes_what_calls_left_and_leaves_nothing():
    model = Model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    model(X)
    np.testing.assert_array_equal(excitation_flax.pop_routing(model)["layers"][0].counts, active(model.layers[0]))
    assert nnx.graphdef(model) == before
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
    np.testing.assert_array_equal(utilization["layers"][0].counts, active(model.layers[0]))


def test_in_evaluation_calls_leave_nothing_behind_and_capture_still_counts():
    model = nnx.Sequential(Neurons(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    model.layers[0].deterministic = False
    model.eval()
    before = nnx.graphdef(model)
    output = model(X)
    for call in (nnx.jit(lambda m, x: m(x)), nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))):
        np.testing.assert_allclose(call(model, X), output, rtol=1e-6)
    assert nnx.graphdef(model) == before
    _, utilization = excitation_flax.capture_routing(model)(X)
    assert utilization["layers"][0].tokens == 4
    model.train()
    model(X)
    assert excitation_flax.pop_routing(model)["layers"][0].tokens == 4


@pytest.mark.parametrize("leftover", [False, True])
def test_a_model_that_jit_closed_over_runs_but_cannot_be_recorded(leftover):
    model = Model(nnx.Rngs(0))
    expected, _ = excitation_flax.capture_routing(model)(X)
    if leftover:
        model(X)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: model(x[None])[0])(X), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"nnx.jit, or by nnx.split outside and nnx.merge inside"):
        jax.jit(lambda x: excitation_flax.capture_routing(model)(x)[0])(X)
    if leftover:  # no tracer was added to it
        np.testing.assert_array_equal(excitation_flax.pop_routing(model)["layers"][0].counts, active(model.layers[0]))


def test_capture_inside_grad_jit_and_vmap():
    model = Model(nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss_fn(params, x):
        output, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(x)
        return jnp.mean(output), utilization

    _, utilization = jax.jit(jax.grad(loss_fn, has_aux=True))(params, X)
    np.testing.assert_array_equal(utilization["layers"][0].counts, active(model.layers[0]))
    stacked = jax.vmap(lambda x: loss_fn(params, x)[1])(jnp.stack([X, -X]))
    np.testing.assert_array_equal(stacked["layers"][0].counts[1], active(model.layers[0], -X))


def train_step(model, excitation):
    """One step of SGD with rate 1 after the loss sum(output^2); also returns the gradients and the utilization."""
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1.0), excitation), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            output, utilization = excitation_flax.capture_routing(model)(X)
            return jnp.sum(output**2), utilization

        grads, utilization = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, utilization=utilization)
        return grads, utilization

    return step(model, optimizer)


def test_nnx_optimizer_takes_utilization_as_it_is():
    model = Model(nnx.Rngs(0))
    kernels = [layer.kernel[...] for layer in model.layers] + [model.head.kernel[...]]
    grads, utilization = train_step(
        model, excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=-1)
    )
    for number in range(2):
        u = utilization["layers"][number].utilization
        expected = kernels[number] - grads.layers[number].kernel[...] * (u / jnp.mean(u))[None]
        np.testing.assert_allclose(model.layers[number].kernel[...], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.head.kernel[...], kernels[2] - grads.head.kernel[...], rtol=1e-6)


# What the counts are about


class OneModule(nnx.Module):
    """Experts beside their router, as parameters, as separate modules and as a list."""

    def __init__(self, rngs, *names):
        self.router = nnx.Param(rngs.params.normal((2, 3)))
        self.w = nnx.Param(jnp.ones((3, 2)))
        self.v = nnx.Param(jnp.ones((3, 2)))
        for number in range(3):
            setattr(self, f"expert_{number}", nnx.Linear(2, 3, rngs=rngs))
        self.listed = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(3)])
        self.names = names

    def __call__(self, x):
        counts = excitation_optax.count_logits(x @ self.router[...], experts_per_token=2)
        excitation_flax.sow_routing(self, counts, *self.names)
        return x


BELOW = ("kernel", "bias")
NAMES = {
    ("w",): ["w"],
    ("w", "v"): ["v", "w"],
    ("{w,v}",): ["v", "w"],
    ("expert_{expert}",): [f"expert_{k}/{name}" for k in range(3) for name in BELOW],
    ("listed/{expert}",): [f"listed/{k}/{name}" for k in range(3) for name in BELOW],
}


@pytest.mark.parametrize("names", NAMES)
def test_names_say_what_in_a_module_is_experts(names):
    model = nnx.Sequential(OneModule(nnx.Rngs(0), *names), OneModule(nnx.Rngs(1), *names))
    _, captured = excitation_flax.capture_routing(model)(X)
    model(X)
    chex.assert_trees_all_equal(captured, excitation_flax.pop_routing(model))
    chosen = np.argsort(-(X @ model.layers[0].router[...]))[:, :2]
    (counts,) = jax.tree.leaves(
        captured["layers"][0], is_leaf=lambda leaf: isinstance(leaf, excitation_optax.RoutingCounts)
    )  # one layer
    np.testing.assert_array_equal(counts.counts, np.bincount(chosen.reshape(-1), minlength=3))
    described = excitation_optax.describe(nnx.as_pure(nnx.state(model, nnx.Param)), captured)
    scaled = sorted(p.path for p in described.parameters if p.scaled_by)
    assert scaled == sorted(f"layers/{n}/{path}" for n in range(2) for path in NAMES[names])


WRONG_NAMES = {
    ("exprt",): "has no 'exprt'. Nearest: ",
    ("w", "u"): "has no 'u'",
    ("expert_{expert}x",): "has no 'expert_{expert}x'",
    ("{a,b}",): "has no '{a,b}'",
    ("listed/up",): "has no 'listed/up'",
    ("",): "non-empty string, such as 'w_in'; got ''",
    (3,): "got 3",
    (("w", "v"),): "got ('w', 'v')",
    ("w/",): "got 'w/'",
    ("w", "listed/0"): "several names must be children of one module; got ('w', 'listed/0')",
}


@pytest.mark.parametrize("names", WRONG_NAMES, ids=str)
def test_wrong_names(names):
    for call in (lambda model: excitation_flax.capture_routing(model)(X), lambda model: model(X)):
        with pytest.raises(ValueError, match=re.escape(WRONG_NAMES[names])):
            call(OneModule(nnx.Rngs(0), *names))


class Pooled(nnx.Module):
    """A layer whose experts belong to all layers."""

    def __init__(self, pool, name):
        self.pool, self.name = pool, name

    def __call__(self, x):
        h = self.pool(x)
        counts = excitation_optax.count_active(h > 0)
        if self.name:
            excitation_flax.sow_routing(self, counts, self.name)
        else:
            excitation_flax.sow_routing(self.pool, counts)
        return h


@pytest.mark.parametrize("name", [None, "pool", "pool/kernel"])
def test_a_pool_of_experts_that_layers_share_is_one_entry(name):
    pool = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model = nnx.Sequential(Pooled(pool, name), Pooled(pool, name))
    kernel = pool.kernel[...]
    grads, utilization = train_step(
        model, excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=-1)
    )
    entry = utilization["layers"][0]["pool"] if name != "pool/kernel" else utilization["layers"][0]["pool"]["kernel"]
    assert list(utilization["layers"]) == [0]
    h = X @ kernel
    np.testing.assert_array_equal(entry.counts, np.sum(h > 0, axis=0) + np.sum(h @ kernel > 0, axis=0))
    assert entry.tokens == 2 * len(X)
    phi = entry.utilization / jnp.mean(entry.utilization)
    expected = kernel - grads.layers[0].pool.kernel[...] * phi[None]
    np.testing.assert_allclose(pool.kernel[...], expected, rtol=1e-5)


def test_routing_that_would_be_counted_twice_is_an_error():
    def by_both(layer, x):
        h = layer.neurons(x)
        excitation_flax.sow_routing(layer, excitation_optax.count_active(h > 0), *layer.names)
        return h

    class Above(nnx.Module):
        def __init__(self, *names):
            self.neurons = Neurons(2, 3, rngs=nnx.Rngs(0))
            self.names = names

    for names in ([], ["neurons"]):
        with pytest.raises(ValueError, match=r"sown at .*'neurons'.* and also at a module above"):
            excitation_flax.capture_routing(by_both)(Above(*names), X)


class LinenLayer(linen.Module):
    names: tuple = ()
    plain: bool = False

    @linen.compact
    def __call__(self, x):
        dense = linen.Dense(3, name="experts")
        h = linen.relu(dense(x))
        counts = excitation_optax.count_active(h > 0)
        if self.plain:  # Flax's own sow appends to a tuple, and on the parent there are other intermediates
            dense.sow("intermediates", "load", counts)
            self.sow("intermediates", "mean", jnp.mean(h))
        elif self.names:
            excitation_flax.sow_routing(self, counts, *self.names)
        else:
            excitation_flax.sow_routing(dense, counts)
        return h


def test_arguments_of_the_wrong_kind():
    linear, counts = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), COUNTS
    bound = LinenLayer().bind({})
    wrong = {
        "sowed no routing": lambda: excitation_flax.capture_routing(linear)(X),
        "takes RoutingCounts, as from count_routing; got": lambda: excitation_flax.sow_routing(linear, jnp.ones(3)),
        "takes the module that holds the experts; got NoneType": lambda: excitation_flax.sow_routing(None, counts),
        "got List. For a list of experts, call": lambda: excitation_flax.sow_routing(nnx.List([linear]), counts),
        "Can't access variables on unbound modules": lambda: excitation_flax.sow_routing(LinenLayer(), counts),
        "function whose first argument is one; got NoneType": lambda: excitation_flax.capture_routing(None),
        "got LinenLayer. In Linen, use": lambda: excitation_flax.capture_routing(LinenLayer()),
        "got method. In Linen, use": lambda: excitation_flax.capture_routing(bound.__call__),
        "first argument must be the model; got ArrayImpl": lambda: excitation_flax.capture_routing(abs)(X),
        "first argument must be the model; got NoneType": lambda: excitation_flax.capture_routing(abs)(),
        "subclasses of nnx.Variable; got ('loss',)": lambda: excitation_flax.capture_routing(linear, "loss"),
        "pop_routing takes the nnx.Module that was called; got NoneType": lambda: excitation_flax.pop_routing(None),
        "was called; got builtin_function_or_method": lambda: excitation_flax.pop_routing(abs),
        "hold no RoutingCounts": lambda: excitation_flax.routing_from_intermediates({"a": {"b": (jnp.ones(3),)}}),
        "takes the collection": lambda: excitation_flax.routing_from_intermediates(None),
        "sown['intermediates'] of": lambda: excitation_flax.routing_from_intermediates({"intermediates": {}}),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_routing_like_gives_the_shapes_of_a_call():
    class Branching(Model):
        def __call__(self, x, repeat=1, *, halves=None):
            return super().__call__(jnp.concatenate([x, *halves]) if repeat > 1 else x)

    model = nnx.eval_shape(lambda: Branching(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    like = excitation_flax.routing_like(model, x, 2, halves=[x, X])
    assert like["layers"][1].counts == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert like["layers"][1].tokens == jax.ShapeDtypeStruct((), jnp.float32)


# Linen


class LinenAround(linen.Module):
    """Calls `call(layer, x)`, after another layer that sows."""

    call: Callable
    make: Callable = LinenLayer

    def setup(self):
        self.first = LinenLayer()
        self.layer = self.make()

    def __call__(self, x):
        return self.call(self.layer, self.first(x))


def utilization_of(model, variables=None, **kwargs):
    params = {"params": model.init(jax.random.key(0), X)["params"]}
    _, sown = model.apply(variables or params, X, mutable=["intermediates"], **kwargs)
    return excitation_flax.routing_from_intermediates(sown["intermediates"])


@pytest.mark.parametrize("layer", [LinenLayer(), LinenLayer(("experts",)), LinenLayer(plain=True)], ids=str)
def test_linen(layer):
    model = LinenAround(lambda layer, x: layer(x) + layer(2 * x), lambda: layer)
    params = model.init(jax.random.key(0), X)["params"]
    utilization = utilization_of(model, {"params": params}, capture_intermediates=True)
    h = X
    for name in ("first", "layer"):
        dense = params[name]["experts"]
        z = h @ dense["kernel"] + dense["bias"][None]
        counts = [np.sum(z > 0, axis=0)]
        h = np.maximum(z, 0)
    counts.append(np.sum(2 * (z - dense["bias"][None]) + dense["bias"][None] > 0, axis=0))
    np.testing.assert_array_equal(utilization["layer"]["experts"].counts, sum(counts))
    assert utilization["layer"]["experts"].tokens == 8
    described = excitation_optax.describe(params, utilization, expert_axis=-1)
    scaled = {p.path for p in described.parameters if p.scaled_by}
    assert scaled == {f"{name}/experts/{below}" for name in ("first", "layer") for below in BELOW}


class TwiceInside(linen.Module):
    def setup(self):
        self.inner = linen.remat(LinenLayer)()

    @linen.remat
    def block(self, x):
        return self.inner(x)

    def __call__(self, x):
        return self.inner(self.block(self.block(x)))


def scanned(**axes):
    class Step(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return LinenLayer(name="step")(x), None

    lifted = {"variable_axes": {"params": 0, **axes}, "split_rngs": {"params": True}, "length": 5}
    return lambda: linen.scan(Step, **lifted)()


LINEN_CARRIES = {  # and how often the layer is called
    "remat": (lambda layer, x: layer(layer(x)), linen.remat(LinenLayer), 2),
    "jit": (lambda layer, x: layer(layer(x)), linen.jit(LinenLayer), 2),
    "methods under remat": (lambda layer, x: layer(layer(x)), linen.remat(TwiceInside), 6),
    "remat of a function": (lambda layer, x: linen.remat(lambda m, x: m(x))(layer, layer(x)), LinenLayer, 2),
    "scan": (lambda layer, x: layer(x, None)[0], scanned(intermediates=0), 5),
}


@pytest.mark.parametrize("name", LINEN_CARRIES)
def test_linen_transforms_count_every_call_once_and_earlier_steps_never(name):
    call, make, calls = LINEN_CARRIES[name]
    model = LinenAround(call, make)
    variables = model.init(jax.random.key(0), X)
    step = jax.jit(lambda variables: model.apply(variables, X, mutable=["intermediates"])[1])
    for _ in range(3):  # what was sown is dropped, as it should be
        utilization = excitation_flax.routing_from_intermediates(step(variables)["intermediates"])
        (counts,) = jax.tree.leaves(
            utilization["layer"], is_leaf=lambda leaf: isinstance(leaf, excitation_optax.RoutingCounts)
        )
        assert np.sum(counts.tokens) == calls * len(X)  # linen.scan gives an axis of layers
    for run in (step, jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, X, mutable=["intermediates"])[0])))):
        with pytest.raises(
            ValueError, match=r"passed to apply hold the routing of (first|layer).* from an earlier call"
        ):
            run({**variables, **step(variables)})


def test_linen_routing_that_would_be_lost_is_an_error():
    wrong = {
        "routing of layer/step/experts would be lost: a lifted": (lambda layer, x: layer(x, None)[0], scanned()),
        "routing of layer/experts cannot leave the JAX transform": (
            lambda layer, x: jax.vmap(lambda x: call_row(layer, x))(x),
            LinenLayer,
        ),
        "LinenLayer has no 'exprts'. Nearest: experts": (call_layer, lambda: LinenLayer(("exprts",))),
        "LinenLayer has no 'w'": (call_layer, lambda: LinenLayer(("experts", "w"))),
    }
    for message, (call, make) in wrong.items():
        model = LinenAround(call, make)
        variables = model.init(jax.random.key(0), X)
        with pytest.raises(ValueError, match=re.escape(message)):
            model.apply(variables, X, mutable=["intermediates"])
    LinenAround(call_layer, LinenLayer).apply(variables, X)  # nothing is recorded, so nothing is lost


def test_a_pool_that_linen_layers_share_is_one_entry():
    class Layer(linen.Module):
        pool: linen.Module

        def __call__(self, x):
            h = self.pool(x)
            excitation_flax.sow_routing(self, excitation_optax.count_active(h > 0), "pool")
            return h

    class PoolModel(linen.Module):
        def setup(self):
            self.shared = linen.Dense(2, use_bias=False)
            self.layers = [Layer(self.shared), Layer(self.shared)]

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    params = PoolModel().init(jax.random.key(0), X)["params"]
    utilization = utilization_of(PoolModel(), {"params": params})
    h = X @ params["shared"]["kernel"]
    expected = np.sum(h > 0, axis=0) + np.sum(h @ params["shared"]["kernel"] > 0, axis=0)
    assert list(utilization) == ["shared"]
    np.testing.assert_array_equal(utilization["shared"].counts, expected)
    assert utilization["shared"].tokens == 2 * len(X)


def test_linen_train_state_forwards_extra_arguments():
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
