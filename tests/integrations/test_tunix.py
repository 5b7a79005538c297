"""google-tunix's Qwen3-MoE and Gemma 4, excited by what docs/integrations/tunix.md defines, which is run as it stands.

The expected factors are worked out in NumPy from what the model's own `top_k` chose in a forward pass without any of
this. In all batches there are prompts, which the loss mask leaves out and the counts do not, and padding.

Axis letters: B batch, S sequence, L layers, K experts per token, E experts.
"""

import ast
import contextlib
import dataclasses
import functools
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

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
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "integrations" / "tunix.md"
VOCABULARY, LENGTH, PROMPT, LAYERS, EXPERTS, EXPERTS_PER_TOKEN, STEPS = 32, 12, 3, 2, 4, 2, 25


@functools.cache
def page(title):
    """What the page imports and defines, functions and classes, from its beginning to the end of a section."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    last = next(i for i, section in enumerate(sections) if section.startswith(title + "\n"))
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```$", "".join(sections[: last + 1]), re.DOTALL | re.MULTILINE)
    tree = ast.parse("\n".join(blocks))
    tree.body = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
    ]
    names: dict[str, Any] = {}
    exec(compile(tree, str(PAGE), "exec"), names)
    return types.SimpleNamespace(**names)


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
        layer.moe.__class__ = page("Gemma 4").RecordingMoE
        for dense in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):  # zeros, meant to be loaded
            dense.kernel[...] = 0.1 * jax.random.normal(jax.random.key(0), dense.kernel.shape)
    return model


@dataclasses.dataclass(frozen=True)
class Family:
    page: types.SimpleNamespace  # what its section defines
    make: Callable  # from the name of a RematConfig
    experts: tuple[str, ...]  # the parameters of a layer that are scaled, whatever their rank, with E in front


QWEN3 = Family(page("Qwen3"), make_qwen3, ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"))
GEMMA4 = Family(page("Gemma 4"), make_gemma4, ("moe/gating_einsum", "moe/linear", "moe/per_expert_scale"))


def inputs(tokens):
    mask = tokens != 0
    return tokens, utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask)


def batches(steps, batch=8):
    """Sequences in which a token tells the next, of different lengths, padded with 0; prompts are in no loss."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = 1 + (rng.integers(VOCABULARY - 1, size=(batch, 1)) + 5 * np.arange(LENGTH)) % (VOCABULARY - 1)
        tokens *= np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH, size=(batch, 1))
        in_loss = (tokens != 0) & (np.arange(LENGTH) >= PROMPT)
        yield peft_trainer.TrainingInput(jnp.asarray(tokens, jnp.int32), jnp.asarray(in_loss))


def optimizer_of():
    return optax.chain(
        optax.adam(1e-2), excited.recorded(excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    )


def choices(plain, model, tokens):
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
        plain(*inputs(tokens))
    return np.stack(seen)


def expected_factors(family, updates, chosen, tokens):
    """u / mean(u) for every expert parameter, from choices `[L, B, S, K]` for tokens `[B, S]`."""
    assert not tokens.all(), "there must be padding to leave out"
    shapes = {path: np.shape(update) for path, update in excited.paths(updates).items()}
    factors = {}
    for layer, indices in enumerate(chosen):
        counts = np.bincount(indices[tokens != 0].ravel(), minlength=EXPERTS)
        for name in family.experts:
            path = f"layers/{layer}/{name}"
            factors[path] = (counts / counts.mean()).reshape(EXPERTS, *[1] * (len(shapes[path]) - 1))
    return factors


def assert_excited(family, record, chosen, tokens):
    factors = expected_factors(family, record["before"], np.asarray(chosen), np.asarray(tokens))
    excited.assert_scaled(record["before"], record["after"], factors)


@pytest.mark.parametrize(
    ("family", "remat"), [(QWEN3, "NONE"), (QWEN3, "DECODER"), (GEMMA4, "NONE"), (GEMMA4, "DECODER")]
)
def test_trains(family, remat):
    model, plain = family.make(remat), family.make()
    optimizer = nnx.Optimizer(model, optimizer_of(), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, inputs):
        traces.append(1)
        return family.page.step(model, optimizer, inputs)

    losses = []
    for batch in batches(STEPS):
        chosen = choices(plain, model, batch.input_tokens)
        losses.append(float(step(model, optimizer, family.page.gen_model_input_fn(batch))[0]))
        assert_excited(family, nnx.as_pure(optimizer.opt_state)[1], chosen, batch.input_tokens)
    assert len(traces) == 1
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


@pytest.mark.parametrize("family", [QWEN3, GEMMA4])
def test_a_prompt_without_loss_is_attended_to_and_counted(family):
    model, (batch,) = family.make(), batches(1)
    assert not batch.input_mask[:, :PROMPT].any()
    answers = np.asarray(batch.input_mask)
    other = dataclasses.replace(batch, input_tokens=batch.input_tokens.at[:, 0].set(batch.input_tokens[:, 0] % 31 + 1))
    masks = family.page.gen_model_input_fn(batch)
    loss_mask = masks.pop("loss_mask")
    logits, utilization = family.page.forward(model, **masks)
    other_logits, _ = family.page.forward(model, other.input_tokens, masks["padding_mask"])
    assert np.all(np.max(np.abs(logits - other_logits), axis=-1)[answers] > 1e-4)
    tokens = [counts.tokens for counts in jax.tree.leaves(utilization, is_leaf=lambda x: hasattr(x, "tokens"))]
    assert tokens == [np.sum(np.asarray(batch.input_tokens) != 0)] * LAYERS
    loss, _ = family.page.loss_fn(model, **masks, loss_mask=loss_mask)
    losses = -np.take_along_axis(np.asarray(nnx.log_softmax(logits)), np.roll(batch.input_tokens, -1, 1)[..., None], -1)
    np.testing.assert_allclose(loss, losses[:, :-1, 0][answers[:, 1:]].mean(), rtol=1e-5)


def test_recording_takes_no_memory():
    """Of what nnx.capture records in a model that recomputes its layers, only the counts outlive the layer."""
    graph, state = nnx.split(make_qwen3("DECODER"))
    tokens = jnp.ones((32, 64), jnp.int32)

    def memory(forward):
        def loss_fn(state):
            logits, aux = forward(nnx.merge(graph, state), tokens)
            return jnp.mean(logits**2), aux

        return jax.jit(jax.grad(loss_fn, has_aux=True)).lower(state).compile().memory_analysis().temp_size_in_bytes

    plain = memory(lambda model, tokens: model(*inputs(tokens)))
    assert memory(lambda model, tokens: QWEN3.page.forward(model, tokens, tokens != 0)) < 1.01 * plain


def shard(model, mesh):
    """Puts the parameters on the mesh as tunix's sharding config says."""
    state = nnx.state(model)
    place = lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))
    nnx.update(model, jax.tree.map(place, state, nnx.get_partition_spec(state)))
    assert not model.layers[0].mlp.gate_proj[...].sharding.is_fully_replicated


