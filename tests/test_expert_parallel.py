"""Experts split over eight devices: the same numbers as on one device, and what is sent between devices."""

import functools
import re

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import expert_parallel, moe

D, F, E, K, T = 6, 5, 16, 2, 32
X = jax.random.normal(jax.random.key(1), (T, D)) + 1.0  # off center, so that experts get different loads
DY = jax.random.normal(jax.random.key(2), (T, D))
WHERE = jnp.arange(T) % 7 != 3
BIAS = 0.3 * jax.random.normal(jax.random.key(3), (E,))
DEEPSEEK = {"scores": "sigmoid", "num_groups": 4, "groups_per_token": 2, "gate_scale": 2.5}
MESHES = {
    "8": ((8,), ("expert",)),
    "2x4": ((2, 4), ("data", "expert")),
    "4x2": ((4, 2), ("expert", "model")),
}


def make_mesh(name, axis_type=AxisType.Auto):
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


def make(seed=0, axis="expert", **options):
    options = {"d_model": D, "d_ff": F, "num_experts": E, "experts_per_token": K, "num_shared_experts": 1} | options
    layer = moe.MoE(moe.MoEConfig(**options, expert_parallel_axis=axis), rngs=nnx.Rngs(seed))
    if layer.router.bias is not None:
        layer.router.bias[...] = BIAS
    return layer


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, params, x, where):
    """Output, counts, losses, and the gradients of params and x."""

    def loss_fn(params, x):
        model = nnx.merge(graphdef, params)
        y, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(x, where)
        losses = moe.auxiliary_losses(sown)
        loss = jnp.sum(DY * y) + 0.7 * losses.load_balancing + 0.3 * losses.router_z
        return loss, (y, utilization["experts"], losses)

    (_, aux), (d_params, dx) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(params, x)
    return *aux, nnx.to_pure_dict(d_params), dx


def shard(mesh, params):
    """Experts along the axis, all else on every device."""
    specs = jax.tree.map_with_path(
        lambda path, _: PartitionSpec("expert") if "experts" in jax.tree_util.keystr(path) else PartitionSpec(), params
    )
    return jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))


def run(mesh, where=None, **options):
    graphdef, params = nnx.split(make(**options))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec()))
        return jax.device_get(step(graphdef, shard(mesh, params), x, where))


@functools.cache
def on_one_device(where, gated, deepseek):
    """By the oracle, which shares no code with the layer."""
    where = WHERE if where else None
    params = nnx.to_pure_dict(nnx.state(make(gated=gated)))
    of_router = DEEPSEEK | {"bias": BIAS} if deepseek else {}
    expected = moe_oracle.moe(params, X, K, normalize=True, where=where, **of_router)
    d_params, dx = expected.backward(DY, 0.7, 0.3)
    return expected, d_params, dx


def assert_as_on_one_device(got, where=False, gated=False, deepseek=False):
    y, counts, losses, d_params, dx = got
    assert not np.any(d_params["router"].pop("bias", 0))
    expected, expected_params, expected_x = on_one_device(where, gated, deepseek)
    moe_oracle.assert_close(y, expected.y, 1e-5)
    np.testing.assert_array_equal(counts.counts, expected.route.counts)
    assert int(counts.tokens) == (np.sum(np.asarray(WHERE)) if where else T)
    np.testing.assert_allclose(losses.load_balancing, expected.route.load_balancing, rtol=1e-5)
    np.testing.assert_allclose(losses.router_z, expected.route.router_z, rtol=1e-5)
    moe_oracle.assert_close(d_params, expected_params, 1e-5)
    moe_oracle.assert_close(dx, expected_x, 1e-5)


LARGE = float(E) / K  # a capacity that takes all tokens of a device


@pytest.mark.parametrize(
    ("mesh", "axis_type", "options"),
    [
        ("8", AxisType.Auto, {}),
        ("8", AxisType.Explicit, {"backend": "dense"}),
        ("8", AxisType.Auto, {"capacity_factor": LARGE}),
        ("2x4", AxisType.Auto, {"backend": "dense"}),
        ("2x4", AxisType.Explicit, {}),
        ("2x4", AxisType.Explicit, {"backend": "dense"}),
        ("2x4", AxisType.Explicit, DEEPSEEK | {"selection_bias": True}),
        ("2x4", AxisType.Auto, {"capacity_factor": LARGE}),
        ("4x2", AxisType.Explicit, {"capacity_factor": LARGE}),
    ],
)
def test_the_same_as_on_one_device(mesh, axis_type, options):
    assert_as_on_one_device(run(make_mesh(mesh, axis_type), **options), deepseek="scores" in options)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": LARGE}])
def test_the_same_with_padding_and_gated_experts(options):
    got = run(make_mesh("2x4"), where=WHERE, gated=True, **options)
    assert_as_on_one_device(got, where=True, gated=True)


def multiply(linear, params, rows):
    """An expert of one number."""
    return linear(rows, params, None)


