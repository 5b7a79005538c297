"""The GPT-MoE: sizes, causality, padding, scanned against unrolled layers, generation, errors."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import gpt_moe, moe, router, transformer

TOKENS = jax.random.randint(jax.random.key(0), (3, 10), 0, 11)


def configure(layer=None, **kwargs):
    """A small config. `layer` holds options of its MoE."""
    layer = moe.MoEConfig(**{"d_model": 8, "d_ff": 12, "num_experts": 4, "experts_per_token": 2} | (layer or {}))
    sizes = {"num_layers": 3, "num_heads": 2, "context": 16, "vocab_size": 11}
    return gpt_moe.GPTMoEConfig(moe=layer, **sizes | kwargs)


def make(seed=0, **kwargs):
    """Weights are tripled, so that attention and routing differ visibly between tokens."""
    model = gpt_moe.GPTMoE(configure(**kwargs), rngs=nnx.Rngs(seed))
    nnx.update(model, jax.tree.map(lambda leaf: 3 * leaf, nnx.state(model)))
    return model


def run(model, tokens=TOKENS, where=None):
    """Logits, utilization and auxiliary losses of a model, by a program that equal models share."""
    return compiled(*nnx.split(model), tokens, where)


@functools.partial(jax.jit, static_argnums=0)
def compiled(graphdef, params, tokens, where):
    model = nnx.merge(graphdef, params)
    logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(tokens, where)
    return logits, utilization, moe.auxiliary_losses(sown)


# Table 2 of the paper: millions of parameters for d_ff = 256, 384, 512, 768, 1024. They do not depend on K.
TABLE_2 = {
    4: (77, 83, 89, 102, 115),
    8: (89, 102, 115, 140, 165),
    16: (115, 140, 165, 216, 266),
    32: (165, 216, 266, 367, 468),
    64: (266, 367, 468, 670, 871),
}
K_OF_TABLE_2 = {4: (2,), 8: (2, 4), 16: (2, 4, 8), 32: (2, 4, 8), 64: (2, 4, 8)}


@pytest.mark.parametrize("num_experts", list(TABLE_2))
def test_the_60_sizes_of_table_2(num_experts):
    for d_ff, millions in zip((256, 384, 512, 768, 1024), TABLE_2[num_experts], strict=True):
        for k in K_OF_TABLE_2[num_experts]:
            layer = moe.MoEConfig(d_model=512, d_ff=d_ff, num_experts=num_experts, experts_per_token=k)
            config = gpt_moe.GPTMoEConfig(moe=layer)
            params = nnx.eval_shape(lambda config=config: nnx.state(gpt_moe.GPTMoE(config, rngs=nnx.Rngs(0))))
            assert round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6) == millions


def test_a_position_depends_on_itself_and_on_those_before():
    model = make()
    logits = run(model)[0]
    for position in (0, 4, 9):
        changed = run(model, TOKENS.at[:, position].set((TOKENS[:, position] + 1) % 11))[0]
        np.testing.assert_allclose(changed[:, :position], logits[:, :position], atol=1e-5)
        differs = np.max(np.abs(changed - logits), axis=(0, 2)) > 1e-4
        assert np.all(differs[position:])


def test_padding_is_not_attended_to_not_routed_and_not_counted():
    model = make()
    where = jnp.arange(10)[None] < jnp.array([[10], [7], [4]])
    logits, utilization, losses = run(model, where=where)
    noise = jnp.where(where, TOKENS, (TOKENS + 5) % 11)
    other = run(model, noise, where)
    chex.assert_trees_all_close((logits[1, :7], utilization, losses), (other[0][1, :7], *other[1:]), atol=1e-5)
    counts = utilization["layers"]["stack"]["moe"]["experts"]
    np.testing.assert_array_equal(counts.tokens, [21.0] * 3)  # 10 + 7 + 4
    np.testing.assert_allclose(counts.utilization.sum(-1), 2, rtol=1e-6)
    # The same as with no padding at all.
    alone = run(model, TOKENS[1:2, :7])[0]
    np.testing.assert_allclose(logits[1, :7], alone[0], atol=1e-4)


def unrolled(stacked):
    """The same model with a list of layers."""
    model = make(scan_layers=False)
    state = nnx.as_pure(nnx.state(stacked))
    layers = state["layers"].pop("stack")
    state["layers"]["list"] = {n: jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(3)}
    nnx.update(model, nnx.State(state))
    return model


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_scanned_layers_are_unrolled_ones(remat):
    model = make(remat=remat)
    logits, utilization, losses = run(model)
    expected = run(unrolled(model))
    np.testing.assert_allclose(logits, expected[0], atol=1e-4)
    chex.assert_trees_all_close(losses, expected[2], rtol=1e-5)
    counts = utilization["layers"]["stack"]["moe"]["experts"].counts
    for number in range(3):
        np.testing.assert_array_equal(counts[number], expected[1]["layers"]["list"][number]["moe"]["experts"].counts)


def train_step(model, tx):
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params, state, tokens):
        def loss_fn(params):
            logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), utilization

        (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, utilization=utilization)
        return optax.apply_updates(params, updates), state, loss, utilization

    return step, params, tx.init(params)


@pytest.mark.slow
def test_remat_and_scan_change_no_update():
    """Nor do they count tokens twice."""
    tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    models = [make(), make(remat=True), unrolled(make())]
    results = []
    for model in models:
        step, params, state = train_step(model, tx)
        params, _, _, utilization = step(params, state, TOKENS)
        results.append((nnx.as_pure(params), utilization))
    chex.assert_trees_all_close(results[0], results[1], atol=1e-5)
    np.testing.assert_array_equal(results[1][1]["layers"]["stack"]["moe"]["experts"].tokens, [27.0] * 3)
    stacked, listed = results[0][0], results[2][0]
    for number in range(3):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, n=number: leaf[n], stacked["layers"]["stack"]),
            listed["layers"]["list"][number],
            atol=1e-5,
        )


@pytest.mark.slow
def test_it_learns_and_excitation_changes_experts_alone_at_first():
    with jax.numpy_dtype_promotion("standard"):
        plain, excited = optax.adam(3e-2), optax.chain(optax.adam(3e-2), excitation_optax.scale_by_excitation())
        after = []
        for tx in (optax.chain(plain), excited):
            model = gpt_moe.GPTMoE(configure(), rngs=nnx.Rngs(0))
            step, params, state = train_step(model, tx)
            losses = []
            for number in range(40):
                params, state, loss, _ = step(params, state, TOKENS)
                if number == 0:
                    after.append(nnx.as_pure(params))
                losses.append(float(loss))
            assert losses[-1] < 0.5 * losses[0]  # of three sequences
    differences = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), *after)
    for path, differs in jax.tree.leaves_with_path(differences):
        assert differs == ("experts" in jax.tree_util.keystr(path)), path


@pytest.mark.parametrize("scan_layers", [True, False])
def test_selection_biases_are_updated_from_captured_counts(scan_layers):
    """Scanned, biases are `[L, E]` like the counts. The optimizer's step leaves them alone."""
    model = make(layer={"selection_bias": True, "scores": "sigmoid"}, scan_layers=scan_layers)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits, utilization = excitation_flax.capture_routing(model)(TOKENS)
            return jnp.mean(logits**2), utilization

        grads, utilization = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, moe.MoE):
                counts = functools.reduce(lambda tree, name: tree[name], [*path, "experts"], utilization)
                layer.router.bias[...] = router.update_router_bias(layer.router.bias[...], counts, 0.25)
        return utilization

    counts = step(model, optimizer)["layers"]
    if scan_layers:
        got, loads = model.layers.stack.moe.router.bias[...], counts["stack"]["moe"]["experts"].counts
    else:
        got = jnp.stack([layer.moe.router.bias[...] for layer in model.layers.list])
        loads = jnp.stack([counts["list"][number]["moe"]["experts"].counts for number in range(3)])
    signs = np.sign(60 / 4 - np.asarray(loads))  # 30 tokens, K = 2, E = 4
    assert np.any(signs != 0)
    np.testing.assert_allclose(got, 0.25 * (signs - signs.mean(1, keepdims=True)), atol=1e-6)


