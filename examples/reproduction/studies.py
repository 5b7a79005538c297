"""All sections of the report, in its order: the paper's, the search for what the paper leaves open, and our studies.

`ours.toml` says what ours are; here is what it cannot say. See results/PLAN.md.
"""

import dataclasses
from collections.abc import Sequence

from examples.reproduction import sections
from examples.reproduction.sections import Row, Section


def _gain(text: str, larger: Sequence[Row], smaller: Sequence[Row] = ()) -> Row:
    """The claim that positive_sum saves loss, on average over models, or more of it than on average over others."""
    terms = [(1 / len(larger), where) for where in larger] + [(-1 / len(smaller), where) for where in smaller]
    strategies = ((1, "vanilla"), (-1, "positive_sum"))
    contrast = [[sign * factor, {**where, "strategy": name}] for factor, where in terms for sign, name in strategies]
    return {"text": text, "measure": "loss", "contrast": contrast, "sign": 1}


def _gains(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The loss that positive_sum saves in every model at one learning rate, and for which models it saves more."""
    wheres = [row["where"] for row in rows]
    cells = [where for where in wheres if where["learning_rate"] == 3e-3 and where["strategy"] == "vanilla"]
    of = lambda k, *ns: [c for c in cells if c["experts_per_token"] == k and c["num_experts"] in ns]
    saved = "loss that positive_sum saves at 0.003"
    each = "N={num_experts}, k={experts_per_token}, d_ff={d_ff}: " + saved
    larger = "the gain is larger with k=2 than with k=8, mean of N=16, 32, 64"
    claims = [_gain(each.format(**cell), [cell]) for cell in cells]
    claims.append(_gain(f"{saved}, mean of all 60 models", cells))
    claims.append(_gain(larger, of(2, 16, 32, 64), of(8, 16, 32, 64)))
    for more, fewer in ((8, 4), (8, 32), (64, 32)):
        claims.append(_gain(f"k=2: the gain is larger at N={more} than at N={fewer}", of(2, more), of(2, fewer)))
    return tuple(claims)


def _beside_table_1(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with the values that Table 1 prints for their optimizer and strategy."""
    key = lambda row: (row["where"]["optimizer"], row["where"]["strategy"])
    printed = {key(row): row["value"] for row in sections.paper()["table1"].rows}
    return tuple(row | {"value": printed[key(row)]} for row in rows)


# All sections, in the order of the report, with what `ours.toml` cannot say.
SECTIONS: dict[str, Section] = sections.paper() | sections.ours()
_torch_long, _mini_table2 = SECTIONS["torch_long"], SECTIONS["mini_table2"]
SECTIONS["torch_long"] = dataclasses.replace(_torch_long, rows=_beside_table_1(_torch_long.rows))
SECTIONS["mini_table2"] = dataclasses.replace(_mini_table2, claims=_gains(_mini_table2.rows))
