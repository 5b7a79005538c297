"""The paper's tables and figures as runs: one row for each, with our choices where the paper leaves them open."""

import functools
import json
import pathlib
import tomllib
from typing import Any

from examples.reproduction import configs, study

PAPER = pathlib.Path(__file__).with_name("paper.json")


Experiment = configs.Experiment
_grid = configs.grid


@functools.cache
def paper() -> dict[str, Any]:
    """The paper's numbers and claims, by table and figure, and views of them that are run otherwise too."""
    views = json.loads(PAPER.read_text())["views"]
    table1, fig2 = views["table1"], views["fig2"]
    order = list(views)
    views["table1_long"] = {**table1, "title": "Six optimizers, at full length"}
    of_17m = lambda wheres: all(where["num_experts"] == 64 for where in wheres)
    views["fig6_long"] = {
        **views["fig6"],
        "title": "MoE-ViT on CIFAR-10: 64 narrow experts, ten epochs",
        "rows": [row for row in views["fig6"]["rows"] if of_17m([row["where"]])],
        "claims": [c for c in views["fig6"]["claims"] if of_17m(where for _, where in c["contrast"])],
    }
    for name, view in (("table1_crops", table1), ("fig2_crops", fig2)):
        views[name] = {**view, "title": "Another setting: four hidden layers, random crops"}
    views["fig3_torch"] = {**views["fig3"], "title": "Another start: as PyTorch initializes its layers"}
    for name in views.keys() - set(order):
        views[name]["derived"] = True  # the paper's view, with other runs
    return {name: views[name] for name in sorted(views, key=lambda name: order.index(name.split("_")[0]))}


def targets() -> list[dict[str, Any]]:
    """The rows of the paper that the open choices are held against: vanilla SGD and Adam, of tables 1, 4 and 6."""
    table4, table6 = ([row for row in paper()[t]["rows"] if row["column"] == "vanilla"] for t in ("table4", "table6"))
    return [
        *(row for row in table4 if row["where"]["sparsity"] in (0.9, 0.1)),
        *(row for row in table6 if row["where"]["schedule"] == "constant"),
    ]


def runs(experiment: Experiment, **changes: Any) -> list[configs.Run]:
    """All runs of a table or figure, of its rows and of the claims about it, each once, with changes if any."""
    if experiment.rows is None:
        view = paper()[experiment.name]
        specs = [*(row_spec(view, row) for row in view["rows"]), *view["claims"]]
        rows = [where for spec in specs for _, where in spec["contrast"]]
    else:
        rows = experiment.rows
    wheres = [{**row, **changes} for row in rows]
    return list(dict.fromkeys(experiment.make_run(where, seed) for where in wheres for seed in range(experiment.seeds)))


