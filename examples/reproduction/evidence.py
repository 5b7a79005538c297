"""What the results say about claims, the paper's and ours: differences between runs, paired by seed, with intervals.

The runs of a seed share their initialization and batches. Values are in the paper's units: accuracies in percent.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import special

from examples.reproduction import configs, store
from examples.reproduction.sections import Row, Section

VERDICTS = ("confirmed", "contradicted", "inconclusive", "not tested")
FACTOR = {"accuracy": 100}  # of measures whose unit on file is not the paper's
MIN_SEEDS = 3  # fewer give no verdict: they only show that the program runs


class Contrast(NamedTuple):
    """A linear combination of runs, paired by seed: its mean and standard deviation over seeds that did not diverge."""

    mean: float  # NaN without a seed
    deviation: float  # NaN if there are fewer than two seeds
    n: int
    diverged: int = 0  # seeds left out because one of their runs is not finite

    @property
    def half(self) -> float:
        """Half the length of the 95 % interval, of Student's t; NaN if there are fewer than two seeds."""
        return float(special.stdtrit(self.n - 1, 0.975) * self.deviation / math.sqrt(self.n)) if self.n else math.nan

    @property
    def p_value(self) -> float:
        """The two-sided p-value of a paired t-test; NaN if there are fewer seeds than a verdict requires."""
        if self.n < MIN_SEEDS or self.deviation == 0:
            return math.nan if self.n < MIN_SEEDS else float(self.mean == 0)
        t = math.sqrt(self.n) * self.mean / self.deviation
        return float(2 * special.stdtr(self.n - 1, -abs(t)))


def found(results: store.Results, section: Section) -> list[configs.Run]:
    """The runs of a section that are on file."""
    return [run for run in section.runs() if run in results]


def measured(result: store.Result, spec: Row) -> float:
    """What a claim or a row measures in one run, in the unit on file; the mean over layers, if any.

    It is measured at the end of the run, or `at` a fraction of it. With `layers`: "middle", only the middle half of the
    layers counts.
    """
    if "at" in spec:
        epochs = np.asarray(result.curve["epoch"], float)
        return float(result.curve[spec["measure"]][np.argmin(np.abs(epochs - spec["at"] * epochs[-1]))])
    values = np.atleast_1d(np.asarray(result.measures[spec["measure"]], float))
    if spec.get("layers") == "middle":
        quarter = len(values) // 4
        values = values[quarter : len(values) - quarter]
    return float(values.mean())


def by_seed(results: store.Results, section: Section, spec: Row) -> np.ndarray:
    """The linear combination of a claim or row, in the paper's unit, for each seed that has all runs.

    NaN if one of them diverged.
    """
    wheres = [(factor, resolve(results, section, where)) for factor, where in spec["contrast"]]
    if any(where is None for _, where in wheres):
        return np.array([])
    combinations = []
    for seed in range(section.seeds):
        terms = [(factor, section.make_run(where, seed)) for factor, where in wheres if where is not None]
        if all(run in results for _, run in terms):
            combinations.append(sum(factor * measured(results[run], spec) for factor, run in terms))
    return FACTOR.get(spec["measure"], 1) * np.array(combinations, float)


def resolve(results: store.Results, section: Section, where: Row) -> Row | None:
    """The setting with a number for its learning rate, if the claim says "best" or "baseline's best".

    The best rate has the best mean on held-out data, over the seeds that have runs of all rates. A rate at which a seed
    diverged is not chosen. None if no seed has runs of all rates.
    """
    if not isinstance(where.get("learning_rate"), str):
        return where
    like = where | ({"strategy": "vanilla"} if where["learning_rate"] == "baseline's best" else {})
    planned = {section.make_run(row["where"], 0) for row in section.rows}
    rates = sorted({row["where"]["learning_rate"] for row in section.rows})
    rates = [rate for rate in rates if section.make_run(like | {"learning_rate": rate}, 0) in planned]
    runs = [[section.make_run(like | {"learning_rate": rate}, s) for rate in rates] for s in range(section.seeds)]
    complete = [row for row in runs if row and all(run in results for run in row)]
    if not complete:
        return None
    scores = np.mean([[results[run].measures["validation"] for run in row] for row in complete], axis=0)
    scores = -scores if section.measure == "loss" else scores
    return None if np.isnan(scores).all() else where | {"learning_rate": rates[int(np.nanargmax(scores))]}


def contrast(results: store.Results, section: Section, spec: Row) -> Contrast:
    """The statistics over seeds of what a claim or a row is about."""
    values = by_seed(results, section, spec)
    kept = values[np.isfinite(values)]
    mean = float(kept.mean()) if len(kept) else math.nan
    deviation = float(kept.std(ddof=1)) if len(kept) > 1 else math.nan
    return Contrast(mean, deviation, len(kept), len(values) - len(kept))


def verdict(contrast: Contrast, sign: int) -> str:
    """Whether the results agree with a claim that the contrast has this sign."""
    if contrast.n + contrast.diverged < MIN_SEEDS:
        return "not tested (smoke test)" if contrast.n + contrast.diverged else "not tested"
    if contrast.n < MIN_SEEDS:
        return "inconclusive (diverged)"
    if abs(contrast.mean) <= contrast.half:
        return "inconclusive"
    return "confirmed" if sign * contrast.mean > 0 else "contradicted"


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p-values. NaN, for a claim that was not tested, stays and does not count."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), math.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected.tolist()


def judge(results: store.Results, section: Section) -> list[tuple[Row, Contrast, str]]:
    """The claims of a section, each with our difference and the verdict."""
    ours = [contrast(results, section, claim) for claim in section.claims]
    return [(claim, c, verdict(c, claim["sign"])) for claim, c in zip(section.claims, ours, strict=True)]


def count(results: store.Results, *sections: Section) -> list[int]:
    """How many claims of the sections have each of `VERDICTS`."""
    verdicts = [verdict for section in sections for *_, verdict in judge(results, section)]
    return [sum(verdict.startswith(name) for verdict in verdicts) for name in VERDICTS]


def printed_deltas(section: Section) -> list[Row]:
    """The claims of a table that are a printed Δ."""
    return [claim for claim in section.claims if claim["printed"] is not None]


def printed(section: Section, claim: Row) -> float | None:
    """The paper's Δ if it is printed there, otherwise the difference of printed values, if any."""
    if claim["printed"] is not None:
        return claim["printed"]
    values: dict[frozenset, float] = {}
    for row in section.rows:
        (_, first), *others = row["contrast"]  # of a row that is a difference itself, the first stands for all
        values |= {frozenset(where.items()): 0.0 for _, where in others}
        values[frozenset(first.items())] = math.nan if row["value"] is None else row["value"]
    terms = [factor * values.get(frozenset(where.items()), math.nan) for factor, where in claim["contrast"]]
    return None if "at" in claim or math.isnan(sum(terms)) else sum(terms)