def test_compile_time_is_flat_in_the_number_of_layers():
    """One layer in the program, however many there are."""

    def lines(num_layers):
        config = configure(num_layers=num_layers)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: gpt_moe.GPTMoE(config, rngs=nnx.Rngs(0))))
        loss = lambda params: jnp.sum(excitation_flax.capture_routing(nnx.merge(graphdef, params))(TOKENS)[0])
        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert lines(12) == lines(3)


@pytest.mark.parametrize("kwargs", [{}, {"scan_layers": False}, {"layer": {"num_experts": 12, "experts_per_token": 3}}])
@pytest.mark.slow
def test_greedy_generation_is_the_most_probable_token_each_time(kwargs):
    model = make(**kwargs)
    before = jax.tree.structure(nnx.state(model))
    generated = gpt_moe.generate(model, TOKENS[:, :4], 12, temperature=0.0)
    assert generated.shape == (3, 16)
    assert jax.tree.structure(nnx.state(model)) == before
    np.testing.assert_array_equal(generated[:, :4], TOKENS[:, :4])
    logits = run(model, generated[:, :-1])[0]  # causal, so one call tells what each token should have been
    np.testing.assert_array_equal(generated[:, 4:], jnp.argmax(logits, axis=-1)[:, 3:])


@pytest.mark.slow
def test_decoding_gives_the_logits_of_the_whole():
    model = make()
    logits = run(model)[0]
    model.eval()
    first, cache = model.decode(TOKENS[:, :6], model.empty_cache(3))
    second, cache = model.decode(TOKENS[:, 6:9], cache)
    third, cache = model.decode(TOKENS[:, 9:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], axis=1), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.length, [10] * 3)


