"""The mappings of docs/integrations onto other projects' parameter trees, held fast without their packages.

Axis letters: L layers, E experts.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import excitation_optax
from tests.integrations import excited


def read_layouts():
    """By name, the shapes of a tree's leaves by path."""
    layouts = {}
    for line in pathlib.Path(__file__).with_name("layouts.txt").read_text().splitlines():
        if line.startswith("== "):
            layouts[line.removeprefix("== ")] = shapes = {}
        elif line and not line.startswith("#"):
            path, shape = line.split(" ", 1)
            shapes[path] = tuple(json.loads(shape))
    return layouts


LAYOUTS = read_layouts()


def tree_of(layout, leaf):
    """A nested dict of `leaf(shape)`."""
    tree = {}
    for path, shape in LAYOUTS[layout].items():
        *nodes, name = path.split("/")
        node = tree
        for key in nodes:
            node = node.setdefault(key, {})
        node[name] = leaf(shape)
    return tree


@dataclasses.dataclass(frozen=True)
class Mapping:
    layout: str
    patterns: dict  # to the shape of the layers' utilization
    expert_axis: object
    scaled: dict  # the parameters that are scaled, and the axes along which; no others are


GATED = ("wi_0", "wi_1", "wo")
MAPPINGS = [
    Mapping(
        "maxtext mixtral-8x7b",
        {"decoder/layers/MoeBlock_0/w*": (3, 8)},
        (1, 0),
        {f"decoder/layers/MoeBlock_0/{name}": (1, 0) for name in GATED},
    ),
    Mapping(  # its two input matrices in one, [E, D, 2F]
        "maxtext qwen3-30b-a3b unscanned",
        {"decoder/layers_*/moe_block/w*": (8,)},
        None,
        {f"decoder/layers_{i}/moe_block/{name}": (0,) for i in range(2) for name in ("wi", "wo")},
    ),
    Mapping(  # a dense layer, and shared experts beside the others
        "maxtext deepseek3-671b",
        {"decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/w*": (3, 8)},
        (1, 0),
        {f"decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/{name}": (1, 0) for name in GATED},
    ),
    Mapping(  # blocks of two layers are scanned; biases of experts, and of the router
        "maxtext gpt-oss-20b",
        {"decoder/layers/layers_*/GptOssMlp/w*": (2, 8)},
        (1, 0),
        {
            f"decoder/layers/layers_{i}/GptOssMlp/{name}": (1, 0)
            for i in range(2)
            for name in (*GATED, "wi_0_bias", "wi_1_bias", "wo_bias")
        },
    ),
    Mapping(  # scans within scans
        "maxtext gemma4-26b",
        {
            f"decoder/scanned_blocks/{block}/mlp/moe_block/MoeBlock_0/{name}": shape
            for block, shape in {"global_layer": (1, 8), "local_layers": (1, 5, 8)}.items()
            for name in ("w*", "per_expert_scale")
        },
        {"decoder": {"scanned_blocks": {"global_layer": (1, 0), "local_layers": (1, 2, 0)}}},
        {
            f"decoder/scanned_blocks/{block}/mlp/moe_block/MoeBlock_0/{name}": axes
            for block, axes in {"global_layer": (1, 0), "local_layers": (1, 2, 0)}.items()
            for name in (*GATED, "per_expert_scale")
        },
    ),
    Mapping(
        "vmoe",
        {"Encoder/encoderblock_*/Moe/Mlp": (4,)},
        None,
        {
            f"Encoder/encoderblock_1/Moe/Mlp/{dense}/{name}": (0,)
            for dense in ("Dense_0", "Dense_1")
            for name in ("kernel", "bias")
        },
    ),
    Mapping(
        "flaxformer unscanned",
        {"**/mlp/expert": (4,)},
        None,
        {
            f"{layer}/mlp/expert/{dense}/{name}": (0,)
            for layer in ("encoder/layers_1", "decoder/layers_0")
            for dense in ("wi", "wo")
            for name in ("kernel", "bias")
        },
    ),
    Mapping(  # two blocks of encoder layers, the second layer of each with experts; three of the decoder
        "flaxformer scanned",
        {"encoder/encoder/subblock_*/mlp/expert": (2, 4), "decoder/decoder/subblock_*/mlp/expert": (3, 4)},
        (1, 0),
        {
            f"{block}/mlp/expert/{dense}/{name}": (1, 0)
            for block in ("encoder/encoder/subblock_1", "decoder/decoder/subblock_0")
            for dense in ("wi", "wo")
            for name in ("kernel", "bias")
        },
    ),
]


