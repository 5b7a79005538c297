"""Our own studies: what the paper leaves out, as runs and claims of the same form as the paper's.

* mechanism: does Excitation work by the direction of a layer's step or by its length?
* deep, depth, ways_out, rescue: deep networks that the baseline does not train, and other ways to train them.
* mini: transformers in miniature, at tuned learning rates, with and without a balancing loss.

A learning rate "best" in a claim is the rate of the row's best mean on held-out data; "baseline's best" is the best
rate of the same row without Excitation. See results/PLAN.md.
"""

from typing import Any

from examples.reproduction import configs

Row = dict[str, Any]
BASELINE: Row = {"strategy": "vanilla"}
ZERO_SUM, POSITIVE_SUM = ({"strategy": name} for name in ("zero_sum", "positive_sum"))
COMPONENTS = ("both", "direction", "norm")
VARIANTS: tuple[Row, ...] = (
    BASELINE,
    *({"strategy": s, "component": c} for s in ("zero_sum", "positive_sum") for c in COMPONENTS),
)
# Scikit-learn's digits: the last 157 training images are held out.
DIGITS: Row = {"dataset": "digits", "subset": 1280, "batch_size": 128, "schedule": "constant", "epochs": 100}
MINI: Row = {"dataset": "tinyshakespeare"}


def product(*choices: tuple[Row, ...]) -> tuple[Row, ...]:
    """A row for each combination of parts of rows; the last part varies fastest."""
    rows: tuple[Row, ...] = ({},)
    for parts in choices:
        rows = tuple({**row, **part} for row in rows for part in parts)
    return rows


def rates(*values: float) -> tuple[Row, ...]:
    """Parts of rows: learning rates."""
    return tuple({"learning_rate": value} for value in values)


def beats(text: str, better: Row, worse: Row, measure: str = "accuracy", **common: Any) -> dict[str, Any]:
    """The claim that one row is better than another: more accurate, or of a smaller loss."""
    contrast = [[1.0, {**common, **better}], [-1.0, {**common, **worse}]]
    return {"text": text, "measure": measure, "contrast": contrast, "sign": -1 if measure == "loss" else 1}


def tuned(prefix: str, measure: str = "accuracy", **common: Any) -> list[dict[str, Any]]:
    """Claims about both strategies and their components, each at its own best learning rate."""
    claims = []
    for strategy in ("zero_sum", "positive_sum"):
        part = {c: {"strategy": strategy, "component": c} for c in COMPONENTS}
        pairs = [(part[c], BASELINE, f"{c} beats the baseline") for c in COMPONENTS]
        pairs += [(part["both"], part[c], f"both beats {c}") for c in ("direction", "norm")]
        claims += [
            beats(f"{prefix}{strategy}: {text}, each at its best rate", a, b, measure, learning_rate="best", **common)
            for a, b, text in pairs
        ]
    return claims


def at_each(prefix: str, values: tuple[float, ...], measure: str = "accuracy", **common: Any) -> list[dict[str, Any]]:
    """Claims about components at the same learning rate."""
    claims = []
    for rate in values:
        for strategy in ("zero_sum", "positive_sum"):
            part = {c: {"strategy": strategy, "component": c} for c in COMPONENTS}
            pairs = [
                (part["both"], BASELINE, "both beats the baseline"),
                (part["both"], part["norm"], "both beats norm"),
            ]
            pairs += [(part["direction"], BASELINE, "direction beats the baseline")]
            claims += [
                beats(f"{prefix} {rate:g}, {strategy}: {text}", a, b, measure, learning_rate=rate, **common)
                for a, b, text in pairs
            ]
    return claims


def label(row: Row) -> str:
    """A row without its learning rate, in words."""
    names = [row[key] for key in ("strategy", "component") if key in row]
    words = ["baseline" if name == "vanilla" else name for name in names]
    rest = [
        value if key == "optimizer" else f"{key.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
        for key, value in row.items()
        if key not in ("strategy", "component", "learning_rate")
    ]
    return ", ".join(rest + words)


