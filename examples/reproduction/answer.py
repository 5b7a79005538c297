"""The table and the picture of docs/does-it-help.md: gains over the baseline at the best learning rates, or at one."""

import itertools
from typing import Any

from examples.reproduction import evidence, pictures, sections, store, studies, tables
from examples.reproduction.sections import COMPONENTS, Row
from excitation_optax import plotting

# Rows of the table: a study, what the row's runs have in common, and the range of the picture. CIFAR-10's runs hold no
# data out by which to choose a rate: at each of six, the baseline is at chance.
ANSWER: dict[str, tuple[str, Row, tuple[float, float] | None]] = {
    "3 layers, digits, SGD (points)": ("mechanism_digits", {"optimizer": "sgd"}, (80, 98)),
    "3 layers, digits, Adam (points)": ("mechanism_digits", {"optimizer": "adam"}, (80, 98)),
    "16 layers, digits, Adam (points)": ("depth_digits", {"depth": 16}, (0, 100)),
    "19 layers, CIFAR-10, Adam (points)": ("rescue", {"learning_rate": 1e-3}, (0, 60)),
    "GPT-MoE, text, AdamW (nats; less is better)": ("mini_tuned", {}, None),
}


def markdown(results: store.Results) -> str:
    """The table: differences from the baseline, a row for each study and strategy, a column for each component.

    Each variant and the baseline have their best learning rate, or that of the row.
    """
    rows = []
    for (text, (name, common, _)), strategy in itertools.product(ANSWER.items(), ("zero_sum", "positive_sum")):
        section, row = studies.SECTIONS[name], [text, f"`{strategy}`"]
        for component in COMPONENTS:
            better = {"learning_rate": "best", **common, "strategy": strategy, "component": component}
            claim = sections.claim("", better, measure=section.measure)
            ours = evidence.contrast(results, section, claim)
            verdict, cell = evidence.verdict(ours, claim["sign"]), tables.our_delta(claim, ours)
            cell = f"**{cell}**" if verdict in ("confirmed", "contradicted") else cell
            row.append("not tested" if verdict.startswith("not tested") else cell)
        rows.append(row)
    return tables.table(("", "", *COMPONENTS), rows, numbers=3)


def draw(results: store.Results, figure: Any) -> None:
    """What the baseline and the components of zero_sum reached over the learning rate, a panel for each study."""
    variants = [sections.BASELINE, *({"strategy": "zero_sum", "component": component} for component in COMPONENTS)]
    for axes, (title, (name, common, limits)) in pictures.panels(figure, ANSWER):
        section = studies.SECTIONS[name]
        measure, rates = section.measure, sorted({row["where"]["learning_rate"] for row in section.rows})
        axes.set(title=title.partition(" (")[0], xscale="log", xlabel="learning rate", ylabel=tables.UNIT[measure])
        for variant in variants:
            specs = [sections.row({**common, **variant, "learning_rate": rate}, measure) for rate in rates]
            color = plotting.COLORS[variant.get("component", "baseline")]
            pictures.reached(axes, rates, results, section, specs, sections.words(variant), color=color)
        axes.set_ylim(limits)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
