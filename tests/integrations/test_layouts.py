"""The mappings of docs/integrations onto other projects' parameter trees, tested without their packages.

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
class Layer:
    """A layer, or a stack of layers: the pattern that addresses it, and what the pattern must scale."""

    pattern: str
    shape: tuple[int, ...]  # of its utilization
    axes: tuple[int, ...]  # of its parameters, that the axes of the utilization run along
    parameters: list[str]


@dataclasses.dataclass(frozen=True)
class Mapping:
    layout: str
    layers: list[Layer]
    expert_axis: object = None

    @property
    def scaled(self):
        """By path of each scaled parameter, its axes."""
        return {path: layer.axes for layer in self.layers for path in layer.parameters}


def below(node, *names):
    return [f"{node}/{name}" for name in names]


GATED = ("wi_0", "wi_1", "wo")
DENSE = ("wi/kernel", "wi/bias", "wo/kernel", "wo/bias")
GPT_OSS = "decoder/layers/layers_{}/GptOssMlp"
GEMMA = "decoder/scanned_blocks/{}/mlp/moe_block/MoeBlock_0"
AXLEARN = "decoder/transformer/repeat/layer"
MAPPINGS = [
    Mapping(
        "maxtext mixtral-8x7b",
        [Layer("decoder/layers/MoeBlock_0/w*", (3, 8), (1, 0), below("decoder/layers/MoeBlock_0", *GATED))],
        (1, 0),
    ),
    Mapping(  # its two input matrices are one array, [E, D, 2F]
        "maxtext qwen3-30b-a3b unscanned",
        [
            Layer(f"decoder/layers_{i}/moe_block/w*", (8,), (0,), below(f"decoder/layers_{i}/moe_block", "wi", "wo"))
            for i in range(2)
        ],
    ),
    Mapping(  # it has a dense layer, and shared experts beside the others
        "maxtext deepseek3-671b",
        [
            Layer(
                "**/MoeBlock_0/w*",
                (3, 8),
                (1, 0),
                below("decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0", *GATED),
            )
        ],
        (1, 0),
    ),
    Mapping(  # blocks of two layers are scanned; the experts and the router have biases
        "maxtext gpt-oss-20b",
        [
            Layer(
                f"{GPT_OSS.format(i)}/w*",
                (2, 8),
                (1, 0),
                below(GPT_OSS.format(i), *GATED, "wi_0_bias", "wi_1_bias", "wo_bias"),
            )
            for i in range(2)
        ],
        (1, 0),
    ),
    Mapping(  # scans within scans
        "maxtext gemma4-26b",
        [
            Layer(
                f"**/{block}/mlp/moe_block/MoeBlock_0/{{w*,per_expert_scale}}",
                shape,
                axes,
                below(GEMMA.format(block), *GATED, "per_expert_scale"),
            )
            for block, shape, axes in [("global_layer", (1, 8), (1, 0)), ("local_layers", (1, 5, 8), (1, 2, 0))]
        ],
        {"**/global_layer": (1, 0), "**/local_layers": (1, 2, 0)},
    ),
    Mapping(
        "vmoe",
        [
            Layer(
                "Encoder/encoderblock_1/Moe/Mlp",
                (4,),
                (0,),
                below(
                    "Encoder/encoderblock_1/Moe/Mlp", "Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel", "Dense_1/bias"
                ),
            )
        ],
    ),
    Mapping(
        "flaxformer unscanned",
        [
            Layer(f"{layer}/mlp/expert", (4,), (0,), below(f"{layer}/mlp/expert", *DENSE))
            for layer in ("encoder/layers_1", "decoder/layers_0")
        ],
    ),
    Mapping(  # two blocks of encoder layers, the second layer of each with experts; three of the decoder
        "flaxformer scanned",
        [
            Layer(f"{block}/mlp/expert", shape, (1, 0), below(f"{block}/mlp/expert", *DENSE))
            for block, shape in {"encoder/encoder/subblock_1": (2, 4), "decoder/decoder/subblock_0": (3, 4)}.items()
        ],
        (1, 0),
    ),
    Mapping(  # the second layer of each of three repeated blocks has experts, beside the router and the norms
        "axlearn",
        [
            Layer(
                "**/feed_forward/w*_weight",
                (3, 4),
                (0, 1),
                below(f"{AXLEARN}/layer1/feed_forward", "wi_0_weight", "wi_1_weight", "wo_weight"),
            )
        ],
    ),
]


@pytest.fixture(params=MAPPINGS, ids=lambda mapping: mapping.layout)
def mapping(request):
    return request.param


def test_every_layout_is_mapped():
    assert [mapping.layout for mapping in MAPPINGS] == list(LAYOUTS)


def shape_leaf(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_describe(mapping):
    utilization = {layer.pattern: shape_leaf(layer.shape) for layer in mapping.layers}
    description = excitation_optax.describe(tree_of(mapping.layout, shape_leaf), utilization, mapping.expert_axis)
    rows = {row.path: row for row in description.parameters}
    assert {path: row.shape for path, row in rows.items()} == LAYOUTS[mapping.layout]
    assert {path: row.axes for path, row in rows.items() if row.scaled_by is not None} == mapping.scaled


def test_updates(mapping):
    rng = np.random.default_rng(0)
    before = tree_of(mapping.layout, lambda shape: rng.normal(size=shape).astype(np.float32))
    utilization = {layer.pattern: rng.uniform(size=layer.shape).astype(np.float32) for layer in mapping.layers}
    tx = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=mapping.expert_axis)
    after, _ = jax.jit(lambda updates, u: tx.update(updates, tx.init(updates), utilization=u))(before, utilization)

    factors = {}
    for layer in mapping.layers:
        u = utilization[layer.pattern]
        factor = u / u.mean(axis=-1, keepdims=True)
        for path in layer.parameters:
            shape = np.ones(len(LAYOUTS[mapping.layout][path]), int)
            shape[list(layer.axes)] = factor.shape
            factors[path] = np.transpose(factor, np.argsort(layer.axes)).reshape(shape)
    excited.assert_scaled(before, after, factors)


@pytest.mark.parametrize(
    ("layout", "pattern", "shape", "expert_axis", "message"),
    [
        ("maxtext mixtral-8x7b", "decoder/layers/MoeBlock_0/w*", (3, 8), None, r"these have \[8, 3\] entries"),
        ("maxtext qwen3-30b-a3b unscanned", "**/MoeBlock_0/w*", (8,), None, "matches no parameter"),
        # Routers and shared experts are found by their shapes, whatever they are called.
        ("maxtext mixtral-8x7b", "**/MoeBlock_0", (3, 8), (1, 0), r"gate/kernel \[16, 3, 8\] cannot be scaled"),
        ("maxtext gpt-oss-20b", "**/layers_0/GptOssMlp", (2, 8), (1, 0), r"gate/kernel \[16, 2, 8\] cannot be scaled"),
        ("maxtext deepseek3-671b", "**/shared_experts", (3, 8), (1, 0), r"wi_0/kernel \[16, 3, 32\] cannot be scaled"),
        ("vmoe", "**/Moe", (4,), None, r"Router/dense/kernel \[16, 4\] cannot be scaled"),
        ("flaxformer unscanned", "encoder/*/mlp", (4,), None, r"are different layers"),
        ("flaxformer unscanned", "encoder/layers_1/mlp", (4,), None, r"w/kernel \[13, 4\] cannot be scaled"),
        ("axlearn", "**/layer1/feed_forward", (3, 4), None, r"gate_weight \[3, 12, 4\] cannot be scaled"),
        # One entry for several layers would give them the same counts.
        ("maxtext qwen3-30b-a3b unscanned", "**/moe_block/w*", (8,), None, "are different layers"),
        ("maxtext gpt-oss-20b", "decoder/layers/layers_*/GptOssMlp/w*", (2, 8), (1, 0), "are different layers"),
        ("flaxformer unscanned", "**/mlp/expert", (4,), None, "are different layers"),
    ],
)
def test_mistakes_are_errors(layout, pattern, shape, expert_axis, message):
    with pytest.raises(ValueError, match=message):
        excitation_optax.describe(tree_of(layout, shape_leaf), {pattern: shape_leaf(shape)}, expert_axis)


def test_describe_asks_about_a_bias_that_may_be_the_routers():
    """Its shape, `[E]`, is also that of a scalar for each expert."""
    path = "encoder/layers_1/mlp/router/router_weights/w/bias"
    params = tree_of("flaxformer unscanned", shape_leaf)
    assert excitation_optax.describe(params, {path: shape_leaf((4,))}).doubtful == (f"{path} [4]",)
