"""The sections of the report: one value for each table or figure of the paper, and for each study of ours.

A section holds what is specific to it: its runs, claims, remark, table and drawing. Those of the paper come from
`paper.json`, what the paper prints, and `paper.toml`, what we chose for it. Ours are in `studies`, `search` and
`ours.toml`.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

from examples.reproduction import configs

PAPER = pathlib.Path(__file__).with_name("paper.json")
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
    draw: tuple[Any, ...] = ()  # the name of a function of `pictures`, and its arguments
    table: Callable[..., str] | None = None  # of results and this section; by default that of `tables`
    in_study: bool = False  # whether it is one of the studies, which are in the summary
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


def row(where: Row, measure: str = "accuracy") -> Row:
    """A row about the runs of one setting."""
    return {"where": where, "measure": measure, "contrast": [[1.0, where]]}


def rows(wheres: Iterable[Row], measure: str = "accuracy") -> tuple[Row, ...]:
    """A row for each setting."""
    return tuple(row(where, measure) for where in wheres)


def grid(**choices: Iterable[Any]) -> tuple[Row, ...]:
    """A setting for each combination of choices; the last one varies fastest."""
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def product(*choices: Iterable[Row]) -> tuple[Row, ...]:
    """A setting for each combination of parts of settings; the last part varies fastest."""
    return tuple(functools.reduce(lambda a, b: {**a, **b}, parts) for parts in itertools.product(*choices))


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
def paper() -> dict[str, Section]:
    """The paper's tables and figures in its order, each followed by its versions in other settings."""
    views, chosen = (
        json.loads(PAPER.read_bytes())["views"],
        tomllib.loads(PAPER.with_suffix(".toml").read_text("utf-8")),
    )
    return {name: _from_paper(name, views, chosen) for name in chosen}


@functools.cache
def _ours() -> dict[str, dict[str, Any]]:
    return tomllib.loads(PAPER.with_name("ours.toml").read_text("utf-8"))


def ours(name: str, **fields: Any) -> Section:
    """A section of our own, of what `ours.toml` says about it and these fields."""
    return Section(name, **_ours()[name] | fields)


def _from_paper(name: str, views: dict[str, Any], chosen: dict[str, Any]) -> Section:
    ours = dict(chosen[name])
    view, only = views[ours.get("of", name)], ours.pop("only", {})
    if "same_as" in view:
        view = {**views[view["same_as"]], **chosen[view["same_as"]], **view, "remark": ""}
    fits = lambda spec: all(only.items() <= where.items() for _, where in spec["contrast"])
    rows = [_spec(view["measure"], row) for row in view["rows"]]
    fields: Any = view | ours | {"rows": tuple(filter(fits, rows)), "claims": tuple(filter(fits, view["claims"]))}
    return Section(name, **fields | {"draw": tuple(fields.get("draw", ()))})


def _spec(measure: str, row: Row) -> Row:
    """A row of the paper with its contrast. Table 2 prints differences of perplexity."""
    if measure != "perplexity_reduction":
        return row | {"measure": measure, "contrast": [[1.0, row["where"]]]}
    signs = {"vanilla": 1.0, "positive_sum": -1.0}
    contrast = [[sign, row["where"] | {"strategy": strategy}] for strategy, sign in signs.items()]
    return row | {"measure": "perplexity", "contrast": contrast}
