"""No cost in the wrong place, read off the compiled program: Table 8's smallest Top-K MLP, batch 512, Adam."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import topk_mlp

CONFIG = topk_mlp.TopKMLPConfig(input_dim=784, width=2048, depth=2)
BATCH = 512


def make_step(config, excited, counting=True):
    """The training step, and the shapes of its state."""
    excitation = excitation_optax.scale_by_excitation(expert_axis=topk_mlp.TopKMLP.expert_axis)
    tx = optax.chain(optax.adam(1e-3), *[excitation] * excited)
    make_params = lambda seed: nnx.state(topk_mlp.TopKMLP(config, rngs=nnx.Rngs(jax.random.key(seed))))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: topk_mlp.TopKMLP(config, rngs=nnx.Rngs(0))))

    def step(params, opt_state, x, y):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            logits, utilization = excitation_flax.capture_routing(model)(x) if counting else (model(x), None)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), utilization

        (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return optax.apply_updates(params, updates), opt_state, loss, utilization

    def init(seed):
        params = make_params(seed)
        return params, tx.init(params)

    return step, init


@functools.cache
def compiled(excited, counting=True):
    step, init = make_step(CONFIG, excited, counting)
    params, opt_state = nnx.eval_shape(lambda: init(0))
    x = jax.ShapeDtypeStruct((BATCH, CONFIG.input_dim), jnp.float32)
    y = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, x, y).compile()


@pytest.mark.parametrize("measure", ["bytes accessed", "flops"])
def test_excitation_costs_at_most_one_percent_of_a_step(measure):
    vanilla, excited = (compiled(excited).cost_analysis()[measure] for excited in (False, True))
    assert vanilla < excited <= 1.01 * vanilla


@pytest.mark.parametrize("measure", ["bytes accessed", "flops"])
def test_counting_and_excitation_cost_at_most_five_percent(measure):
    bare = compiled(excited=False, counting=False).cost_analysis()[measure]
    assert bare < compiled(excited=True).cost_analysis()[measure] <= 1.05 * bare


def test_excitation_holds_no_memory():
    vanilla, excited = (compiled(excited).memory_analysis() for excited in (False, True))
    assert excited.output_size_in_bytes == vanilla.output_size_in_bytes
    assert excited.temp_size_in_bytes <= 1.01 * vanilla.temp_size_in_bytes


def test_the_step_talks_to_no_host():
    text = compiled(excited=True).as_text()
    assert "fusion" in text  # it is the program
    for word in ("callback", "infeed", "outfeed", "send", "recv"):
        assert word not in text


def test_the_second_call_compiles_nothing():
    step, init = make_step(topk_mlp.TopKMLPConfig(input_dim=6, width=8, depth=2), excited=True)
    events = []
    listen = lambda event, seconds, **kwargs: events.append(event)
    with jax.numpy_dtype_promotion("standard"):
        jitted = jax.jit(step)
        params, opt_state = jax.jit(init)(0)
        x, y = jnp.ones((4, 6)), jnp.zeros(4, jnp.int32)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            params, opt_state, *_ = jitted(params, opt_state, x, y)
            assert any("compile" in event for event in events)
            events.clear()
            jitted(params, opt_state, x, y)
            assert not any("compile" in event or "trace" in event for event in events)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
