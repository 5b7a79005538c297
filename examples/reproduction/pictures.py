"""Pictures of the paper's tables and figures, with ours; hollow markers are the paper's.

Each function fills a matplotlib figure.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from examples.reproduction import evidence, experiments, inside, store, study, toy

# Factor and digits that a measure is shown with; accuracies are fractions in the results and percent in the paper.
SHOWN = {"accuracy": (100, 2), "perplexity": (1, 2), "perplexity_reduction": (1, 2)}
UNIT = {
    "accuracy": "test accuracy (%)",
    "loss": "test loss (nats per byte)",
    "entropy": "routing entropy (nats)",
    "perplexity_reduction": "perplexity saved",
}
COLORS = {
    "vanilla": "0.4",
    "zero_sum": "C0",
    "positive_sum": "C1",
    "exp_diff": "C2",
    "global_exp": "C4",
    "random_boost": "C5",
    "inverted": "C3",
}


def _curves(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """A measure along training: the mean over seeds, and a band from the lowest to the highest."""
    measure = view["measure"]
    for axes, (label, rows) in _panels(figure, _grouped(view["rows"], lambda row: row["label"])):
        axes.set(title=label, xlabel="epoch", ylabel=UNIT.get(measure, measure))
        for row in rows:
            curves = [result.curve for result in _of_row(results, experiment, row) if measure in result.curve]
            if curves:
                values = SHOWN.get(measure, (1, 3))[0] * np.array([curve[measure] for curve in curves], float)
                _line_with_band(axes, curves[0]["epoch"], values, row["column"])


def _by_layer(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """A measure by hidden layer, at the end of training."""
    measure = view["measure"]
    for axes, (label, rows) in _panels(figure, _grouped(view["rows"], lambda row: row["label"])):
        axes.set(title=label, xlabel="hidden layer", ylabel=UNIT.get(measure, measure))
        for row in rows:
            values = np.array([r.measures[measure] for r in _of_row(results, experiment, row)], float)
            if len(values):
                _line_with_band(axes, np.arange(1, values.shape[1] + 1), values, row["column"], marker=".")


def _learning_rates(
    results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any
) -> None:
    """Final accuracy over the learning rate."""
    for axes, (optimizer, rows) in _panels(figure, _grouped(view["rows"], lambda row: row["label"].split(",")[0])):
        axes.set(title=optimizer, xscale="log", xlabel="learning rate", ylabel=UNIT["accuracy"])
        for strategy, row_group in _grouped(rows, lambda row: row["column"]).items():
            rates = [row["where"]["learning_rate"] for row in row_group]
            values = [
                100 * _finite(evidence.by_seed(results, experiment, experiments.row_spec(view, row)))
                for row in row_group
            ]
            means = [v.mean() if len(v) else np.nan for v in values]
            spreads = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
            style = {"color": COLORS[strategy], "marker": "o", "markersize": 4}
            axes.errorbar(rates, means, spreads, label=strategy, linewidth=1.2, capsize=2, **style)
            paper = [row["value"] for row in row_group]
            axes.plot(rates, paper, linestyle=":", linewidth=0.6, fillstyle="none", **style)
        axes.legend(fontsize="x-small")


def _gains(field: str, xlabel: str, scale: str) -> Any:
    """A picture of the printed Δs of a table, over a field of its runs."""

    def draw(results, experiment, view, figure):
        ((axes, _),) = _panels(figure, {"": view["rows"]})
        axes.set(xscale=scale, xlabel=xlabel, ylabel="Δ test accuracy (points)")
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        groups = _grouped(evidence.printed_deltas(view), lambda claim: claim["text"].split(",")[0])
        for number, (optimizer, claims) in enumerate(groups.items()):
            values = [claim["contrast"][0][1][field] for claim in claims]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4}
            _intervals(
                axes, values, [evidence.contrast(results, experiment, c) for c in claims], label=optimizer, **style
            )
            paper = [claim["printed"] for claim in claims]
            axes.plot(values, paper, linestyle=":", linewidth=0.6, fillstyle="none", **style)
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.minorticks_off()

    return draw


def _by_experts(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """Gains over the number of experts, for each width and number of experts per token."""
    for axes, (k, rows) in _panels(figure, _grouped(view["rows"], lambda row: row["where"]["experts_per_token"])):
        axes.set(title=f"k = {k}", xscale="log", xlabel="experts", ylabel="perplexity saved")
        for number, (width, line) in enumerate(_grouped(rows, lambda row: row["where"]["d_ff"]).items()):
            experts = [row["where"]["num_experts"] for row in line]
            axes.set_xticks(experts, [str(n) for n in experts])
            style = {"color": f"C{number}", "marker": "o", "markersize": 4}
            ours = [_finite(evidence.by_seed(results, experiment, experiments.row_spec(view, row))) for row in line]
            axes.plot(experts, [v.mean() if len(v) else np.nan for v in ours], label=f"d_ff = {width}", **style)
            paper = [row["value"] for row in line]
            axes.plot(experts, paper, linestyle=":", linewidth=0.6, fillstyle="none", **style)
        axes.minorticks_off()
        axes.legend(fontsize="x-small")


def _summary(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """The printed Δs of a table beside ours, one above the other."""
    claims = evidence.printed_deltas(view)
    figure.set_size_inches(7, 1.2 + 0.3 * len(claims))
    axes = figure.subplots()
    axes.axvline(0, color="0.7", linewidth=0.8)
    places = np.arange(len(claims))
    for strategy in ("zero_sum", "positive_sum"):
        chosen = [i for i, claim in enumerate(claims) if claim["contrast"][0][1]["strategy"] == strategy]
        ours = [evidence.contrast(results, experiment, claims[i]) for i in chosen]
        style = {"color": COLORS[strategy], "linestyle": "none", "marker": "o", "markersize": 6}
        _intervals(axes, places[chosen], ours, horizontal=True, label=f"{strategy}, here", **style)
        paper = [claims[i]["printed"] for i in chosen]
        axes.plot(paper, places[chosen], label=f"{strategy}, paper", fillstyle="none", **style)
    axes.set_yticks(places, [claim["text"].replace(" beats vanilla", "") for claim in claims])
    axes.invert_yaxis()
    epochs = experiment.settings["epochs"]
    axes.set(xlabel=f"Δ test accuracy over vanilla after {epochs} epochs (points), with 95 % intervals")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.grid(alpha=0.3, axis="x")


DRAW = {  # by view: how it is drawn
    "fig2": _curves,
    "table1": _summary,
    "fig3": _curves,
    "fig4": _by_layer,
    "fig5": _curves,
    "fig6": _curves,
    "fig6_long": _curves,
    "fig7": _by_experts,
    "table3": _learning_rates,
    "table4": _gains("sparsity", "sparsity", "linear"),
    "table5": _gains("batch_size", "batch size", "log"),
    "fig8": _curves,
    "fig9": _curves,
    "fig10": _curves,
    "fig11": _curves,
}


def _over_rates(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """What a study's rows reached, over the learning rate: means and standard deviations, a panel for each setting."""
    measure = view["measure"]
    apart = ("learning_rate", *VARIANT)
    panels = _grouped(view["rows"], lambda row: study.label({k: v for k, v in row.items() if k not in apart}))
    for axes, (title, rows) in _panels(figure, panels):
        axes.set(title=title, xscale="log", xlabel="learning rate", ylabel=UNIT[measure])
        for name, line in _grouped(rows, lambda row: study.label({k: row[k] for k in VARIANT if k in row})).items():
            values = [_finite(evidence.by_seed(results, experiment, _measure_of(measure, row))) for row in line]
            style = STYLES.get(name, {"color": f"C{len(axes.containers) % 10}", "linestyle": ":"})
            _points(axes, [row["learning_rate"] for row in line], measure, values, name, **style)
        if axes.containers:
            axes.legend(fontsize="x-small")


