"""EasyDeL's own Qwen3-MoE, trained with Excitation on a mesh of eight devices.

The model gives out its routers' logits. The expected factors are worked out in NumPy from another source: the experts
that each layer sends its tokens to, written down by EasyDeL's hook at the place where it chooses them.

Axis letters: B batch, S sequence, D model width, F expert width, K experts per token, E experts.
"""

import dataclasses
import functools
import os

os.environ["EASYDEL_AUTO"] = "0"  # else it sets XLA flags that no other jax than its own knows

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from tests.integrations import excited

pytest.importorskip("easydel")
import easydel

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_users_have_it")]

STEPS, B, S, VOCABULARY, D, F, E, K = 20, 8, 16, 32, 32, 16, 8, 2
LAYERS, DENSE = 3, 0
EXPERTS = {"gate_proj": (E, D, F), "up_proj": (E, D, F), "down_proj": (E, F, D)}


@pytest.fixture(scope="module")
def model():
    config = easydel.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=64,
        moe_intermediate_size=F,
        num_hidden_layers=LAYERS,
        mlp_only_layers=[DENSE],
        decoder_sparse_step=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=True,
        max_position_embeddings=S,
        sharding_axis_dims=(-1, 1, 1, 1, 1),  # data parallel; its other meshes need what XLA has no CPU version of
    )
    return easydel.Qwen3MoeForCausalLM(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def batches():
    """Sequences in which a token tells the next."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield jnp.asarray((rng.integers(VOCABULARY, size=(B, 1)) + 5 * np.arange(S)) % VOCABULARY, jnp.int32)


def loss_fn(model, tokens):
    output = model(input_ids=tokens, output_router_logits=True)
    counts = {}
    for i, layer in enumerate(model.model.layers):
        if layer.is_moe:
            gates = nnx.softmax(output.router_logits[i].astype(jnp.float32))
            counts[f"model/layers/{i}/mlp/experts"] = excitation_optax.count_logits(gates, K)
    losses = optax.softmax_cross_entropy_with_integer_labels(output.logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses) + output.aux_loss, counts


def write_down_choices(model):
    """A list for each MoE layer, to which every pass adds the experts chosen on each device."""
    written = {i: [] for i, layer in enumerate(model.model.layers) if layer.is_moe}

    def choose(layer, gates, _, experts_per_token):
        values, indices = jax.lax.top_k(gates, experts_per_token)
        jax.debug.callback(lambda chosen: written[layer].append(np.asarray(chosen)), indices)
        return values, indices

    for i in written:
        mlp = model.model.layers[i].mlp
        mlp.moe_hooks = dataclasses.replace(mlp.moe_hooks, select_hook=functools.partial(choose, i))
    return written


def test_trains(model):
    written = write_down_choices(model)
    adamw = optax.adamw(1e-2)
    tx = optax.chain(adamw, excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, tokens):
        grad_fn = jax.value_and_grad(lambda params: loss_fn(nnx.merge(graphdef, params, rest), tokens), has_aux=True)
        (loss, utilization), grads = grad_fn(params)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return optax.apply_updates(params, updates), opt_state, loss, vanilla, updates

    losses = []
    with model.mesh:
        for tokens in batches():
            params, opt_state, loss, vanilla, updates = step(params, opt_state, tokens)
            losses.append(float(loss))
            jax.effects_barrier()
            factors = {}
            for i, chosen in written.items():
                indices = np.concatenate([part.ravel() for part in chosen])
                assert indices.size == B * S * K
                counts = np.bincount(indices, minlength=E)
                for name in EXPERTS:
                    path = f"model/layers/{i}/mlp/experts/{name}/kernel"
                    factors[path] = (counts / counts.mean()).reshape(E, 1, 1)
                chosen.clear()
            excited.assert_scaled(nnx.to_pure_dict(vanilla), nnx.to_pure_dict(updates), factors)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


def test_describe(model):
    """All experts are scaled along their first axis; routers, the dense layer and the rest are not."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    entry = jax.ShapeDtypeStruct((E,), jnp.float32)
    utilization = {f"model/layers/{i}/mlp/experts": entry for i in range(LAYERS) if i != DENSE}
    description = excitation_optax.describe(params, utilization)
    scaled = {row.path: (row.shape, row.axes) for row in description.parameters if row.scaled_by is not None}
    assert scaled == {
        f"model/layers/{i}/mlp/experts/{name}/kernel": (shape, (0,))
        for i in range(LAYERS)
        if i != DENSE
        for name, shape in EXPERTS.items()
    }
