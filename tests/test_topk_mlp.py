"""The Top-K MLP: what is kept, what is counted, what is scaled, how large it is."""

import math

import chex
import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import topk_mlp


def make(seed=0, **kwargs):
    config = topk_mlp.TopKMLPConfig(**{"input_dim": 12, "width": 16, "depth": 3, "sparsity": 0.75} | kwargs)
    return topk_mlp.TopKMLP(config, rngs=nnx.Rngs(seed))


X = jax.random.normal(jax.random.key(1), (8, 12))


@pytest.mark.parametrize(
    ("width", "sparsity", "kept"), [(128, 0.9, 13), (2048, 0.9, 205), (128, 0.1, 115), (4, 0.9, 1)]
)
def test_num_kept(width, sparsity, kept):
    # 12.8, 204.8, 115.2, 0.4
    assert topk_mlp.TopKMLPConfig(input_dim=1, width=width, sparsity=sparsity).num_kept == kept


@pytest.mark.parametrize(
    ("width", "depth", "millions"), [(2048, 2, 5.8), (4096, 2, 20.0), (1024, 16, 16.6), (16384, 4, 818.4)]
)
def test_sizes_of_table_8(width, depth, millions):
    config = topk_mlp.TopKMLPConfig(input_dim=784, width=width, depth=depth)
    params = nnx.eval_shape(lambda: nnx.state(topk_mlp.TopKMLP(config, rngs=nnx.Rngs(0))))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert round(size / 1e6, 1) == millions


def test_hidden_layers_by_hand():
    """A plain loop over samples: ReLU, sort, keep the K largest."""
    model = make()
    h = np.asarray(X, np.float64)
    _, utilization = excitation_flax.capture_routing(model)(X)
    for number, layer in enumerate(model.layers):
        z = np.maximum(h @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...]), 0)
        h = np.zeros_like(z)
        for sample in range(len(z)):
            kept = np.argsort(-z[sample])[:4]  # K = round(16 * 0.25) = 4
            h[sample, kept] = z[sample, kept]
        np.testing.assert_allclose(model.hidden(X)[number], h, rtol=1e-5, atol=1e-6)
        excitation_flax.pop_routing(model)
        np.testing.assert_array_equal(utilization["layers"][number].counts, (h > 0).sum(0))
        assert utilization["layers"][number].tokens == 8
    logits = h @ np.asarray(model.head.kernel[...], np.float64) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(X), logits, rtol=1e-5, atol=1e-6)


def test_a_retained_zero_is_not_active():
    h = jnp.array([[0.0, 2.0, 0.0, 1.0, 0.0]])
    kept = topk_mlp.keep_top_k(h, 4)
    np.testing.assert_array_equal(kept, h)
    np.testing.assert_array_equal(excitation_optax.count_active(kept > 0).counts, [0, 1, 0, 1, 0])


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (4, 24), elements=hypothesis.strategies.floats(0, 3.0000000054977558e38, width=32)
    ),
    hypothesis.strategies.sampled_from([1, 5, 23, 24]),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_kth_largest_is_that_of_a_sort(h, k):
    np.testing.assert_array_equal(KTH_LARGEST(h, k)[:, 0], np.sort(h, axis=-1)[:, -k])


