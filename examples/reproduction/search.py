"""The search for what the paper leaves open, by baseline runs, and a smoke test of Table 2."""

import itertools

import numpy as np

from examples.reproduction import configs, evidence, sections, store, tables
from examples.reproduction.sections import Row, Section, grid, product

SGD = {"optimizer": "sgd", "learning_rate": 0.01}
ADAM = {"optimizer": "adam", "learning_rate": 1e-4}


def targets() -> list[Row]:
    """The rows of the paper that the open choices are compared with: baseline SGD and Adam, of Tables 1, 4 and 6."""
    table4, table6 = (
        [row for row in sections.paper()[t].rows if row["column"] == "baseline"] for t in ("table4", "table6")
    )
    sparse = [row for row in table4 if row["where"]["sparsity"] in (0.9, 0.1)]
    return sparse + [row for row in table6 if row["where"]["schedule"] == "constant"]


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
    settings: dict[str, dict[str, tuple[float, float]]] = {}
    for run in evidence.found(results, section):
        assert isinstance(run, configs.MLPRun)
        name = f"{run.augmentation}, {run.normalization}, {run.initialization}"
        after = epochs_to(results[run], printed[run.optimizer] / 100)
        settings.setdefault(name, {})[run.optimizer] = 100 * results[run].measures["accuracy"], after
    apart = lambda two: max(a / b for a, b in itertools.permutations([after for _, after in two.values()], 2))
    lines = []
    for name, two in sorted(((n, two) for n, two in settings.items() if len(two) == 2), key=lambda x: apart(x[1])):
        cells = (cell for o in ("sgd", "adam") for cell in (f"{two[o][0]:.1f}", tables.about(two[o][1])))
        lines.append((name, *cells, tables.about(apart(two))))
    after = f"after {section.settings['epochs']} epochs"
    head = [h for o in ("SGD", "Adam") for h in (f"{o}: {after}", f"{o}: epochs to {printed[o.lower()]:.2f}")]
    head = ("augmentation, normalization, initialization", *head, "ratio")
    return tables.table(head, lines, text=1, numbers=5)


def residuals(results: store.Results, section: Section) -> str:
    """The open choices, by what baseline SGD and Adam reach with them where the paper prints a number."""
    reached: dict[str, list[float]] = {}  # by choice, for each target
    for target in targets():
        where = target["where"].items()
        for row in (row["where"] for row in section.rows if where <= row["where"].items()):
            choice = ", ".join(f"{k} {v}" for k, v in row.items() if (k, v) not in where) or "none"
            run = section.make_run(row, seed=0)
            accuracy = 100 * results[run].measures["accuracy"] if run in results else np.nan
            reached.setdefault(choice, []).append(accuracy)
    printed = np.array([target["value"] for target in targets()])
    lines = [("the paper", *(f"{value:.2f}" for value in printed), "")]
    for choice, accuracies in reached.items():
        if not np.isnan(accuracies).all():
            apart = np.array(accuracies) - printed
            cells = ("" if np.isnan(a) else f"{a:.2f} ({r:+.2f})" for a, r in zip(accuracies, apart, strict=True))
            lines.append((choice, *cells, f"{np.sqrt(np.nanmean(apart**2)):.2f}"))
    head = ("what is changed", *(target["label"] for target in targets()), "root mean square of residuals")
    return tables.table(head, lines, text=1, numbers=len(printed) + 1)


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

SEARCH = (
    sections.ours("table2_brief", grid(num_experts=(4,), d_ff=(256,), strategy=("vanilla", "positive_sum"))),
    sections.ours("search", product(CHOICES, (SGD, ADAM)), table=extrapolations),
    sections.ours(
        "search_variants",
        [{**row["where"], **variant} for variant in VARIANTS for row in targets()],
        table=residuals,
    ),
    sections.ours(
        "search_long",
        [{**row["where"], **choice} for choice in CANDIDATES for row in targets()],
        table=residuals,
    ),
)
