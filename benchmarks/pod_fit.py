"""Whether a training step fits a TPU slice, and what it sends: compiled ahead of time, without the slice.

    python -m benchmarks.pod_fit --topology v5e:4x4 --expert 4
    python -m benchmarks.pod_fit --topology v5p:8x8x8 --expert 8 --fsdp 8 --num-experts 64 --batch-size 4096

Prints memory per chip, FLOPs, and the collectives with their bytes, of the step without and with Excitation; both log
the loss only. Requires the TPU compiler, on any Linux machine: uv sync --locked --extra examples --extra tpu.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from examples import training
from examples.pod import parallel, train

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
COLLECTIVE = re.compile(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    """Compile a training step for a TPU topology."""

    topology: str = "v5e:4x4"
    """NAME:SHAPE in chips, such as v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4."""
    strategy: training.Strategy = "positive_sum"
    """The strategy of the step that is compared with the baseline."""


class Program(NamedTuple):
    """XLA's figures for a compiled step; sizes are per chip, in bytes."""

    arguments: int
    temporary: int
    flops: float  # XLA counts the body of a loop, such as that over the layers, once
    collectives: dict[str, list[int]]  # the bytes of each one's result, by kind


def bare_step(*args: Any, **kwargs: Any) -> tuple[training.TrainState, Any]:
    """The step of `train` that logs the loss only: then the baseline does not count its routing."""
    state, logged = train.step_fn(*args, **kwargs)
    return state, logged["loss"]


def compile_step(config: train.Config, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The step, compiled for the devices of a mesh.

    Raises:
      ValueError: if it does not fit, with both sizes.
    """
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.context + 1), jnp.int32)
    try:
        with jax.set_mesh(mesh):
            _, trainer = train.make_trainer(config, mesh, bare_step)
            return trainer.step.trace(trainer.like, tokens).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"The step does not fit {mesh.devices.flat[0].device_kind}: {error}") from error


def examine(compiled: jax.stages.Compiled) -> Program:
    """Reads memory, FLOPs and collectives off a compiled program."""
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    hlo = compiled.as_text() or ""
    return Program(memory.argument_size_in_bytes, memory.temp_size_in_bytes, cost["flops"], collectives(hlo))


def collectives(hlo: str) -> dict[str, list[int]]:
    """The bytes of the result of each collective of an HLO program, by kind; times the trips of the loop it is in.

    XLA may fuse parts of a collective with other computations. They share its channel, and count as one.
    """
    computations, entry = _computations(hlo)
    found: dict[Any, tuple[str, int]] = {}

    def walk(name: str, times: int, fused: bool = False) -> None:
        for line in computations[name]:
            if match := COLLECTIVE.match(line):
                shapes, kind, started = match.groups()
                channel = re.search(r"channel_id=\d+", line)
                key = channel[0] if channel and fused else len(found)
                found[key] = kind, times * _bytes_out(shapes, kind if started else "")
            for called in re.findall(r"(?:calls|to_apply|condition)=%?([\w.-]+)", line):
                walk(called, times, fused or " fusion(" in line)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for branch in branches.split(", "):
                    walk(branch.lstrip("%"), times)
            if match := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                walk(match[2], times * _trips(computations[match[1]]))

    walk(entry, 1)
    by_kind = collections.defaultdict(list)
    for kind, size in found.values():
        by_kind[kind].append(size)
    return dict(by_kind)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of an HLO program's computations by name, and the name of the one that it starts with."""
    computations, entry, lines = {}, "", []
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computations[header[2]] = lines = []
            entry = header[2] if header[1] else entry
        lines.append(line)
    return computations, entry


def _trips(condition: list[str]) -> int:
    """The trips of a loop of `jax.lax.scan`: the constant of its condition. 1 if they depend on data."""
    bounds = [match[1] for line in condition if (match := re.search(r"= s32\[\]\S* constant\((\d+)\)", line))]
    return int(bounds[0]) if len(bounds) == 1 and any("direction=LT" in line for line in condition) else 1


def _bytes_out(shapes: str, started: str) -> int:
    """The size of a collective's result. The start of an asynchronous one returns its operands first."""
    sizes = [_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
    if started == "all-gather":
        sizes = sizes[len(sizes) // 2 :]
    elif started == "collective-permute":
        sizes = sizes[1:2]
    return sum(sizes)


def _bytes(dtype: str, shape: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8  # of pred
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def table(baseline: Program, excited: Program) -> str:
    """Both side by side, in Markdown."""
    rows = [
        ("arguments, MiB a chip", *(f"{p.arguments / 2**20:,.1f}" for p in (baseline, excited))),
        ("temporary, MiB a chip", *(f"{p.temporary / 2**20:,.1f}" for p in (baseline, excited))),
        ("GFLOPs a chip, loops once", *(f"{p.flops / 1e9:,.2f}" for p in (baseline, excited))),
    ]
    for kind in COLLECTIVES:
        sizes = [p.collectives.get(kind, []) for p in (baseline, excited)]
        if any(sizes):
            rows.append((f"{kind}: number, KiB in all", *(f"{len(s)}, {sum(s) / 2**10:,.1f}" for s in sizes)))
    lines = ["| | baseline | excited |", "| --- | --: | --: |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice, which need not exist here.

    Raises:
      ValueError: if there is no such slice, or no TPU compiler.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU has metadata to be asked for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no other process uses a TPU
    jax.config.update("jax_platforms", "cpu")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("There is no TPU compiler here: uv sync --locked --extra examples --extra tpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except RuntimeError as error:
        raise ValueError(f"{topology!r} is no TPU slice, as v5e:4x4 is: {error}") from error


def compare(config: Config) -> tuple[jax.sharding.Mesh, Program, Program]:
    """The mesh, and the steps of the baseline and of the strategy on it.

    Raises:
      ValueError: if the mesh does not fit the topology, or the step the chips.
    """
    mesh = parallel.make_mesh(config.data, config.fsdp, config.expert, devices=devices(config.topology))
    parallel.check_sizes(mesh, config.batch_size // config.micro_batches, config.num_experts)
    baseline, excited = (
        examine(compile_step(dataclasses.replace(config, strategy=strategy), mesh))
        for strategy in ("baseline", config.strategy)
    )
    return mesh, baseline, excited


def main(config: Config) -> None:
    """Compiles both steps and prints what they require."""
    mesh, baseline, excited = compare(config)
    print(f"{config.topology}, {mesh.size} chips, mesh {dict(mesh.shape)}: the step fits.\n")
    print(table(baseline, excited))


if __name__ == "__main__":
    training.run_program(main, Config, "benchmarks.pod_fit")
