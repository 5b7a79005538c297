"""A training step of a GPT-MoE: its memory, by XLA's and the system's figures, and its tokens per second.

    python -m benchmarks.gpt_step                                      # 165M parameters: E=16, K=2, d_ff=512
    python -m benchmarks.gpt_step --num-experts 64 --d-ff 1024         # 871M, the largest of the paper's Table 2

The step is the one of `examples.train_gpt_moe`, with clipping, auxiliary losses and its log, on random tokens.
On a GPU or TPU use `--dtype bfloat16`, and compare `--backend tokamax` and `padded`.
"""

import dataclasses
import functools
import os
import resource
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from examples import train_gpt_moe, training
from models import gpt_moe, grouped

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train_gpt_moe.RunConfig):
    """Take training steps of a GPT-MoE of the paper's Table 2 on random tokens."""

    strategy: training.Strategy = "positive_sum"
    """Excitation."""
    d_ff: int = 512
    """The hidden width of an expert."""
    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    vocab_size: int = 50257
    batch_size: int = 8
    steps: int = 3
    """Timed, after one that warms up."""
    backend: grouped.Backend | None = None
    """The backend of the MoE layers; by default the platform's."""


def main(config: Config) -> None:
    """Compiles the step, tells its memory, takes it, and tells its time and what it left in memory."""
    model_config = config.model(config.vocab_size)
    model_config = dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, backend=config.backend))
    make = lambda: nnx.split(gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(config.seed)))
    graphdef, abstract = nnx.eval_shape(make)
    excite: Any = {"strategy": config.strategy, "gamma": config.gamma, "seed": config.seed}
    base = training.base_optimizer(config, config.steps + 1)
    tx = training.make_optimizer(base, expert_axis=gpt_moe.GPTMoE.expert_axis, **excite)
    losses = {"load_balancing": config.load_balancing, "router_z": config.router_z}
    gradient = jax.grad(functools.partial(train_gpt_moe.loss_fn, graphdef, **losses), has_aux=True)

    def train_step(state, tokens):
        new_state, logged, utilization = training.train_step(gradient, tx, state, tokens)
        return new_state, logged | training.routing_metrics(utilization, step=state.step, **excite)

    tokens = np.random.default_rng(config.seed).integers(0, config.vocab_size, (config.batch_size, config.context + 1))
    tokens = tokens.astype(np.int32)
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print(
        f"{size / 1e6:.0f}M parameters, float32, computed in {config.dtype}; {config.optimizer}, {config.strategy}; "
        f"batch {config.batch_size} x {config.context} tokens; remat {config.remat}"
    )
    start_state = lambda params: training.TrainState.create(params, tx)
    step = jax.jit(train_step, donate_argnums=0)
    program: Any = step.lower(jax.eval_shape(start_state, abstract), tokens).compile()
    memory: Any = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        f"XLA: parameters and optimizer {memory.argument_size_in_bytes / GIB:.2f} GiB, temporary "
        f"{memory.temp_size_in_bytes / GIB:.2f} GiB, together {(total + memory.temp_size_in_bytes) / GIB:.2f} GiB"
    )
    state = jax.jit(lambda: start_state(make()[1]))()
    seconds = []
    for number in range(config.steps + 1):
        start = time.perf_counter()
        state, logged = program(state, tokens)
        loss = float(logged["loss"])
        seconds.append(time.perf_counter() - start)
        print(f"step {number}: loss {loss:.4f}, {seconds[-1]:.2f} s", flush=True)
    rate = config.batch_size * config.context / min(seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{rate:,.0f} tokens per second; peak of the process, with compilation and initialization {peak / GIB:.2f} GiB"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
