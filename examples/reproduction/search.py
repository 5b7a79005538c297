"""The search for what the paper leaves open, by baseline runs, and a smoke test of Table 2."""

import numpy as np

from examples.reproduction import configs, evidence, sections, store, tables
from examples.reproduction.sections import Row, Section


def targets() -> list[Row]:
    """The rows of the paper that the open choices are compared with: baseline SGD and Adam, of Tables 1, 4 and 6."""
    baselines = [row for t in ("table4", "table6") for row in sections.paper()[t].rows if row["column"] == "baseline"]
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
        runs = {row["where"]["optimizer"]: section.make_run(row["where"], seed=0) for row in rows}  # SGD first
        if all(run in results for run in runs.values()):
            reached = [f"{100 * results[run].measures['accuracy']:.1f}" for run in runs.values()]
            epochs = [epochs_to(results[run], printed[name] / 100) for name, run in runs.items()]
            ratio = max(epochs) / min(epochs)
            cells = [cell for pair in zip(reached, map(tables.about, epochs), strict=True) for cell in pair]
            lines.append((ratio, (choice, *cells, tables.about(ratio))))
    after = f"after {section.settings['epochs']} epochs"
    head = [h for o in ("SGD", "Adam") for h in (f"{o}: {after}", f"{o}: epochs to {printed[o.lower()]:.2f}")]
    head = (", ".join(chosen), *head, "ratio")
    return tables.table(head, [line for _, line in sorted(lines)], text=1, numbers=5)


def residuals(results: store.Results, section: Section) -> str:
    """The open choices, by what baseline SGD and Adam reach with them where the paper prints a number."""
    reached: dict[str, list[np.ndarray]] = {}  # by choice, for each target
    for target in targets():
        where = target["where"].items()
        for row in (row for row in section.rows if where <= row["where"].items()):
            choice = ", ".join(f"{k} {v}" for k, v in row["where"].items() if (k, v) not in where) or "none"
            reached.setdefault(choice, []).append(evidence.by_seed(results, section, row))
    lines = [("the paper", *(f"{target['value']:.2f}" for target in targets()), "")]
    for choice, accuracies in reached.items():
        apart = [value - target["value"] for value, target in zip(accuracies, targets(), strict=True)]
        if any(map(len, apart)):
            cells = [
                f"{value[0]:.2f} ({r[0]:+.2f})" if len(r) else "" for value, r in zip(accuracies, apart, strict=True)
            ]
            lines.append((choice, *cells, f"{np.sqrt(np.mean(np.concatenate(apart) ** 2)):.2f}"))
    head = ("what is changed", *(target["label"] for target in targets()), "root mean square of residuals")
    return tables.table(head, lines, text=1, numbers=len(targets()) + 1)
