"""The models' parameters at the start, and what they compute from them, against values on file.

Results on file keep their meaning only while the names, sizes and initial values of all parameters stay as they are.
`initial_values.json` holds the shape of every parameter, four of its values, the sum of their absolute values, and
the output and the busiest expert's load on a fixed input. After an intended change, write it again:

    python tests/test_initial_values.py > tests/initial_values.json
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import gpt_moe, moe, moe_vit, topk_mlp

FILE = pathlib.Path(__file__).with_suffix("").with_name("initial_values.json")
ROWS = jax.random.normal(jax.random.key(1), (7, 6))
TOKENS = jax.random.randint(jax.random.key(2), (2, 8), 0, 11)
IMAGES = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))


def layer(**options):
    config = moe.MoEConfig(d_model=6, d_ff=5, num_experts=4, experts_per_token=2, **options)
    return moe.MoE(config, rngs=nnx.Rngs(0)), ROWS


def gpt(seed=0, scan_layers=True, **options):
    config = gpt_moe.GPTMoEConfig(
        moe=moe.MoEConfig(d_model=8, d_ff=12, num_experts=4, experts_per_token=2, **options),
        num_layers=3,
        num_heads=2,
        context=8,
        vocab_size=11,
        scan_layers=scan_layers,
    )
    return gpt_moe.GPTMoE(config, rngs=nnx.Rngs(seed)), TOKENS


def vit(**options):
    layer = moe.MoEConfig(d_model=8, d_ff=12, num_experts=4, experts_per_token=1, **options)
    config = moe_vit.MoEViTConfig(moe=layer, num_layers=2, num_heads=2, image_size=8)
    return moe_vit.MoEViT(config, rngs=nnx.Rngs(0)), IMAGES


def mlp():
    config = topk_mlp.TopKMLPConfig(input_dim=6, width=16, depth=2, sparsity=0.75)
    return topk_mlp.TopKMLP(config, rngs=nnx.Rngs(0)), ROWS


MODELS = {
    "MoE": layer,
    "MoE, gated, two shared experts": lambda: layer(gated=True, num_shared_experts=2),
    "MoE, no biases, one shared expert": lambda: layer(use_bias=False, num_shared_experts=1),
    "GPTMoE": gpt,
    "GPTMoE, a list of layers, seed 1": lambda: gpt(seed=1, scan_layers=False, gated=True, num_shared_experts=1),
    "MoEViT": vit,
    "MoEViT, no biases": lambda: vit(use_bias=False),
    "TopKMLP": mlp,
}


def numbers(array):
    """Four values of an array, evenly spread over it, and the sum of its absolute values."""
    flat = np.asarray(array, np.float64).ravel()
    few = [*flat[np.linspace(0, flat.size - 1, 4).astype(int)], np.sum(np.abs(flat))]
    return [float(f"{value:.9g}") for value in few]


def values(model, x):
    """Path to `[shape, dtype, numbers]` of every parameter; and of the output, and the busiest expert's counts."""
    flat = nnx.to_flat_state(nnx.state(model))
    rows = {"/".join(map(str, path)): [list(leaf.shape), str(leaf.dtype), numbers(leaf[...])] for path, leaf in flat}
    output, utilization = excitation_flax.capture_routing(model)(x)
    layers = jax.tree.leaves(utilization, is_leaf=lambda leaf: isinstance(leaf, excitation_optax.RoutingCounts))
    busiest = [int(count) for layer in layers for count in np.ravel(layer.counts.max(axis=-1))]
    return rows | {"output": [list(output.shape), str(output.dtype), numbers(output)], "busiest": busiest}


@pytest.mark.parametrize("name", MODELS)
def test_as_on_file(name):
    expected, got = json.loads(FILE.read_text())[name], values(*MODELS[name]())
    assert list(got) == list(expected)
    assert got.pop("busiest") == expected.pop("busiest")
    for path, (shape, dtype, few) in expected.items():
        assert got[path][:2] == [shape, dtype], path
        # The last bits of a normal sample depend on the compiler.
        tolerance = 1e-4 if path == "output" else 1e-5
        np.testing.assert_allclose(got[path][2], few, rtol=tolerance, atol=0.1 * tolerance, err_msg=path)


if __name__ == "__main__":
    text = json.dumps({name: values(*make()) for name, make in MODELS.items()})
    print(text.replace("]], ", "]],\n  ").replace(': {"', ': {\n  "').replace('}, "', '},\n"'))
