"""The sections of the report: one value for each table or figure of the paper, and for each study of ours.

A section holds what is specific to it: its runs, claims, remark, table and drawing. Those of the paper come from
`paper.json`, what the paper prints, and `paper.toml`, what we chose for it. Ours come from `ours.toml`, which explains
how it writes rows and claims.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

from examples.reproduction import configs

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """A table, a figure or a study.

    Rows and claims are dicts with a `measure` and a `contrast`, a linear combination of runs: `[[factor, where], ...]`.
    A row has the `where` that it is about, and in the paper a `label`, a `column` and a `value`. A claim has a `text`
    and a `sign`; in the paper a `source` and the `printed` difference; optionally `at`, the fraction of the training
    after which it is measured, and `layers`.
    """

    name: str
    title: str
    kind: str = "mlp"  # of its runs; "toy" and "overhead" have none
    seeds: int = 3
    settings: Row = dataclasses.field(default_factory=dict)  # of every run, such as {"epochs": 30}
    measure: str = "accuracy"
    rows: tuple[Row, ...] = ()
    claims: tuple[Row, ...] = ()
    remark: str = ""
    draw: Sequence[Any] = ()  # the name of a function of `pictures`, and its arguments
    table: str = "by_rate"  # the name of a function of `tables`
    inside: bool = False  # whether it shows the picture of `inside`
    where_in_paper: str = ""
    note: str = ""
    same_as: str = ""  # the section whose runs it shows
    of: str = ""  # the table or figure that it runs in another setting

    @property
    def trains(self) -> bool:
        """Whether it has runs."""
        return self.kind in configs.KINDS

    @property
    def in_study(self) -> bool:
        """Whether it is one of our studies, which are in the summary."""
        return bool(self.claims) and not self.where_in_paper

    @property
    def is_drawn(self) -> bool:
        """Whether it has a picture. A smoke test, of fewer than three seeds, has none."""
        return bool(self.draw) and self.seeds >= 3

    @property
    def label(self) -> str:
        """`fig2` as Figure 2."""
        return self.name.replace("fig", "Figure ").replace("table", "Table ").replace("_", ", ")

    @property
    def heading(self) -> str:
        """Its title in the report."""
        return f"{self.label}: {self.title}" if self.where_in_paper else self.title

    @property
    def command(self) -> str:
        """How it is made."""
        module = "benchmarks.overhead" if self.kind == "overhead" else f"examples.reproduce run {self.name}"
        return f"`python -m {module}`"

    def make_run(self, where: Row, seed: int) -> configs.Run:
        """The run of a row: the settings, what the row says, and a seed."""
        fields: Row = {**self.settings, **where, "seed": seed}
        return configs.KINDS[self.kind](**fields)

    def runs(self, **changes: Any) -> list[configs.Run]:
        """The runs of its rows and claims, each once, with changes if any."""
        wheres = [where for spec in (*self.rows, *self.claims) for _, where in spec["contrast"]] if self.trains else []
        named = [{**where, **changes} for where in wheres if not isinstance(where.get("learning_rate"), str)]
        return list(dict.fromkeys(self.make_run(where, seed) for where in named for seed in range(self.seeds)))


BASELINE: Row = {"strategy": "vanilla"}
COMPONENTS = ("both", "direction", "norm")
# Fields that make lines of a picture, not panels; columns of a table, not rows.
VARIANT = ("strategy", "component", "gamma", "expert_rate", "load_balancing", "router_bias")


def row(where: Row, measure: str = "accuracy") -> Row:
    """A row about the runs of one setting."""
    label = words(where, *VARIANT)
    column = words({key: where[key] for key in VARIANT if key in where})
    return {"where": where, "measure": measure, "contrast": [[1.0, where]], "label": label, "column": column}


def settings(part: Any) -> tuple[Row, ...]:
    """The settings that a part of a product in `ours.toml` stands for."""
    if isinstance(part, str):
        return settings(read("ours.toml")["parts"][part])
    if isinstance(part, list):
        return tuple(itertools.chain.from_iterable(map(settings, part)))
    choices = [value if isinstance(value, list) else [value] for value in part.values()]
    return tuple(dict(zip(part, values, strict=True)) for values in itertools.product(*choices))


def product(parts: Iterable[Any]) -> tuple[Row, ...]:
    """A setting for each combination of the parts' settings; the last part varies fastest."""
    combinations = itertools.product(*map(settings, parts))
    return tuple({k: v for setting in combination for k, v in setting.items()} for combination in combinations)


def words(where: Row, *but: str) -> str:
    """A setting in words, without its learning rate and the fields `but`."""
    where = {key: value for key, value in where.items() if key not in ("learning_rate", *but)}
    names = [where.pop(key) for key in ("strategy", "component") if key in where]
    rest = [
        value if key == "optimizer" else f"{key.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
        for key, value in where.items()
    ]
    return ", ".join(rest + ["baseline" if name == "vanilla" else name for name in names])


@functools.cache
def read(name: str) -> dict[str, dict[str, Any]]:
    """What `paper.toml` or `ours.toml` says about each section."""
    return tomllib.loads(pathlib.Path(__file__).with_name(name).read_text("utf-8"))


def ours() -> dict[str, Section]:
    """Our own sections, in the order of `ours.toml`."""
    return {name: _from_ours(name, fields) for name, fields in read("ours.toml").items() if "rows" in fields}


def _from_ours(name: str, fields: dict[str, Any]) -> Section:
    measure, kind = fields.get("measure", "accuracy"), fields.get("kind", "mlp")
    known = {field.name for field in dataclasses.fields(configs.KINDS[kind])}
    of_runs = lambda setting: {key: value for key, value in setting.items() if key in known}
    rows = tuple(row(of_runs(setting), measure) for parts in fields["rows"] for setting in product(parts))
    claims = []
    for template in fields.get("claims", ()):
        for setting in product(template["each"]):
            setting = template | setting
            options: Any = {"measure": measure}
            options |= {name: setting[name] for name in ("measure", "worse", "at", "layers") if name in setting}
            claims.append(claim(setting["text"].format(**setting), of_runs(setting), **options))
    made: dict[str, Any] = fields | {"rows": rows, "claims": tuple(claims)}
    return Section(name, **made)


LESS_IS_BETTER = ("loss", "entropy", "max_load")


def claim(text: str, better: Row, worse: Row = BASELINE, *, measure: str, **options: Any) -> Row:
    """The claim that a setting is better than itself with the changes of `worse`, by the sign of the measure."""
    if better.get("learning_rate") == "best":
        text += ", each at its best rate"
    sign = -1 if measure in LESS_IS_BETTER else 1
    contrast = [[1.0, better], [-1.0, {**better, **worse}]]
    return {"text": text, "measure": measure, "contrast": contrast, "sign": sign, **options}


@functools.cache
def paper() -> dict[str, Section]:
    """The paper's tables and figures in its order, each followed by its versions in other settings."""
    views = json.loads(pathlib.Path(__file__).with_name("paper.json").read_bytes())["views"]
    return {name: _from_paper(name, views) for name in read("paper.toml")}


def _from_paper(name: str, views: dict[str, Any]) -> Section:
    chosen = read("paper.toml")
    view = views[chosen[name].get("of", name)]
    if "same_as" in view:
        view = {**views[view["same_as"]], **chosen[view["same_as"]], **view, "remark": ""}
    rows = tuple({"measure": view["measure"], "contrast": [[1.0, row["where"]]], **row} for row in view["rows"])
    made: dict[str, Any] = view | chosen[name] | {"rows": rows, "claims": tuple(view["claims"])}
    return Section(name, table="beside_the_paper", **made)