KTH_LARGEST = jax.jit(topk_mlp.kth_largest, static_argnums=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("width", [1, 7, 128])
def test_keep_top_k_of_every_dtype_and_width(dtype, width):
    with jax.enable_x64(dtype == "float64"):
        h = jax.nn.relu(jax.random.normal(jax.random.key(0), (32, width), jnp.dtype(dtype)))
        for k in {1, (width + 1) // 2, width}:
            kept = topk_mlp.keep_top_k(h, k)
            assert kept.dtype == h.dtype
            wide = np.asarray(h, np.float64)
            expected = np.where(wide >= np.sort(wide, axis=-1)[:, -k, None], wide, 0)  # ties are all kept
            np.testing.assert_array_equal(np.asarray(kept, np.float64), expected)


def test_gradients_flow_through_kept_activations_alone():
    h = jnp.array([[1.0, 4.0, 3.0, 2.0]])
    slope = jax.grad(lambda h: jnp.sum(topk_mlp.keep_top_k(h, 2) ** 2))(h)
    np.testing.assert_array_equal(slope, [[0.0, 8.0, 6.0, 0.0]])


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_a_nan_is_not_hidden(nan):
    kept = topk_mlp.keep_top_k(jnp.array([[1.0, nan, 2.0]]), 1)
    assert np.isnan(kept[0, 1])


def test_evaluation_leaves_nothing_behind():
    model = make()
    before = jax.tree.structure(nnx.state(model))
    model.eval()
    model(X)
    assert jax.tree.structure(nnx.state(model)) == before


def test_inputs_are_flattened_and_checked():
    model = make()
    np.testing.assert_array_equal(model(X), model(X.reshape(8, 2, 2, 3)))
    for wrong, received in [
        (jnp.ones((8, 5)), r"float32\[8, 5\]"),
        (1.0, r"float32\[\]"),
        (jnp.ones(12), r"float32\[12\]"),
    ]:
        with pytest.raises(ValueError, match=rf"x must be \[B, ...\] with input_dim = 12 values .*; got {received}"):
            model(wrong)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_dim": 0}, "input_dim must be an integer of at least 1; got 0"),
        ({"width": 0}, "width must be an integer of at least 1; got 0"),
        ({"depth": 0}, "depth must be an integer of at least 1; got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 1; got -1"),
        ({"width": 2.5}, "width must be an integer of at least 1; got 2.5"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\]; got 1.5"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\]; got -0.1"),
    ],
)
def test_bad_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_no_two_neurons_begin_alike_and_seeds_differ():
    kernel = make().layers[0].kernel[...]
    assert len(np.unique(np.asarray(kernel), axis=1).T) == 16
    assert not np.allclose(kernel, make(seed=1).layers[0].kernel[...])


def test_excitation_scales_incoming_weights_and_biases_of_hidden_neurons_alone():
    model = make()
    params = nnx.state(model)
    _, utilization = excitation_flax.capture_routing(model)(X)
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=model.expert_axis)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = excitation.update(ones, excitation.init(params), utilization=utilization)
    for number in range(3):
        u = utilization["layers"][number].utilization
        phi = u / jnp.mean(u)
        layer = updates["layers"][number]
        np.testing.assert_allclose(layer["kernel"][...], np.tile(phi, (layer["kernel"].shape[0], 1)), rtol=1e-6)
        np.testing.assert_allclose(layer["bias"][...], phi, rtol=1e-6)
    chex.assert_trees_all_equal(updates["head"], ones["head"])


def test_it_learns_with_every_strategy():
    labels = (X[:, 0] > 0).astype(jnp.int32)
    graphdef, params = nnx.split(make())

    def loss_fn(params):
        logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(X)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), utilization

    for strategy in (excitation_optax.zero_sum, excitation_optax.positive_sum, excitation_optax.exp_diff):
        tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(strategy, expert_axis=-1))

        @jax.jit
        def step(carry, _, tx=tx):
            params, state = carry
            (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, utilization=utilization)
            return (optax.apply_updates(params, updates), state), loss

        _, losses = jax.lax.scan(step, (params, tx.init(params)), length=40)
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("k", [0, 4])
def test_keep_top_k_requires_a_count_of_neurons(k):
    with pytest.raises(ValueError, match=rf"k must be between 1 and 3, .*got {k}"):
        topk_mlp.keep_top_k(jnp.ones((2, 3)), k)
    with pytest.raises(ValueError, match=r"keep_top_k: h must be an array of floats \[..., E\]; got float32\[\]"):
        topk_mlp.keep_top_k(1.0, 1)
