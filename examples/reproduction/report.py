"""The report: the paper's numbers and ours side by side, as a page, pictures and a table for the README.

It is made of the results on file, `paper.json` and `experiments`, and of nothing else: the same results give the same
bytes.
"""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from examples.reproduction import (
    configs,
    evidence,
    experiments,
    inside,
    overhead,
    pictures,
    store,
    study,
    toy,
    transformers,
)

IMAGES = pathlib.PurePosixPath("images/reproduction")  # in the folder of the page
MARKERS = "<!-- reproduction -->", "<!-- /reproduction -->"
ANSWER = "<!-- answer -->", "<!-- /answer -->"

INTRODUCTION = """\
# The paper's tables and figures

What *Excitation: Momentum For Experts* (arXiv 2602.21798) prints, and what came out here. This page and its pictures
are written by `python -m examples.reproduce report` from the results on file: edits are lost.

* A value is a mean ± standard deviation over seeds, accuracies in percent; the residual is ours minus the paper's.
* A Δ is a mean over seeds of differences between runs with the same seed, and so the same initialization and batches;
  in brackets its 95 % interval, of Student's t. Accuracy in points.
* A claim of the paper is a statement of its text, or the sign of a Δ that it prints, however small. It is *confirmed*
  if our interval excludes zero on the paper's side, *contradicted* if it excludes zero on the other side,
  *inconclusive* if it holds zero, and *not tested* if the runs are missing or there are fewer than three seeds (*smoke
  test*). This is about the sign; *larger* or *smaller* follows if the paper's Δ lies outside our interval.
* With this many claims, expect a few verdicts by chance. Tables share runs, and so verdicts: the gain of SGD at its
  common settings, for example, stands in seven of them.
* Our own studies come after the paper's tables and figures. Their claims and rules were written down before the runs
  (`results/PLAN.md`). The corrected p is of a paired t-test, after Holm's correction for all claims of the study.
* The paper does not print how long it trained: a verdict is about runs of the length that its section states.
* A paper's Δ in parentheses is not printed there, but is the difference of printed values; > 0 or < 0 stands for a
  claim without a number.
* Runs that diverged (to what is not a number) are counted, and left out of means and of differences."""


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
    answer = docs_folder / "does-it-help.md"
    if answer.is_file():
        update(answer, ANSWER, answer_markdown(results))
    return [page, *pictures.draw_all(results, docs_folder / IMAGES)]


def markdown(results: store.Results) -> str:
    """The page."""
    sections, lines, found = [], [], []
    for name, view in experiments.paper().items():
        if "same_as" in view:
            section, line = _same_as(results, name, view)
        elif view["kind"] == "toy":
            section, line = _toy(results, name, view)
        elif view["kind"] == "overhead":
            section, line = _overhead(results, name, view)
        else:
            section, line = _view(results, name, view)
            found += _found(results, name)
        sections.append(section)
        lines.append(line)
    for name, experiment in experiments.EXPERIMENTS.items():
        if name not in experiments.paper():
            sections.append((_study if name in study.STUDIES else _other)(results, experiment))
    found = list(dict.fromkeys(found, None))
    head = ("", "", "runs", *evidence.VERDICTS)
    lines.append(("all of the paper's", "", "", *totals(results)))
    lines += [_study_line(results, e) for name, e in experiments.EXPERIMENTS.items() if name in study.STUDIES]
    summary = ["## Summary", _table(head, lines, numbers=5)]
    if found:
        summary.append(f"{_plural(len(found), 'run')}, {_total_time(found, results)}.")
    return "\n\n".join([INTRODUCTION, *_data(results, found), *summary, *sections]) + "\n"


def totals(results: store.Results) -> list[int]:
    """How many of the paper's claims there are of each of `evidence.VERDICTS`."""
    of_views = (evidence.verdicts(results, experiments.EXPERIMENTS[name], view) for name, view in _judged().items())
    return evidence.count(list(itertools.chain.from_iterable(of_views)))