@pytest.mark.parametrize(("micro_batches", "devices"), [(1, 1), (2, 1), (1, 4)])
def test_tunix_trainer(micro_batches, devices):
    """Tunix's trainer takes the counts on; over micro-batches they add up, and over devices."""
    seen, tokens = [], []

    class Watched(QWEN3.page.ExcitedTrainer):
        def _prepare_inputs(self, data):
            tokens.append(np.asarray(data.input_tokens))
            seen.append(choices(plain, self.model, data.input_tokens))
            return data

        def _post_process_train_step(self, utilization):
            counts = utilization["layers/0/mlp/*_proj"]
            assert counts.tokens == np.sum(tokens[-1] != 0)
            if len(tokens) % micro_batches == 0:
                state = nnx.as_pure(self.optimizer.opt_state)
                record = (state.multi_steps.inner_opt_state if micro_batches > 1 else state)[1]
                chosen = np.concatenate(seen[-micro_batches:], axis=1)
                assert_excited(QWEN3, record, chosen, np.concatenate(tokens[-micro_batches:]))
                updates.append(record)

    updates = []
    model, plain = make_qwen3(), make_qwen3()
    tx = optimizer_of()
    data = list(batches(STEPS * micro_batches))
    if micro_batches > 1:
        like = jax.eval_shape(lambda: QWEN3.page.loss_fn(make_qwen3(), **QWEN3.page.gen_model_input_fn(data[0]))[1])
        tx = excitation_optax.accumulate_utilization(optax.MultiSteps(tx, micro_batches), like)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=len(data))
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh if devices > 1 else contextlib.nullcontext():
        if devices > 1:
            shard(model, mesh)
        trainer = Watched(model, tx, config)
        trainer = trainer.with_loss_fn(QWEN3.page.loss_fn, has_aux=True)
        trainer = trainer.with_gen_model_input_fn(QWEN3.page.gen_model_input_fn)
        trainer.train(data)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert len(updates) == STEPS
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


def test_tunix_trainer_refuses_accumulation_that_keeps_the_last_routing_only():
    make = lambda n: QWEN3.page.ExcitedTrainer(
        make_qwen3(),
        optimizer_of(),
        peft_trainer.TrainingConfig(eval_every_n_steps=100, gradient_accumulation_steps=n),
    )
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        make(2)
    make(1)
    make(None)


def assert_described(model, pattern, shapes, layers):
    """All experts of the model are scaled along their first axis, and nothing else is."""
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    entry = jax.ShapeDtypeStruct((128,), jnp.float32)
    description = excitation_optax.describe(params, {f"layers/{i}/{pattern}": entry for i in range(layers)})
    scaled = {row.path: row.shape for row in description.parameters if row.scaled_by is not None}
    assert scaled == {f"layers/{i}/{name}": shape for i in range(layers) for name, shape in shapes.items()}
    assert {row.axes for row in description.parameters if row.path in scaled} == {(0,)}


def test_full_size():
    """The addresses fit the models as they are published, from shapes alone."""
    model = nnx.eval_shape(lambda: qwen3.Qwen3(qwen3.ModelConfig.qwen3_30b_a3b(), rngs=nnx.Rngs(0)))
    shapes = dict(zip(QWEN3.experts, [(128, 2048, 768), (128, 2048, 768), (128, 768, 2048)], strict=True))
    assert_described(model, "mlp/*_proj", shapes, layers=48)
    model = nnx.eval_shape(lambda: gemma4.Gemma4(gemma4.ModelConfig.gemma4_26b_a4b(), rngs=nnx.Rngs(0)))
    shapes = dict(zip(GEMMA4.experts, [(128, 2, 704, 2816), (128, 704, 2816), (128,)], strict=True))
    assert_described(model, "moe/{gating_einsum,linear,per_expert_scale}", shapes, layers=30)
