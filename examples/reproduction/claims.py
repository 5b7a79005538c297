"""Parts of our studies: settings, and claims that compare two of them.

A learning rate "best" in a claim is the rate of the row's best mean on held-out data; "baseline's best" is the best
rate of the same row without Excitation. See results/PLAN.md.
"""

from collections.abc import Iterable
from typing import Any

from examples.reproduction import tables
from examples.reproduction.sections import Row, Section, grid, product, rows

BASELINE: Row = {"strategy": "vanilla"}
ZERO_SUM, POSITIVE_SUM = TWO = tuple({"strategy": name} for name in ("zero_sum", "positive_sum"))
COMPONENTS = ("both", "direction", "norm")
VARIANTS: tuple[Row, ...] = (BASELINE, *product(TWO, grid(component=COMPONENTS)))
# Scikit-learn's digits: the last 157 training images are held out.
DIGITS: Row = {"dataset": "digits", "subset": 1280, "batch_size": 128, "schedule": "constant", "epochs": 100}
TORCH: Row = {"initialization": "torch"}
DEEP: Row = {**DIGITS, "depth": 14, **TORCH, "optimizer": "adam"}
UNBALANCED: Row = {"load_balancing": 0.0}
BALANCED: Row = {"load_balancing": 0.01}
BEST: Row = {"learning_rate": "best"}
BIASED: Row = {**UNBALANCED, "router_bias": 1e-3}  # DeepSeek-V3's rate
LESS_IS_BETTER = ("loss", "entropy", "max_load")


def rates(*values: float) -> tuple[Row, ...]:
    """Parts of settings: learning rates."""
    return grid(learning_rate=values)


def beats(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> Row:
    """The claim that one setting is better than another, by the sign of the measure."""
    contrast = [[1.0, {**common, **better}], [-1.0, {**common, **worse}]]
    return {"text": text, "measure": measure, "contrast": contrast, "sign": -1 if measure in LESS_IS_BETTER else 1}


def at_best(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> Row:
    """The claim that one setting is better than another, each at its own best learning rate."""
    return beats(f"{text}, each at its best rate", better, worse, measure, **BEST, **common)


def tuned(prefix: str, measure: str = "accuracy", strategies: Iterable[Row] = TWO, **common: Any) -> list[Row]:
    """Claims about strategies and their components, each at its own best learning rate."""
    pairs = [(c, "baseline") for c in COMPONENTS] + [("both", "direction"), ("both", "norm")]
    return [
        at_best(*_part(f"{prefix}{two['strategy']}: {{}}", two, pair), measure, **common)
        for two in strategies
        for pair in pairs
    ]


def at_each(prefix: str, values: Iterable[float], **common: Any) -> list[Row]:
    """Claims about components at the same learning rate."""
    pairs = (("both", "baseline"), ("both", "norm"), ("direction", "baseline"))
    return [
        beats(*_part(f"{prefix} {rate:g}, {two['strategy']}: {{}}", two, pair), learning_rate=rate, **common)
        for rate in values
        for two in TWO
        for pair in pairs
    ]


def _part(text: str, two: Row, pair: tuple[str, str]) -> tuple[str, Row, Row]:
    """The text, and a component of a strategy beside another one or the baseline."""
    better, worse = (BASELINE if name == "baseline" else {**two, "component": name} for name in pair)
    return text.format(f"{pair[0]} beats {'the ' if pair[1] == 'baseline' else ''}{pair[1]}"), better, worse


def study(name: str, title: str, wheres: Iterable[Row], claims: Iterable[Row] = (), **fields: Any) -> Section:
    """A section for a study: a picture and a table over the learning rate, and claims with a correction."""
    measure = fields.get("measure", "loss" if fields.get("kind") == "mini_gpt" else "accuracy")
    every: Row = {"seeds": 5, "table": tables.by_rate, "measure": measure, "in_study": True, "draw": ("over_rates",)}
    return Section(name, title, rows=rows(wheres, measure), claims=tuple(claims), **every | fields)
