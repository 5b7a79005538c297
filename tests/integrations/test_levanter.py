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

hax = pytest.importorskip("haliax")
optim = pytest.importorskip("levanter.optim")
trainer = pytest.importorskip("levanter.trainer")

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "integrations" / "levanter.md"
EXPERTS = "transformer/layers/stacked/block_sparse_moe/experts"
STEPS = 20


@functools.cache
def blocks():
    """The page's blocks of Python: the lines that matter first, which run as part of those after them."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def page():
    """What the page's code defines: of each block what stands before its `with`, where training begins."""
    names = {}
    exec(compile("\n".join(block.split("\nwith ")[0] for block in blocks()[1:]), str(PAGE), "exec"), names)
    return names


@pytest.fixture
def mesh(as_users_have_it):
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        yield


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


def count(model, example, where=None):
    """[L, E] tokens of each expert, and the number of tokens."""
    with hax.axis_mapping({}):
        scores = np.asarray(router_scores(model, example))
    where = np.ones(scores.shape[1:3], bool) if where is None else where
    chosen = np.argsort(-scores, axis=-1)[..., : page()["config"].num_experts_per_tok]
    counts = [np.bincount(layer[where].ravel(), minlength=scores.shape[-1]) for layer in chosen]
    return np.stack(counts), np.sum(where)


def factors(counts, tokens):
    """Positive-sum: max(1, u / mean u)."""
    utilization = counts / tokens
    phi = np.maximum(1, utilization / np.mean(utilization, axis=-1, keepdims=True))
    return {f"{EXPERTS}/{name}/weight/0": phi[:, :, None, None] for name in ("w1", "w2", "w3")}


def test_the_lines_that_matter_are_those_that_run():
    for line in blocks()[0].splitlines():
        assert line.split("  #")[0].removeprefix("utilization = ") in "".join(blocks()[1:]), line


def test_describe_prints_what_the_page_says():
    model = eqx.filter_eval_shape(page()["make_model"])
    description = excitation_optax.describe(model, page()["at_experts"](model, jnp.ones((3, 8))))
    assert f"```text\n{description}\n```" in PAGE.read_text()
    assert {p.path for p in description.parameters if p.scaled_by} == set(factors(np.ones((3, 8)), 1))


@pytest.mark.parametrize("padded", [False, True])
def test_a_training_loop_scales_the_experts_and_nothing_else(padded, mesh):
    names = page()
    model = names["with_counting"](names["make_model"]()) if padded else names["make_model"]()
    loss_fn = names["padded_loss_fn" if padded else "loss_fn"]
    adamw = optax.adamw(1e-2)
    tx = optax.chain(adamw, excitation_optax.scale_by_excitation(excitation_optax.positive_sum))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state, example):
        (loss, utilization), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, example)
        params = eqx.filter(model, eqx.is_inexact_array)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        utilization = names["at_experts"](params, utilization)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return eqx.apply_updates(model, updates), opt_state, loss, vanilla, updates

    losses = []
    for i in range(STEPS):
        example = names["make_example"](jax.random.key(i))
        if padded:  # sequences of 8 to 31 tokens; the last ones of a batch are padding, all alike
            lengths = np.random.default_rng(i).integers(8, 32, size=names["Batch"].size)
            mask = np.arange(names["config"].seq_len) < lengths[:, None]
            example = eqx.tree_at(
                lambda e: (e.tokens.array, e.loss_mask.array),
                example,
                (jnp.where(mask, example.tokens.array, 0), mask * example.loss_mask.array),
            )
        counts, tokens = count(model, example, np.asarray(example.loss_mask.array) != 0 if padded else None)
        model, opt_state, loss, vanilla, updates = step(model, opt_state, example)
        excited.assert_scaled(vanilla, updates, factors(counts, tokens))
        losses.append(float(loss))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0] / 4


def test_levanters_trainer_on_eight_devices_in_two_micro_batches(as_users_have_it):
    names = page()
    config = dataclasses.replace(names["trainer_config"], num_train_steps=STEPS, per_device_parallelism=1)
    assert names["Batch"].size == 2 * jax.device_count() == 16
    snapshot = optax.snapshot("updates", lambda updates: updates)  # in the state, before Excitation and after
    excitation = excitation_optax.scale_by_excitation(excitation_optax.positive_sum)
    adam = optim.AdamConfig(learning_rate=1e-2, warmup=0).build(STEPS)
    tx = optax.chain(adam, snapshot, excitation, snapshot)
    losses = []
    with names["ExcitedTrainer"](config, tx, names["trainer_loss_fn"], add_default_hooks=False) as excited_trainer:
        state = excited_trainer.initial_state(jax.random.key(0), model_init=names["make_model"])
        for i in range(STEPS):
            example = names["make_example"](jax.random.key(i))
            counts, tokens = count(state.model, example)
            info = excited_trainer.train_step(state, example)
            state = info.state
            _, vanilla, _, scaled = state.opt_state
            excited.assert_scaled(
                vanilla.measurement["updates"], scaled.measurement["updates"], factors(counts, tokens)
            )
            losses.append(info.loss)
    weight = state.model.transformer.layers.stacked.block_sparse_moe.experts.w1.weight.array
    assert weight.sharding.spec == jax.sharding.PartitionSpec(None, None, "data", None)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0] / 4


def test_levanters_own_trainer_drops_the_utilization_which_is_an_error():
    names = page()
    arguments = names["trainer_config"], names["tx"], names["trainer_loss_fn"]
    with trainer.Trainer(*arguments, add_default_hooks=False) as own:
        state = own.initial_state(jax.random.key(0), model_init=names["make_model"])
        with pytest.raises(ValueError, match="Those that came: obj_fn, loss"):
            own.train_step(state, names["make_example"](jax.random.key(0)))


def test_where_token_axes_are_sharded_loads_are_one_devices():
    names = page()
    config = trainer.TrainerConfig(axis_resources={"token": "data", "token_repeat": "data"})
    forward = hax.named_jit(lambda *args: names["forward"](*args)[1], axis_resources=config.compute_axis_mapping)
    with jax.set_mesh(config.device_mesh):
        model, example = names["with_counting"](names["make_model"]()), names["make_example"](jax.random.key(0))
        extras = forward(model, example)
        of_first_layer = count(model, example)[0][0]
    loads = extras["expert_loads"].array
    assert loads.sharding.is_fully_replicated  # so it is said, and yet
    assert len({tuple(np.asarray(shard.data)[0]) for shard in loads.addressable_shards}) == 8
    np.testing.assert_array_equal(np.bincount(np.ravel(extras["chosen"][0]), minlength=8), of_first_layer)
