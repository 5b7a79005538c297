"""Our own studies: questions that the paper leaves open, as sections of the same form as the paper's.

* mechanism: does Excitation work by the direction of a layer's step or by its length?
* deep, depth, ways_out, rescue: deep networks that the baseline does not train, and other ways to train them.
* mini: transformers in miniature, at tuned learning rates, with and without a balancing loss.

See results/PLAN.md.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from examples.reproduction import mini_studies, search, sections, tables
from examples.reproduction.claims import (
    BASELINE,
    DEEP,
    DIGITS,
    TORCH,
    TWO,
    VARIANTS,
    ZERO_SUM,
    at_best,
    at_each,
    beats,
    rates,
    study,
    tuned,
)
from examples.reproduction.sections import Row, Section, grid, product, words


def _mechanism(name: str, title: str, optimizers: dict[str, tuple[float, ...]], tune: bool, **fields: Any) -> Section:
    wheres, claims = [], []
    for optimizer, values in optimizers.items():
        wheres += product(({"optimizer": optimizer},), rates(*values), VARIANTS)
        claims += tuned(f"{optimizer}, ", optimizer=optimizer) if tune else []
        claims += at_each(optimizer, values, optimizer=optimizer)
    return study(name, title, wheres, claims, **fields)


WAYS: dict[str, Row] = {
    "plain": TORCH,
    "LeCun-normal": {"initialization": "lecun_normal"},
    "He-normal": {"initialization": "he_normal"},
    "residual": {**TORCH, "residual": True},
    "LayerNorm": {**TORCH, "layer_norm": True},
    "Adam's epsilon 1e-16": {**TORCH, "epsilon": 1e-16},
}


def _ways_out() -> Section:
    claims = []
    for name, way in list(WAYS.items())[1:]:
        text = f"{name}: the baseline beats zero_sum in the plain network"
        claims.append(at_best(text, {**way, **BASELINE}, {**WAYS["plain"], **ZERO_SUM}))
        text = f"{name}: {{}} beats the baseline there"
        claims += [at_best(text.format(two["strategy"]), two, BASELINE, **way) for two in TWO]
    wheres = product(WAYS.values(), rates(3e-4, 1e-3, 3e-3), (BASELINE, *TWO))
    title, settings = "Other ways to train 14 hidden layers on digits", {**DIGITS, "depth": 14, "optimizer": "adam"}
    return study("deep_ways_out", title, wheres, claims, settings=settings)


def _depth() -> Section:
    depths = (4, 6, 8, 10, 12, 16, 20, 30)
    text = "{} hidden layers: {} beats the baseline"
    claims = [at_best(text.format(d, two["strategy"]), two, BASELINE, depth=d) for d in depths for two in TWO]
    return study(
        "depth_digits",
        "From 4 to 30 hidden layers on digits, PyTorch's initialization",
        product(grid(depth=depths), rates(3e-4, 1e-3, 3e-3, 1e-2), (BASELINE, *TWO)),
        claims,
        settings={**DIGITS, **TORCH, "optimizer": "adam"},
        draw=("over_depth",),
    )


def _rescue() -> Section:
    """One of the paper's 20 layers is the output layer, as in Figure 3."""
    claims = at_each("adam", (1e-3, 1e-4))
    for strategy, rate in (("zero_sum", 1e-3), ("positive_sum", 1e-3), ("zero_sum", 1e-4)):
        for other in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
            if other != rate:
                better = {"strategy": strategy, "learning_rate": rate}
                text = f"{strategy} at {rate:g} beats the baseline at {other:g}"
                claims.append(beats(text, better, BASELINE | {"learning_rate": other}))
    wheres = product(rates(1e-3, 1e-4), VARIANTS) + product(rates(3e-4, 3e-3, 1e-2, 3e-2), (BASELINE,))
    return study(
        "rescue",
        "19 hidden layers on CIFAR-10, PyTorch's initialization",
        wheres,
        claims,
        settings={"depth": 19, **TORCH, "optimizer": "adam", "schedule": "constant", "epochs": 60},
    )


def _inside_the_rescue(name: str, title: str, measure: str, draw: str, claims: Iterable[tuple[str, Row]]) -> Section:
    """Figure 4 or 5 at the rate of `deep_digits` at which Excitation trains what the baseline does not."""
    wheres = product(rates(1e-3), (BASELINE, *TWO))
    beaten = [
        beats(text.format(two["strategy"]), two, BASELINE, measure, learning_rate=1e-3) | more
        for two in TWO
        for text, more in claims
    ]
    section = study(name, title, wheres, beaten, settings=DEEP, seeds=10, measure=measure, draw=(draw,))
    return dataclasses.replace(section, rows=tuple(map(_in_picture, section.rows)))


