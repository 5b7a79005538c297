"""MaxText's own models, trained with Excitation by MaxText's loss and train state, on a mesh of eight devices.

Its MoE layer is asked for its choice once more, at the door of the matrix products. The expected factors are worked out
in NumPy from the choice that the layer itself makes inside, in a forward pass without any of this.

Axis letters: B batch, S sequence, L layers, K experts per token, E experts.
"""

import contextlib
import dataclasses
import functools
import inspect
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from flax.core import spmd

import excitation_optax
from tests.integrations import excited, test_layouts

pytest.importorskip("maxtext")
import maxtext
from maxtext.common import train_state_nnx
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils, model_creation_utils

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

STEPS, B, S, VOCABULARY, E, K = 25, 16, 16, 32, 8, 2
SIZES = {
    "base_emb_dim": 32,
    "base_mlp_dim": 32,
    "base_moe_mlp_dim": 32,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "num_experts": E,
    "num_experts_per_tok": K,
    "max_target_length": S,
    "per_device_batch_size": B / jax.device_count(),
}


NOT_SPARSE = {"sparse_matmul": False}


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    layers: int
    axes: tuple[int, ...]  # of the experts' arrays, that the axes of utilization run along
    experts: tuple[str, ...]  # the parameters that are scaled, and no others
    settings: dict = dataclasses.field(default_factory=dict)


GATED = ("wi_0", "wi_1", "wo")
MIXTRAL = Family(
    "mixtral-8x7b",
    layers=2,
    axes=(1, 0),
    experts=tuple(f"decoder/layers/MoeBlock_0/{name}" for name in GATED),
    settings={"megablox": False},  # jax.lax.ragged_dot
)
DEEPSEEK = Family(  # a dense layer, shared experts, and a choice of experts by groups, with a bias
    "deepseek3-671b",
    layers=3,
    axes=(1, 0),
    experts=tuple(f"decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/{name}" for name in GATED),
    settings={
        "first_num_dense_layers": 1,
        "n_routing_groups": 4,
        "topk_routing_group": 2,
        "routed_bias": True,
        **NOT_SPARSE,
    },
)
GPT_OSS = Family(
    "gpt-oss-20b",
    layers=2,
    axes=(0,),
    experts=tuple(
        f"decoder/layers_{i}/GptOssMlp/{name}" for i in range(2) for name in (*GATED, *(f"{n}_bias" for n in GATED))
    ),
    settings={"scan_layers": False, **NOT_SPARSE},
)


def configure(name, **settings):
    return pyconfig.initialize(
        ["", os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")],
        model_name=name,
        run_name="excitation",
        override_model_config=True,
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        dataset_type="synthetic",
        log_config=False,
        jax_cache_dir="",
        dtype="float32",
        attention="dot_product",
        remat_policy="none",
        **(SIZES | settings),
    )


def make(config):
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with on(config, mesh):
        return model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0), model_mode="train")


@contextlib.contextmanager
def on(config, mesh):
    with mesh, spmd.logical_axis_rules(config.logical_axis_rules):
        yield


def counted(matmul):
    """What docs/integrations/maxtext.md has you put around MaxText's two ways to multiply."""

    @functools.wraps(matmul)
    def call(self, inputs, gate_logits, pre_bias_logits, *args, **kwargs):
        _, chosen = self.get_topk(gate_logits, pre_bias_logits, self.rngs, kwargs.get("input_ids"))
        self.sow(nnx.Intermediate, "routing", excitation_optax.count_routing(chosen, self.num_experts))
        return matmul(self, inputs, gate_logits, pre_bias_logits, *args, **kwargs)

    return call


def utilization_of(intermediates):
    sown = traverse_util.flatten_dict(intermediates)
    return {"/".join([*path[:-1], "w*"]): value[0] for path, value in sown.items() if path[-1] == "routing"}


def excited_train_step():
    """MaxText's train step, in which one line is changed."""
    source, line = inspect.getsource(train.train_step), "state.apply_gradients(grads)"
    assert source.count(line) == 1
    changed = "state.apply_gradients(grads, utilization=utilization_of(intermediate_outputs))"
    names = {**vars(train), "utilization_of": utilization_of}
    exec(source.replace(line, changed), names)
    return names["train_step"]


