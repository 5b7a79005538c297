"""google-tunix's own Qwen3-MoE and Gemma 4, trained with Excitation by a plain NNX loop and by tunix's trainer.

Neither model knows of Excitation or gives out its routing. Qwen3's router is a layer of its own, whose scores
`nnx.capture` records; Gemma 4's is a method, which a subclass overrides. The expected factors are worked out in NumPy
from what the model's own `top_k` chose in a forward pass without any of this.

Axis letters: B batch, S sequence, L layers, K experts per token, E experts.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import excited
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax

pytest.importorskip("tunix")
from tunix.models.gemma4 import model as gemma4
from tunix.models.gemma4 import moe as gemma4_moe
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

VOCABULARY, LENGTH, LAYERS, EXPERTS, EXPERTS_PER_TOKEN, STEPS = 32, 12, 2, 4, 2, 25


class Chosen(nnx.Intermediate):
    """The experts that a router chose."""


class RecordingMoE(gemma4_moe.MoERagged):
    def _router(self, router_logits):
        weights, chosen = super()._router(router_logits)
        self.sow(Chosen, "chosen", chosen)
        return weights, chosen


def make_qwen3(remat="NONE"):
    config = qwen3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=32,
        hidden_dim=16,
        num_heads=2,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        remat_config=qwen3.RematConfig[remat],
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def forward_qwen3(model, tokens, mask):
    recorded = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    (logits, _), outputs = recorded(*inputs(tokens, mask))
    counts = {}
    for i, layer in nnx.as_pure(outputs)["layers"].items():
        (scores,) = layer["mlp"]["router"]["__call__"]
        probabilities = nnx.softmax(scores.astype(jnp.float32))
        counts[f"layers/{i}/mlp/*_proj"] = excitation_optax.count_logits(probabilities, EXPERTS_PER_TOKEN, where=mask)
    return logits, excitation_optax.by_pattern(nnx.state(model, nnx.Param), counts)


def make_gemma4(remat="NONE"):
    config = gemma4.ModelConfig(
        num_layers=LAYERS,
        num_embed=VOCABULARY,
        embed_dim=32,
        hidden_dim=32,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        sliding_window_size=LENGTH,
        enable_moe=True,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        expert_dim=16,
        remat_config=gemma4.RematConfig[remat],
    )
    model = gemma4.Gemma4(config, rngs=nnx.Rngs(0))
    for layer in model.layers:
        layer.moe.__class__ = RecordingMoE
        for dense in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):  # zeros, meant to be loaded
            dense.kernel[...] = 0.1 * jax.random.normal(jax.random.key(0), dense.kernel.shape)
    return model


def forward_gemma4(model, tokens, mask):
    (logits, _), outputs = nnx.capture(model, Chosen)(*inputs(tokens, mask))
    counts = {}
    for i, layer in nnx.as_pure(outputs)["layers"].items():
        (chosen,) = layer["moe"]["chosen"]
        for name in ("gating_einsum", "linear", "per_expert_scale"):
            counts[f"layers/{i}/moe/{name}"] = excitation_optax.count_routing(chosen, EXPERTS, where=mask)
    return logits, excitation_optax.by_pattern(nnx.state(model, nnx.Param), counts)


@dataclasses.dataclass(frozen=True)
class Family:
    make: Callable  # from the name of a RematConfig
    forward: Callable  # from a model, tokens [B, S] and their mask, to logits and utilization
    experts: tuple[str, ...]  # the parameters of a layer that are scaled, whatever their rank, with E in front


QWEN3 = Family(make_qwen3, forward_qwen3, ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"))
GEMMA4 = Family(make_gemma4, forward_gemma4, ("moe/gating_einsum", "moe/linear", "moe/per_expert_scale"))


def inputs(tokens, mask):
    return tokens, utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask)


def batches(steps, batch=8):
    """Sequences in which a token tells the next, of different lengths, padded with 0."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = (rng.integers(VOCABULARY, size=(batch, 1)) + 5 * np.arange(LENGTH)) % VOCABULARY
        mask = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH, size=(batch, 1))
        yield jnp.asarray(np.where(mask, tokens, 0), jnp.int32), jnp.asarray(mask)