def _in_picture(row: Row, **more: Any) -> Row:
    """A row with the panel and the line of a picture, or of a table beside the paper."""
    label, column = words(row["where"], "strategy"), words({"strategy": row["where"]["strategy"]})
    return {**row, "label": label, "column": column, **more}


def _torch_baseline() -> Section:
    """Three hidden layers and 100 epochs first: they decide the question with a third of the work."""
    optimizers, three = (search.SGD, search.ADAM), (BASELINE, *TWO)
    short = lambda depth: product(grid(depth=(depth,), epochs=(100,)), optimizers, three)
    frozen = product(grid(initialization=("lecun_normal",)), short(3))  # on file, as the full length of Table 1
    wheres = short(3) + frozen + short(4) + product(grid(depth=(3, 4), epochs=(300,)), optimizers, (BASELINE,))
    claims = []
    for common in product(grid(depth=(3, 4), epochs=(100,)), optimizers):
        text = f"{common['depth']} hidden layers, {common['optimizer']}: {{}} beats the baseline"
        claims += [beats(text.format(two["strategy"]), two, BASELINE, **common) for two in TWO]
    fields = {"seeds": 3, "settings": TORCH, "draw": (), "note": ". The paper's values are those of Table 1"}
    section = study("torch_long", "PyTorch's initialization at full length", wheres, claims, **fields)
    remark = """
With three layers and 100 epochs, baselines with PyTorch's initialization are further from the paper's than those with
LeCun-normal: 6.4 points below with SGD and 2.1 with Adam, against 2.9 and 0.2. So the other tables keep
LeCun-normal."""
    key = lambda where: (where["optimizer"], where["strategy"])
    paper = {key(row["where"]): row["value"] for row in sections.paper()["table1"].rows}
    rows = (_in_picture(row, value=paper[key(row["where"])]) for row in section.rows)
    return dataclasses.replace(section, rows=tuple(rows), table=tables.beside_the_paper, remark=remark)


STUDIES = (
    _mechanism(
        "mechanism",
        "Direction or step length? CIFAR-10",
        {"sgd": (0.01, 0.1, 0.3), "adam": (1e-4, 1e-3, 3e-3)},
        tune=False,
        settings={"epochs": 30},
    ),
    _mechanism(
        "mechanism_digits",
        "Direction or step length? Digits, up to divergence",
        {"sgd": (0.02, 0.05, 0.1, 0.3, 1.0, 3.0), "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
        tune=True,
        seeds=10,
        settings=DIGITS,
        remark="""
`both` needs a smaller rate than the baseline and diverges at a smaller rate. `direction` diverges where the baseline
does. With Adam and small rates, `direction` alone is worse than the baseline.""",
    ),
    study(
        "deep_digits",
        "14 hidden layers on digits, PyTorch's initialization",
        product(rates(1e-3, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2), VARIANTS),
        tuned("") + at_each("adam", (1e-3,)),
        seeds=10,
        settings=DEEP,
        inside=True,
        remark="""
An accuracy of 10 % is that of a network that never started to learn, or lost what it had learned; its numbers stay
finite, so that it does not count as diverged. That is why the intervals are wide at the larger rates.""",
    ),
    _inside_the_rescue(
        "fig4_torch",
        "Figure 4 where Excitation trains what the baseline does not: 14 hidden layers on digits",
        "specialization",
        "by_layer",
        (
            ("{} specializes more than the baseline, mean of all layers", {}),
            ("{}: the same, mean of the middle half of the layers", {"layers": "middle"}),
        ),
    ),
    _inside_the_rescue(
        "fig5_torch",
        "Figure 5 where Excitation trains what the baseline does not: 14 hidden layers on digits",
        "entropy",
        "curves",
        (
            ("{} ends at lower entropy than the baseline", {}),
            ("{} is lower after a fifth of the training already", {"at": 0.2}),
        ),
    ),
    _ways_out(),
    _depth(),
    _rescue(),
    study(
        "rescue_sgd",
        "9 hidden layers on CIFAR-10 with SGD, PyTorch's initialization",
        product(rates(0.1, 0.01), VARIANTS) + product(rates(0.03, 0.3), (BASELINE,)),
        at_each("sgd", (0.1, 0.01)),
        settings={"depth": 9, **TORCH, "optimizer": "sgd", "schedule": "constant", "epochs": 60},
    ),
    _torch_baseline(),
    *mini_studies.STUDIES,
)

# All sections, in the order of the report.
SECTIONS: dict[str, Section] = sections.paper() | {section.name: section for section in (*search.SEARCH, *STUDIES)}
