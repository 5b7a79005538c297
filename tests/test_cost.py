"""No cost in the wrong place, read off the compiled program: Table 8's smallest Top-K MLP, batch 512, Adam."""

import functools

import jax
import jax.numpy as jnp
import pytest

import excitation_optax
from benchmarks import overhead


@functools.cache
def compiled(excited, counting=True):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        return overhead.compile_step(overhead.ROWS["mlp-2048-2"], 512, excited, counting)


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


def test_separate_experts_share_their_kernels():
    """XLA would compile a kernel for each slice of phi, and put all that phi is computed from into it."""
    updates = {f"expert_{k}": jnp.ones((8, 4)) for k in range(64)}
    tx = excitation_optax.scale_by_excitation()
    update = lambda updates, u: tx.update(updates, tx.init(updates), utilization={"expert_{expert}": u})[0]
    text = jax.jit(update).lower(updates, jnp.ones(64)).compile().as_text()
    assert "f32[8,4]" in text  # it is the program
    assert "slice" not in text


def test_the_step_talks_to_no_host():
    text = compiled(excited=True).as_text()
    assert "fusion" in text  # it is the program
    for word in ("callback", "infeed", "outfeed", "send", "recv"):
        assert word not in text


def test_the_second_call_compiles_nothing():
    row = overhead.shrink(overhead.ROWS["mlp-2048-2"])
    tx = overhead.make_optimizer(row, excited=True)
    events = []
    listen = lambda event, seconds, **kwargs: events.append(event)
    with jax.numpy_dtype_promotion("standard"):
        jitted = jax.jit(overhead.make_step(row, tx))
        params = overhead.make_params(row)
        opt_state = jax.jit(tx.init)(params)
        x, y = jnp.ones((4, row.config.input_dim)), jnp.zeros(4, jnp.int32)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            params, opt_state, *_ = jitted(params, opt_state, x, y)
            assert any("compile" in event for event in events)
            events.clear()
            jitted(params, opt_state, x, y)
            assert not any("compile" in event or "trace" in event for event in events)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