@pytest.mark.slow
def test_a_cache_that_is_too_short_is_seen():
    model = make()
    model.eval()
    _, cache = model.decode(TOKENS[:, :3], model.empty_cache(3, positions=4))
    logits, _ = model.decode(TOKENS[:, 3:4], cache)
    assert np.all(np.isfinite(logits))
    logits, _ = model.decode(TOKENS[:, 3:5], cache)
    assert np.all(np.isnan(logits))
    with pytest.raises(ValueError, match=r"the cache is for 3 sequences of up to 4 tokens; got \[3, 5\]"):
        model.decode(TOKENS[:, :5], model.empty_cache(3, positions=4))
    for positions in (0, 17):
        with pytest.raises(ValueError, match=f"may have 1 to context = 16 positions; got {positions}"):
            model.empty_cache(3, positions)


@pytest.mark.slow
def test_padding_may_be_no_token_at_all():
    where = jnp.arange(10)[None] < jnp.array([[10], [7], [4]])
    logits, _, losses = run(make(), jnp.where(where, TOKENS, 99), where)
    expected, _, expected_losses = run(make(), TOKENS, where)
    np.testing.assert_array_equal(np.asarray(logits)[np.asarray(where)], np.asarray(expected)[np.asarray(where)])
    chex.assert_trees_all_equal(losses, expected_losses)


def test_after_eval_a_compiled_function_may_close_over_the_model():
    model = make()
    expected = run(model)[0]
    model.eval()
    np.testing.assert_allclose(jax.jit(lambda tokens: model(tokens))(TOKENS), expected, atol=1e-5)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(make()))
    _, utilization = excitation_flax.capture_routing(model)(TOKENS)  # a capture still counts
    assert utilization["layers"]["stack"]["moe"]["experts"].counts.sum() == 3 * 30 * 2


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_experts_on_several_devices(axis_type):
    """Logits and generated text are those of one device, though a token at a time cannot be split evenly."""
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(axis_type,) * 2)
    expected, text = run(make())[0], gpt_moe.generate(make(), TOKENS[:, :4], 3, temperature=0.0)
    with jax.set_mesh(mesh):
        model = make(layer={"expert_parallel_axis": "expert"})
        np.testing.assert_allclose(run(model)[0], expected, atol=1e-3)  # logits reach 16
        np.testing.assert_array_equal(gpt_moe.generate(model, TOKENS[:, :4], 3, temperature=0.0), text)