@pytest.fixture(params=MAPPINGS, ids=lambda mapping: mapping.layout)
def mapping(request):
    return request.param


def test_every_layout_is_mapped():
    assert [mapping.layout for mapping in MAPPINGS] == list(LAYOUTS)


def test_describe(mapping):
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = tree_of(mapping.layout, leaf)
    patterns = {pattern: leaf(shape) for pattern, shape in mapping.patterns.items()}
    utilization = excitation_optax.by_pattern(params, patterns)
    description = excitation_optax.describe(params, utilization, mapping.expert_axis)
    rows = {row.path: row for row in description.parameters}
    assert {path: row.shape for path, row in rows.items()} == LAYOUTS[mapping.layout]
    assert {path: row.axes for path, row in rows.items() if row.scaled_by is not None} == mapping.scaled


def test_updates(mapping):
    rng = np.random.default_rng(0)
    before = tree_of(mapping.layout, lambda shape: rng.normal(size=shape).astype(np.float32))
    patterns = {pattern: rng.uniform(size=shape).astype(np.float32) for pattern, shape in mapping.patterns.items()}
    utilization = excitation_optax.by_pattern(before, patterns)
    tx = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=mapping.expert_axis)
    after, _ = jax.jit(lambda updates, u: tx.update(updates, tx.init(updates), utilization=u))(before, utilization)

    by_path = {}
    for entry, leaf in excited.paths(utilization).items():  # of which some end in {several,siblings}
        head, _, names = entry.rpartition("/")
        by_path |= {f"{head}/{name}": leaf for name in names.strip("{}").split(",")}
    factors = {}
    for path, axes in mapping.scaled.items():
        u = np.asarray(next(leaf for prefix, leaf in by_path.items() if f"{path}/".startswith(f"{prefix}/")))
        factor = u / u.mean(axis=-1, keepdims=True)
        shape = np.ones(len(LAYOUTS[mapping.layout][path]), int)
        shape[list(axes)] = factor.shape
        factors[path] = np.transpose(factor, np.argsort(axes)).reshape(shape)
    excited.assert_scaled(before, after, factors)


@pytest.mark.parametrize(
    ("layout", "pattern", "shape", "expert_axis", "message"),
    [
        ("maxtext mixtral-8x7b", "decoder/layers/MoeBlock_0/w*", (3, 8), None, "these have \\[8, 3\\] entries"),
        ("maxtext mixtral-8x7b", "decoder/layers/MoeBlock_0", (3, 8), (1, 0), "whose name 'gate' is one to avoid"),
        (
            "maxtext deepseek3-671b",
            "**/DeepSeekMoeBlock_0/**/w*",
            (3, 8),
            (1, 0),
            "whose name 'shared_experts' is one to avoid",
        ),
        ("maxtext qwen3-30b-a3b unscanned", "**/MoeBlock_0/w*", (8,), None, "matches no parameter"),
        ("vmoe", "Encoder/*/Moe", (4,), None, "whose name 'Router' is one to avoid"),
        ("vmoe", "Encoder/*/*/Mlp", (4,), 1, "cannot be scaled"),
        ("flaxformer scanned", "encoder/**/mlp/expert", (2, 4), None, "these have \\[4, 2\\] entries"),
        ("flaxformer unscanned", "**/mlp", (4,), None, "whose name 'router' is one to avoid"),
    ],
)
def test_mistakes_are_errors(layout, pattern, shape, expert_axis, message):
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = tree_of(layout, leaf)
    with pytest.raises(ValueError, match=message):
        excitation_optax.describe(params, excitation_optax.by_pattern(params, {pattern: leaf(shape)}), expert_axis)
