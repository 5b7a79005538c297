"""Pictures of the sections; hollow markers are the paper's. Each function fills a matplotlib figure."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from examples.reproduction import configs, evidence, sections, store
from examples.reproduction.sections import Row, Section, words
from examples.reproduction.tables import UNIT
from excitation_optax import plotting

STYLES: dict[str, dict[str, Any]] = {"baseline": {"color": plotting.COLORS["baseline"]}}
for strategy in ("zero_sum", "positive_sum"):
    for component, line in (("", "-"), (", both", "-"), (", direction", "--"), (", norm", ":")):
        STYLES[strategy + component] = {"color": plotting.COLORS[strategy], "linestyle": line}
POINTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
PAPER: dict[str, Any] = {"linestyle": ":", "linewidth": 0.6, "fillstyle": "none", "marker": "o", "markersize": 4}


def draw(section: Section, results: store.Results, figure: Any) -> None:
    """The picture of a section: its `draw` names one of the functions below, and arguments."""
    name, *arguments = section.draw
    globals()[name](results, section, figure, *arguments)


def along(results: store.Results, section: Section, figure: Any, what: str) -> None:
    """A measure along training ("epoch"), or by "hidden layer" at its end.

    A panel for each label, a line for each column: the mean over seeds, and a band from the lowest to the highest. NaNs
    are left out.
    """
    measure, style = section.measure, {} if what == "epoch" else {"marker": "."}
    for axes, (label, rows) in panels(figure, configs.grouped(section.rows, lambda row: row["label"])):
        axes.set(title=label, xlabel=what, ylabel=UNIT.get(measure, measure))
        for row in rows:
            runs = [section.make_run(row["where"], seed) for seed in range(section.seeds)]
            found = [results[run] for run in runs if run in results]
            if not found:
                continue
            sources = [result.curve if what == "epoch" else result.measures for result in found]
            values = evidence.FACTOR.get(measure, 1) * np.array([source[measure] for source in sources], float)
            values = np.ma.masked_invalid(values)
            x = sources[0]["epoch"] if what == "epoch" else np.arange(1, values.shape[1] + 1)
            color = plotting.COLORS[row["column"]]
            axes.plot(x, values.mean(0), label=row["column"], color=color, linewidth=1.2, **style)
            axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
            axes.legend(fontsize="x-small")


def over(results: store.Results, section: Section, figure: Any, field: str, part: int | None = None) -> None:
    """What rows reached over a field of their runs: means and standard deviations, and the paper's values.

    A panel for each label, or each value of a `part` of it, and a line for each column.
    """
    panel = lambda row: row["label"] if part is None else row["label"].split(", ")[part]
    for axes, (title, rows) in panels(figure, configs.grouped(section.rows, panel)):
        axes.set(title=title, xscale="log", xlabel=field.replace("_", " "), ylabel=UNIT[section.measure])
        for name, line in configs.grouped(rows, lambda row: row["column"].split(" (")[0]).items():
            x = [row["where"][field] for row in line]
            style = STYLES.get(name, {"color": f"C{len(axes.containers) % 10}", "linestyle": ":"})
            if field == "num_experts":
                axes.set_xticks(x, [str(n) for n in x])
                axes.minorticks_off()
            reached(axes, x, results, section, line, name, **style)
            if "value" in line[0]:
                axes.plot(x, [row["value"] for row in line], color=style["color"], **PAPER)
        if axes.containers:
            axes.legend(fontsize="x-small")


def over_depth(results: store.Results, section: Section, figure: Any) -> None:
    """Accuracy over depth, each at its best learning rate on held-out data."""
    ((axes, _),) = panels(figure, {"": None})
    axes.set(xlabel="hidden layers", ylabel=f"{UNIT[section.measure]} at the best learning rate")
    depths = sorted({row["where"]["depth"] for row in section.rows})
    for strategy in ("vanilla", "zero_sum", "positive_sum"):
        line = [sections.row({"strategy": strategy, "depth": depth, "learning_rate": "best"}) for depth in depths]
        name = words({"strategy": strategy})
        reached(axes, depths, results, section, line, name, **STYLES[name])
    axes.legend(fontsize="x-small")


def gains(results: store.Results, section: Section, figure: Any, field: str, scale: str) -> None:
    """The printed Δs of a table, over a field of its runs."""
    ((axes, _),) = panels(figure, {"": None})
    axes.set(xscale=scale, xlabel=field.replace("_", " "), ylabel="Δ test accuracy (points)")
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    groups = configs.grouped(evidence.printed_deltas(section), lambda claim: claim["text"].split(",")[0])
    for number, (optimizer, claims) in enumerate(groups.items()):
        values, color = [claim["contrast"][0][1][field] for claim in claims], f"C{number}"
        ours = [evidence.contrast(results, section, claim) for claim in claims]
        means, halves = [c.mean for c in ours], [c.half for c in ours]
        axes.errorbar(values, means, yerr=halves, **POINTS, label=optimizer, color=color)
        axes.plot(values, [claim["printed"] for claim in claims], color=color, **PAPER)
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axes.legend(fontsize="small")
    axes.minorticks_off()


def summary(results: store.Results, section: Section, figure: Any) -> None:
    """The printed Δs of a table beside ours, one above the other."""
    claims = evidence.printed_deltas(section)
    figure.set_size_inches(7, 1.2 + 0.3 * len(claims))
    axes = figure.subplots()
    axes.axvline(0, color="0.7", linewidth=0.8)
    groups = configs.grouped(enumerate(claims), lambda numbered: numbered[1]["contrast"][0][1]["strategy"])
    for strategy, numbered in groups.items():
        lines, papers = zip(*((line, claim["printed"]) for line, claim in numbered), strict=True)
        ours = [evidence.contrast(results, section, claim) for _, claim in numbered]
        style = {"color": plotting.COLORS[strategy], "linestyle": "none", "marker": "o", "markersize": 6}
        means, halves = [c.mean for c in ours], [c.half for c in ours]
        axes.errorbar(means, lines, xerr=halves, capsize=2, label=f"{strategy}, here", **style)
        axes.plot(papers, lines, label=f"{strategy}, paper", fillstyle="none", **style)
    axes.set_yticks(range(len(claims)), [claim["text"].replace(" beats the baseline", "") for claim in claims])
    axes.invert_yaxis()
    epochs = section.settings["epochs"]
    axes.set(xlabel=f"Δ test accuracy over the baseline after {epochs} epochs\n(points, with 95 % intervals)")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.grid(alpha=0.3, axis="x")


def reached(
    axes: Any, x: Any, results: store.Results, section: Section, rows: Iterable[Row], label: str, **style: Any
) -> None:
    """A line through the means of the rows that have runs, with their standard deviations."""
    found = zip(x, (evidence.contrast(results, section, row) for row in rows), strict=True)
    points = [(place, ours.mean, ours.deviation) for place, ours in found if ours.n]
    if points:
        axes.errorbar(*zip(*points, strict=True), label=label, **POINTS | style)


def panels(figure: Any, groups: dict[Any, Any]) -> list[tuple[Any, tuple[Any, Any]]]:
    """Axes for each group, at most three in a row."""
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure.set_size_inches((4 if columns > 1 else 6) * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.grid(alpha=0.3)
    return list(zip(grid, groups.items(), strict=False))


def save(path: pathlib.Path, draw: Callable[..., None], *arguments: Any) -> pathlib.Path:
    """Draws with matplotlib's defaults, whatever the user's are, and to the same bytes each time."""
    import matplotlib  # imported late: it takes a second

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.style.context(["default", {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}]):
        figure = plt.figure(layout="constrained")
        draw(*arguments, figure)
        empty = [axes for axes in figure.axes if not any(map(_shows_data, axes.lines))]
        if len(empty) == len(figure.axes):
            raise ValueError(f"The picture {path.name} shows no data.")
        for axes in empty:
            axes.set_axis_off()
            axes.set_title(f"{axes.get_title()}: not run" if axes.get_title() else "")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def _shows_data(line: Any) -> bool:
    """Whether a line has a point to be seen: one with a marker, or two that are joined."""
    finite: np.ndarray = np.all(np.isfinite(np.asarray(line.get_xydata(), float)), axis=-1)
    marked = line.get_marker() not in (None, "None", "", " ")
    joined = line.get_linestyle() != "None" and bool((finite[1:] & finite[:-1]).any())
    labelled = line.get_label() and not line.get_label().startswith("_child")
    return bool(labelled and (joined or (marked and finite.any())))
