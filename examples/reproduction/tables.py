"""Tables of the report: what the rows of a section reached, and its claims. A section's `table` names one of them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from examples.reproduction import configs, evidence, store
from examples.reproduction.sections import Row, Section, paper, words

UNIT = {
    "accuracy": "test accuracy (%)",
    "loss": "test loss (nats per byte)",
    "specialization": "specialization",
    "entropy": "routing entropy (nats)",
    "perplexity_reduction": "perplexity saved",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, text: int = 2, numbers: int = 0) -> str:
    """A Markdown table; after the columns of text, those of numbers are aligned on the right."""
    align = ["---"] * text + ["--:"] * numbers
    align += ["---"] * (len(head) - len(align))
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def digits(measure: str) -> int:
    """The digits after the point that a measure is shown with."""
    return 2 if measure in ("accuracy", "perplexity", "perplexity_reduction") else 3


def plural(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def about(value: float) -> str:
    """Two digits of an estimate."""
    return f"{float(f'{value:.2g}'):,g}" if value < 1e4 else "> 10,000"


def reached(section: Section, ours: evidence.Contrast) -> str:
    """What the runs of a row reached."""
    precision = digits(section.measure)
    mean = f"{ours.mean:z.{precision}f}" if ours.n else "-"
    mean += f" ± {ours.deviation:.{precision}f}" if ours.n > 1 else ""
    diverged = f", {ours.diverged} diverged" if ours.diverged else ""
    return f"{mean} ({plural(ours.n, 'seed')}{diverged})" if ours.n or ours.diverged else ""


def beside_the_paper(results: store.Results, section: Section) -> str:
    """The rows of a table or figure: the paper's value, ours, and the residual."""
    precision, lines = digits(section.measure), []
    for row in section.rows:
        paper, ours = row["value"], evidence.contrast(results, section, row)
        residual = f"{ours.mean - paper:+z.{precision}f}" if paper is not None and ours.n else ""
        shown = "-" if paper is None else f"{paper:z.{precision}f}"
        shown += f" ± {row['spread']:.{precision}f}" if row.get("spread") is not None else ""
        shown = f"about {paper:g}" if row.get("approximate") else shown
        lines.append((row["label"], row["column"], shown, reached(section, ours), residual))
    return table(("", "", "paper", "ours", "residual"), lines, numbers=3)


def by_rate(results: store.Results, section: Section) -> str:
    """The rows of a study, with a column for every learning rate, if they name one: a table for each optimizer."""
    measure, tables = UNIT.get(section.measure, section.measure), []
    for optimizer, rows in configs.grouped(section.rows, lambda row: row["where"].get("optimizer")).items():
        cells: dict[str, dict[float, str]] = {}
        for row in rows:
            line = cells.setdefault(words(row["where"], "optimizer"), {})
            line[row["where"].get("learning_rate", 0.0)] = reached(section, evidence.contrast(results, section, row))
        rates = sorted({rate for line in cells.values() for rate in line})
        head = (f"{measure}, {optimizer}" if optimizer else measure, *(f"{rate:g}" if rate else "" for rate in rates))
        lines = [(name, *(line.get(rate, "") for rate in rates)) for name, line in cells.items() if any(line.values())]
        tables.append(table(head, lines, text=1, numbers=len(rates)))
    return "\n\n".join(tables)


def our_delta(claim: Row, ours: evidence.Contrast) -> str:
    """Our Δ and its interval. Its ends keep their sign where they are rounded to zero: [-0.00, +0.82] holds zero."""
    precision = digits(claim["measure"])
    text = f"{ours.mean:+z.{precision}f}" if ours.n else ""
    low, high = ours.mean - ours.half, ours.mean + ours.half
    text += f" [{low:+.{precision}f}, {high:+.{precision}f}]" if ours.n > 1 else ""
    return text + (f" ({ours.diverged} diverged)" if ours.diverged else "")


def papers_delta(section: Section, claim: Row) -> str:
    """The Δ that the paper prints; in parentheses if it is a difference of printed values."""
    value = evidence.printed(section, claim)
    if value is None:
        return "> 0" if claim["sign"] > 0 else "< 0"
    text = f"{value:+z.{digits(claim['measure'])}f}"
    return f"({text})" if claim["printed"] is None else text


def claims_beside_the_paper(results: store.Results, section: Section) -> str:
    """The claims of a table or figure, with the paper's Δ and ours."""
    rows = []
    for claim, ours, verdict in evidence.judge(results, section):
        value = evidence.printed(section, claim)
        if value is not None and ours.n >= evidence.MIN_SEEDS and abs(ours.mean - value) > ours.half:
            verdict += ", larger" if claim["sign"] * (ours.mean - value) > 0 else ", smaller"
        deltas = papers_delta(section, claim), our_delta(claim, ours)
        rows.append((claim["text"], claim["source"], *deltas, verdict))
    return table(("claim", "where", "paper's Δ", "our Δ", "verdict"), rows, numbers=2)