def loss_fn(family, model, tokens, mask):
    logits, utilization = family.forward(model, tokens, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses, where=mask[:, 1:]), utilization


def recorded(tx):
    """The transformation, with what went into it and what came out of it in its state."""

    def init_fn(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # twice, as tunix's trainer donates its optimizer
        return {"tx": tx.init(params), "before": zeros(), "after": zeros()}

    def update_fn(updates, state, params=None, **extra_args):
        after, tx_state = tx.update(updates, state["tx"], params, **extra_args)
        return after, {"tx": tx_state, "before": updates, "after": after}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def optimizer_of():
    return optax.chain(optax.adam(1e-2), recorded(excitation_optax.scale_by_excitation(excitation_optax.zero_sum)))


def choices(plain, model, tokens, mask):
    """What the routers choose, `[L, B, S, K]`: seen at the function that chooses, in a plain forward pass."""
    nnx.update(plain, nnx.state(model, nnx.Param))
    seen = []

    def spy(function):
        def spied(*args, **kwargs):
            values, indices = function(*args, **kwargs)
            seen.append(np.asarray(indices))
            return values, indices

        return spied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "top_k", spy(jax.lax.top_k))
        patch.setattr(jax.lax, "approx_max_k", spy(jax.lax.approx_max_k))
        plain(*inputs(tokens, mask))
    return np.stack(seen)


def expected_factors(family, updates, chosen, masks):
    """u / mean(u) for every expert parameter, from choices `[L, B, S, K]` and masks `[B, S]`."""
    assert not masks.all(), "there must be padding to leave out"
    shapes = {path: np.shape(update) for path, update in excited.paths(updates).items()}
    factors = {}
    for layer, indices in enumerate(chosen):
        counts = np.bincount(indices[masks].ravel(), minlength=EXPERTS)
        for name in family.experts:
            path = f"layers/{layer}/{name}"
            factors[path] = (counts / counts.mean()).reshape(EXPERTS, *[1] * (len(shapes[path]) - 1))
    return factors


def assert_excited(family, record, chosen, masks):
    factors = expected_factors(family, record["before"], np.asarray(chosen), np.asarray(masks))
    excited.assert_scaled(record["before"], record["after"], factors)


@pytest.mark.parametrize(
    ("family", "remat"), [(QWEN3, "NONE"), (QWEN3, "DECODER"), (GEMMA4, "NONE"), (GEMMA4, "DECODER")]
)
def test_trains(family, remat):
    model, plain = family.make(remat), family.make()
    optimizer = nnx.Optimizer(model, optimizer_of(), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, tokens, mask):
        traces.append(1)
        grad_fn = nnx.value_and_grad(loss_fn, argnums=1, has_aux=True)
        (loss, utilization), grads = grad_fn(family, model, tokens, mask)
        optimizer.update(model, grads, utilization=utilization)
        return loss

    losses = []
    for tokens, mask in batches(STEPS):
        chosen = choices(plain, model, tokens, mask)
        losses.append(float(step(model, optimizer, tokens, mask)))
        assert_excited(family, nnx.as_pure(optimizer.opt_state)[1], chosen, mask)
    assert len(traces) == 1
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


def test_recording_takes_no_memory():
    """Of what nnx.capture records in a model that recomputes its layers, only the counts outlive the layer."""
    graph, state = nnx.split(make_qwen3("DECODER"))
    tokens, mask = jnp.ones((32, 64), jnp.int32), jnp.ones((32, 64), jnp.bool_)

    def memory(forward):
        def loss_fn(state):
            logits, aux = forward(nnx.merge(graph, state), tokens, mask)
            return jnp.mean(logits**2), aux

        return jax.jit(jax.grad(loss_fn, has_aux=True)).lower(state).compile().memory_analysis().temp_size_in_bytes

    plain = memory(lambda model, tokens, mask: model(*inputs(tokens, mask)))
    assert memory(forward_qwen3) < 1.01 * plain


class ExcitedTrainer(peft_trainer.PeftTrainer):
    def _train_step(self, model, optimizer, inputs):
        grad_fn = nnx.value_and_grad(self.loss_fn, has_aux=True)
        (loss, utilization), grads = grad_fn(model, **self.gen_model_input_fn(inputs))
        optimizer.update(model, grads, utilization=utilization)
        return loss, utilization, optax.global_norm(grads)


