"""CPU time to describe, trace and compile an excited update: 48 layers of 128 separate experts of 3 arrays each.

    python -m benchmarks.tracing            # a minute
    python -m benchmarks.tracing --compile  # also compiles; minutes

The plain update is SGD's. Each figure is the smallest of `--rounds` tries, in seconds of CPU time.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import excitation_optax


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the tree, and what to measure."""

    layers: int = 48
    """Layers, each with counts of its own."""
    experts: int = 128
    """Separate modules per layer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the updates."""
    rounds: int = 3
    """Tries per figure."""
    compile: bool = False
    """Also compile the update, by XLA for the CPU."""


def make_params(config: Config) -> dict[str, Any]:
    """The shapes of a model with separate experts."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, config.dtype)
    expert = lambda: {"up": array(16, 8), "gate": array(16, 8), "down": array(8, 16)}
    moe = lambda: {"router": array(16, config.experts)} | {f"expert_{k}": expert() for k in range(config.experts)}
    return {f"block_{n}": {"attention": array(16, 16), "moe": moe()} for n in range(config.layers)}


def cpu_seconds(f: Callable[[], Any], rounds: int) -> float:
    """The smallest CPU time of some calls."""
    times = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def main(config: Config) -> None:
    """Prints a line for each pattern and component."""
    params = make_params(config)
    u = jax.ShapeDtypeStruct((config.experts,), jnp.float32)

    def trace(tx, utilization):
        state = jax.eval_shape(tx.init, params)
        update = jax.jit(lambda grads, state, u: tx.update(grads, state, utilization=u))
        traced = update.trace(params, state, utilization)
        if config.compile:
            traced.lower().compile()

    plain = cpu_seconds(lambda: trace(optax.with_extra_args_support(optax.sgd(0.1)), {}), config.rounds)
    what = "trace and compile" if config.compile else "trace"
    print(f"{config.layers} layers x {config.experts} experts, {config.dtype}; {what} SGD: {plain:.2f} s")
    for pattern in ("block_{}/moe/expert_{{expert}}", "**/block_{}/**/expert_{{expert}}"):
        utilization = {pattern.format(n): u for n in range(config.layers)}
        seconds = cpu_seconds(lambda u=utilization: excitation_optax.describe(params, u), config.rounds)
        print(f"{pattern.format(0)}: describe {seconds:.2f} s")
        for component in ("both", "direction", "norm"):
            excite = excitation_optax.scale_by_excitation(component=component)
            tx = optax.chain(optax.sgd(0.1), excite)
            seconds = cpu_seconds(lambda tx=tx, u=utilization: trace(tx, u), config.rounds)
            print(f"  {component:<10} {what} {seconds:.2f} s, {seconds - plain:.2f} s more than SGD")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.tracing"))
