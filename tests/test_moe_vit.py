"""The MoE-ViT: sizes, patches, gradients, routing, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import moe, moe_vit

IMAGES = jax.random.normal(jax.random.key(0), (5, 8, 8, 3))


def configure(layer=None, **kwargs):
    """A small config. `layer` holds options of its MoE."""
    layer = moe.MoEConfig(**{"d_model": 8, "d_ff": 12, "num_experts": 4, "experts_per_token": 2} | (layer or {}))
    return moe_vit.MoEViTConfig(moe=layer, **{"num_layers": 3, "num_heads": 2, "image_size": 8} | kwargs)


def make(seed=0, **kwargs):
    return moe_vit.MoEViT(configure(**kwargs), rngs=nnx.Rngs(seed))


def number_of_parameters(config):
    params = nnx.eval_shape(lambda: nnx.state(moe_vit.MoEViT(config, rngs=nnx.Rngs(0))))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("sizes", "num_layers", "num_heads", "millions"),
    [
        # num_experts, experts_per_token, d_model, d_ff
        ((64, 2, 128, 256), 4, 4, 17.2),  # section 4.5's "17M"
        ((32, 8, 512, 32), 2, 8, 4.3),  # and "4M"
        ((8, 2, 512, 1024), 6, 8, 56.8),  # Table 8
        ((32, 2, 1024, 2048), 12, 16, 1662.7),  # printed there as 1.64B
    ],
)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_sizes_of_the_paper(sizes, num_layers, num_heads, millions, scan_layers):
    names = ("num_experts", "experts_per_token", "d_model", "d_ff")
    config = moe_vit.MoEViTConfig(
        moe=moe.MoEConfig(**dict(zip(names, sizes, strict=True))),
        num_layers=num_layers,
        num_heads=num_heads,
        scan_layers=scan_layers,
    )
    assert round(number_of_parameters(config) / 1e6, 1) == millions


def test_patches_are_cut_row_by_row():
    images = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    patches = moe_vit.split_into_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    for number, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        patch = images[1, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(patches[1, number], patch.reshape(-1))


def test_every_parameter_gets_a_gradient_and_excitation_scales_experts_alone():
    graphdef, params = nnx.split(make())

    @jax.jit
    def gradients(params):
        def loss_fn(params):
            run = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)
            logits, utilization, sown = run(IMAGES)
            return jnp.sum(logits**2), (utilization, moe.auxiliary_losses(sown))

        return jax.grad(loss_fn, has_aux=True)(params)

    grads, (utilization, losses) = gradients(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.any(np.asarray(leaf) != 0), path
    counts = utilization["layers"]["stack"]["moe"]["experts"]
    np.testing.assert_array_equal(counts.tokens, [20.0] * 3)  # 5 images of (8 / 4)^2 patches
    np.testing.assert_allclose(counts.utilization.sum(-1), 2, rtol=1e-6)
    assert losses.load_balancing.shape == ()
    table = excitation_optax.describe(nnx.as_pure(params), utilization, moe_vit.MoEViT.expert_axis)
    scaled = {str(row).split()[0] for row in str(table).splitlines() if "axis" in row}
    assert {line for line in scaled if "experts" in line} == scaled
    assert len(scaled) == 4  # kernels and biases, in and out


def test_the_order_of_patches_matters_and_that_of_images_does_not():
    model = make()
    logits = excitation_flax.capture_routing(model)(IMAGES)[0]
    backwards = excitation_flax.capture_routing(model)(IMAGES[::-1])[0]
    np.testing.assert_allclose(backwards, logits[::-1], atol=1e-5)
    moved = excitation_flax.capture_routing(model)(jnp.roll(IMAGES, 4, axis=2))[0]
    assert np.max(np.abs(moved - logits)) > 1e-4


def test_half_precision_computes_in_it_and_returns_float32():
    model = make(layer={"dtype": jnp.bfloat16})
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    logits = excitation_flax.capture_routing(model)(IMAGES)[0]
    exact = excitation_flax.capture_routing(make())(IMAGES)[0]
    assert logits.dtype == jnp.float32
    assert 0 < np.max(np.abs(logits - exact)) < 0.05 * np.max(np.abs(exact))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "d_model must be divisible by num_heads = 3; got 8"),
        ({"patch_size": 3}, "image_size must be divisible by patch_size = 3; got 8"),
        ({"num_layers": 0}, "MoEViTConfig: num_layers must be an integer of at least 1; got 0"),
        ({"num_classes": 2.5}, "MoEViTConfig: num_classes must be an integer of at least 1; got 2.5"),
        ({"moe": None}, "MoEViTConfig: moe must be a MoEConfig; got NoneType"),
    ],
)
def test_bad_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configure(), **kwargs)


@pytest.mark.parametrize(
    "images", [jnp.ones((2, 8, 8)), jnp.ones((2, 8, 4, 3)), jnp.ones((2, 8, 8, 3), jnp.int32), 1.0]
)
def test_bad_images(images):
    with pytest.raises(ValueError, match=r"MoEViT: images must be an array of floats \[B, 8, 8, 3\]; got "):
        make()(images)