def shard(model, mesh):
    """Puts the parameters on the mesh as tunix's sharding config says."""
    state = nnx.state(model)
    place = lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))
    nnx.update(model, jax.tree.map(place, state, nnx.get_partition_spec(state)))
    assert not model.layers[0].mlp.gate_proj[...].sharding.is_fully_replicated


@pytest.mark.parametrize(("micro_batches", "devices"), [(1, 1), (2, 1), (1, 4)])
def test_tunix_trainer(micro_batches, devices):
    """Tunix's trainer takes the counts on; over micro-batches they add up, and over devices."""
    seen, masks = [], []

    class Watched(ExcitedTrainer):
        def _prepare_inputs(self, data):
            masks.append(data.input_mask)
            seen.append(choices(plain, self.model, data.input_tokens, data.input_mask))
            return data

        def _post_process_train_step(self, utilization):
            assert utilization["layers"]["0"]["mlp"]["{down_proj,gate_proj,up_proj}"].tokens == np.sum(masks[-1])
            if len(masks) % micro_batches == 0:
                state = nnx.as_pure(self.optimizer.opt_state)
                record = (state.multi_steps.inner_opt_state if micro_batches > 1 else state)[1]
                chosen = np.concatenate(seen[-micro_batches:], axis=1)
                assert_excited(QWEN3, record, chosen, np.concatenate(masks[-micro_batches:]))
                updates.append(record)

    updates = []
    model, plain = make_qwen3(), make_qwen3()
    tx = optimizer_of()
    data = [peft_trainer.TrainingInput(tokens, mask) for tokens, mask in batches(STEPS * micro_batches)]
    if micro_batches > 1:
        like = jax.eval_shape(lambda: forward_qwen3(make_qwen3(), data[0].input_tokens, data[0].input_mask)[1])
        tx = excitation_optax.accumulate_utilization(optax.MultiSteps(tx, micro_batches), like)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=len(data))
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh if devices > 1 else contextlib.nullcontext():
        if devices > 1:
            shard(model, mesh)
        trainer = Watched(model, tx, config)
        qwen3_loss = lambda model, tokens, mask: loss_fn(QWEN3, model, tokens, mask)
        trainer = trainer.with_loss_fn(qwen3_loss, has_aux=True)
        trainer = trainer.with_gen_model_input_fn(lambda data: {"tokens": data.input_tokens, "mask": data.input_mask})
        trainer.train(data)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert len(updates) == STEPS
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


def assert_described(model, patterns, shapes, layers):
    """All experts of the model are scaled along their first axis, and nothing else is."""
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    entry = jax.ShapeDtypeStruct((128,), jnp.float32)
    description = excitation_optax.describe(params, excitation_optax.by_pattern(params, dict.fromkeys(patterns, entry)))
    scaled = {row.path: row.shape for row in description.parameters if row.scaled_by is not None}
    assert scaled == {f"layers/{i}/{name}": shape for i in range(layers) for name, shape in shapes.items()}
    assert {row.axes for row in description.parameters if row.path in scaled} == {(0,)}


def test_full_size():
    """The addresses fit the models as they are published, from shapes alone."""
    model = nnx.eval_shape(lambda: qwen3.Qwen3(qwen3.ModelConfig.qwen3_30b_a3b(), rngs=nnx.Rngs(0)))
    shapes = dict(zip(QWEN3.experts, [(128, 2048, 768), (128, 2048, 768), (128, 768, 2048)], strict=True))
    assert_described(model, ["layers/*/mlp/*_proj"], shapes, layers=48)
    model = nnx.eval_shape(lambda: gemma4.Gemma4(gemma4.ModelConfig.gemma4_26b_a4b(), rngs=nnx.Rngs(0)))
    shapes = dict(zip(GEMMA4.experts, [(128, 2, 704, 2816), (128, 704, 2816), (128,)], strict=True))
    assert_described(model, [f"layers/*/{name}" for name in GEMMA4.experts], shapes, layers=30)
