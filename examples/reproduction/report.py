"""The report: the paper's numbers and ours side by side, as a page, pictures and a table for the README.

It is made of the results on file, `paper.json` and `experiments`, and of nothing else: the same results give the same
bytes. Differences between runs are paired by seed, as the runs of a seed share their initialization and batches.
"""

import collections
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from examples.reproduction import configs, experiments, overhead, store

IMAGES = pathlib.PurePosixPath("images/reproduction")  # in the folder of the page
VERDICTS = ("confirmed", "contradicted", "inconclusive", "not tested")
MARKERS = "<!-- reproduction -->", "<!-- /reproduction -->"

# Factor and digits that a measure is shown with; accuracies are fractions in the results and percent in the paper.
SHOWN = {"accuracy": (100, 2), "perplexity": (1, 2), "perplexity_reduction": (1, 2)}
UNIT = {
    "accuracy": "test accuracy (%)",
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

INTRODUCTION = """\
# The paper's tables and figures

What *Excitation: Momentum For Experts* (arXiv 2602.21798) prints, and what came out here. This page and its pictures
are written by `python -m examples.reproduce report` from the results on file: edits are lost.

* A value is a mean ± standard deviation over seeds, accuracies in percent; the residual is ours minus the paper's.
* A Δ is a mean over seeds of differences between runs with the same seed, and so the same initialization and batches;
  in brackets its 95 % interval, of Student's t. Accuracy in points.
* A claim of the paper is *confirmed* if the interval excludes zero on the paper's side, *contradicted* if it does on
  the other, *inconclusive* if it holds zero or there is one seed only, and *not tested* if the runs are missing. With
  this many claims, a few verdicts of chance are to be expected.
* A paper's Δ in parentheses is not printed there, but is the difference of printed values; > 0 or < 0 stands for a
  claim without a number.
* Runs that diverged are counted, and left out of means and of differences."""


class Contrast(NamedTuple):
    """A linear combination of runs, paired by seed. Low and high are NaN if there are fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int  # seeds that it was computed from
    diverged: int = 0  # seeds left out, as a run of theirs is not finite


def measured(result: store.Result, spec: dict[str, Any]) -> float:
    """What a claim or a row measures: the mean over layers, if it is measured by layer.

    Args:
      result: of one run.
      spec: `measure`; optionally `at`, the share of the training after which it is measured instead of at the end; or
        `layers`: "middle", the middle half of them.
    """
    if "at" in spec:
        epochs = np.asarray(result.curve["epoch"], float)
        return float(result.curve[spec["measure"]][np.argmin(np.abs(epochs - spec["at"] * epochs[-1]))])
    values = np.atleast_1d(np.asarray(result.measures[spec["measure"]], float))
    if spec.get("layers") == "middle":
        quarter = len(values) // 4
        values = values[quarter : len(values) - quarter]
    return float(values.mean())


def by_seed(results: store.Results, experiment: experiments.Experiment, spec: dict[str, Any]) -> list[float]:
    """The linear combination that a claim is about, for each seed of which all runs are there; NaN if one diverged."""
    combinations = []
    for seed in range(experiment.seeds):
        terms = [(factor, experiments.make_run(experiment, where, seed)) for factor, where in spec["contrast"]]
        if all(run in results for _, run in terms):
            combinations.append(sum(factor * measured(results[run], spec) for factor, run in terms))
    return combinations


def contrast(results: store.Results, experiment: experiments.Experiment, claim: dict[str, Any]) -> Contrast:
    """The mean over seeds of what a claim is about, and its 95 % interval, in the measure's own unit."""
    values = np.asarray(by_seed(results, experiment, claim), float)
    finite = values[np.isfinite(values)]
    n, diverged = len(finite), len(values) - len(finite)
    if n < 2:
        return Contrast(float(finite[0]) if n else math.nan, math.nan, math.nan, n, diverged)
    mean = float(finite.mean())
    half = float(special.stdtrit(n - 1, 0.975) * finite.std(ddof=1) / math.sqrt(n))
    return Contrast(mean, mean - half, mean + half, n, diverged)


def verdict(contrast: Contrast, sign: int) -> str:
    """Whether what was measured bears out a claim that the contrast has this sign."""
    if contrast.n + contrast.diverged == 0:
        return "not tested"
    if contrast.n < 2:
        return "inconclusive (one seed)" if contrast.n else "inconclusive (diverged)"
    if min(sign * contrast.low, sign * contrast.high) > 0:
        return "confirmed"
    return "contradicted" if max(sign * contrast.low, sign * contrast.high) < 0 else "inconclusive"


def printed(view: dict[str, Any], claim: dict[str, Any]) -> tuple[float | None, bool]:
    """The paper's Δ, and whether it stands in the paper rather than being the difference of what stands there."""
    if claim["printed"] is not None:
        return claim["printed"], True
    values: dict[frozenset, float] = {}
    for row in view["rows"]:
        terms = experiments.row_spec(view, row)["contrast"]
        values |= {frozenset(where.items()): 0.0 for _, where in terms[1:]}  # only the difference is printed
        values[frozenset(terms[0][1].items())] = math.nan if row["value"] is None else row["value"]
    terms = [factor * values.get(frozenset(where.items()), math.nan) for factor, where in claim["contrast"]]
    return (None if "at" in claim or math.isnan(sum(terms)) else sum(terms)), False


# The page.


def write(results: store.Results, docs_folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `reproduction.md` and its pictures into the folder of the documentation.

    Returns:
      What was written.

    Raises:
      OSError: if it could not be.
    """
    (docs_folder / IMAGES).mkdir(parents=True, exist_ok=True)
    page = docs_folder / "reproduction.md"
    page.write_text(markdown(results), encoding="utf-8")
    return [page, *_draw_all(results, docs_folder / IMAGES)]


def markdown(results: store.Results) -> str:
    """The page."""
    sections, lines, found = [], [], []
    for name, view in experiments.paper().items():
        if "same_as" in view:
            section, line = _same_as(results, name, view)
        elif view["kind"] == "overhead":
            section, line = _overhead(results, name, view)
        else:
            section, line = _view(results, name, view)
            found += _found(results, name, view)
        sections.append(section)
        lines.append(line)
    for name, experiment in experiments.EXPERIMENTS.items():
        if name not in experiments.paper():
            sections.append(_other(results, experiment))
    found = list(dict.fromkeys(found, None))
    head = ("", "", "runs", *VERDICTS)
    summary = ["## Summary", _table(head, lines, numbers=5)]
    if found:
        summary.append(f"{_plural(len(found), 'run')}, {_total_time(found, results)}.")
    return "\n\n".join([INTRODUCTION, *_data(results, found), *summary, *sections]) + "\n"


def _found(results: store.Results, name: str, view: dict[str, Any]) -> list[configs.Run]:
    """Those runs of a table or figure that are on file."""
    experiment = experiments.EXPERIMENTS.get(name)
    return [run for run in experiments.runs(experiment) if run in results] if experiment else []


def _data(results: store.Results, found: list[configs.Run]) -> list[str]:
    """The section on the data that the runs were trained on."""
    if not found:
        return []
    states = {_describe(results[run].about.get("data", "not recorded")) for run in found}
    return [
        "## The data",
        "What the results say of the data that they come from:",
        "\n".join(f"* {s}" for s in sorted(states)),
    ]


def _view(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """The section of a table or figure, and its line in the summary."""
    experiment, found = experiments.EXPERIMENTS.get(name), _found(results, name, view)
    if experiment is None or not found:
        how = f": {_command(name)}" if experiment else "."
        parts = [_title(name, view), f"{view['where_in_paper']}. Not run{how}"]
        return _with_remark(name, parts), (*_linked(name, view), "not run", 0, 0, 0, len(view["claims"]))
    total = len(experiments.runs(experiment))
    ours = [contrast(results, experiment, claim) for claim in view["claims"]]
    verdicts = [verdict(c, claim["sign"]) for claim, c in zip(view["claims"], ours, strict=True)]
    counts = collections.Counter(v.split(" (")[0] for v in verdicts)
    parts = [_title(name, view), f"{view['where_in_paper']}. Here: {_settings(experiment)}."]
    parts += [view["note"]] if "note" in view else []
    parts += [_picture(name, view)] if name in PICTURES else []
    rows = [_row(results, experiment, view, row) for row in view["rows"]]
    parts.append(_table(("", "", "paper", "ours", "residual"), rows, numbers=3))
    if view["claims"]:
        rows = [
            (claim["text"], claim["source"], *_deltas(view, claim, c), v)
            for claim, c, v in zip(view["claims"], ours, verdicts, strict=True)
        ]
        parts.append(_table(("claim", "where", "paper's Δ", "our Δ", "verdict"), rows, numbers=2))
    parts.append(_provenance(results, name, found, total))
    line = (*_linked(name, view), f"{len(found)} of {total}", *(counts[v] for v in VERDICTS))
    return _with_remark(name, parts), line


def _same_as(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """A picture of another view's rows."""
    other = experiments.paper()[view["same_as"]]
    link, _ = _linked(view["same_as"], other)
    found = _found(results, view["same_as"], other)
    parts = [_title(name, view), f"{view['where_in_paper']}. A picture of {link}.{'' if found else ' Not run.'}"]
    parts += [_picture(name, view)] if found and name in PICTURES else []
    return _with_remark(name, parts), (*_linked(name, view), f"see {_name(view['same_as'])}", *[""] * len(VERDICTS))


def _overhead(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """Table 8, which has measurements of its own."""
    entries = overhead.load(results.folder)
    how = f"{'Made by' if entries else 'Not run:'} `python -m benchmarks.overhead`"
    parts = [_title(name, view), f"{view['where_in_paper']}. {how}", view["note"]]
    parts += [overhead.table(entries)] if entries else []
    rows = len({entry["row"] for entry in entries})
    runs = f"{rows} of {len(view['rows'])} rows" if entries else "not run"
    return _with_remark(name, parts), (*_linked(name, view), runs, *[""] * len(VERDICTS))


def _other(results: store.Results, experiment: experiments.Experiment) -> str:
    """Runs that are not the paper's, such as a look at what it leaves open."""
    found = [run for run in experiments.runs(experiment) if run in results]
    parts = [f"## {experiment.title}"]
    if not found:
        return _with_remark(experiment.name, [*parts, f"Not run: {_command(experiment.name)}"])
    measure = "perplexity" if experiment.kind == "gpt" else "accuracy"
    view = {"measure": measure}
    parts.append(f"Not in the paper. Here: {_settings(experiment)}.")
    rows = []
    for where in experiment.rows or ():
        label = ", ".join(f"{key} {value}" for key, value in where.items())
        rows.append(
            (label, _row(results, experiment, view, {"label": "", "column": "", "where": where, "value": None})[3])
        )
    parts.append(_table(("", UNIT.get(measure, measure)), rows, text=1, numbers=1))
    parts.append(_provenance(results, experiment.name, found, len(experiments.runs(experiment))))
    return _with_remark(experiment.name, parts)


def _row(
    results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], row: dict[str, Any]
) -> tuple:
    """Label, column, the paper's value, ours, and the residual."""
    factor, digits = SHOWN.get(view["measure"], (1, 3))
    values = factor * np.asarray(by_seed(results, experiment, experiments.row_spec(view, row)), float)
    finite = values[np.isfinite(values)]
    ours, diverged = "", len(values) - len(finite)
    if len(values):
        ours = _mean(finite.mean() if len(finite) else None, finite.std(ddof=1) if len(finite) > 1 else None, digits)
        ours += f" ({_plural(len(finite), 'seed')}{f', {diverged} diverged' if diverged else ''})"
    paper, residual = _mean(row["value"], row.get("spread"), digits), ""
    if row["value"] is not None and len(finite):
        residual = f"{finite.mean() - row['value']:+z.{digits}f}"
    return row["label"], row["column"], f"about {row['value']:g}" if row.get("approximate") else paper, ours, residual


def _deltas(view: dict[str, Any], claim: dict[str, Any], ours: Contrast) -> tuple[str, str]:
    """The paper's Δ and ours, as text."""
    factor, digits = SHOWN.get(claim["measure"], (1, 3))
    value, stands_there = printed(view, claim)
    paper = "> 0" if claim["sign"] > 0 else "< 0"
    if value is not None:
        paper = f"{value:+z.{digits}f}" if stands_there else f"({value:+z.{digits}f})"
    mean, low, high = (f"{factor * x:+z.{digits}f}" for x in ours[:3])
    text = mean if ours.n else ""
    text += f" [{low}, {high}]" if ours.n > 1 else ""
    return paper, text + (f" ({ours.diverged} diverged)" if ours.diverged else "")


def _mean(mean: float | None, spread: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:z.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _provenance(results: store.Results, name: str, found: list[configs.Run], total: int) -> str:
    """How many runs, how long, on what, when, and how to make them."""
    about = [results[run].about for run in found]
    devices = sorted({a.get("device", "a device not recorded") for a in about})
    dates = sorted({a["date"][:10] for a in about if "date" in a})
    when = f", {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}" if dates else ""
    runs = f"{len(found)} of {_plural(total, 'run')}"
    return f"{runs}, {_total_time(found, results)}, on {'; '.join(devices)}{when}. Made by {_command(name)}."


def _total_time(found: Iterable[configs.Run], results: store.Results) -> str:
    seconds = sum(results[run].seconds for run in found)
    amount, unit = (seconds / 3600, "hours") if seconds >= 7200 else (seconds / 60, "minutes")
    return f"{amount:.1f} {unit} of wall time in all"


def _describe(state: Any) -> str:
    """What a result says about its data, as text."""
    return (
        ", ".join(f"{key}: {value}" for key, value in sorted(state.items())) if isinstance(state, dict) else str(state)
    )


def _name(name: str) -> str:
    """`fig2` as Figure 2."""
    return name.replace("fig", "Figure ").replace("table", "Table ").replace("_", ", ").replace("targets", "Targets")


def _title(name: str, view: dict[str, Any]) -> str:
    return f"## {_name(name)}: {view['title']}"


def _anchor(name: str, view: dict[str, Any]) -> str:
    """Of the title, as GitHub makes it."""
    title = f"{_name(name)}: {view['title']}".lower()
    return "".join(c for c in title if c.isalnum() or c in " -_").replace(" ", "-")


def _linked(name: str, view: dict[str, Any]) -> tuple[str, str]:
    """The first cells of a view's line in the summary."""
    return f"[{_name(name)}](#{_anchor(name, view)})", view["title"]


def _settings(experiment: experiments.Experiment) -> str:
    """What we chose for the runs of a view."""
    settings = [f"{key.replace('_', ' ')} {value}" for key, value in experiment.settings.items()]
    return ", ".join([*settings, _plural(experiment.seeds, "seed")])


def _command(name: str) -> str:
    return f"`python -m examples.reproduce run {name}`"


def _picture(name: str, view: dict[str, Any]) -> str:
    return f"![{_name(name)}: {view['title']}]({IMAGES / _file(name)})"


def _file(name: str) -> str:
    """Of a view's picture; the README shows Table 1's."""
    return "summary.svg" if name == "table1" else f"{name}.svg"


def _with_remark(name: str, parts: list[str]) -> str:
    return "\n\n".join([*parts, *([experiments.REMARKS[name]] if name in experiments.REMARKS else [])])


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, text: int = 2, numbers: int = 0) -> str:
    """A Markdown table; after the columns of text, those of numbers are aligned on the right."""
    align = ["---"] * text + ["--:"] * numbers
    align += ["---"] * (len(head) - len(align))
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# The README.


def summary_markdown(results: store.Results) -> str:
    """Table 1's differences, the paper's and ours: the table in the README."""
    view, experiment = experiments.paper()["table1"], experiments.EXPERIMENTS.get("table1")
    found = _found(results, "table1", view)
    if experiment is None or not found:
        return f"Not run: {_command('table1')}"
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    labels = {frozenset(row["where"].items()): (row["label"], row["column"]) for row in view["rows"]}
    for claim in _deltas_of_table(view):
        label, strategy = labels[frozenset(claim["contrast"][0][1].items())]
        cells.setdefault(label, {})[strategy] = _deltas(view, claim, contrast(results, experiment, claim))
    head = ("Δ accuracy, points", "`zero_sum`, paper", "ours", "`positive_sum`, paper", "ours")
    rows = [(label, *(by["zero_sum"]), *(by["positive_sum"])) for label, by in cells.items()]
    below = f"Ours: {_settings(experiment)}; in brackets, the 95 % interval."
    return f"{_table(head, rows, text=1, numbers=4)}\n\n{below}"


def update_readme(path: pathlib.Path, results: store.Results) -> None:
    """Puts the table between the markers of a text.

    Raises:
      ValueError: if the text has not each marker once, in order.
    """
    text, (begin, end) = path.read_text(encoding="utf-8"), MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} must have the markers {begin} and {end} once each, in this order.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    path.write_text(f"{before}{begin}\n{summary_markdown(results)}\n{after}", encoding="utf-8")


def _deltas_of_table(view: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims that are a printed Δ."""
    return [claim for claim in view["claims"] if claim["printed"] is not None]


# Pictures. Each function fills a matplotlib figure; hollow markers are the paper's.


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
            values = [100 * _finite(by_seed(results, experiment, experiments.row_spec(view, row))) for row in row_group]
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
        groups = _grouped(_deltas_of_table(view), lambda claim: claim["text"].split(",")[0])
        for number, (optimizer, claims) in enumerate(groups.items()):
            values = [claim["contrast"][0][1][field] for claim in claims]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4}
            _intervals(axes, values, [contrast(results, experiment, c) for c in claims], label=optimizer, **style)
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
            ours = [_finite(by_seed(results, experiment, experiments.row_spec(view, row))) for row in line]
            axes.plot(experts, [v.mean() if len(v) else np.nan for v in ours], label=f"d_ff = {width}", **style)
            paper = [row["value"] for row in line]
            axes.plot(experts, paper, linestyle=":", linewidth=0.6, fillstyle="none", **style)
        axes.minorticks_off()
        axes.legend(fontsize="x-small")


def _summary(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], figure: Any) -> None:
    """The printed Δs of a table beside ours, one above the other."""
    claims = _deltas_of_table(view)
    figure.set_size_inches(7, 1.2 + 0.3 * len(claims))
    axes = figure.subplots()
    axes.axvline(0, color="0.7", linewidth=0.8)
    places = np.arange(len(claims))
    for strategy in ("zero_sum", "positive_sum"):
        chosen = [i for i, claim in enumerate(claims) if claim["contrast"][0][1]["strategy"] == strategy]
        ours = [contrast(results, experiment, claims[i]) for i in chosen]
        style = {"color": COLORS[strategy], "linestyle": "none", "marker": "o", "markersize": 6}
        _intervals(axes, places[chosen], ours, horizontal=True, label=f"{strategy}, here", **style)
        paper = [claims[i]["printed"] for i in chosen]
        axes.plot(paper, places[chosen], label=f"{strategy}, paper", fillstyle="none", **style)
    axes.set_yticks(places, [claim["text"].replace(" beats vanilla", "") for claim in claims])
    axes.invert_yaxis()
    axes.set(xlabel="Δ test accuracy over vanilla (points), with 95 % intervals")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.grid(alpha=0.3, axis="x")


PICTURES = {  # by view: how it is drawn
    "fig2": _curves,
    "table1": _summary,
    "fig3": _curves,
    "fig4": _by_layer,
    "fig5": _curves,
    "fig6": _curves,
    "fig7": _by_experts,
    "table3": _learning_rates,
    "table4": _gains("sparsity", "sparsity", "linear"),
    "table5": _gains("batch_size", "batch size", "log"),
    "fig8": _curves,
    "fig9": _curves,
    "fig10": _curves,
    "fig11": _curves,
}


def _draw_all(results: store.Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the pictures of all views with runs, and table 1's once more for the README."""
    paths = []
    for name, draw in PICTURES.items():
        name_of_rows = experiments.paper()[name].get("same_as", name)
        view = experiments.paper()[name_of_rows]
        if _found(results, name_of_rows, view):
            paths.append(folder / _file(name))
            _save(paths[-1], draw, results, experiments.EXPERIMENTS[name_of_rows], view)
    return paths


def _save(path: pathlib.Path, draw: Any, *arguments: Any) -> None:
    """Draws with matplotlib's defaults, whatever the user's are, and to the same bytes each time."""
    import matplotlib  # imported late: it takes a second

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.style.context(["default", {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}]):
        figure = plt.figure(layout="constrained")
        draw(*arguments, figure)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


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


def _intervals(axes: Any, places: Any, contrasts: list[Contrast], *, horizontal: bool = False, **style: Any) -> None:
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
    runs = [experiments.make_run(experiment, row["where"], seed) for seed in range(experiment.seeds)]
    return [results[run] for run in runs if run in results]


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    return array[np.isfinite(array)]
