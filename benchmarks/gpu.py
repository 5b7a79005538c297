"""Everything that needs a GPU, in one run of at most eight minutes.

    make gpu-wheels DATA=~/tensorflow_datasets   # with a network: packs packages and CIFAR-10 into .gpu (40 MB)
    make gpu                                     # on the machine with the GPU, which needs no network

Each part is a program with a time limit. Its output goes to a log as it comes, and its results to the results folder,
so a part that fails or is stopped costs the others nothing. Tests and the runs of Top-K MLPs compute in full float32.
Speed is measured and MoE-ViTs train at JAX's default precision, which on these GPUs is TF32 for float32.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import tyro

from examples.reproduction import store

# Processes side by side take memory as they need it, and one that is alone may fill it.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=3",  # XLA's default, which the tests would lower
}
FULL_FLOAT32 = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}


class Part(NamedTuple):
    """A program."""

    alone: bool  # whether its time is measured; the other parts run side by side after these
    seconds: float  # its limit
    command: str  # the module and its arguments
    tiny: str  # the same at toy sizes
    full_float32: bool = False


PARTS = {
    # Table 8, and its largest model, of which a step takes longer.
    "table8": Part(
        True,
        100,
        "benchmarks.overhead --rounds 50 --results {results} "
        "--rows mlp-2048-2 mlp-4096-2 mlp-1024-16 mlp-16384-4 vit-512-6-8",
        "benchmarks.overhead --tiny --rounds 2 --rows mlp-2048-2",
    ),
    "table8_large": Part(
        True,
        80,
        "benchmarks.overhead --rounds 15 --results {results} --rows vit-1024-12-32 --batch-size 128",
        "benchmarks.overhead --tiny --rounds 2 --rows vit-1024-12-32",
    ),
    "layer": Part(
        True, 200, "benchmarks.moe_layer --sections C F", "benchmarks.moe_layer --sections C F --rounds 1 --tiny"
    ),
    "gpt": Part(
        True,
        80,
        "benchmarks.gpt_step --d-ff 256 --batch-size 64 --dtype bfloat16 --steps 30",
        "benchmarks.gpt_step --num-experts 4 --d-ff 16 --d-model 16 --num-layers 2 --num-heads 2 --vocab-size 50 "
        "--batch-size 2 --context 8 --steps 1",
    ),
    # Numbers against NumPy; tests of several devices are left out.
    "tests": Part(
        False,
        300,
        "pytest -v -n 8 -p no:benchmark -k 'not mesh and not sharded' tests/test_contract.py tests/test_strategies.py "
        "tests/test_scaling.py tests/test_grouped.py tests/test_moe.py tests/test_router.py tests/test_topk_mlp.py",
        "pytest tests/test_topk_mlp.py",
        full_float32=True,
    ),
    "fig6": Part(
        False,
        400,
        "examples.reproduce run fig6 --data-dir {data} --results {results}",
        "pytest tests/test_reproduction_transformers.py",
    ),
    "studies": Part(
        False,
        400,
        "examples.reproduce run rescue table1_long torch_long fig3_torch --data-dir {data} --results {results}",
        "examples.reproduce run deep_digits --seeds 1 --epochs 1 --results {results}",
        full_float32=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the checks that need a GPU."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Which parts; timed ones run first, one by one, and the others after them, side by side."""
    minutes: float = 8.0
    """The time for all parts; those that it does not reach are left out."""
    data: pathlib.Path = pathlib.Path(".gpu/data")
    """The folder with CIFAR-10, as TensorFlow Datasets prepares it."""
    results: pathlib.Path | None = None
    """The folder of the results, which get new lines; the output of each part goes to gpu in it. By default results, or
    out/gpu-tiny at toy sizes."""
    tiny: bool = False
    """Toy sizes, to see on any machine that every part runs."""

    def __post_init__(self):
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"--parts can name {', '.join(PARTS)}; got {', '.join(sorted(unknown))}.")

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the results."""
        return self.results or (pathlib.Path("out/gpu-tiny") if self.tiny else store.FOLDER)

    @property
    def logs(self) -> pathlib.Path:
        """The folder for the output of each part."""
        return self.folder / "gpu"


def run_part(name: str, config: Config, deadline: float) -> str:
    """Runs a part until its limit or the deadline, and returns how it ended."""
    part, start = PARTS[name], time.monotonic()
    if deadline - start < 5:
        return f"{name}: no time was left"
    command = (part.tiny if config.tiny else part.command).format(data=config.data, results=config.folder)
    with (config.logs / f"{name}.txt").open("w", encoding="utf-8") as log:
        print(command, file=log, flush=True)
        try:
            code = subprocess.run(
                [sys.executable, "-m", *shlex.split(command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | (FULL_FLOAT32 if part.full_float32 else {}),
                timeout=deadline - start if config.tiny else min(part.seconds, deadline - start),
            ).returncode
            ended = "finished" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            ended = "was stopped"
    return f"{name}: {ended} after {time.monotonic() - start:.0f} s"


def main(config: Config) -> list[str]:
    """Runs the parts, prints how each ended, and returns it."""
    config.logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * config.minutes
    outcomes = []
    for alone in (True, False):
        names = [name for name in config.parts if PARTS[name].alone is alone]
        with concurrent.futures.ThreadPoolExecutor(1 if alone else len(PARTS)) as pool:
            for outcome in pool.map(lambda name: run_part(name, config, deadline), names):
                print(outcome, flush=True)
                outcomes.append(outcome)
    print(f"The output of each part is in {config.logs}")
    return outcomes


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