def claims_corrected(results: store.Results, section: Section) -> str:
    """The claims of a study, with p-values corrected for their number, and a sentence that counts them."""
    judged = evidence.judge(results, section)
    p_values = evidence.holm([ours.p_value for _, ours, _ in judged])
    rows = [
        (with_rates(results, section, claim), our_delta(claim, ours), verdict, "" if np.isnan(p) else f"{p:.2g}")
        for (claim, ours, verdict), p in zip(judged, p_values, strict=True)
    ]
    verdicts, tested = [verdict for *_, verdict in judged], int(np.isfinite(p_values).sum())
    holds = lambda name: sum(v == name and p < 0.05 for v, p in zip(verdicts, p_values, strict=True))
    return table(("claim", "our Δ", "verdict", "corrected p"), rows, text=1) + (
        f"\n\nOf {plural(len(judged), 'claim')}, {tested} were tested: {verdicts.count('confirmed')} confirmed and "
        f"{verdicts.count('contradicted')} contradicted; after the correction for {tested} claims, "
        f"{holds('confirmed')} and {holds('contradicted')}."
    )


def with_rates(results: store.Results, section: Section, claim: Row) -> str:
    """The text of a claim, with the learning rates that were chosen."""
    wheres = [where for _, where in claim["contrast"]]
    if not any(isinstance(where.get("learning_rate"), str) for where in wheres):
        return claim["text"]
    chosen = [evidence.resolve(results, section, where) for where in wheres]
    rates = [f"{row['learning_rate']:g}" if row else "?" for row in chosen]
    return f"{claim['text']} ({' and '.join(rates)})"


# The search for what the paper leaves open, by baseline runs.


def targets() -> list[Row]:
    """The rows of the paper that the open choices are compared with: baseline SGD and Adam, of Tables 1, 4 and 6."""
    baselines = [row for t in ("table4", "table6") for row in paper()[t].rows if row["column"] == "baseline"]
    chosen = lambda where: where.get("sparsity") in (0.9, 0.1) or where.get("schedule") == "constant"
    return [row for row in baselines if chosen(row["where"])]


def epochs_to(result: store.Result, accuracy: float) -> float:
    """After how many epochs a run would reach an accuracy: an extrapolation, good for comparing settings.

    A line through the last two thirds of its curve, over the logarithm of epochs.
    """
    epochs, accuracies = (np.asarray(result.curve[name], float) for name in ("epoch", "accuracy"))
    late = epochs >= epochs[-1] / 3
    slope, offset = np.polyfit(np.log(epochs[late]), accuracies[late], 1)
    return float(np.exp(min((accuracy - offset) / slope, 50.0))) if slope > 0 else np.inf


def extrapolations(results: store.Results, section: Section) -> str:
    """The open choices, by when baseline SGD and Adam would reach what the paper prints for a constant rate."""
    printed = {row["where"]["optimizer"]: row["value"] for row in targets() if "schedule" in row["where"]}
    chosen, lines = ("augmentation", "normalization", "initialization"), []
    choice_of = lambda row: ", ".join(row["where"][name] for name in chosen)
    for choice, rows in configs.grouped(section.rows, choice_of).items():
        runs: list[Any] = [section.make_run(row["where"], seed=0) for row in rows]  # SGD, then Adam
        if all(run in results for run in runs):
            epochs = [epochs_to(results[run], printed[run.optimizer] / 100) for run in runs]
            accuracies = [f"{100 * results[run].measures['accuracy']:.1f}" for run in runs]
            cells = itertools.chain(*zip(accuracies, map(about, epochs), strict=True))
            ratio = max(epochs) / min(epochs)
            lines.append((ratio, (choice, *cells, about(ratio))))
    after = f"after {section.settings['epochs']} epochs"
    head = [h for o in ("SGD", "Adam") for h in (f"{o}: {after}", f"{o}: epochs to {printed[o.lower()]:.2f}")]
    head = (", ".join(chosen), *head, "ratio")
    return table(head, [line for _, line in sorted(lines)], text=1, numbers=5)


def residuals(results: store.Results, section: Section) -> str:
    """The open choices, by what baseline SGD and Adam reach with them where the paper prints a number."""
    reached: dict[str, list[np.ndarray]] = {}  # by choice, for each target
    for target in targets():
        where = target["where"].items()
        for row in (row for row in section.rows if where <= row["where"].items()):
            choice = ", ".join(f"{k} {v}" for k, v in row["where"].items() if (k, v) not in where) or "none"
            reached.setdefault(choice, []).append(evidence.by_seed(results, section, row))
    labels, values = zip(*((target["label"], target["value"]) for target in targets()), strict=True)
    lines = [("the paper", *(f"{value:.2f}" for value in values), "")]
    for choice, accuracies in reached.items():
        apart = np.concatenate([ours - value for ours, value in zip(accuracies, values, strict=True)])
        if len(apart):
            pairs = zip(accuracies, values, strict=True)
            cells = [f"{ours[0]:.2f} ({ours[0] - value:+.2f})" if len(ours) else "" for ours, value in pairs]
            lines.append((choice, *cells, f"{np.sqrt(np.mean(apart**2)):.2f}"))
    return table(("what is changed", *labels, "root mean square of residuals"), lines, text=1, numbers=len(labels) + 1)