def row_spec(view: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What a row of the paper measures, in the form of a claim: a measure, and a linear combination of runs."""
    if view["measure"] != "perplexity_reduction":
        return {"measure": view["measure"], "contrast": [[1.0, row["where"]]]}
    signs = {"vanilla": 1.0, "positive_sum": -1.0}
    contrast = [[sign, row["where"] | {"strategy": strategy}] for strategy, sign in signs.items()]
    return {"measure": "perplexity", "contrast": contrast}


ADAM = {"optimizer": "adam", "learning_rate": 1e-4}
SGD = {"optimizer": "sgd", "learning_rate": 0.01}

_SEARCH = _grid(
    augmentation=("crop_flip", "flip", "none"),
    normalization=("standard", "unit"),
    initialization=("lecun_normal", "torch", "he_normal"),
)

# One choice at a time, against the setting that the first look favours; and candidates at their length.
_VARIANTS = ({}, {"augmentation": "flip"}, {"activation": "none"}, {"depth": 3})
_CANDIDATES = (
    {"depth": 3, "augmentation": "flip", "initialization": "lecun_normal", "epochs": 100},
    {"depth": 3, "augmentation": "flip", "initialization": "he_normal", "epochs": 100},
    {"depth": 4, "augmentation": "crop_flip", "initialization": "lecun_normal", "epochs": 300},
    {"depth": 4, "augmentation": "none", "initialization": "he_normal", "epochs": 200},
)

EPOCHS = 30  # of the tables: what two CPU cores can do for 400 runs
LONG = 100  # a length at which the vanilla columns come close to the paper's: see the remark on `search_long`

CROPS = {"epochs": EPOCHS, "depth": 4, "augmentation": "crop_flip"}  # what the search's first look favours

# A hundred steps: what two hours of a CPU core give to twelve runs. An accelerator can do 30 epochs: `run --epochs 30`.
BRIEF_VIT = {"epochs": 1, "subset": 12_800, "batch_size": 128}
BRIEF_GPT = {"dataset": "wikitext-valid", "epochs": 1, "subset": 320, "batch_size": 8}

EXPERIMENTS = {
    e.name: e
    for e in [
        Experiment("fig2", "CIFAR-10, all strategies and controls", seeds=5, settings={"epochs": EPOCHS}),
        Experiment("table1", "Six optimizers on CIFAR-10", seeds=5, settings={"epochs": EPOCHS}),
        Experiment("fig3", "Deep networks without skip connections", settings={"epochs": LONG}),
        Experiment("fig4", "Specialization by layer", settings={"epochs": LONG}),
        Experiment("fig5", "Routing entropy along training", settings={"epochs": LONG}),
        Experiment("fig6", "MoE-ViT on CIFAR-10", kind="vit", seeds=1, settings=BRIEF_VIT),
        Experiment("fig6_long", "MoE-ViT on CIFAR-10, ten epochs", kind="vit", settings={"epochs": 10}),
        Experiment("table2", "Perplexity of 60 GPT-MoEs on WikiText-103", kind="gpt", seeds=1),
        Experiment("table3", "Learning rates", settings={"epochs": EPOCHS}),
        Experiment("table4", "Sparsity", settings={"epochs": EPOCHS}),
        Experiment("table5", "Batch sizes", settings={"epochs": EPOCHS}),
        Experiment("table6", "Schedules", settings={"epochs": EPOCHS}),
        Experiment("table7", "The intensity gamma", settings={"epochs": EPOCHS}),
        Experiment("fig8", "SVHN and CIFAR-100, all strategies and controls", settings={"epochs": EPOCHS}),
        Experiment("fig9", "Training curves of five optimizers", seeds=5, settings={"epochs": EPOCHS}),
        Experiment("fig10", "MoE-ViT on CIFAR-100", kind="vit"),
        Experiment("fig11", "MoE-ViT on SVHN", kind="vit"),
        Experiment(
            "table2_brief",
            "The smallest GPT-MoE, forty steps on WikiText's validation split",
            kind="gpt",
            seeds=2,
            settings=BRIEF_GPT,
            rows=_grid(num_experts=(4,), d_ff=(256,), strategy=("vanilla", "positive_sum")),
        ),
        Experiment("table1_long", "Six optimizers at full length", settings={"epochs": LONG}),
        Experiment("table1_crops", "Table 1 in another setting", seeds=5, settings=CROPS),
        Experiment("fig2_crops", "Figure 2 in another setting", seeds=5, settings=CROPS),
        Experiment("fig3_torch", "Figure 3 with another start", settings={"epochs": LONG, "initialization": "torch"}),
        Experiment(
            "search",
            "The open choices, first look: vanilla, constant rate",
            seeds=1,
            settings={"epochs": 30, "depth": 4, "schedule": "constant"},
            rows=tuple({**choice, **optimizer} for choice in _SEARCH for optimizer in (SGD, ADAM)),
        ),
        Experiment(
            "search_variants",
            "The open choices, second look: one at a time, vanilla",
            seeds=1,
            settings=CROPS,
            rows=tuple({**row["where"], **variant} for variant in _VARIANTS for row in targets()),
        ),
        Experiment(
            "search_long",
            "The open choices, third look: candidates at their length, vanilla",
            seeds=1,
            rows=tuple({**row["where"], **choice} for choice in _CANDIDATES for row in targets()),
        ),
    ]
} | study.STUDIES
# What a reader of the report should know, by section.
REMARKS: dict[str, str] = tomllib.loads(PAPER.with_name("remarks.toml").read_text(encoding="utf-8"))
