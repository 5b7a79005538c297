"""CPU time to describe, trace and compile: 48 layers of 128 separate experts of 3 arrays each, or a GPT-MoE.

    python -m benchmarks.tracing                                 # describe, and trace the update alone; a minute
    python -m benchmarks.tracing --step separate --layers 2      # trace and compile a training step; minutes
    python -m benchmarks.tracing --step gpt-moe                  # the same for 871M parameters, by their shapes alone
    valgrind --tool=callgrind python -m benchmarks.tracing --step gpt-moe --variants both    # instructions of one step

Seconds are CPU time. The plain update is SGD's, the plain step Adam's. A figure of the update alone is the smallest of
`--rounds` tries. A figure of a step is their median, and "together" the median ratio to the plain step within a round.

Times vary by a tenth on a noisy machine; counts of instructions repeat within a hundredth. Subtract the count of
`--variants` with nothing after it, which compiles nothing.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import gpt_moe, moe


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the tree, and what to measure."""

    layers: int = 48
    """Layers, each with counts of its own; a GPT-MoE has 12."""
    experts: int = 128
    """Separate modules per layer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the updates."""
    rounds: int = 3
    """Tries per figure."""
    step: Literal["none", "separate", "gpt-moe"] = "none"
    """Trace and compile whole training steps, by XLA for the machine's device, instead of the update alone."""
    variants: tuple[Literal["plain", "both", "direction", "norm"], ...] = ("plain", "both", "direction", "norm")
    """The steps to compare with the first of them. One alone is compiled once, to count its instructions."""


def make_params(config: Config) -> dict[str, Any]:
    """The shapes of a model with separate experts."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, config.dtype)
    expert = lambda: {"up": array(16, 8), "gate": array(16, 8), "down": array(8, 16)}
    moe = lambda: {"router": array(16, config.experts)} | {f"expert_{k}": expert() for k in range(config.experts)}
    return {f"block_{n}": {"attention": array(16, 16), "moe": moe()} for n in range(config.layers)}


def separate_loss(params: dict[str, Any], x: jax.Array, excited: bool) -> tuple[jax.Array, Any]:
    """A loss of the model with separate experts, and its routing if the step is excited."""
    utilization = {}
    for block, layer in params.items():
        x = x + x @ layer["attention"]
        logits = x @ layer["moe"]["router"]
        if excited:
            utilization[f"{block}/moe/expert_{{expert}}"] = excitation_optax.count_logits(logits, 2)
        for k, gate in enumerate(jnp.split(jax.nn.softmax(logits), logits.shape[-1], axis=-1)):
            expert = layer["moe"][f"expert_{k}"]
            x = x + gate * ((jax.nn.silu(x @ expert["gate"]) * (x @ expert["up"])) @ expert["down"])
    return jnp.mean(x**2), utilization


def steps(config: Config) -> tuple[Any, Any, Callable[..., tuple[jax.Array, Any]], Any]:
    """Parameters and a batch as shapes, a loss `(params, batch, excited)`, and expert_axis."""
    if config.step == "separate":
        return make_params(config), jax.ShapeDtypeStruct((8, 16), config.dtype), separate_loss, None
    layer = moe.MoEConfig(d_model=512, d_ff=1024, num_experts=64, experts_per_token=2)
    model_config = gpt_moe.GPTMoEConfig(moe=layer)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(0))))

    def loss(params, tokens, excited):
        model = nnx.merge(graphdef, params)
        logits, utilization = excitation_flax.capture_routing(model)(tokens) if excited else (model(tokens), {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(), utilization

    return params, jax.ShapeDtypeStruct((8, model_config.context), jnp.int32), loss, gpt_moe.GPTMoE.expert_axis


def measure_steps(config: Config) -> None:
    """Prints a line for each variant of the step."""
    params, batch, loss, expert_axis = steps(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{config.step}, {config.layers if config.step == 'separate' else 12} layers, {size / 1e6:.1f}M parameters")

    def seconds(variant: Any) -> tuple[float, float]:
        excited = variant != "plain"
        tx = optax.with_extra_args_support(optax.adam(1e-3))
        if excited:
            tx = optax.chain(tx, excitation_optax.scale_by_excitation(expert_axis=expert_axis, component=variant))

        def step(params, state, batch):
            grads, utilization = jax.grad(loss, has_aux=True)(params, batch, excited)
            updates, state = tx.update(grads, state, params, utilization=utilization)
            return optax.apply_updates(params, updates), state

        jax.clear_caches()
        state = jax.eval_shape(tx.init, params)
        start = time.process_time()
        lowered = jax.jit(step).lower(params, state, batch)
        traced = time.process_time()
        lowered.compile()
        return traced - start, time.process_time() - traced

    if len(config.variants) < 2:
        print(*config.variants, *map(seconds, config.variants))
        return
    seconds(config.variants[0])  # the first compilation is slower
    tries = np.array([[seconds(variant) for variant in config.variants] for _ in range(config.rounds)])  # interleaved
    together = tries.sum(axis=-1)  # [round, variant]
    ratios = np.quantile(together / together[:, :1], [0.25, 0.5, 0.75], axis=0)
    for variant, times, quartiles in zip(config.variants, np.median(tries, axis=0), ratios.T, strict=True):
        low, median, high = quartiles - 1
        print(f"  {variant:<10} trace {times[0]:.2f} s, compile {times[1]:.2f} s", end="")
        print(f", together {median:+.1%} (quartiles {low:+.1%}, {high:+.1%})")


def cpu_seconds(f: Callable[[], Any], rounds: int) -> float:
    """The smallest CPU time of some calls."""
    times = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def measure_updates(config: Config) -> None:
    """Prints a line for each pattern and component."""
    params = make_params(config)
    u = jax.ShapeDtypeStruct((config.experts,), jnp.float32)

    def trace(tx, utilization):
        state = jax.eval_shape(tx.init, params)
        jax.jit(lambda grads, state, u: tx.update(grads, state, utilization=u)).trace(params, state, utilization)

    plain = cpu_seconds(lambda: trace(optax.with_extra_args_support(optax.sgd(0.1)), {}), config.rounds)
    print(f"{config.layers} layers x {config.experts} experts, {config.dtype}; trace SGD: {plain:.2f} s")
    for pattern in ("block_{}/moe/expert_{{expert}}", "**/block_{}/**/expert_{{expert}}"):
        utilization = {pattern.format(n): u for n in range(config.layers)}
        seconds = cpu_seconds(lambda u=utilization: excitation_optax.describe(params, u), config.rounds)
        print(f"{pattern.format(0)}: describe {seconds:.2f} s")
        for component in ("both", "direction", "norm"):
            tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(component=component))
            seconds = cpu_seconds(lambda tx=tx, u=utilization: trace(tx, u), config.rounds)
            print(f"  {component:<10} trace {seconds:.2f} s, {seconds - plain:.2f} s more than SGD")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__, prog="python -m benchmarks.tracing")
    measure_updates(config) if config.step == "none" else measure_steps(config)