def batches():
    """Sequences in which a token tells the next."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = jnp.asarray((rng.integers(VOCABULARY, size=(B, 1)) + 5 * np.arange(S + 1)) % VOCABULARY, jnp.int32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        for name in ("inputs", "targets"):
            batch[f"{name}_position"] = jnp.broadcast_to(jnp.arange(S), (B, S))
            batch[f"{name}_segmentation"] = jnp.ones((B, S), jnp.int32)
        yield batch


def spied(get_topk):
    @functools.wraps(get_topk)
    def call(self, *args, **kwargs):
        weights, chosen = get_topk(self, *args, **kwargs)
        self.sow(nnx.Intermediate, "chosen", chosen)
        return weights, chosen

    return call


def choices(config, model, batch):
    """By the path of the MoE layer, what it chose inside: `[B, S, K]`, or `[L, B, S, K]` of scanned layers."""
    _, aux = train.loss_fn(model, config, dict(batch), None, None)
    sown = traverse_util.flatten_dict(aux["intermediate_outputs"])
    return {"/".join(path[:-1]): value[0] for path, value in sown.items() if path[-1] == "chosen"}


def expected_factors(family, updates, chosen):
    """u / mean(u) for every expert parameter."""
    factors = {}
    for path, update in excited.paths(updates).items():
        if path in family.experts:
            indices = np.asarray(chosen[path.rpartition("/")[0]])
            layers = indices.reshape(-1, B * S * K)
            counts = np.stack([np.bincount(layer, minlength=E) for layer in layers], axis=1)  # [E, L]
            factor = counts / counts.mean(axis=0)
            factors[path] = factor.reshape(*update.shape[: len(family.axes)], *[1] * (update.ndim - len(family.axes)))
    assert factors.keys() == set(family.experts)
    return factors


@pytest.mark.parametrize(
    ("family", "micro_batches"),
    [(MIXTRAL, 1), (MIXTRAL, 2), (DEEPSEEK, 1), (GPT_OSS, 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_trains(family, micro_batches, monkeypatch):
    settings = {"base_num_decoder_layers": family.layers, **family.settings}
    plain_config = configure(family.name, **settings | NOT_SPARSE)
    settings["per_device_batch_size"] = SIZES["per_device_batch_size"] / micro_batches
    config = configure(family.name, gradient_accumulation_steps=micro_batches, **settings)
    model, plain = make(config), make(plain_config)
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=family.axes)
    tx = optax.chain(optax.adamw(1e-2), excited.recorded(excitation))
    train_state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    graphdef, state = nnx.split(train_state)
    whole = jax.sharding.NamedSharding(model.mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, nnx.state(model, nnx.Param))
    step = jax.jit(functools.partial(excited_train_step(), graphdef, config, None, shardings))
    choose = nnx.jit(functools.partial(choices, plain_config))

    losses = []
    with on(config, model.mesh):
        for batch in batches():
            nnx.update(plain, state.model)
            with monkeypatch.context() as patch:
                patch.setattr(moe.RoutedMoE, "get_topk", spied(moe.RoutedMoE.get_topk))
                chosen = choose(plain, batch)
            with monkeypatch.context() as patch:
                patch.setattr(moe.RoutedMoE, "dense_matmul", counted(moe.RoutedMoE.dense_matmul))
                patch.setattr(moe.RoutedMoE, "sparse_matmul", counted(moe.RoutedMoE.sparse_matmul))
                state, metrics = step(state, batch)
            losses.append(float(metrics["scalar"]["learning/lm_loss"]))
            record = nnx.as_pure(nnx.merge(graphdef, state).optimizer.opt_state)[1]
            factors = expected_factors(family, record["before"], chosen)
            excited.assert_scaled(record["before"], record["after"], factors)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * losses[0], losses


UNGROUPED = {"n_routing_groups": -1, "topk_routing_group": -1}


@pytest.mark.parametrize(
    ("layout", "layers", "settings"),
    [
        ("mixtral-8x7b", 3, {}),
        ("qwen3-30b-a3b unscanned", 2, {"scan_layers": False, "prefuse_moe_weights": True}),
        ("deepseek3-671b", 4, {"first_num_dense_layers": 1, **UNGROUPED}),
        ("gpt-oss-20b", 4, {}),
        ("gemma4-26b", 6, {}),
    ],
)
def test_layouts_are_as_they_are_written_down(layout, layers, settings):
    sizes = {"base_emb_dim": 16, "head_dim": 8, "vocab_size": 64, "base_num_decoder_layers": layers}
    config = configure(layout.split()[0], **sizes | settings)
    shapes = excited.paths(nnx.as_pure(nnx.state(nnx.eval_shape(lambda: make(config)), nnx.Param)))
    assert {path: leaf.shape for path, leaf in shapes.items()} == test_layouts.LAYOUTS[f"maxtext {layout}"]
