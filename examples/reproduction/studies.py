"""Our own studies: questions that the paper leaves open, as sections of the same form as the paper's.

* mechanism: does Excitation work by the direction of a layer's step or by its length?
* deep, depth, ways_out, rescue: deep networks that the baseline does not train, and other ways to train them.
* mini: transformers in miniature, at tuned learning rates, with and without a balancing loss.

A learning rate "best" in a claim is the rate of the row's best mean on held-out data; "baseline's best" is the best
rate of the same row without Excitation. See results/PLAN.md.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from examples.reproduction import search, sections, tables
from examples.reproduction.sections import Row, Section, grid, product, rows, words

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
AT_BEST = "each at its best rate"
LESS_IS_BETTER = ("loss", "entropy", "max_load")


def rates(*values: float) -> tuple[Row, ...]:
    """Parts of settings: learning rates."""
    return grid(learning_rate=values)


def beats(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> Row:
    """The claim that one setting is better than another: more accurate, or of a smaller loss."""
    contrast = [[1.0, {**common, **better}], [-1.0, {**common, **worse}]]
    return {"text": text, "measure": measure, "contrast": contrast, "sign": -1 if measure in LESS_IS_BETTER else 1}


def tuned(prefix: str, measure: str = "accuracy", strategies: Iterable[Row] = TWO, **common: Any) -> list[Row]:
    """Claims about strategies and their components, each at its own best learning rate."""
    claims = []
    for two in strategies:
        part = {c: {**two, "component": c} for c in COMPONENTS}
        pairs = [(part[c], BASELINE, f"{c} beats the baseline") for c in COMPONENTS]
        pairs += [(part["both"], part[c], f"both beats {c}") for c in ("direction", "norm")]
        for better, worse, text in pairs:
            text = f"{prefix}{two['strategy']}: {text}, {AT_BEST}"
            claims.append(beats(text, better, worse, measure, **BEST, **common))
    return claims


def at_each(prefix: str, values: Iterable[float], **common: Any) -> list[Row]:
    """Claims about components at the same learning rate."""
    claims = []
    for rate in values:
        for two in TWO:
            both, direction, norm = ({**two, "component": c} for c in COMPONENTS)
            pairs = [(both, BASELINE, "both beats the baseline"), (both, norm, "both beats norm")]
            for better, worse, text in [*pairs, (direction, BASELINE, "direction beats the baseline")]:
                text = f"{prefix} {rate:g}, {two['strategy']}: {text}"
                claims.append(beats(text, better, worse, learning_rate=rate, **common))
    return claims


def study(name: str, title: str, wheres: Iterable[Row], claims: Iterable[Row] = (), **fields: Any) -> Section:
    """A section for a study: a picture and a table over the learning rate, and claims with a correction."""
    measure = fields.get("measure", "loss" if fields.get("kind") == "mini_gpt" else "accuracy")
    every: Row = {"seeds": 5, "table": tables.by_rate, "measure": measure, "in_study": True}
    return Section(name, title, rows=rows(wheres, measure), claims=tuple(claims), **every | fields)


def _mechanism(name: str, title: str, optimizers: dict[str, tuple[float, ...]], tune: bool, **fields: Any) -> Section:
    wheres, claims = [], []
    for optimizer, values in optimizers.items():
        wheres += product(({"optimizer": optimizer},), rates(*values), VARIANTS)
        claims += tuned(f"{optimizer}, ", optimizer=optimizer) if tune else []
        claims += at_each(optimizer, values, optimizer=optimizer)
    return study(name, title, wheres, claims, draw=("over_rates",), **fields)


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
        text = f"{name}: the baseline beats zero_sum in the plain network, {AT_BEST}"
        claims.append(beats(text, {**way, **BASELINE}, {**WAYS["plain"], **ZERO_SUM}, **BEST))
        for two in TWO:
            text = f"{name}: {two['strategy']} beats the baseline there, {AT_BEST}"
            claims.append(beats(text, two, BASELINE, **BEST, **way))
    wheres = product(WAYS.values(), rates(3e-4, 1e-3, 3e-3), (BASELINE, *TWO))
    title, settings = "Other ways to train 14 hidden layers on digits", {**DIGITS, "depth": 14, "optimizer": "adam"}
    return study("deep_ways_out", title, wheres, claims, settings=settings, draw=("over_rates",))


def _depth() -> Section:
    depths = (4, 6, 8, 10, 12, 16, 20, 30)
    text = "{} hidden layers: {} beats the baseline, {}"
    claims = [
        beats(text.format(depth, two["strategy"], AT_BEST), two, BASELINE, depth=depth, **BEST)
        for depth in depths
        for two in TWO
    ]
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
        draw=("over_rates",),
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
    section = study("torch_long", "PyTorch's initialization at full length", wheres, claims, seeds=3, settings=TORCH)
    key = lambda where: (where["optimizer"], where["strategy"])
    paper = {key(row["where"]): row["value"] for row in sections.paper()["table1"].rows}
    rows = (_in_picture(row, value=paper[key(row["where"])]) for row in section.rows)
    note = ". The paper's values are those of Table 1"
    return dataclasses.replace(section, rows=tuple(rows), table=tables.beside_the_paper, note=note)


_mini = functools.partial(study, kind="mini_gpt", settings={"dataset": "tinyshakespeare"})


OTHERS: dict[str, Row] = {
    "zero_sum with gamma 0.5": {**ZERO_SUM, "gamma": 0.5},
    "half the experts' rate": {**BASELINE, "expert_rate": 0.5},
    "twice the experts' rate": {**BASELINE, "expert_rate": 2.0},
    "no balancing loss": {**BASELINE, **UNBALANCED},
}


def _mini_tuned() -> Section:
    others = {**OTHERS, "zero_sum without a balancing loss": {**ZERO_SUM, **UNBALANCED}}
    claims = tuned("", "loss")
    claims += [beats(f"{n} beats the baseline, {AT_BEST}", o, BASELINE, "loss", **BEST) for n, o in others.items()]
    text = f"without a balancing loss, zero_sum beats the baseline, {AT_BEST}"
    claims.append(beats(text, ZERO_SUM, BASELINE, "loss", **BEST, **UNBALANCED))
    for two in TWO:
        text = f"{two['strategy']} beats the baseline at the baseline's best rate"
        claims.append(beats(text, two, BASELINE, "loss", learning_rate="baseline's best"))
    return _mini(
        "mini_tuned",
        "A GPT-MoE in miniature (16 experts, 2 for each token) at tuned learning rates",
        product(rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2), (*VARIANTS, *others.values())),
        claims,
        draw=("over_rates",),
    )


def _mini_bias() -> Section:
    """The runs without a router bias are those of `mini_tuned`."""
    ways = {"a router bias": BIASED, "a balancing loss": {}, "neither": UNBALANCED}
    excited = [{**ZERO_SUM, **way} for way in ways.values()]
    baselines = dict(zip(ways, ({**BASELINE, **way} for way in ways.values()), strict=True))
    biased, claims = baselines["a router bias"], []
    for other in ("a balancing loss", "neither"):
        text = f"the baseline with a router bias {{}} the baseline with {other}, {AT_BEST}"
        claims.append(beats(text.format("beats"), biased, baselines[other], "loss", **BEST))
        text = text.format("has a more even load than")
        claims.append(beats(text, biased, baselines[other], "max_load", **BEST))
    text = f"with a router bias, zero_sum {{}} the baseline, {AT_BEST}"
    claims.append(beats(text.format("beats"), excited[0], biased, "loss", **BEST))
    claims.append(beats(text.format("has a more even load than"), excited[0], biased, "max_load", **BEST))
    text = f"zero_sum with {{}} beats the baseline with a router bias, {AT_BEST}"
    claims.append(beats(text.format("a balancing loss"), excited[1], biased, "loss", **BEST))
    claims.append(beats(text.format("neither"), excited[2], biased, "loss", **BEST))
    return _mini(
        "mini_bias",
        "The GPT-MoE in miniature with a router bias instead of the balancing loss",
        product(rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2), (*baselines.values(), *excited)),
        claims,
        draw=("over_rates",),
    )


def _mini_vit() -> Section:
    claims = tuned("", strategies=(ZERO_SUM,))
    others = {"positive_sum": POSITIVE_SUM, **OTHERS}
    claims += [beats(f"{name} beats the baseline, {AT_BEST}", o, BASELINE, **BEST) for name, o in others.items()]
    for two in TWO:
        text = f"{two['strategy']} beats the baseline at the baseline's best rate"
        claims.append(beats(text, two, BASELINE, learning_rate="baseline's best"))
    variants = (BASELINE, *product((ZERO_SUM,), grid(component=COMPONENTS)), *others.values())
    return study(
        "mini_vit",
        "A MoE-ViT in miniature (64 experts, 2 for each patch) at tuned learning rates",
        product(rates(1e-3, 3e-4, 2e-3, 4e-3, 1e-2), variants),
        claims,
        kind="mini_vit",
        seeds=3,
        settings={"dataset": "cifar10", "epochs": 8},
        draw=("over_rates",),
    )


def _mini_unbalanced() -> Section:
    sizes, claims = grid(num_experts=(64, 16), experts_per_token=(2, 1)), []
    for size in sizes:
        label = f"E={size['num_experts']}, K={size['experts_per_token']}"
        for balancing, kind in ((UNBALANCED, "without a balancing loss"), (BALANCED, "with a balancing loss")):
            for two in TWO:
                text = f"{label}, {kind}: {two['strategy']} beats the baseline, {AT_BEST}"
                claims.append(beats(text, two, BASELINE, "loss", **size, **balancing, **BEST))
        text = f"{label}: zero_sum without a balancing loss beats the baseline with it, {AT_BEST}"
        claims.append(beats(text, {**ZERO_SUM, **UNBALANCED}, {**BASELINE, **BALANCED}, "loss", **size, **BEST))
    variants = (BASELINE, POSITIVE_SUM, *product((ZERO_SUM,), grid(component=COMPONENTS)))
    wheres = product(sizes, (UNBALANCED, BALANCED), rates(1e-3, 3e-3, 1e-2), variants)
    return _mini("mini_unbalanced", "GPT-MoEs in miniature with and without a balancing loss", wheres, claims, seeds=3)


def _mini_table2() -> Section:
    """Table 2 with an eighth of its model width and expert width, and 2 of its 12 layers."""
    pairs = [(4, 2), (8, 2), (8, 4), *((n, k) for n in (16, 32, 64) for k in (2, 4, 8))]
    sizes = tuple({"num_experts": n, "experts_per_token": k} for n, k in pairs)
    two = (BASELINE, POSITIVE_SUM)
    cells = product(sizes, grid(d_ff=(32, 48, 64, 96, 128)), rates(3e-3))
    wheres = product(cells, two) + product(sizes, grid(d_ff=(32, 128)), rates(1e-3, 1e-2), two)

    def gain(text: str, *groups: tuple[float, list[Row]]) -> Row:
        """The claim that a sum of mean gains is positive."""
        terms = [(factor / len(group), where) for factor, group in groups for where in group]
        contrast = [[s * f, {**where, **e}] for f, where in terms for s, e in zip((1, -1), two, strict=True)]
        return {"text": text, "measure": "loss", "contrast": contrast, "sign": 1}

    of = lambda k, *ns: [c for c in cells if c["num_experts"] in ns and c["experts_per_token"] == k]
    text = "N={num_experts}, k={experts_per_token}, d_ff={d_ff}: loss that positive_sum saves at 0.003"
    larger, mean = "the gain is larger with k=2 than with k=8, mean of N=16, 32, 64", "mean of all 60 models"
    claims = [
        *(gain(text.format(**cell), (1.0, [cell])) for cell in cells),
        gain(f"loss that positive_sum saves at 0.003, {mean}", (1.0, list(cells))),
        gain(larger, (1.0, of(2, 16, 32, 64)), (-1.0, of(8, 16, 32, 64))),
        *(
            gain(f"k=2: the gain is larger at N={a} than at N={b}", (1.0, of(2, a)), (-1.0, of(2, b)))
            for a, b in ((8, 4), (8, 32), (64, 32))
        ),
    ]
    return _mini("mini_table2", "Table 2 in miniature", wheres, claims, seeds=3)


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
        draw=("over_rates",),
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
        draw=("over_rates",),
    ),
    _torch_baseline(),
    _mini_tuned(),
    _mini_bias(),
    _mini_vit(),
    _mini_unbalanced(),
    _mini_table2(),
)

# All sections, in the order of the report.
SECTIONS: dict[str, Section] = sections.paper() | {section.name: section for section in (*search.SEARCH, *STUDIES)}
