"""A training step of a GPT-MoE without and with Excitation: memory, by XLA's figures, and tokens per second.

    python -m benchmarks.gpt_step                                      # 165M parameters: E=16, K=2, d_ff=512
    python -m benchmarks.gpt_step --num-experts 64 --d-ff 1024         # 871M, the largest of the paper's Table 2

The step is the one of `examples.train_gpt_moe`, with clipping, auxiliary losses and its log, on random tokens. The
programs take turns on one training state. On a GPU or TPU use `--dtype bfloat16`, and compare the backends.
"""

import dataclasses
import functools
import os
import resource
import statistics
import sys
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks import timing
from examples import train_gpt_moe, training
from models import gpt_moe, grouped

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train_gpt_moe.RunConfig):
    """Take training steps of a GPT-MoE of the paper's Table 2 on random tokens."""

    strategy: training.Strategy = "positive_sum"
    """Excitation, which is compared with the baseline."""
    d_ff: int = 512
    """The hidden width of an expert."""
    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    vocab_size: int = 50257
    batch_size: int = 8
    steps: int = 3
    """Steps of each program that are timed, after one that warms up."""
    backend: grouped.Backend | None = None
    """The backend of the MoE layers; by default the platform's."""


def compile_step(config: Config, strategy: training.Strategy, tokens: np.ndarray) -> tuple[Any, Any]:
    """The compiled step, and a function that makes the state that it starts from."""
    model_config = config.model(config.vocab_size)
    model_config = dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, backend=config.backend))
    make = lambda: nnx.split(gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(config.seed)))
    graphdef, abstract = nnx.eval_shape(make)
    excite: Any = {"strategy": strategy, "gamma": config.gamma, "seed": config.seed}
    base = training.base_optimizer(config, 2 * config.steps + 2)
    tx = training.make_optimizer(base, expert_axis=gpt_moe.GPTMoE.expert_axis, **excite)
    if strategy == "baseline":
        tx = optax.chain(base, optax.identity())  # so that both programs have one kind of state
    losses = {"load_balancing": config.load_balancing, "router_z": config.router_z}
    gradient = jax.grad(functools.partial(train_gpt_moe.loss_fn, graphdef, **losses), has_aux=True)

    def train_step(state, tokens):
        new_state, logged, utilization = training.train_step(gradient, tx, state, tokens)
        return new_state, logged | training.routing_metrics(utilization, step=state.step, **excite)

    start_state = lambda params: training.TrainState.create(params, tx)
    step = jax.jit(train_step, donate_argnums=0)
    compiled = step.lower(jax.eval_shape(start_state, abstract), tokens).compile()
    return compiled, jax.jit(lambda: start_state(make()[1]))


def main(config: Config) -> None:
    """Compiles the steps, prints their memory, takes them in turns, and prints their speed."""
    tokens = np.random.default_rng(config.seed).integers(0, config.vocab_size, (config.batch_size, config.context + 1))
    tokens = tokens.astype(np.int32)
    strategies: tuple[training.Strategy, ...] = ("baseline", config.strategy)
    compiled = {strategy: compile_step(config, strategy, tokens) for strategy in strategies}
    programs: dict[str, Any] = {strategy: program for strategy, (program, _) in compiled.items()}
    state = compiled["baseline"][1]()
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print(
        f"{size / 1e6:.0f}M parameters, float32, computed in {config.dtype}; {config.optimizer}; "
        f"batch {config.batch_size} x {config.context} tokens; remat {config.remat}"
    )
    for name, program in programs.items():
        memory: Any = program.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        print(
            f"{name}: parameters and optimizer {memory.argument_size_in_bytes / GIB:.2f} GiB, temporary "
            f"{memory.temp_size_in_bytes / GIB:.2f} GiB, together {(kept + memory.temp_size_in_bytes) / GIB:.2f} GiB"
        )

    def take_step(program):
        nonlocal state
        state, logged = program(state, tokens)
        return logged["loss"]

    calls = {name: functools.partial(take_step, program) for name, program in programs.items()}
    seconds = timing.interleave(calls, config.steps)
    for name, times in seconds.items():
        rate = config.batch_size * config.context / statistics.median(times)
        print(f"{name}: {1e3 * statistics.median(times):.1f} ms, {rate:,.0f} tokens per second")
    ratio, _ = timing.ratios(seconds, config.strategy, "baseline")
    print(f"{config.strategy} over the baseline: {ratio:.3f}, the median of the ratios within rounds")
    print(f"loss {float(take_step(programs['baseline'])):.4f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak of the process, with compilation and initialization {peak / GIB:.2f} GiB")


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
