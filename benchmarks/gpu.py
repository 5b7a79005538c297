"""Everything that needs a GPU, in one run of at most eight minutes.

    make gpu-wheels DATA=~/tensorflow_datasets   # with a network: packs packages and CIFAR-10 into .gpu (40 MB)
    make gpu                                     # on the machine with the GPU, which needs no network

Each part is a program with a time limit. Its output is copied to the log as it comes, and its results go to the results
folder at once, so a part that fails or runs out of time costs the others nothing. Tests and training runs compute in
full float32; speed is measured at JAX's default precision, which on these GPUs is TF32 for float32.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from typing import NamedTuple

import tyro

from examples.reproduction import store

FULL_PRECISION = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
# Without this, the first process of several would take most of the memory; with it, the timed ones may fill it.
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


class Part(NamedTuple):
    """A program."""

    seconds: float  # its limit
    command: str  # the module and its arguments
    tiny: str  # the same at toy sizes
    environment: Mapping[str, str] = types.MappingProxyType({})


PARTS = {
    # Numbers against NumPy; tests of several devices are left out.
    "tests": Part(
        80,
        "pytest -n 8 -k 'not mesh and not sharded' tests/test_contract.py tests/test_strategies.py "
        "tests/test_scaling.py tests/test_grouped.py tests/test_moe.py tests/test_router.py tests/test_topk_mlp.py",
        "pytest tests/test_topk_mlp.py",
        FULL_PRECISION,
    ),
    "table8": Part(
        120,
        "benchmarks.overhead --rounds 40 --results {results}",
        "benchmarks.overhead --tiny --rounds 2 --rows mlp-2048-2 vit-512-6-8",
    ),
    "layer": Part(80, "benchmarks.moe_layer --sections F", "benchmarks.moe_layer --sections F --rounds 1 --tiny"),
    "gpt": Part(
        60,
        "benchmarks.gpt_step --d-ff 256 --batch-size 64 --dtype bfloat16 --steps 30",
        "benchmarks.gpt_step --num-experts 4 --d-ff 16 --d-model 16 --num-layers 2 --num-heads 2 --vocab-size 50 "
        "--batch-size 2 --context 8 --steps 1",
    ),
    "table1": Part(
        70,
        "examples.reproduce run table1_long --data-dir {data} --results {results}",
        "examples.reproduce run mechanism_digits --seeds 1 --epochs 1 --results {results}",
        FULL_PRECISION,
    ),
    "fig6": Part(
        70,
        "examples.reproduce run fig6_long --data-dir {data} --results {results}",
        "examples.reproduce run fig6 --subset 128 --epochs 1 --data-dir {data} --results {results}",
        FULL_PRECISION | {"JAX_COMPILATION_CACHE_DIR": ".gpu/compiled"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the checks that need a GPU."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Which parts, in this order."""
    minutes: float = 8.0
    """The time for all parts; those that it does not reach are left out."""
    log: pathlib.Path = pathlib.Path("out/gpu.txt")
    """Where the output of all parts goes."""
    data: pathlib.Path = pathlib.Path(".gpu/data")
    """The folder with CIFAR-10, as TensorFlow Datasets prepares it."""
    results: pathlib.Path = store.FOLDER
    """The folder of the results, which get new lines."""
    tiny: bool = False
    """Toy sizes, to see on any machine that every part runs."""

    def __post_init__(self):
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"--parts can name {', '.join(PARTS)}; got {', '.join(sorted(unknown))}.")


def run_part(name: str, config: Config, seconds: float) -> str:
    """Runs a part for at most so many seconds, and returns how it ended."""
    part = PARTS[name]
    command = (part.tiny if config.tiny else part.command).format(data=config.data, results=config.results)
    start = time.monotonic()
    with config.log.open("a", encoding="utf-8") as log:
        print(f"\n== {name}: {command}", file=log, flush=True)
        try:
            code = subprocess.run(
                [sys.executable, "-m", *shlex.split(command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | MEMORY | dict(part.environment) | {"PYTHONUNBUFFERED": "1"},
                timeout=seconds,
            ).returncode
            ended = "finished" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            ended = "ran out of time"
        outcome = f"{name}: {ended} after {time.monotonic() - start:.0f} s"
        print(f"== {outcome}", file=log)
    return outcome


def main(config: Config) -> list[str]:
    """Runs the parts one after the other, and prints how each ended."""
    config.log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * config.minutes
    outcomes = []
    for name in config.parts:
        left = deadline - time.monotonic()
        outcomes.append(run_part(name, config, min(PARTS[name].seconds, left)) if left > 5 else f"{name}: no time left")
        print(outcomes[-1], flush=True)
    print(f"The output of all parts is in {config.log}")
    return outcomes


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
