"""Our own studies: questions that the paper leaves open, as sections of the same form as the paper's.

* mechanism: does Excitation work by the direction of a layer's step or by its length?
* deep, depth, ways_out, rescue: deep networks that the baseline does not train, and other ways to train them.
* mini: transformers in miniature, at tuned learning rates, with and without a balancing loss.

Here are their rows and claims; titles, seeds, settings and remarks are in `ours.toml`. A learning rate "best" in a
claim is the rate of the row's best mean on held-out data; "baseline's best" is the best rate of the same row without
Excitation. See results/PLAN.md.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from examples.reproduction import search, sections, tables
from examples.reproduction.sections import Row, Section, grid, ours, product

BASELINE: Row = {"strategy": "vanilla"}
ZERO_SUM, POSITIVE_SUM = TWO = tuple({"strategy": name} for name in ("zero_sum", "positive_sum"))
COMPONENTS = ("both", "direction", "norm")
VARIANTS: tuple[Row, ...] = (BASELINE, *product(TWO, grid(component=COMPONENTS)))
TORCH: Row = {"initialization": "torch"}
UNBALANCED: Row = {"load_balancing": 0.0}
LESS_IS_BETTER = ("loss", "entropy", "max_load")

# Claims.


def rates(*values: float) -> tuple[Row, ...]:
    """Parts of settings: learning rates."""
    return grid(learning_rate=values)


def beats(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> Row:
    """The claim that one setting is better than another, by the sign of the measure."""
    contrast = [[1.0, {**common, **better}], [-1.0, {**common, **worse}]]
    return {"text": text, "measure": measure, "contrast": contrast, "sign": -1 if measure in LESS_IS_BETTER else 1}


def at_best(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> Row:
    """The claim that one setting is better than another, each at its own best learning rate."""
    text = f"{text}, each at its best rate"
    return beats(text, better, worse, measure, learning_rate="best", **common)


def both_beat(claim: Callable[..., Row], text: str, measure: str = "accuracy", **common: Any) -> list[Row]:
    """Claims, by `beats` or `at_best`, that zero_sum and positive_sum beat the baseline; the text has {} for them."""
    return [claim(text.format(two["strategy"]), two, BASELINE, measure, **common) for two in TWO]


def tuned(prefix: str = "", measure: str = "accuracy", strategies: Iterable[Row] = TWO, **common: Any) -> list[Row]:
    """Claims about strategies and their components, each at its own best learning rate."""
    pairs = [(component, "baseline") for component in COMPONENTS] + [("both", "direction"), ("both", "norm")]
    return [at_best(*_pair(prefix, two, *pair), measure, **common) for two in strategies for pair in pairs]


def at_each(prefix: str, values: Iterable[float], **common: Any) -> list[Row]:
    """Claims about components at the same learning rate."""
    pairs = (("both", "baseline"), ("both", "norm"), ("direction", "baseline"))
    return [
        beats(*_pair(f"{prefix} {rate:g}, ", two, *pair), learning_rate=rate, **common)
        for rate in values
        for two in TWO
        for pair in pairs
    ]


def _pair(prefix: str, two: Row, better: str, worse: str) -> tuple[str, Row, Row]:
    """A text, and a component of a strategy beside another one or the baseline."""
    text = f"{prefix}{two['strategy']}: {better} beats {'the ' if worse == 'baseline' else ''}{worse}"
    first, second = (BASELINE if name == "baseline" else {**two, "component": name} for name in (better, worse))
    return text, first, second


# Top-K MLPs.


def _mechanism(name: str, optimizers: dict[str, tuple[float, ...]], tune: bool) -> Section:
    wheres, claims = [], []
    for optimizer, values in optimizers.items():
        wheres += product(({"optimizer": optimizer},), rates(*values), VARIANTS)
        claims += tuned(f"{optimizer}, ", optimizer=optimizer) if tune else []
        claims += at_each(optimizer, values, optimizer=optimizer)
    return ours(name, wheres, claims)


def _picture_of_deep_digits(name: str, measure: str, *texts: tuple[str, Row]) -> Section:
    """Figure 4 or 5 at the rate of `deep_digits` at which Excitation trains what the baseline does not."""
    claims = [
        beats(text.format(two["strategy"]), two, BASELINE, measure, learning_rate=1e-3) | more
        for two in TWO
        for text, more in texts
    ]
    return ours(name, product(rates(1e-3), (BASELINE, *TWO)), claims)


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
        claims.append(at_best(text, {**way, **BASELINE}, {**TORCH, **ZERO_SUM}))
        claims += both_beat(at_best, f"{name}: {{}} beats the baseline there", **way)
    return ours("deep_ways_out", product(WAYS.values(), rates(3e-4, 1e-3, 3e-3), (BASELINE, *TWO)), claims)


def _depth() -> Section:
    depths = (4, 6, 8, 10, 12, 16, 20, 30)
    text = "{} hidden layers: {{}} beats the baseline"
    claims = [claim for d in depths for claim in both_beat(at_best, text.format(d), depth=d)]
    return ours("depth_digits", product(grid(depth=depths), rates(3e-4, 1e-3, 3e-3, 1e-2), (BASELINE, *TWO)), claims)


def _rescue() -> Section:
    claims = at_each("adam", (1e-3, 1e-4))
    for strategy, rate in (("zero_sum", 1e-3), ("positive_sum", 1e-3), ("zero_sum", 1e-4)):
        better = {"strategy": strategy, "learning_rate": rate}
        for other in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
            if other != rate:
                text = f"{strategy} at {rate:g} beats the baseline at {other:g}"
                claims.append(beats(text, better, {**BASELINE, "learning_rate": other}))
    wheres = product(rates(1e-3, 1e-4), VARIANTS) + product(rates(3e-4, 3e-3, 1e-2, 3e-2), (BASELINE,))
    return ours("rescue", wheres, claims)


def _torch_long() -> Section:
    """Three hidden layers and 100 epochs first: they decide the question with a third of the work."""
    optimizers, three = (search.SGD, search.ADAM), (BASELINE, *TWO)
    short = lambda depth: product(grid(depth=(depth,), epochs=(100,)), optimizers, three)
    frozen = product(grid(initialization=("lecun_normal",)), short(3))  # on file, as the full length of Table 1
    wheres = short(3) + frozen + short(4) + product(grid(depth=(3, 4), epochs=(300,)), optimizers, (BASELINE,))
    claims = []
    for common in product(grid(depth=(3, 4), epochs=(100,)), optimizers):
        text = f"{common['depth']} hidden layers, {common['optimizer']}: {{}} beats the baseline"
        claims += both_beat(beats, text, **common)
    section = ours("torch_long", wheres, claims, table=tables.beside_the_paper)
    key = lambda row: (row["where"]["optimizer"], row["where"]["strategy"])
    printed = {key(row): row["value"] for row in sections.paper()["table1"].rows}
    return dataclasses.replace(section, rows=tuple(row | {"value": printed[key(row)]} for row in section.rows))


# Transformers in miniature.

BALANCED: Row = {"load_balancing": 0.01}
BIASED: Row = {**UNBALANCED, "router_bias": 1e-3}  # DeepSeek-V3's rate
OTHERS: dict[str, Row] = {
    "zero_sum with gamma 0.5": {**ZERO_SUM, "gamma": 0.5},
    "half the experts' rate": {**BASELINE, "expert_rate": 0.5},
    "twice the experts' rate": {**BASELINE, "expert_rate": 2.0},
    "no balancing loss": {**BASELINE, **UNBALANCED},
}


def _tuned(measure: str, strategies: tuple[Row, ...], others: dict[str, Row], *more: Row) -> list[Row]:
    """Claims at tuned rates."""
    claims = tuned("", measure, strategies)
    claims += [at_best(f"{name} beats the baseline", other, BASELINE, measure) for name, other in others.items()]
    text = "{} beats the baseline at the baseline's best rate"
    return [*claims, *more, *both_beat(beats, text, measure, learning_rate="baseline's best")]


def _mini_tuned() -> Section:
    others = {**OTHERS, "zero_sum without a balancing loss": {**ZERO_SUM, **UNBALANCED}}
    text = "without a balancing loss, zero_sum beats the baseline"
    claims = _tuned("loss", TWO, others, at_best(text, ZERO_SUM, BASELINE, "loss", **UNBALANCED))
    return ours("mini_tuned", product(rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2), (*VARIANTS, *others.values())), claims)


def _mini_bias() -> Section:
    bias, loss, none = BIASED, {}, UNBALANCED
    base, zero = ([{**strategy, **way} for way in (bias, loss, none)] for strategy in (BASELINE, ZERO_SUM))
    pairs = (
        ("the baseline with a router bias {} the baseline with a balancing loss", base[0], base[1]),
        ("the baseline with a router bias {} the baseline with neither", base[0], base[2]),
        ("with a router bias, zero_sum {} the baseline", zero[0], base[0]),
        ("zero_sum with a balancing loss {} the baseline with a router bias", zero[1], base[0]),
        ("zero_sum with neither {} the baseline with a router bias", zero[2], base[0]),
    )
    claims = [at_best(text.format("beats"), better, worse, "loss") for text, better, worse in pairs]
    more_even = "has a more even load than"
    claims += [at_best(text.format(more_even), better, worse, "max_load") for text, better, worse in pairs[:3]]
    return ours("mini_bias", product(rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2), (*base, *zero)), claims)


def _mini_vit() -> Section:
    others = {"positive_sum": POSITIVE_SUM, **OTHERS}
    variants = (BASELINE, *product((ZERO_SUM,), grid(component=COMPONENTS)), *others.values())
    claims = _tuned("accuracy", (ZERO_SUM,), others)
    return ours("mini_vit", product(rates(1e-3, 3e-4, 2e-3, 4e-3, 1e-2), variants), claims)


def _mini_unbalanced() -> Section:
    sizes, claims = grid(num_experts=(64, 16), experts_per_token=(2, 1)), []
    for size in sizes:
        label = f"E={size['num_experts']}, K={size['experts_per_token']}"
        for balancing, kind in ((UNBALANCED, "without a balancing loss"), (BALANCED, "with a balancing loss")):
            claims += both_beat(at_best, f"{label}, {kind}: {{}} beats the baseline", "loss", **size, **balancing)
        text = f"{label}: zero_sum without a balancing loss beats the baseline with it"
        claims.append(at_best(text, {**ZERO_SUM, **UNBALANCED}, {**BASELINE, **BALANCED}, "loss", **size))
    variants = (BASELINE, POSITIVE_SUM, *product((ZERO_SUM,), grid(component=COMPONENTS)))
    return ours("mini_unbalanced", product(sizes, (UNBALANCED, BALANCED), rates(1e-3, 3e-3, 1e-2), variants), claims)


def _mini_plain() -> Section:
    depths = (4, 8)
    claims = [
        claim
        for d in depths
        for claim in both_beat(at_best, f"{d} layers: {{}} beats the baseline", "loss", num_layers=d)
    ]
    wheres = product(grid(num_layers=depths), rates(1e-3, 3e-3, 1e-2), (BASELINE, *TWO))
    return ours("mini_plain", wheres, claims)


def _mini_table2() -> Section:
    pairs = [(4, 2), (8, 2), (8, 4), *((n, k) for n in (16, 32, 64) for k in (2, 4, 8))]
    sizes = tuple({"num_experts": n, "experts_per_token": k} for n, k in pairs)
    two = (BASELINE, POSITIVE_SUM)
    cells = product(sizes, grid(d_ff=(32, 48, 64, 96, 128)), rates(3e-3))
    wheres = product(cells, two) + product(sizes, grid(d_ff=(32, 128)), rates(1e-3, 1e-2), two)

    def gain(text: str, larger: Sequence[Row], smaller: Sequence[Row] = ()) -> Row:
        """The claim that positive_sum saves loss, on average over models, or more of it than on average over others."""
        terms = [(1 / len(larger), where) for where in larger] + [(-1 / len(smaller), where) for where in smaller]
        contrast = [[s * f, {**where, **e}] for f, where in terms for s, e in zip((1, -1), two, strict=True)]
        return {"text": text, "measure": "loss", "contrast": contrast, "sign": 1}

    of = lambda k, *ns: [c for c in cells if c["num_experts"] in ns and c["experts_per_token"] == k]
    saved = "loss that positive_sum saves at 0.003"
    larger = "the gain is larger with k=2 than with k=8, mean of N=16, 32, 64"
    claims = [
        *(
            gain("N={num_experts}, k={experts_per_token}, d_ff={d_ff}: ".format(**cell) + saved, [cell])
            for cell in cells
        ),
        gain(f"{saved}, mean of all 60 models", list(cells)),
        gain(larger, of(2, 16, 32, 64), of(8, 16, 32, 64)),
    ]
    for more, fewer in ((8, 4), (8, 32), (64, 32)):
        claims.append(gain(f"k=2: the gain is larger at N={more} than at N={fewer}", of(2, more), of(2, fewer)))
    return ours("mini_table2", wheres, claims)


SGD_RATES, ADAM_RATES = (0.02, 0.05, 0.1, 0.3, 1.0, 3.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STUDIES = (
    _mechanism("mechanism", {"sgd": (0.01, 0.1, 0.3), "adam": (1e-4, 1e-3, 3e-3)}, tune=False),
    _mechanism("mechanism_digits", {"sgd": SGD_RATES, "adam": ADAM_RATES}, tune=True),
    ours(
        "deep_digits",
        product(rates(1e-3, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2), VARIANTS),
        tuned() + at_each("adam", (1e-3,)),
    ),
    _picture_of_deep_digits(
        "fig4_torch",
        "specialization",
        ("{} specializes more than the baseline, mean of all layers", {}),
        ("{}: the same, mean of the middle half of the layers", {"layers": "middle"}),
    ),
    _picture_of_deep_digits(
        "fig5_torch",
        "entropy",
        ("{} ends at lower entropy than the baseline", {}),
        ("{} is lower after a fifth of the training already", {"at": 0.2}),
    ),
    _ways_out(),
    _depth(),
    _rescue(),
    ours(
        "rescue_sgd",
        product(rates(0.1, 0.01), VARIANTS) + product(rates(0.03, 0.3), (BASELINE,)),
        at_each("sgd", (0.1, 0.01)),
    ),
    _torch_long(),
    _mini_tuned(),
    _mini_bias(),
    _mini_vit(),
    _mini_unbalanced(),
    _mini_plain(),
    _mini_table2(),
)

# All sections, in the order of the report.
SECTIONS: dict[str, Section] = sections.paper() | {section.name: section for section in (*search.SEARCH, *STUDIES)}