def _mechanism(
    name: str, title: str, settings: Row, seeds: int, by_optimizer: dict[str, tuple[float, ...]], tune: bool
):
    rows, claims = [], []
    for optimizer, values in by_optimizer.items():
        rows += product(({"optimizer": optimizer},), rates(*values), VARIANTS)
        claims += tuned(f"{optimizer}, ", optimizer=optimizer) if tune else []
        claims += at_each(optimizer, values, optimizer=optimizer)
    return configs.Experiment(name, title, seeds=seeds, settings=settings, rows=tuple(rows), claims=tuple(claims))


def _deep() -> configs.Experiment:
    values = (1e-3, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2)
    claims = tuned("") + at_each("adam", (1e-3,))
    return configs.Experiment(
        "deep_digits",
        "14 hidden layers on digits, PyTorch's initialization",
        seeds=10,
        settings={**DIGITS, "depth": 14, "initialization": "torch", "optimizer": "adam"},
        rows=product(rates(*values), VARIANTS),
        claims=tuple(claims),
    )


WAYS: dict[str, Row] = {
    "plain": {"initialization": "torch"},
    "LeCun-normal": {"initialization": "lecun_normal"},
    "He-normal": {"initialization": "he_normal"},
    "residual": {"initialization": "torch", "residual": True},
    "LayerNorm": {"initialization": "torch", "layer_norm": True},
    "Adam's epsilon 1e-16": {"initialization": "torch", "epsilon": 1e-16},
}


def _ways_out() -> configs.Experiment:
    strategies = (BASELINE, ZERO_SUM, POSITIVE_SUM)
    rows = product(tuple(WAYS.values()), rates(3e-4, 1e-3, 3e-3), strategies)
    best, excited = {"learning_rate": "best"}, {**WAYS["plain"], **ZERO_SUM}
    claims = []
    for name, way in list(WAYS.items())[1:]:
        text = f"{name}: the baseline beats zero_sum in the plain network, each at its best rate"
        claims.append(beats(text, {**way, **BASELINE}, excited, **best))
        for strategy in ("zero_sum", "positive_sum"):
            text = f"{name}: {strategy} beats the baseline there, each at its best rate"
            claims.append(beats(text, {"strategy": strategy}, BASELINE, **best, **way))
    return configs.Experiment(
        "deep_ways_out",
        "Other ways to train 14 hidden layers on digits",
        seeds=5,
        settings={**DIGITS, "depth": 14, "optimizer": "adam"},
        rows=rows,
        claims=tuple(claims),
    )


def _depth() -> configs.Experiment:
    depths = (4, 6, 8, 10, 12, 16, 20, 30)
    rows = product(configs.grid(depth=depths), rates(3e-4, 1e-3, 3e-3, 1e-2), (BASELINE, ZERO_SUM, POSITIVE_SUM))
    claims = [
        beats(
            f"{depth} hidden layers: {strategy} beats the baseline, each at its best rate",
            {"strategy": strategy},
            BASELINE,
            depth=depth,
            learning_rate="best",
        )
        for depth in depths
        for strategy in ("zero_sum", "positive_sum")
    ]
    return configs.Experiment(
        "depth_digits",
        "From 4 to 30 hidden layers on digits, PyTorch's initialization",
        seeds=5,
        settings={**DIGITS, "initialization": "torch", "optimizer": "adam"},
        rows=rows,
        claims=tuple(claims),
    )


def _rescue() -> configs.Experiment:
    """Of the paper's 20 layers one is the output layer, as in Figure 3."""
    excited = product(rates(1e-3, 1e-4), VARIANTS)
    baselines = product(rates(3e-4, 3e-3, 1e-2, 3e-2), (BASELINE,))
    claims = at_each("adam", (1e-3, 1e-4))
    for strategy, rate in (("zero_sum", 1e-3), ("positive_sum", 1e-3), ("zero_sum", 1e-4)):
        claims += [
            beats(
                f"{strategy} at {rate:g} beats the baseline at {other:g}",
                {"strategy": strategy, "learning_rate": rate},
                BASELINE | {"learning_rate": other},
            )
            for other in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
            if other != rate
        ]
    return configs.Experiment(
        "rescue",
        "19 hidden layers on CIFAR-10, PyTorch's initialization",
        seeds=5,
        settings={"depth": 19, "initialization": "torch", "optimizer": "adam", "schedule": "constant", "epochs": 60},
        rows=excited + baselines,
        claims=tuple(claims),
    )


