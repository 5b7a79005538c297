"""What the training step of a GPT-MoE sends on TPU slices, without and with Excitation; compiled without having them.

    python -m benchmarks.traffic
    python -m benchmarks.traffic --topologies v5e:4x4

Needs the TPU compiler, on any Linux machine: uv sync --locked --extra examples --extra tpu. The model is the same
everywhere; a chip has two sequences, and Adam's moments. `python -m benchmarks.pod_fit` shows one slice, by
kind of collective.
"""

import dataclasses
import sys

import tyro

from benchmarks import pod_fit as fit
from examples import training

LAYERS, EXPERTS = 12, 64
MESHES = {  # fsdp and expert; data is what these leave
    "v5e:4x4": (1, 16),
    "v5e:16x16": (4, 16),
    "v5p:8x8x8": (8, 8),
    "v5p:16x16x24": (16, 16),  # the largest single slice
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What training steps send on TPU slices."""

    topologies: tuple[str, ...] = tuple(MESHES)
    """Of those in MESHES."""
    excited: training.Strategy = "positive_sum"
    """The strategy of the excited step."""

    def __post_init__(self):
        """Errors before anything is compiled."""
        if unknown := set(self.topologies) - set(MESHES):
            raise ValueError(f"--topologies are among {', '.join(MESHES)}; got {', '.join(sorted(unknown))}.")


def row(config: Config, topology: str) -> str:
    """A row of the table."""
    fsdp, expert = MESHES[topology]
    chips = len(fit.devices(topology))
    step = fit.Config(
        topology=topology,
        strategy=config.excited,
        fsdp=fsdp,
        expert=expert,
        num_experts=EXPERTS,
        d_model=512,
        d_ff=1024,
        num_layers=LAYERS,
        num_heads=8,
        tokenizer="gpt2",
        batch_size=2 * chips,
    )
    mesh, *programs = fit.compare(step)
    sizes = [[size for kind in p.collectives.values() for size in kind] for p in programs]
    cells = [
        topology,
        f"{chips:,}",
        " x ".join(str(mesh.shape[axis]) for axis in ("data", "fsdp", "expert")),
        " / ".join(str(len(s)) for s in sizes),
        " / ".join(f"{sum(s) / 2**20:,.1f}" for s in sizes),
        f"{sum(sizes[1]) - sum(sizes[0]):,}",
        " / ".join(f"{p.temporary / 2**20:,.1f}" for p in programs),
    ]
    return "| " + " | ".join(cells) + " |"


def main(config: Config) -> None:
    """Prints the table, row by row."""
    print(f"Vanilla / excited. The routing counts of {LAYERS} layers are {4 * LAYERS * (EXPERTS + 1):,} bytes.\n")
    names = ["topology", "chips", "data x fsdp x expert", "collectives", "MiB they give out", "bytes more"]
    names += ["temporary memory, MiB a chip"]
    print("| " + " | ".join(names) + " |")
    print("| --- " + "| --: " * (len(names) - 1) + "|")
    for topology in config.topologies:
        print(row(config, topology), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=Config.__doc__))
    except ValueError as error:
        sys.exit(f"traffic: {error}")
