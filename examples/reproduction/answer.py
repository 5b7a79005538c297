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
    """The table: a row for each study and strategy, a column for each component."""
    rows = []
    for (text, (name, common, _)), strategy in itertools.product(ANSWER.items(), ("zero_sum", "positive_sum")):
        row = [text, f"`{strategy}`"]
        for component in COMPONENTS:
            claim, ours = difference(results, name, {"strategy": strategy, "component": component}, common)
            verdict, cell = evidence.verdict(ours, claim["sign"]), tables.our_delta(claim, ours)
            cell = f"**{cell}**" if verdict in ("confirmed", "contradicted") else cell
            row.append("not tested" if verdict.startswith("not tested") else cell)
        rows.append(row)
    return tables.table(("", "", *COMPONENTS), rows, numbers=3)


def difference(results: store.Results, name: str, better: Row, common: Row) -> tuple[Row, evidence.Contrast]:
    """The claim that a variant beats the baseline, each at its best or the row's learning rate, and its evidence."""
    section = studies.SECTIONS[name]
    claim = sections.claim("", {"learning_rate": "best", **common, **better}, measure=section.measure)
    return claim, evidence.contrast(results, section, claim)


def draw(results: store.Results, figure: Any) -> None:
    """A column for each study: what the baseline and the components of zero_sum reached over the learning rate.

    Below it, differences from the baseline, each at its best learning rate, paired by seed, with 95 % intervals.
    """
    components = [{"strategy": "zero_sum", "component": component} for component in COMPONENTS]
    figure.set_size_inches(max(1.86 * len(ANSWER), 3.3), 4.1)
    grid = figure.subplots(2, len(ANSWER), squeeze=False, height_ratios=(3, 2))
    measure = ""
    for (title, (name, common, limits)), above, below in zip(ANSWER.items(), *grid, strict=True):
        setting, _, unit = title.removesuffix(")").partition(" (")
        section = studies.SECTIONS[name]
        above.set(title=setting.replace(", ", "\n", 1), xscale="log", xlabel="learning rate")
        if section.measure != measure:
            measure = section.measure
            above.set_ylabel(tables.UNIT[measure])
        rates = sorted({row["where"]["learning_rate"] for row in section.rows})
        for variant in (sections.BASELINE, *components):
            specs = [sections.row({**common, **variant, "learning_rate": rate}, measure) for rate in rates]
            color = plotting.COLORS[variant.get("component", "baseline")]
            pictures.reached(above, rates, results, section, specs, sections.words(variant), color=color)
        above.set_ylim(limits)
        for place, variant in enumerate(components):
            _, ours = difference(results, name, variant, common)
            style = pictures.POINTS | {"color": plotting.COLORS[variant["component"]]}
            below.errorbar([ours.mean], [place], xerr=[ours.half], label=variant["component"], **style)
        below.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        below.set_yticks(range(3), [f"{component} - baseline" for component in COMPONENTS])
        below.set(ylim=(2.6, -0.6), xlabel=f"difference ({unit})".replace("; ", ";\n"))
        below.tick_params(labelleft=below is grid[1, 0])
        above.grid(alpha=0.3)
        below.grid(alpha=0.3, axis="x")
        for axes in (above, below):
            axes.title.set_fontsize("medium")
            axes.spines[["top", "right"]].set_visible(False)
    handles = {label: h for axes in grid[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