def _rescue_sgd() -> configs.Experiment:
    values = (0.1, 0.01)
    return configs.Experiment(
        "rescue_sgd",
        "9 hidden layers on CIFAR-10 with SGD, PyTorch's initialization",
        seeds=5,
        settings={"depth": 9, "initialization": "torch", "optimizer": "sgd", "schedule": "constant", "epochs": 60},
        rows=product(rates(*values), VARIANTS) + product(rates(0.03, 0.3), (BASELINE,)),
        claims=tuple(at_each("sgd", values)),
    )


def _torch_vanilla() -> configs.Experiment:
    optimizers = ({"optimizer": "sgd", "learning_rate": 0.01}, {"optimizer": "adam", "learning_rate": 1e-4})
    short = product(configs.grid(depth=(3, 4), epochs=(100,)), optimizers, (BASELINE, ZERO_SUM, POSITIVE_SUM))
    return configs.Experiment(
        "torch_long",
        "PyTorch's initialization at full length",
        settings={"initialization": "torch"},
        rows=short + product(configs.grid(depth=(3, 4), epochs=(300,)), optimizers, (BASELINE,)),
    )


UNBALANCED: Row = {"load_balancing": 0.0}


def _mini_tuned() -> configs.Experiment:
    variants = (
        *VARIANTS,
        {**ZERO_SUM, "gamma": 0.5},
        {**BASELINE, "expert_rate": 0.5},
        {**BASELINE, "expert_rate": 2.0},
        {**BASELINE, **UNBALANCED},
        {**ZERO_SUM, **UNBALANCED},
    )
    best, loss = {"learning_rate": "best"}, "loss"
    claims = tuned("", loss)
    others = {
        "zero_sum with gamma 0.5": {**ZERO_SUM, "gamma": 0.5},
        "half the experts' rate": {**BASELINE, "expert_rate": 0.5},
        "twice the experts' rate": {**BASELINE, "expert_rate": 2.0},
        "no balancing loss": {**BASELINE, **UNBALANCED},
        "zero_sum without a balancing loss": {**ZERO_SUM, **UNBALANCED},
    }
    claims += [
        beats(f"{n} beats the baseline, each at its best rate", o, BASELINE, loss, **best) for n, o in others.items()
    ]
    text = "without a balancing loss, zero_sum beats the baseline, each at its best rate"
    claims.append(beats(text, ZERO_SUM, BASELINE, loss, **best, **UNBALANCED))
    for strategy in ("zero_sum", "positive_sum"):
        common = {"learning_rate": "baseline's best"}
        claims.append(
            beats(
                f"{strategy} beats the baseline at the baseline's best rate",
                {"strategy": strategy},
                BASELINE,
                loss,
                **common,
            )
        )
    return configs.Experiment(
        "mini_tuned",
        "A GPT-MoE in miniature (16 experts, 2 for each token) at tuned learning rates",
        kind="mini_gpt",
        seeds=5,
        settings=MINI,
        rows=product(rates(1e-3, 3e-3, 1e-2, 2e-2, 3e-2), variants),
        claims=tuple(claims),
    )


def _mini_unbalanced() -> configs.Experiment:
    sizes = configs.grid(num_experts=(64, 16), experts_per_token=(2, 1))
    variants = (BASELINE, POSITIVE_SUM, *({**ZERO_SUM, "component": c} for c in COMPONENTS))
    rows = product(sizes, (UNBALANCED, {"load_balancing": 0.01}), rates(1e-3, 3e-3, 1e-2), variants)
    claims = []
    for size in sizes:
        label = f"E={size['num_experts']}, K={size['experts_per_token']}"
        for balancing in (UNBALANCED, {"load_balancing": 0.01}):
            common = {**size, **balancing, "learning_rate": "best"}
            kind = "without a balancing loss" if balancing is UNBALANCED else "with a balancing loss"
            for strategy in ("zero_sum", "positive_sum"):
                text = f"{label}, {kind}: {strategy} beats the baseline, each at its best rate"
                claims.append(beats(text, {"strategy": strategy}, BASELINE, "loss", **common))
        text = f"{label}: zero_sum without a balancing loss beats the baseline with it, each at its best rate"
        one, other = {**ZERO_SUM, **UNBALANCED}, {**BASELINE, "load_balancing": 0.01}
        claims.append(beats(text, one, other, "loss", **size, learning_rate="best"))
    return configs.Experiment(
        "mini_unbalanced",
        "GPT-MoEs in miniature with and without a balancing loss",
        kind="mini_gpt",
        seeds=3,
        settings=MINI,
        rows=rows,
        claims=tuple(claims),
    )


