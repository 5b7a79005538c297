"""Whether a training step fits a TPU slice, and what it sends: compiled ahead of time, without the slice.

    python -m examples.pod.fit --topology v5e:4x4 --expert 4
    python -m examples.pod.fit --topology v5p:8x8x8 --expert 8 --fsdp 8 --num-experts 64 --batch-size 4096

Prints memory for each chip, FLOPs, and the collectives with their bytes, of the vanilla and of the excited step. Needs
the TPU compiler, `pip install 'jax[tpu]'`, on any Linux machine.
"""

import collections
import dataclasses
import math
import os
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from examples.pod import parallel, train

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16}  # of other types, the digits in their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    """Compile a training step for a TPU topology."""

    topology: str = "v5e:4x4"
    """NAME:SHAPE in chips, such as v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4."""
    strategy: Any = "positive_sum"
    """That of the excited step."""


class Program(NamedTuple):
    """What XLA says of a compiled step; sizes are for each chip, in bytes."""

    arguments: int
    temporary: int
    flops: float
    collectives: dict[str, list[int]]  # bytes of each, by kind


def compile_step(config: train.Config, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The step, compiled for the devices of a mesh.

    Raises:
      ValueError: if it does not fit, with both sizes.
    """
    _, trainer = train.make_trainer(config, mesh)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.context + 1), jnp.int32)
    try:
        return trainer.trace(tokens).lower(lowering_platforms=("tpu",)).compile()
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
    """The bytes that each collective of an HLO program gives out, by kind; of asynchronous ones, where they start."""
    found = collections.defaultdict(list)
    for kind in COLLECTIVES:
        for shapes in re.findall(rf"= (\(?[^=\n]*?\)?) {kind}(?:-start)?\(", hlo):
            found[kind].append(sum(_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)))
    return dict(found)


def _bytes(dtype: str, shape: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def table(vanilla: Program, excited: Program) -> str:
    """Both side by side, in Markdown."""
    rows = [
        ("arguments, MiB a chip", *(f"{p.arguments / 2**20:,.1f}" for p in (vanilla, excited))),
        ("temporary, MiB a chip", *(f"{p.temporary / 2**20:,.1f}" for p in (vanilla, excited))),
        ("GFLOPs a chip", *(f"{p.flops / 1e9:,.2f}" for p in (vanilla, excited))),
    ]
    for kind in COLLECTIVES:
        sizes = [p.collectives.get(kind, []) for p in (vanilla, excited)]
        if any(sizes):
            rows.append((f"{kind}: number, KiB in all", *(f"{len(s)}, {sum(s) / 2**10:,.1f}" for s in sizes)))
    lines = ["| | vanilla | excited |", "| --- | --: | --: |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def compare(config: Config) -> tuple[jax.sharding.Mesh, Program, Program]:
    """The mesh, and the vanilla and the excited step on it.

    Raises:
      ValueError: if the mesh does not fit the topology, or the step the chips.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose metadata could be asked for
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=config.topology).devices
    mesh = parallel.make_mesh(config.data, config.fsdp, config.expert, devices=devices)
    parallel.check_sizes(mesh, config.batch_size // config.micro_batches, config.num_experts)
    vanilla, excited = (
        examine(compile_step(dataclasses.replace(config, strategy=strategy), mesh))
        for strategy in ("none", config.strategy)
    )
    return mesh, vanilla, excited


def main(config: Config) -> None:
    """Compiles both steps and prints what they need."""
    mesh, vanilla, excited = compare(config)
    print(f"{config.topology}, {mesh.size} chips, mesh {dict(mesh.shape)}: the step fits.\n")
    print(table(vanilla, excited))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=Config.__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"pod.fit: {error}")
