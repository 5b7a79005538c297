"""What Excitation adds to a training step of Table 8's smallest Top-K MLP (784-2048-2048-10, batch 512, Adam).

    python -m benchmarks.step_cost

Bytes, FLOPs and temporary memory are XLA's own figures for the compiled program. Times are of interleaved steps.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import excitation_optax
from benchmarks import timing
from excitation_optax import flax as excitation_flax
from models import topk_mlp

CONFIG = topk_mlp.TopKMLPConfig(input_dim=784, width=2048, depth=2)
BATCH, ROUNDS = 512, 30


def make_step(config: topk_mlp.TopKMLPConfig, excited: bool, counting: bool = True):
    """A training step, and the function that makes its parameters and optimizer state."""
    excitation = excitation_optax.scale_by_excitation(expert_axis=topk_mlp.TopKMLP.expert_axis)
    tx = optax.chain(optax.adam(1e-3), excitation) if excited else optax.chain(optax.adam(1e-3))
    make_model = lambda: topk_mlp.TopKMLP(config, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def step(params, opt_state, x, y):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            logits, utilization = excitation_flax.capture_routing(model)(x) if counting else (model(x), None)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), utilization

        (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return optax.apply_updates(params, updates), opt_state, loss, utilization

    def init():
        params = nnx.state(make_model())
        return params, tx.init(params)

    return step, init


def compile_step(config: topk_mlp.TopKMLPConfig, batch: int, excited: bool, counting: bool = True):
    """The step, compiled ahead of time from shapes alone."""
    step, init = make_step(config, excited, counting)
    x = jax.ShapeDtypeStruct((batch, config.input_dim), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*nnx.eval_shape(init), x, y).compile()


def keep_training(program, state):
    """A call that takes one step from where the last one ended."""
    x, y = jnp.ones((BATCH, CONFIG.input_dim)), jnp.zeros(BATCH, jnp.int32)

    def call():
        nonlocal state
        *state, _, _ = program(*state, x, y)
        return state

    return call


def main():
    variants = {
        "vanilla, routing not counted": {"excited": False, "counting": False},
        "vanilla": {"excited": False},
        "with Excitation": {"excited": True},
    }
    programs, calls = {}, {}
    for name, kwargs in variants.items():
        programs[name] = compile_step(CONFIG, BATCH, **kwargs)
        calls[name] = keep_training(programs[name], make_step(CONFIG, **kwargs)[1]())
    seconds = timing.interleave(calls, ROUNDS)
    print(f"{'ratio to vanilla':<32}{'bytes':>10}{'FLOPs':>10}{'temporary':>12}{'time (median of pairs)':>26}")
    for name, program in programs.items():
        cost, base = program.cost_analysis(), programs["vanilla"].cost_analysis()
        memory, base_memory = (p.memory_analysis().temp_size_in_bytes for p in (program, programs["vanilla"]))
        time = timing.ratios(seconds, name, "vanilla")[0]
        print(
            f"{name:<32}{cost['bytes accessed'] / base['bytes accessed']:>10.4f}{cost['flops'] / base['flops']:>10.4f}"
            f"{memory / base_memory:>12.4f}{time:>26.3f}"
        )


if __name__ == "__main__":
    main()