def _judged() -> dict[str, dict[str, Any]]:
    """The paper's own tables and figures with claims that runs can bear out."""
    views = experiments.paper().items()
    return {name: view for name, view in views if name in experiments.EXPERIMENTS and "derived" not in view}


def _found(results: store.Results, name: str) -> list[configs.Run]:
    """Those runs of a table or figure that are on file."""
    return evidence.found(results, experiments.EXPERIMENTS[name])


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
    experiment, found = experiments.EXPERIMENTS[name], _found(results, name)
    if not found:
        section = f"{_title(name, view)}\n\n{view['where_in_paper']}. Not run: {_how(experiment)}"
        return section, (*_linked(name, view), "not run", 0, 0, 0, len(view["claims"]))
    total = len(experiments.runs(experiment))
    judged = [
        (claim, ours, evidence.verdict(ours, claim["sign"]))
        for claim, ours in evidence.judge(results, experiment, view)
    ]
    parts = [_title(name, view), f"{view['where_in_paper']}. Here: {_settings(experiment)}."]
    parts += [view["note"]] if "note" in view else []
    parts += [_picture(name, view)] if name in pictures.DRAW and pictures.is_drawn(experiment) else []
    rows = [_row(results, experiment, view, row) for row in view["rows"]]
    parts.append(_table(("", "", "paper", "ours", "residual"), rows, numbers=3))
    if judged:
        rows = [
            (claim["text"], claim["source"], *_deltas(view, claim, ours), verdict + _size(view, claim, ours))
            for claim, ours, verdict in judged
        ]
        parts.append(_table(("claim", "where", "paper's Δ", "our Δ", "verdict"), rows, numbers=2))
    parts.append(_provenance(results, name, found, total))
    counts = evidence.count([verdict for _, _, verdict in judged])
    return _with_remark(name, parts), (*_linked(name, view), f"{len(found)} of {total}", *counts)


def _how(experiment: experiments.Experiment) -> str:
    """How to make the runs of a view, and what it would take."""
    runs = [run for run in experiments.runs(experiment) if isinstance(run, configs.ViTRun | configs.GPTRun)]
    if not runs:
        return _command(experiment.name)
    hours = _about(sum(transformers.estimate_gpu_hours(run) for run in runs))
    return f"{_command(experiment.name)}, {_plural(len(runs), 'run')}, by estimate {hours} hours of an H100."


