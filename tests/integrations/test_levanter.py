"""Levanter's Mixtral, excited by the code of docs/integrations/levanter.md, which is run here as it stands there.

Levanter counts by sorting tokens inside its scan; here NumPy counts, layer by layer, from the router's own scores.

Axis letters: B batch, S sequence, L layers, K experts per token, E experts.
"""

import dataclasses
import functools
import pathlib
import re

import equinox as eqx
import excited
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import excitation_optax

pytest.importorskip("levanter")
import haliax as hax
import levanter.tracker
from levanter import metrics, optim, trainer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "integrations" / "levanter.md"
EXPERTS = "transformer/layers/stacked/block_sparse_moe/experts"
STEPS = 20


@functools.cache
def blocks():
    """The page's blocks of Python."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def page():
    """What the page's code defines: of each block what stands before its `with`, where training begins."""
    names = {}
    exec(compile("\n".join(block.split("\nwith ")[0] for block in blocks()), str(PAGE), "exec"), names)
    return names


@eqx.filter_jit
def router_scores(model, example):
    """[L, B, S, E], each layer run by itself."""
    x, scores = model.embeddings.embed(example.tokens), []
    for layer in model.transformer.layers.unstacked():
        attended = x + layer.self_attn(x=layer.input_layernorm(x), mask=example.attn_mask)
        logits = layer.block_sparse_moe.gate(layer.post_attention_layernorm(attended))
        scores.append(logits.rearrange(("batch", "position", "experts")).array)
        x, _ = layer(x, mask=example.attn_mask)
    return jnp.stack(scores)


def count(model, example, where):
    """[L, E] tokens of each expert, and the number of tokens."""
    with hax.axis_mapping({}):
        scores = np.asarray(router_scores(model, example))
    chosen = np.argsort(-scores, axis=-1)[..., : page()["config"].num_experts_per_tok]
    counts = [np.bincount(layer[where].ravel(), minlength=scores.shape[-1]) for layer in chosen]
    return np.stack(counts), np.sum(where)


def factors(counts, tokens):
    """Exp-diff, e^u / E[e^u], which, unlike strategies that go by ratios, notices loads that sum to 1 instead of K."""
    phi = np.exp(counts / tokens)
    phi /= np.mean(phi, axis=-1, keepdims=True)
    return {f"{EXPERTS}/{name}/weight/0": phi[:, :, None, None] for name in ("w1", "w2", "w3")}


def make_example(i, padded):
    """The page's, or with 8 to 31 of its 32 positions before padding, and a prompt of 4, in no loss; what counts."""
    example = page()["make_example"](jax.random.key(i))
    shape = example.tokens.array.shape
    if not padded:
        return example, np.ones(shape, bool)
    mask = np.arange(shape[1]) < np.random.default_rng(i).integers(8, 32, size=shape[:1])[:, None]
    masked = jnp.where(mask, example.tokens.array, 0), example.loss_mask.array * mask * (np.arange(shape[1]) >= 4)
    return eqx.tree_at(lambda e: (e.tokens.array, e.loss_mask.array), example, masked), mask


def test_the_page_scales_the_experts_and_no_other_parameter():
    model = eqx.filter_eval_shape(page()["make_model"])
    description = excitation_optax.describe(model, page()["at_experts"](jnp.ones((3, 8))))
    assert {p.path for p in description.parameters if p.scaled_by} == set(factors(np.ones((3, 8)), 1))


@pytest.mark.parametrize("padded", [False, True])
def test_a_training_loop_scales_the_experts_and_nothing_else(padded, as_users_have_it):
    names = page()
    loss_fn = names["padded_loss_fn" if padded else "loss_fn"]
    adamw = optax.adamw(1e-2)
    tx = optax.chain(adamw, excitation_optax.scale_by_excitation(excitation_optax.exp_diff))

    @eqx.filter_jit
    def step(model, opt_state, example):
        (loss, utilization), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, example)
        params = eqx.filter(model, eqx.is_inexact_array)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        utilization = names["at_experts"](utilization)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return eqx.apply_updates(model, updates), opt_state, loss, vanilla, updates

    losses = []
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = names["with_counting"](names["make_model"]()) if padded else names["make_model"]()
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        for i in range(STEPS):
            example, where = make_example(i, padded)
            counts, tokens = count(model, example, where)
            model, opt_state, loss, vanilla, updates = step(model, opt_state, example)
            excited.assert_scaled(vanilla, updates, factors(counts, tokens))
            losses.append(float(loss))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("padded", [False, True])
