"""The search for what the paper leaves open, by baseline runs, and a smoke test of Table 2."""

import numpy as np

from examples.reproduction import evidence, sections, store, tables
from examples.reproduction.sections import Row, Section, grid, ours, product

SGD = {"optimizer": "sgd", "learning_rate": 0.01}
ADAM = {"optimizer": "adam", "learning_rate": 1e-4}


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
    lines = []
    for choice in CHOICES:
        runs = {o["optimizer"]: section.make_run({**choice, **o}, seed=0) for o in (SGD, ADAM)}
        if all(run in results for run in runs.values()):
            found = {name: results[run] for name, run in runs.items()}
            reached = {name: f"{100 * result.measures['accuracy']:.1f}" for name, result in found.items()}
            epochs = {name: epochs_to(result, printed[name] / 100) for name, result in found.items()}
            cells = [cell for name in runs for cell in (reached[name], tables.about(epochs[name]))]
            ratio = max(epochs.values()) / min(epochs.values())
            lines.append((ratio, (", ".join(choice.values()), *cells, tables.about(ratio))))
    after = f"after {section.settings['epochs']} epochs"
    head = [h for o in ("SGD", "Adam") for h in (f"{o}: {after}", f"{o}: epochs to {printed[o.lower()]:.2f}")]
    head = ("augmentation, normalization, initialization", *head, "ratio")
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


# One choice at a time, against the setting that the first look favours; and candidates at their length.
VARIANTS = ({}, {"augmentation": "flip"}, {"activation": "none"}, {"depth": 3})
CANDIDATES = (
    {"depth": 3, "augmentation": "flip", "initialization": "lecun_normal", "epochs": 100},
    {"depth": 3, "augmentation": "flip", "initialization": "he_normal", "epochs": 100},
    {"depth": 4, "augmentation": "crop_flip", "initialization": "lecun_normal", "epochs": 300},
    {"depth": 4, "augmentation": "none", "initialization": "he_normal", "epochs": 200},
)
CHOICES = grid(
    augmentation=("crop_flip", "flip", "none"),
    normalization=("standard", "unit"),
    initialization=("lecun_normal", "torch", "he_normal"),
)
TARGETS = [row["where"] for row in targets()]

SEARCH = (
    ours("table2_brief", grid(num_experts=(4,), d_ff=(256,), strategy=("vanilla", "positive_sum"))),
    ours("search", product(CHOICES, (SGD, ADAM)), table=extrapolations),
    ours("search_variants", [{**where, **variant} for variant in VARIANTS for where in TARGETS], table=residuals),
    ours("search_long", [{**where, **choice} for choice in CANDIDATES for where in TARGETS], table=residuals),
)
