"""The table and the picture of docs/does-it-help.md: gains over the baseline, each at its best learning rate."""

from typing import Any

from examples.reproduction import claims, evidence, pictures, sections, store, studies, tables
from examples.reproduction.sections import Row
from excitation_optax import plotting

# Rows of the table: a study, what the row's runs have in common, and the range of the picture.
ANSWER: dict[str, tuple[str, Row, tuple[float, float] | None]] = {
    "3 layers, digits, SGD (points)": ("mechanism_digits", {"optimizer": "sgd"}, (80, 98)),
    "3 layers, digits, Adam (points)": ("mechanism_digits", {"optimizer": "adam"}, (80, 98)),
    "14 layers, digits, Adam (points)": ("deep_digits", {}, None),
    "16 layers, digits, Adam (points)": ("depth_digits", {"depth": 16}, None),
    "GPT-MoE, text, AdamW (nats; less is better)": ("mini_tuned", {}, None),
}


def markdown(results: store.Results) -> str:
    """The table: a row for each study and strategy, a column for each component."""
    rows = []
    for text, (name, common, _) in ANSWER.items():
        section = studies.SECTIONS[name]
        for two in claims.TWO:
            cells = []
            for component in claims.COMPONENTS:
                better, more = {**two, "component": component}, {**claims.BEST, **common}
                claim = claims.beats("", better, claims.BASELINE, section.measure, **more)
                ours = evidence.contrast(results, section, claim)
                verdict = evidence.verdict(ours, claim["sign"])
                bold = "**" if verdict in ("confirmed", "contradicted") else ""
                tested = not verdict.startswith("not tested")
                cells.append(f"{bold}{tables.our_delta(claim, ours)}{bold}" if tested else "not tested")
            rows.append((text, f"`{two['strategy']}`", *cells))
    return tables.table(("", "", *claims.COMPONENTS), rows, numbers=3)


def draw(results: store.Results, figure: Any) -> None:
    """zero_sum and its components against the baseline, over the learning rate."""
    variants = [claims.BASELINE, *({**claims.ZERO_SUM, "component": c} for c in claims.COMPONENTS)]
    for axes, (title, (name, common, limits)) in pictures.panels(figure, ANSWER):
        section = studies.SECTIONS[name]
        wheres = [row["where"] for row in section.rows if common.items() <= row["where"].items()]
        rates = sorted({where["learning_rate"] for where in wheres})
        axes.set(
            title=title.partition(" (")[0], xscale="log", xlabel="learning rate", ylabel=tables.UNIT[section.measure]
        )
        for variant in variants:
            specs = [sections.row({**common, **variant, "learning_rate": r}, section.measure) for r in rates]
            color = plotting.COLORS[variant.get("component", "baseline")]
            pictures.reached(axes, rates, results, section, specs, sections.words(variant), color=color)
        axes.set_ylim(*(limits or (None, None)))
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