def test_samples_follow_the_probabilities():
    probabilities = jnp.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (20_000, 4))

    def shares(temperature, top_p):
        tokens = gpt_moe.sample(jax.random.key(1), logits, temperature, top_p)
        return np.bincount(tokens, minlength=4) / 20_000

    np.testing.assert_allclose(shares(1.0, 1.0), probabilities, atol=0.015)
    # 0.5 and 0.3 add up to 0.8: 0.75 needs both, and no more.
    np.testing.assert_allclose(shares(1.0, 0.75), [5 / 8, 3 / 8, 0, 0], atol=0.015)
    # At temperature 1/2 probabilities are squared: 0.25, 0.09, 0.0225, 0.0025 over their sum, 0.365.
    np.testing.assert_allclose(shares(0.5, 1.0), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.015)
    np.testing.assert_array_equal(shares(1.0, 1e-6), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0])


@pytest.mark.slow
def test_seeds_of_generation():
    model = make()
    one, same, two = (gpt_moe.generate(model, TOKENS[:, :2], 10, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != two)
    assert (
        len(
            {
                tuple(row)
                for row in np.asarray(gpt_moe.generate(model, jnp.zeros((3, 1), jnp.int32), 12, key=jax.random.key(0)))
            }
        )
        > 1
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "d_model must be divisible by num_heads = 3; got 8"),
        ({"context": 0}, "GPTMoEConfig: context must be an integer of at least 1; got 0"),
        ({"vocab_size": -1}, "GPTMoEConfig: vocab_size must be an integer of at least 1; got -1"),
        ({"moe": {"d_model": 8}}, "GPTMoEConfig: moe must be a MoEConfig; got dict"),
    ],
)
def test_bad_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configure(), **kwargs)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.ones((2, 5)), r"GPTMoE: tokens must be an array of integers \[B, S\]; got float32\[2, 5\]"),
        (jnp.ones(5, jnp.int32), r"GPTMoE: tokens must be an array of integers \[B, S\]; got int32\[5\]"),
        (3, r"GPTMoE: tokens must be an array of integers \[B, S\]; got int32\[\]"),
        (jnp.ones((2, 17), jnp.int32), "at most context = 16 tokens; got 17. Shorten it, or configure a longer"),
    ],
)
def test_bad_tokens(tokens, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        model.decode(tokens, model.empty_cache(2))


@pytest.mark.parametrize("where", [jnp.ones((3, 9), bool), jnp.ones((3, 10), jnp.int32), jnp.ones(3, bool), True])
def test_bad_masks(where):
    with pytest.raises(ValueError, match=r"GPTMoE: where must be an array of booleans \[3, 10\]; got "):
        make()(TOKENS, where)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_tokens": 13}, "num_tokens must be from 1 to 12, the context 16 minus the prompt's 4 tokens; got 13"),
        ({"num_tokens": 0}, "num_tokens must be from 1 to 12.*got 0"),
        ({"temperature": -1.0}, "temperature must not be negative; got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({}, r"pass key=jax.random.key\(seed\) to sample, or temperature=0 for greedy decoding"),
        ({"prompt": jnp.array([[1, 11]])}, "tokens must be from 0 to 10, the model's vocabulary; got 1 to 11"),
        ({"prompt": jnp.ones((1, 4))}, r"prompt must be an array of integers \[B, S\]; got float32\[1, 4\]"),
        ({"prompt": jnp.ones((1, 0), jnp.int32)}, r"prompt must hold at least one token; got \[1, 0\]"),
    ],
)
def test_bad_arguments_of_generate(kwargs, message):
    with pytest.raises(ValueError, match=message):
        gpt_moe.generate(make(), **{"prompt": TOKENS[:, :4], "num_tokens": 3} | kwargs)


def test_without_residual_connections_a_layer_is_its_parts_one_after_the_other():
    config = moe.MoEConfig(d_model=8, d_ff=4, num_experts=4, experts_per_token=2)
    layer = transformer.Layer(config, num_heads=2, causal=True, residual=False, rngs=nnx.Rngs(0))
    layer.eval()

    @jax.jit
    def whole_and_parts(x):
        attended, _ = layer.attention(layer.norm_attention(x))
        return layer(x)[0], layer.moe(layer.norm_moe(attended))

    np.testing.assert_array_equal(*whole_and_parts(jax.random.normal(jax.random.key(1), (2, 3, 8))))
    model = gpt_moe.GPTMoE(
        gpt_moe.GPTMoEConfig(moe=config, num_layers=2, num_heads=2, context=4, vocab_size=5, residual=False),
        rngs=nnx.Rngs(0),
    )
    assert model.layers.stack is not None
    assert not model.layers.stack.residual