def _over_depth(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """Accuracy over depth, each at its best learning rate on held-out data."""
    ((axes, _),) = _panels(figure, {"": None})
    axes.set(xlabel="hidden layers", ylabel=f"{UNIT['accuracy']} at the best learning rate")
    depths = sorted({row["depth"] for row in view["rows"]})
    for strategy in ("vanilla", "zero_sum", "positive_sum"):
        where = [{"strategy": strategy, "depth": depth, "learning_rate": "best"} for depth in depths]
        values = [_finite(evidence.by_seed(results, experiment, _measure_of("accuracy", row))) for row in where]
        _points(axes, depths, "accuracy", values, study.label({"strategy": strategy}), color=COLORS[strategy])
    axes.legend(fontsize="x-small")


def _answer(results: store.Results, figure: Any) -> None:
    """The picture of does-it-help.md: zero_sum and its components against the baseline, over the learning rate."""
    variants = [study.BASELINE, *({**study.ZERO_SUM, "component": c} for c in study.COMPONENTS)]
    for axes, (title, (name, common, limits)) in _panels(figure, study.ANSWER):
        experiment = experiments.EXPERIMENTS[name]
        measure = "loss" if experiment.kind == "mini_gpt" else "accuracy"
        rows = [row for row in experiment.rows or () if common.items() <= row.items()]
        rates = sorted({row["learning_rate"] for row in rows})
        axes.set(title=title.partition(" (")[0], xscale="log", xlabel="learning rate", ylabel=UNIT[measure])
        for variant in variants:
            specs = [_measure_of(measure, {**common, **variant, "learning_rate": rate}) for rate in rates]
            values = [_finite(evidence.by_seed(results, experiment, spec)) for spec in specs]
            style = {"color": {"both": "C0", "direction": "C2", "norm": "C3"}.get(variant.get("component", ""), "0.4")}
            _points(axes, rates, measure, values, study.label(variant), **style)
        axes.set_ylim(*(limits or (None, None)))
        if axes.containers:
            axes.legend(fontsize="x-small", loc="lower center")


def _measure_of(measure: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"measure": measure, "contrast": [[1.0, row]]}


def _points(axes: Any, places: Any, measure: str, values: list[np.ndarray], label: str, **style: Any) -> None:
    """A line through the means, with standard deviations, where there are any."""
    factor, _ = SHOWN.get(measure, (1, 3))
    there = [(place, factor * v) for place, v in zip(places, values, strict=True) if len(v)]
    if there:
        means, spreads = [v.mean() for _, v in there], [v.std(ddof=1) if len(v) > 1 else 0.0 for _, v in there]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2} | style
        axes.errorbar([place for place, _ in there], means, spreads, label=label, **style)