def _mini_table2() -> configs.Experiment:
    """Table 2 with an eighth of its model width and expert width, and 2 of its 12 layers."""
    pairs = [(4, 2), (8, 2), (8, 4), *((n, k) for n in (16, 32, 64) for k in (2, 4, 8))]
    sizes = tuple({"num_experts": n, "experts_per_token": k} for n, k in pairs)
    widths = configs.grid(d_ff=(32, 48, 64, 96, 128))
    two = (BASELINE, POSITIVE_SUM)
    rows = product(sizes, widths, rates(3e-3), two) + product(
        sizes, configs.grid(d_ff=(32, 128)), rates(1e-3, 1e-2), two
    )
    gain = lambda factor, where: [[factor, {**where, **BASELINE}], [-factor, {**where, **POSITIVE_SUM}]]
    cells = [{**size, **width, "learning_rate": 3e-3} for size in sizes for width in widths]

    def mean(text: str, sign: int, *groups: tuple[float, list[Row]]) -> dict[str, Any]:
        contrast = [term for factor, group in groups for where in group for term in gain(factor / len(group), where)]
        return {"text": text, "measure": "loss", "contrast": contrast, "sign": sign}

    of = lambda **where: [cell for cell in cells if where.items() <= cell.items()]
    claims = [
        mean(
            f"N={c['num_experts']}, k={c['experts_per_token']}, d_ff={c['d_ff']}: positive_sum lowers the loss",
            1,
            (1.0, [c]),
        )
        for c in cells
    ]
    large = lambda k: [cell for n in (16, 32, 64) for cell in of(num_experts=n, experts_per_token=k)]
    claims += [
        mean("positive_sum lowers the loss, mean of all 60 models", 1, (1.0, cells)),
        mean("the gain is larger with k=2 than with k=8, mean of N=16, 32, 64", 1, (1.0, large(2)), (-1.0, large(8))),
    ]
    k2 = lambda n: of(num_experts=n, experts_per_token=2)
    claims += [
        mean(f"k=2: the gain is larger at N={a} than at N={b}", 1, (1.0, k2(a)), (-1.0, k2(b)))
        for a, b in ((8, 4), (8, 32), (64, 32))
    ]
    return configs.Experiment(
        "mini_table2",
        "Table 2 in miniature",
        kind="mini_gpt",
        seeds=3,
        settings=MINI,
        rows=rows,
        claims=tuple(claims),
    )


STUDIES: dict[str, configs.Experiment] = {
    experiment.name: experiment
    for experiment in (
        _mechanism(
            "mechanism",
            "Direction or step length? CIFAR-10",
            {"epochs": 30},
            5,
            {"sgd": (0.01, 0.1, 0.3), "adam": (1e-4, 1e-3, 3e-3)},
            tune=False,
        ),
        _mechanism(
            "mechanism_digits",
            "Direction or step length? Digits, up to divergence",
            DIGITS,
            10,
            {"sgd": (0.02, 0.05, 0.1, 0.3, 1.0, 3.0), "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
            tune=True,
        ),
        _deep(),
        _ways_out(),
        _depth(),
        _rescue(),
        _rescue_sgd(),
        _torch_vanilla(),
        _mini_tuned(),
        _mini_unbalanced(),
        _mini_table2(),
    )
}

# The rows of the table in docs/does-it-help.md: a study, what the row's runs have in common, and the picture's range.
ANSWER: dict[str, tuple[str, Row, tuple[float, float] | None]] = {
    "3 layers, digits, SGD (points)": ("mechanism_digits", {"optimizer": "sgd"}, (80, 98)),
    "3 layers, digits, Adam (points)": ("mechanism_digits", {"optimizer": "adam"}, (80, 98)),
    "14 layers, digits, Adam (points)": ("deep_digits", {}, None),
    "GPT-MoE, text, AdamW (nats; less is better)": ("mini_tuned", {}, None),
}
