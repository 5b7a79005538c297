"""What the programs that compare strategies share: flags, and the table and the picture at the end."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from examples import logs, training
from excitation_optax import plotting

Runs = dict[str, list[list[dict[str, Any]]]]  # by strategy, for each seed, the lines of its log
LOAD = "max_over_mean_load"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.TrainingConfig):
    """Flags of the programs that compare strategies."""

    strategy: tuple[training.Strategy, ...] = ("baseline", "positive_sum")
    """The strategies to compare; baseline is the optimizer without Excitation."""
    seeds: int = 1
    """Models to train with each strategy, with the seeds --seed, --seed + 1, ..."""
    output: pathlib.Path = pathlib.Path("out/comparison.png")
    """The picture. The logs are written beside it, as NAME-STRATEGY-SEED.jsonl."""

    def __post_init__(self):
        """Raises ValueError before anything is loaded or trained."""
        super().__post_init__()
        training.check_positive(self, "seeds")
        check(self)


def check(config: Any) -> None:
    """Raises ValueError for strategies or a picture that a program cannot compare or draw."""
    if not config.strategy or len(set(config.strategy)) < len(config.strategy):
        raise ValueError(f"--strategy must name different strategies, at least one; got {list(config.strategy)}.")
    if config.output.suffix not in (".png", ".pdf", ".svg") or config.output.is_dir():
        raise ValueError(f"--output must name a .png, .pdf or .svg file; got {config.output}.")


def spread(values: Any, digits: int) -> str:
    """The mean and the standard deviation over seeds, `[seeds]`; models that diverged (NaN) are counted apart."""
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    deviation = f" ± {finite.std(ddof=1):.{digits}f}" if len(finite) > 1 else ""
    diverged = f", {len(values) - len(finite)} NaN" if len(finite) < len(values) else ""
    return (f"{finite.mean():.{digits}f}{deviation}" if len(finite) else "-") + diverged


def over_seeds(seeds: int) -> str:
    """What the cells of a table are."""
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"


def row(label: str, cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"{label:<24}" + "".join(f"{cell:>22}" for cell in cells)


def last(lines: list[dict[str, Any]], name: str) -> float:
    """The last value of a metric in a log; NaN if there is none, or it was not finite."""
    value = next((line[name] for line in reversed(lines) if name in line), None)
    return np.nan if value is None else value


def table(runs: Runs, measures: dict[str, tuple[str, int, int]]) -> str:
    """The end of every run: the measures, each by its name in the log, a factor and digits, and the routing."""
    seeds = len(next(iter(runs.values())))
    measures = measures | {"max / mean load": (LOAD, 1, 2), "dead experts, %": ("dead_experts", 100, 1)}
    few = " (too few to compare: use --seeds 3)" if seeds == 1 else ""
    lines = [f"at the end, {over_seeds(seeds)}{few}", row("", list(runs))]
    for label, (name, factor, digits) in measures.items():
        found = {strategy: [factor * last(lines, name) for lines in logs] for strategy, logs in runs.items()}
        lines.append(row(label, [spread(values, digits) for values in found.values()]))
    cells = []
    for seeds_logs in runs.values():
        low, high = (np.mean([last(lines, f"excitation_{end}") for lines in seeds_logs]) for end in ("min", "max"))
        excited = any("excitation_min" in line for line in seeds_logs[0])
        cells.append(f"{low:.2f} to {high:.2f}" if excited else "none")
    return "\n".join([*lines, row("excitation, range", cells)])


@contextlib.contextmanager
def figure(path: pathlib.Path, width: float, height: float = 4.2) -> Iterator[Any]:
    """A figure, saved at the end."""
    import matplotlib  # imported late: it takes a second

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    drawn = plt.figure(figsize=(width, height), layout="constrained")
    yield drawn
    with logs.naming(path):
        drawn.savefig(path, dpi=120)
    plt.close(drawn)


def curve(axes: Any, x: Any, values: Any, label: str) -> None:
    """The mean over seeds of `values` `[len(x), seeds]`, with a band from the lowest to the highest seed."""
    (line,) = axes.plot(x, values.mean(1), label=label, color=plotting.COLORS.get(label))
    axes.fill_between(x, values.min(1), values.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


def finish(runs: Runs, path: pathlib.Path, measures: dict[str, tuple[str, int, int]], title: str) -> None:
    """Prints the table, and draws the first measure and the load of the busiest expert along training."""
    print(table(runs, measures))
    (label, (name, factor, _)), *_ = measures.items()
    with figure(path, 10) as drawn:
        panels = (name, label, factor), (LOAD, "max / mean load", 1)
        for axes, (metric, ylabel, scale) in zip(drawn.subplots(1, 2), panels, strict=True):
            for strategy, seeds in runs.items():
                steps = [line["step"] for line in seeds[0] if metric in line]
                values = [[line[metric] for line in lines if metric in line] for lines in seeds]  # None is NaN
                curve(axes, steps, scale * np.array(values, float).T, strategy)
            axes.set(xlabel="step", ylabel=ylabel)
        drawn.axes[0].legend()
        drawn.suptitle(title)
    print(f"picture: {path.resolve()}, with the logs beside it")


def ready(path: pathlib.Path) -> None:
    """Raises OSError now if the picture cannot be written later."""
    with logs.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