VARIANT = ("strategy", "component", "gamma", "expert_rate", "load_balancing")  # lines of a picture, not panels
STYLES: dict[str, dict[str, Any]] = {
    "baseline": {"color": COLORS["vanilla"]},
    **{s: {"color": COLORS[s]} for s in ("zero_sum", "positive_sum")},
    **{
        f"{s}, {c}": {"color": COLORS[s], "linestyle": line}
        for s in ("zero_sum", "positive_sum")
        for c, line in (("both", "-"), ("direction", "--"), ("norm", ":"))
    },
}
STUDIES = {
    "mechanism": _over_rates,
    "mechanism_digits": _over_rates,
    "deep_digits": _over_rates,
    "deep_ways_out": _over_rates,
    "depth_digits": _over_depth,
    "rescue": _over_rates,
    "rescue_sgd": _over_rates,
    "mini_tuned": _over_rates,
}


def is_drawn(experiment: experiments.Experiment) -> bool:
    """Whether there are enough seeds for a picture: a smoke test has none."""
    return experiment.seeds >= evidence.MIN_SEEDS


def draw_all(results: store.Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the pictures of all views and studies with runs.

    Raises:
      ValueError: if a picture shows no data.
    """
    paths = []
    for name, draw in STUDIES.items():
        experiment = experiments.EXPERIMENTS.get(name)
        if experiment and evidence.found(results, experiment):
            paths.append(folder / file_name(name))
            measure = "loss" if experiment.kind == "mini_gpt" else "accuracy"
            _save(paths[-1], draw, results, experiment, {"rows": experiment.rows, "measure": measure})
    for name, draw in DRAW.items():
        name_of_rows = experiments.paper()[name].get("same_as", name)
        view, experiment = experiments.paper()[name_of_rows], experiments.EXPERIMENTS.get(name_of_rows)
        if experiment and is_drawn(experiment) and evidence.found(results, experiment):
            paths.append(folder / file_name(name))
            _save(paths[-1], draw, results, experiment, view)
    answered = [experiments.EXPERIMENTS.get(name) for name, *_ in study.ANSWER.values()]
    if all(answered) and any(evidence.found(results, experiment) for experiment in answered if experiment):
        paths.append(folder / file_name("answer"))
        _save(paths[-1], _answer, results)
    if outcome := inside.load(results.folder):
        paths.append(folder / file_name("inside"))
        _save(paths[-1], inside.draw, outcome)
    if outcome := toy.load(results.folder / "fig1"):
        paths.append(folder / file_name("fig1"))
        _save(paths[-1], toy.draw, outcome)
    return paths


def file_name(name: str) -> str:
    """Of a view's picture; the README shows Table 1's."""
    return "summary.svg" if name == "table1" else f"{name}.svg"


def _save(path: pathlib.Path, draw: Any, *arguments: Any) -> None:
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


def _shows_data(line: Any) -> bool:
    """Whether a line has a point to be seen: one with a marker, or two that are joined."""
    finite: np.ndarray = np.all(np.isfinite(np.asarray(line.get_xydata(), float)), axis=-1)
    marked = line.get_marker() not in (None, "None", "", " ")
    joined = line.get_linestyle() != "None" and bool((finite[1:] & finite[:-1]).any())
    return bool(line.get_label() and (joined or (marked and finite.any()))) and not line.get_label().startswith(
        "_child"
    )


def _panels(figure: Any, groups: dict[Any, Any]) -> list[tuple[Any, tuple[Any, Any]]]:
    """Axes for each group, at most three in a row."""
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure.set_size_inches((4 if columns > 1 else 6) * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    for axes in grid[: len(groups)]:
        axes.grid(alpha=0.3)
    return list(zip(grid, groups.items(), strict=False))


def _line_with_band(axes: Any, x: Any, values: np.ndarray, label: str, **style: Any) -> None:
    """The mean over the first axis and a band from the lowest to the highest; NaNs are left out."""
    count = np.isfinite(values).sum(0)
    mean = np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
    axes.plot(x, mean, label=label, color=COLORS[label], linewidth=1.2, **style)
    low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    axes.fill_between(x, low, high, color=COLORS[label], alpha=0.2, linewidth=0)
    axes.legend(fontsize="x-small")


def _intervals(
    axes: Any, places: Any, contrasts: list[evidence.Contrast], *, horizontal: bool = False, **style: Any
) -> None:
    """Differences of accuracy in points with their intervals."""
    means = [100 * c.mean for c in contrasts]
    halves = [100 * (c.high - c.low) / 2 if c.n > 1 else 0.0 for c in contrasts]
    if horizontal:
        axes.errorbar(means, places, xerr=halves, capsize=2, **style)
    else:
        axes.errorbar(places, means, yerr=halves, capsize=2, linewidth=1.2, **style)
        axes.legend(fontsize="small")


def _grouped(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    """The items by key, in order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _of_row(results: store.Results, experiment: experiments.Experiment, row: dict[str, Any]) -> list[store.Result]:
    """The results of a row, for the seeds that are there."""
    runs = [experiment.make_run(row["where"], seed) for seed in range(experiment.seeds)]
    return [results[run] for run in runs if run in results]


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    return array[np.isfinite(array)]