def test_levanters_trainer_on_eight_devices_in_two_micro_batches(padded, as_users_have_it):
    names = page()
    steps = 3 if padded else STEPS
    config = dataclasses.replace(names["trainer_config"], num_train_steps=STEPS, per_device_parallelism=1)
    assert names["Batch"].size == 2 * jax.device_count() == 16
    snapshot = optax.snapshot("updates", lambda updates: updates)  # in the state, before Excitation and after
    excitation = excitation_optax.scale_by_excitation(excitation_optax.exp_diff)
    adam = optim.AdamConfig(learning_rate=1e-2, warmup=0).build(STEPS)
    tx = optax.chain(adam, snapshot, excitation, snapshot)

    def padded_loss_fn(model, example, key=None):
        loss, counts = names["padded_loss_fn"](model, example, key)
        return loss, {"utilization": metrics.Metric.from_value(counts, metrics.ReductionType.SUM)}

    make_model = (lambda: names["with_counting"](names["make_model"]())) if padded else names["make_model"]
    loss_fn = padded_loss_fn if padded else names["trainer_loss_fn"]
    losses = []
    with names["ExcitedTrainer"](config, tx, loss_fn, add_default_hooks=False) as excited_trainer:
        state = excited_trainer.initial_state(jax.random.key(0), model_init=make_model)
        for i in range(steps):
            example, where = make_example(i, padded)
            counts, tokens = count(state.model, example, where)
            info = excited_trainer.train_step(state, example)
            state = info.state
            vanilla, scaled = (state.opt_state[n].measurement["updates"] for n in (1, 3))
            excited.assert_scaled(vanilla, scaled, factors(counts, tokens))
            losses.append(info.loss)
    weight = state.model.transformer.layers.stacked.block_sparse_moe.experts.w1.weight.array
    assert weight.sharding.spec == jax.sharding.PartitionSpec(None, None, "data", None)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < (losses[0] if padded else losses[0] / 4)


def test_a_model_without_auxiliary_losses_has_the_loss_of_levanters_own():
    names = page()
    config = dataclasses.replace(names["config"], lbl_coef=None, rzl_coef=None)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = names["mixtral"].MixtralLMHeadModel.init(names["Vocab"], config, key=jax.random.key(0))
        example, _ = make_example(0, padded=True)
        loss, extras = eqx.filter_jit(names["forward"])(model, example)
        with levanter.tracker.defer_tracker_for_jit():
            logits = model(example.tokens, example.attn_mask).array
    assert extras.keys().isdisjoint({"load_balancing_loss", "router_z_loss"})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], example.tokens.array[:, 1:])
    in_loss = example.loss_mask.array[:, :-1]
    np.testing.assert_allclose(loss, np.sum(losses * in_loss) / np.sum(in_loss), rtol=1e-5)


def test_levanters_own_trainer_drops_the_utilization_which_is_an_error():
    names = page()
    arguments = names["trainer_config"], names["tx"], names["trainer_loss_fn"]
    with trainer.Trainer(*arguments, add_default_hooks=False) as own:
        state = own.initial_state(jax.random.key(0), model_init=names["make_model"])
        with pytest.raises(ValueError, match="Extra arguments received: obj_fn, loss"):
            own.train_step(state, names["make_example"](jax.random.key(0)))


def test_where_token_axes_are_sharded_levanters_loads_and_logits_are_others():
    names = page()
    config = trainer.TrainerConfig(axis_resources={"token": "data", "token_repeat": "data"})

    def forward(model, example):
        return model(example.tokens, example.attn_mask).array, names["forward"](model, example)[1]

    with jax.set_mesh(config.device_mesh), levanter.tracker.defer_tracker_for_jit():
        model = names["with_counting"](names["make_model"]())
        example, where = make_example(0, padded=False)
        logits, _ = hax.named_jit(lambda *args: forward(*args), axis_resources={})(model, example)
        sharded = hax.named_jit(forward, axis_resources=config.compute_axis_mapping)
        sharded_logits, extras = sharded(model, example)
        of_first_layer = count(model, example, where)[0][0]
    assert np.max(np.abs(sharded_logits - logits)) > 1
    loads = extras["expert_loads"].array
    assert loads.sharding.is_fully_replicated  # so it is said, and yet
    assert len({tuple(np.asarray(shard.data)[0]) for shard in loads.addressable_shards}) == 8
    np.testing.assert_array_equal(np.bincount(np.ravel(extras["chosen"][0]), minlength=8), of_first_layer)