@pytest.mark.parametrize("mesh", ["8", "2x4"])
def test_a_capacity_counts_for_each_device(mesh):
    """Two tokens on each of 8 devices, K = 1, E = 8: a factor of 4 is one row per expert and device, 4 * 2 / 8."""
    indices = jnp.tile(jnp.array([[3], [3]]), (8, 1))  # of every pair the second is dropped ...
    indices = indices.at[5, 0].set(0)  # ... but on the third device, where the second goes elsewhere
    kernels = 1.0 + jnp.arange(8.0)[:, None, None]
    with jax.set_mesh(make_mesh(mesh)):
        arguments = (multiply, kernels, jnp.ones((16, 1)), indices, jnp.ones((16, 1)))
        y = jax.jit(lambda: expert_parallel.apply_experts(*arguments, axis="expert", capacity_factor=4.0))()
    np.testing.assert_array_equal(y[:, 0], [4, 0, 4, 0, 4, 1, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0])


@jax.numpy_dtype_promotion("standard")  # Optax's Adam needs it
def train(graphdef, params, x, num_steps=2):
    """Steps of Adam and Excitation."""
    tx = optax.chain(optax.adam(0.01), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))

    def loss_fn(params):
        run = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)
        y, utilization, sown = run(x)
        # Without this loss the router's gradients are zero up to rounding for experts that were not chosen; Adam, which
        # divides by their size, would make steps of the rounding errors, and these differ.
        losses = moe.auxiliary_losses(sown)
        return jnp.mean((y - DY) ** 2) + losses.load_balancing + losses.router_z, utilization

    @jax.jit
    def step(params, state):
        (loss, utilization), d_params = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(d_params, state, params, utilization=utilization)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(tx.init)(params)
    for _ in range(num_steps):
        params, state, loss = step(params, state)
    moments = state[0][0]
    return [nnx.to_pure_dict(tree) for tree in (params, moments.mu, moments.nu)], loss


@functools.cache
def train_on_one_device():
    return jax.device_get(train(*nnx.split(make(axis=None)), X))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_training_keeps_experts_where_they_are(axis_type):
    """Parameters and Adam's moments are as on one device, and those of experts remain split."""
    mesh = make_mesh("2x4", axis_type)
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(make())
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(("data", "expert"))))
        trees, loss = train(graphdef, shard(mesh, params), x)
    expected, expected_loss = train_on_one_device()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    # Parameters have moved by 0.02, and more where Excitation is more than 1.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5), trees[0], expected[0])
    for tree in trees:
        for leaf in tree["experts"].values():
            assert leaf.sharding.shard_shape(leaf.shape) == (E // 4, *leaf.shape[1:])
            assert not leaf.sharding.is_fully_replicated


def collectives(mesh, **options):
    """What the compiled forward and backward pass sends: names of operations with the shapes of their results."""
    graphdef, params = nnx.split(make(num_shared_experts=0, **options))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        text = step.lower(graphdef, shard(mesh, params), x, None).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)
    return [(name, shape) for result, name in found for shape in re.findall(r"\w+\[[\d,]*\]", result)]


@pytest.mark.parametrize(("mesh", "along"), [("8", 8), ("2x4", 4)])
@pytest.mark.slow
def test_tokens_are_sent_and_kernels_are_not(mesh, along):
    dropless, with_capacity = (collectives(make_mesh(mesh), **options) for options in ({}, {"capacity_factor": 2.0}))
    assert {name for name, _ in dropless} >= {"all-gather", "reduce-scatter"}
    assert "all-to-all" not in {name for name, _ in dropless}
    assert "all-to-all" in {name for name, _ in with_capacity}
    kernels = {f"f32[{n},{a},{b}]" for n in (E, E // along) for a, b in ((D, F), (F, D))}
    for sent in (dropless, with_capacity):
        assert not [shape for name, shape in sent if name != "all-reduce" and shape in kernels]
        # The sum of gradients over the axis "data", of the experts that a device holds.
        summed = {shape for name, shape in sent if name == "all-reduce" and shape in kernels}
        assert summed == ({f"f32[{E // along},{D},{F}]", f"f32[{E // along},{F},{D}]"} if mesh == "2x4" else set())


def apply(num_experts=8, tokens=16, axis="expert"):
    ones = jnp.ones((tokens, 1))
    arguments = (multiply, jnp.ones((num_experts, 1, 1)), ones, jnp.zeros((tokens, 1), jnp.int32), ones)
    return jax.eval_shape(functools.partial(expert_parallel.apply_experts, *arguments, axis=axis))


def test_without_a_mesh():
    with pytest.raises(ValueError, match=r"expert_parallel_axis='expert' must name an axis of the mesh; .* has \(\)"):
        apply()


def test_meshes_and_sizes_that_do_not_fit():
    with jax.set_mesh(make_mesh("2x4")):
        assert apply().shape == (16, 1)
        with pytest.raises(ValueError, match=r"'model' must name an axis of the mesh; .* has \('data', 'expert'\)"):
            apply(axis="model")
        with pytest.raises(ValueError, match="6 experts cannot be split over 4 devices along 'expert'"):
            apply(num_experts=6)
        assert apply(tokens=12).shape == (12, 1)  # rows that go to no expert fill up the devices