def _same_as(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """A picture of another view's rows."""
    other = experiments.paper()[view["same_as"]]
    link, _ = _linked(view["same_as"], other)
    found = _found(results, view["same_as"])
    parts = [_title(name, view), f"{view['where_in_paper']}. A picture of {link}.{'' if found else ' Not run.'}"]
    drawn = name in pictures.DRAW and pictures.is_drawn(experiments.EXPERIMENTS[view["same_as"]])
    parts += [_picture(name, view)] if found and drawn else []
    line = (*_linked(name, view), f"see {_name(view['same_as'])}", *[""] * len(evidence.VERDICTS))
    return "\n\n".join(parts), line


def _toy(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """Figure 1, a problem of two weights that needs no data."""
    outcome = toy.load(results.folder / name)
    how = f"{'Made by' if outcome else 'Not run:'} {_command(name)}"
    parts = [_title(name, view), f"{view['where_in_paper']}. {how}"]
    parts += [_picture(name, view), toy.markdown(outcome).strip()] if outcome else []
    blank = [""] * len(evidence.VERDICTS)
    return "\n\n".join(parts), (*_linked(name, view), "done" if outcome else "not run", *blank)


def _overhead(results: store.Results, name: str, view: dict[str, Any]) -> tuple[str, tuple]:
    """Table 8, which has measurements of its own."""
    entries = overhead.load(results.folder)
    how = f"{'Made by' if entries else 'Not run:'} `python -m benchmarks.overhead`"
    parts = [_title(name, view), f"{view['where_in_paper']}. {how}", view["note"]]
    parts += [overhead.table(entries)] if entries else []
    rows = len({entry["row"] for entry in entries})
    runs = f"{rows} of {len(view['rows'])} rows" if entries else "not run"
    section = _with_remark(name, parts) if entries else "\n\n".join(parts)
    return section, (*_linked(name, view), runs, *[""] * len(evidence.VERDICTS))


def _other(results: store.Results, experiment: experiments.Experiment) -> str:
    """Runs that are not the paper's, such as a look at what it leaves open."""
    found = evidence.found(results, experiment)
    title = f"## {experiment.title}"
    if not found:
        return f"{title}\n\nNot run: {_command(experiment.name)}"
    table, note = TABLES.get(experiment.name, _measures)(results, experiment)
    parts = [title, f"Not in the paper. Here: {_settings(experiment)}{note}.", table]
    parts.append(_provenance(results, experiment.name, found, len(experiments.runs(experiment))))
    return _with_remark(experiment.name, parts)


def _study_line(results: store.Results, experiment: experiments.Experiment) -> tuple:
    """The line of a study in the summary."""
    found, total = evidence.found(results, experiment), len(experiments.runs(experiment))
    counts = evidence.count(evidence.verdicts(results, experiment, {"claims": experiment.claims}))
    link = f"[{experiment.name}](#{_anchor_of(experiment.title)})"
    return link, experiment.title, f"{len(found)} of {total}" if found else "not run", *counts


def _study(results: store.Results, experiment: experiments.Experiment) -> str:
    """The section of a study: a picture, what every row reached at every learning rate, and the claims."""
    found, title = evidence.found(results, experiment), f"## {experiment.title}"
    if not found:
        return f"{title}\n\nNot run: {_command(experiment.name)}"
    parts = [title, f"Not in the paper. Here: {_settings(experiment)}."]
    if experiment.name in pictures.STUDIES:
        parts.append(f"![{experiment.title}]({IMAGES / pictures.file_name(experiment.name)})")
    parts.append(_by_rate(results, experiment))
    if experiment.name == "deep_digits" and inside.load(results.folder):
        parts.append(f"![Inside the networks]({IMAGES / pictures.file_name('inside')})")
    judged = evidence.judge(results, experiment, {"claims": experiment.claims})
    if judged:
        corrected = evidence.holm([ours.p_value if ours.n >= evidence.MIN_SEEDS else np.nan for _, ours in judged])
        rows = [
            (
                _with_rates(results, experiment, claim),
                _deltas({}, claim | {"printed": 0.0}, ours)[1],
                evidence.verdict(ours, claim["sign"]),
                "" if np.isnan(p) else f"{p:.2g}",
            )
            for (claim, ours), p in zip(judged, corrected, strict=True)
        ]
        parts.append(_table(("claim", "our Δ", "verdict", "corrected p"), rows, text=1))
        verdicts = [row[2] for row in rows]
        holds = lambda name: sum(v == name and p < 0.05 for v, p in zip(verdicts, corrected, strict=True))
        tested = int(np.isfinite(corrected).sum())
        parts.append(
            f"Of {_plural(len(judged), 'claim')}, {tested} were tested: {verdicts.count('confirmed')} confirmed and "
            f"{verdicts.count('contradicted')} contradicted; after the correction for {tested} claims, "
            f"{holds('confirmed')} and {holds('contradicted')}."
        )
    parts.append(_provenance(results, experiment.name, found, len(experiments.runs(experiment))))
    return _with_remark(experiment.name, parts)


def _by_rate(results: store.Results, experiment: experiments.Experiment) -> str:
    """What every row reached, with a column for every learning rate: a table for each optimizer."""
    measure = "loss" if experiment.kind == "mini_gpt" else "accuracy"
    tables = []
    rows_of = experiment.rows or ()
    for optimizer in dict.fromkeys(row.get("optimizer", "") for row in rows_of):
        lines: dict[str, dict[float, str]] = {}
        for row in (row for row in rows_of if row.get("optimizer", "") == optimizer):
            spec = {"label": "", "column": "", "where": row, "value": None}
            cells = lines.setdefault(study.label({k: v for k, v in row.items() if k != "optimizer"}), {})
            cells[row["learning_rate"]] = _row(results, experiment, {"measure": measure}, spec)[3]
        rates = sorted({rate for cells in lines.values() for rate in cells})
        head = (pictures.UNIT[measure] + (f", {optimizer}" if optimizer else ""), *(f"{rate:g}" for rate in rates))
        rows = [(label, *(cells.get(rate, "") for rate in rates)) for label, cells in lines.items()]
        tables.append(_table(head, rows, text=1, numbers=len(rates)))
    return "\n\n".join(tables)


def _with_rates(results: store.Results, experiment: experiments.Experiment, claim: dict[str, Any]) -> str:
    """The text of a claim, with the learning rates that were chosen."""
    wheres = [where for _, where in claim["contrast"]]
    if not any(isinstance(where.get("learning_rate"), str) for where in wheres):
        return claim["text"]
    chosen = [evidence.resolve(results, experiment, where, claim["measure"]) for where in wheres]
    rates = [f"{row['learning_rate']:g}" if row else "?" for row in chosen]
    return f"{claim['text']} ({' and '.join(rates)})"


def _measures(results: store.Results, experiment: experiments.Experiment) -> tuple[str, str]:
    """What each row reached."""
    measure = "perplexity" if experiment.kind == "gpt" else "accuracy"
    view = {"measure": measure}
    rows = []
    for where in experiment.rows or ():
        label = ", ".join(f"{key} {value}" for key, value in where.items())
        rows.append(
            (label, _row(results, experiment, view, {"label": "", "column": "", "where": where, "value": None})[3])
        )
    return _table(("", pictures.UNIT.get(measure, measure)), rows, text=1, numbers=1), ""


def _extrapolations(results: store.Results, experiment: experiments.Experiment) -> tuple[str, str]:
    """The open choices, by when vanilla SGD and Adam would reach what the paper prints for a constant rate."""
    printed = {
        row["where"]["optimizer"]: row["value"] / 100
        for row in experiments.paper()["table6"]["rows"]
        if row["column"] == "vanilla" and row["where"]["schedule"] == "constant"
    }
    settings: dict[str, dict[str, tuple[float, float]]] = {}
    for run in evidence.found(results, experiment):
        assert isinstance(run, configs.MLPRun)
        name = f"{run.augmentation}, {run.normalization}, {run.initialization}"
        after = evidence.epochs_to(results[run], printed[run.optimizer])
        settings.setdefault(name, {})[run.optimizer] = results[run].measures["accuracy"], after
    apart = lambda two: max(a / b for a, b in itertools.permutations([after for _, after in two.values()], 2))
    rows = [
        (
            name,
            *(cell for o in ("sgd", "adam") for cell in (f"{100 * two[o][0]:.1f}", _about(two[o][1]))),
            _about(apart(two)),
        )
        for name, two in sorted(settings.items(), key=lambda item: apart(item[1]))
        if len(two) == 2
    ]
    head = [
        f"{o}: {text}"
        for o, v in (("SGD", printed["sgd"]), ("Adam", printed["adam"]))
        for text in (f"after {experiment.settings['epochs']} epochs", f"epochs to {100 * v:.2f}")
    ]
    head = ("augmentation, normalization, initialization", *head, "ratio")
    return _table(head, rows, text=1, numbers=5), ". Vanilla alone was looked at"


def _residuals(results: store.Results, experiment: experiments.Experiment) -> tuple[str, str]:
    """The open choices, by what vanilla SGD and Adam reach with them where the paper prints a number."""
    targets = experiments.targets()
    reached: dict[str, list[float]] = {}  # by choice, for each target
    for target in targets:
        where = target["where"].items()
        for row in (row for row in experiment.rows or () if where <= row.items()):
            choice = ", ".join(f"{k} {v}" for k, v in row.items() if (k, v) not in where) or "none"
            run = experiment.make_run(row, seed=0)
            accuracy = 100 * results[run].measures["accuracy"] if run in results else np.nan
            reached.setdefault(choice, []).append(accuracy)
    printed = np.array([target["value"] for target in targets])
    rows = [("the paper", *(f"{value:.2f}" for value in printed), "")]
    for choice, accuracies in reached.items():
        if np.isnan(accuracies).all():
            continue
        residuals = np.array(accuracies) - printed
        cells = ("" if np.isnan(a) else f"{a:.2f} ({r:+.2f})" for a, r in zip(accuracies, residuals, strict=True))
        rows.append((choice, *cells, f"{np.sqrt(np.nanmean(residuals**2)):.2f}"))
    head = ("what is changed", *(target["label"] for target in targets), "root mean square of residuals")
    return _table(head, rows, text=1, numbers=len(targets) + 1), "; in parentheses ours minus the paper's"


TABLES = {"search": _extrapolations, "search_variants": _residuals, "search_long": _residuals}  # with a word on them


def _about(value: float) -> str:
    """Two digits, of what is an extrapolation."""
    return f"{float(f'{value:.2g}'):,g}" if value < 1e4 else "> 10,000"


def _row(
    results: store.Results, experiment: experiments.Experiment, view: dict[str, Any], row: dict[str, Any]
) -> tuple:
    """Label, column, the paper's value, ours, and the residual."""
    factor, digits = pictures.SHOWN.get(view["measure"], (1, 3))
    values = factor * np.asarray(evidence.by_seed(results, experiment, experiments.row_spec(view, row)), float)
    finite = values[np.isfinite(values)]
    ours, diverged = "", len(values) - len(finite)
    if len(values):
        ours = _mean(finite.mean() if len(finite) else None, finite.std(ddof=1) if len(finite) > 1 else None, digits)
        ours += f" ({_plural(len(finite), 'seed')}{f', {diverged} diverged' if diverged else ''})"
    paper, residual = _mean(row["value"], row.get("spread"), digits), ""
    if row["value"] is not None and len(finite):
        residual = f"{finite.mean() - row['value']:+z.{digits}f}"
    return row["label"], row["column"], f"about {row['value']:g}" if row.get("approximate") else paper, ours, residual


def _deltas(view: dict[str, Any], claim: dict[str, Any], ours: evidence.Contrast) -> tuple[str, str]:
    """The paper's Δ and ours, as text."""
    factor, digits = pictures.SHOWN.get(claim["measure"], (1, 3))
    value, stands_there = evidence.printed(view, claim)
    paper = "> 0" if claim["sign"] > 0 else "< 0"
    if value is not None:
        paper = f"{value:+z.{digits}f}" if stands_there else f"({value:+z.{digits}f})"
    # An interval's end keeps its sign where it is rounded to zero: [-0.00, +0.82] holds zero.
    low, high = (f"{factor * x:+.{digits}f}" for x in (ours.low, ours.high))
    text = f"{factor * ours.mean:+z.{digits}f}" if ours.n else ""
    text += f" [{low}, {high}]" if ours.n > 1 else ""
    return paper, text + (f" ({ours.diverged} diverged)" if ours.diverged else "")


def _size(view: dict[str, Any], claim: dict[str, Any], ours: evidence.Contrast) -> str:
    """How our Δ compares with the paper's, in the direction of the claim, if the paper's is outside our interval."""
    factor, _ = pictures.SHOWN.get(claim["measure"], (1, 3))
    value, _ = evidence.printed(view, claim)
    if value is None or ours.n < evidence.MIN_SEEDS or factor * ours.low <= value <= factor * ours.high:
        return ""
    return ", larger" if claim["sign"] * (factor * ours.mean - value) > 0 else ", smaller"


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
    return f"{amount:.1f} device {unit}"


def _describe(state: Any) -> str:
    """What a result says about its data, as text."""
    return (
        ", ".join(f"{key}: {value}" for key, value in sorted(state.items())) if isinstance(state, dict) else str(state)
    )


def _name(name: str) -> str:
    """`fig2` as Figure 2."""
    return name.replace("fig", "Figure ").replace("table", "Table ").replace("_", ", ")


def _title(name: str, view: dict[str, Any]) -> str:
    return f"## {_name(name)}: {view['title']}"


def _anchor(name: str, view: dict[str, Any]) -> str:
    return _anchor_of(f"{_name(name)}: {view['title']}")


def _anchor_of(title: str) -> str:
    """The anchor of a title, as GitHub makes it."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


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
    return f"![{_name(name)}: {view['title']}]({IMAGES / pictures.file_name(name)})"


def _with_remark(name: str, parts: list[str]) -> str:
    return "\n\n".join([*parts, *([experiments.REMARKS[name].strip()] if name in experiments.REMARKS else [])])


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
    """The README's part: Table 1's differences at full length where it was run, and all verdicts in a sentence."""
    rows, below = [], []
    for name in ("table1_long", "table1"):
        experiment = experiments.EXPERIMENTS[name]
        if _found(results, name):
            rows += _differences(results, experiment, experiments.paper()[name])
            below.append(_settings(experiment))
    if not rows:
        return f"Not run: {_command('table1')}"
    head = ("Δ accuracy, points", "`zero_sum`, paper", "ours", "`positive_sum`, paper", "ours")
    text = f"Ours: {'; and '.join(below)}; in brackets, the 95 % interval."
    verdicts = [f"{number} {name}" for number, name in zip(totals(results), evidence.VERDICTS, strict=True)]
    missing = [_name(name) for name in _judged() if not _found(results, name)]
    text += f"\nOf {sum(totals(results))} claims of the paper, {', '.join(verdicts[:-1])} and {verdicts[-1]}"
    text += f": {', '.join(missing)} were not run." if missing else "."
    return f"{_table(head, rows, text=1, numbers=4)}\n\n{text}"


def _differences(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any]) -> list[tuple]:
    """A row for each optimizer: the paper's Δ and ours, for the two strategies."""
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    labels = {frozenset(row["where"].items()): (row["label"], row["column"]) for row in view["rows"]}
    for claim in evidence.printed_deltas(view):
        label, strategy = labels[frozenset(claim["contrast"][0][1].items())]
        cells.setdefault(label, {})[strategy] = _deltas(view, claim, evidence.contrast(results, experiment, claim))
    length = f"{experiment.settings['epochs']} epochs"
    return [(f"{label}, {length}", *(by["zero_sum"]), *(by["positive_sum"])) for label, by in cells.items()]


def answer_markdown(results: store.Results) -> str:
    """The table of does-it-help.md: gains over the baseline, each at its best learning rate on held-out data."""
    rows = []
    for text, (name, common, _) in study.ANSWER.items():
        experiment = experiments.EXPERIMENTS[name]
        measure = "loss" if experiment.kind == "mini_gpt" else "accuracy"
        for strategy in ("zero_sum", "positive_sum"):
            cells = []
            for component in study.COMPONENTS:
                better = {"strategy": strategy, "component": component}
                claim = study.beats("", better, study.BASELINE, measure, learning_rate="best", **common)
                ours = evidence.contrast(results, experiment, claim | {"printed": 0.0})
                verdict = evidence.verdict(ours, claim["sign"])
                bold = "**" if verdict in ("confirmed", "contradicted") else ""
                delta = _deltas({}, claim | {"printed": 0.0}, ours)[1]
                cells.append(f"{bold}{delta}{bold}" if not verdict.startswith("not tested") else "not tested")
            rows.append((text, f"`{strategy}`", *cells))
    return _table(("", "", *study.COMPONENTS), rows, numbers=3)


def update(path: pathlib.Path, markers: tuple[str, str], part: str) -> None:
    """Puts a part between the markers of a text.

    Raises:
      ValueError: if the text does not have each marker once, in order.
    """
    text, (begin, end) = path.read_text(encoding="utf-8"), markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} must have the markers {begin} and {end} once each, in this order.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    path.write_text(f"{before}{begin}\n{part}\n{after}", encoding="utf-8")


def update_readme(path: pathlib.Path, results: store.Results) -> None:
    """Puts the README's part between the markers of a text."""
    update(path, MARKERS, summary_markdown(results))
