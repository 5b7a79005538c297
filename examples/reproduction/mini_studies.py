"""Our studies of transformers in miniature: at tuned learning rates, with and without balancing, and Table 2."""

import functools

from examples.reproduction.claims import (
    BALANCED,
    BASELINE,
    BIASED,
    COMPONENTS,
    POSITIVE_SUM,
    TWO,
    UNBALANCED,
    VARIANTS,
    ZERO_SUM,
    at_best,
    beats,
    rates,
    study,
    tuned,
)
from examples.reproduction.sections import Row, Section, grid, product

_gpt = functools.partial(study, kind="mini_gpt", settings={"dataset": "tinyshakespeare"})
RATES = rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2)
OTHERS: dict[str, Row] = {
    "zero_sum with gamma 0.5": {**ZERO_SUM, "gamma": 0.5},
    "half the experts' rate": {**BASELINE, "expert_rate": 0.5},
    "twice the experts' rate": {**BASELINE, "expert_rate": 2.0},
    "no balancing loss": {**BASELINE, **UNBALANCED},
}


def _tuned(measure: str, strategies: tuple[Row, ...], others: dict[str, Row]) -> list[Row]:
    """Claims at tuned rates."""
    claims = tuned("", measure, strategies)
    claims += [at_best(f"{name} beats the baseline", other, BASELINE, measure) for name, other in others.items()]
    text, rate = "{} beats the baseline at the baseline's best rate", "baseline's best"
    by_baseline = [beats(text.format(two["strategy"]), two, BASELINE, measure, learning_rate=rate) for two in TWO]
    return claims + by_baseline


def _mini_tuned() -> Section:
    others = {**OTHERS, "zero_sum without a balancing loss": {**ZERO_SUM, **UNBALANCED}}
    *claims, first, second = _tuned("loss", TWO, others)
    text = "without a balancing loss, zero_sum beats the baseline"
    return _gpt(
        "mini_tuned",
        "A GPT-MoE in miniature (16 experts, 2 for each token) at tuned learning rates",
        product(RATES, (*VARIANTS, *others.values())),
        [*claims, at_best(text, ZERO_SUM, BASELINE, "loss", **UNBALANCED), first, second],
    )


def _mini_bias() -> Section:
    """The runs without a router bias are those of `mini_tuned`."""
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
    title = "The GPT-MoE in miniature with a router bias instead of the balancing loss"
    return _gpt("mini_bias", title, product(RATES, (*base, *zero)), claims)


def _mini_vit() -> Section:
    others = {"positive_sum": POSITIVE_SUM, **OTHERS}
    variants = (BASELINE, *product((ZERO_SUM,), grid(component=COMPONENTS)), *others.values())
    return study(
        "mini_vit",
        "A MoE-ViT in miniature (64 experts, 2 for each patch) at tuned learning rates",
        product(rates(1e-3, 3e-4, 2e-3, 4e-3, 1e-2), variants),
        _tuned("accuracy", (ZERO_SUM,), others),
        kind="mini_vit",
        seeds=3,
        settings={"dataset": "cifar10", "epochs": 8},
    )


def _mini_unbalanced() -> Section:
    sizes, claims = grid(num_experts=(64, 16), experts_per_token=(2, 1)), []
    for size in sizes:
        label = f"E={size['num_experts']}, K={size['experts_per_token']}"
        for balancing, kind in ((UNBALANCED, "without a balancing loss"), (BALANCED, "with a balancing loss")):
            text = f"{label}, {kind}: {{}} beats the baseline"
            both = {**size, **balancing}
            claims += [at_best(text.format(two["strategy"]), two, BASELINE, "loss", **both) for two in TWO]
        text = f"{label}: zero_sum without a balancing loss beats the baseline with it"
        claims.append(at_best(text, {**ZERO_SUM, **UNBALANCED}, {**BASELINE, **BALANCED}, "loss", **size))
    variants = (BASELINE, POSITIVE_SUM, *product((ZERO_SUM,), grid(component=COMPONENTS)))
    wheres = product(sizes, (UNBALANCED, BALANCED), rates(1e-3, 3e-3, 1e-2), variants)
    title = "GPT-MoEs in miniature with and without a balancing loss"
    return _gpt("mini_unbalanced", title, wheres, claims, seeds=3, draw=())


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
    return _gpt("mini_table2", "Table 2 in miniature", wheres, claims, seeds=3, draw=())


STUDIES = (_mini_tuned(), _mini_bias(), _mini_vit(), _mini_unbalanced(), _mini_table2())
