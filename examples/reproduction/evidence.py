"""What the results say about claims, the paper's and ours: differences between runs, paired by seed, with intervals.

The runs of a seed share their initialization and batches.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from examples.reproduction import configs, experiments, store

VERDICTS = ("confirmed", "contradicted", "inconclusive", "not tested")
MIN_SEEDS = 3  # fewer give no verdict: they only show that the program runs


class Contrast(NamedTuple):
    """A linear combination of runs, paired by seed. Low and high are NaN if there are fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int  # seeds that it was computed from
    diverged: int = 0  # seeds left out because one of their runs is not finite

    @property
    def p_value(self) -> float:
        """The two-sided p-value of a paired t-test; NaN if there are fewer than two seeds."""
        half = (self.high - self.low) / 2
        if self.n < 2 or half == 0:
            return math.nan if self.n < 2 else float(self.mean == 0)
        t = self.mean / half * special.stdtrit(self.n - 1, 0.975)
        return float(2 * special.stdtr(self.n - 1, -abs(t)))


def found(results: store.Results, experiment: experiments.Experiment) -> list[configs.Run]:
    """Those runs of a table or figure that are on file."""
    return [run for run in experiments.runs(experiment) if run in results]


def measured(result: store.Result, spec: dict[str, Any]) -> float:
    """What a claim or a row measures: the mean over layers, if it is measured by layer.

    Args:
      result: of one run.
      spec: `measure`; optionally `at`, the share of the training after which it is measured instead of at the end; or
        `layers`: "middle", the middle half of them.
    """
    if "at" in spec:
        epochs = np.asarray(result.curve["epoch"], float)
        return float(result.curve[spec["measure"]][np.argmin(np.abs(epochs - spec["at"] * epochs[-1]))])
    values = np.atleast_1d(np.asarray(result.measures[spec["measure"]], float))
    if spec.get("layers") == "middle":
        quarter = len(values) // 4
        values = values[quarter : len(values) - quarter]
    return float(values.mean())


def by_seed(results: store.Results, experiment: experiments.Experiment, spec: dict[str, Any]) -> list[float]:
    """The linear combination of a claim, for each seed that has all runs; NaN if one of them diverged."""
    wheres = [(factor, resolve(results, experiment, where, spec["measure"])) for factor, where in spec["contrast"]]
    if any(where is None for _, where in wheres):
        return []
    combinations = []
    for seed in range(experiment.seeds):
        terms = [(factor, experiment.make_run(where, seed)) for factor, where in wheres if where is not None]
        if all(run in results for _, run in terms):
            combinations.append(sum(factor * measured(results[run], spec) for factor, run in terms))
    return combinations


def resolve(
    results: store.Results, experiment: experiments.Experiment, where: dict[str, Any], measure: str
) -> dict[str, Any] | None:
    """The row with a number for its learning rate, if the claim says "best" or "baseline's best".

    The best rate has the best mean on held-out data, over the seeds that have runs of all rates. A rate at which a seed
    diverged is not chosen.

    Returns:
      The row, or None if no seed has runs of all rates.
    """
    if not isinstance(where.get("learning_rate"), str):
        return where
    like = where | ({"strategy": "vanilla"} if where["learning_rate"] == "baseline's best" else {})
    planned = {experiment.make_run(row, 0) for row in experiment.rows or ()}
    rates = sorted({run.learning_rate for run in planned if isinstance(run, configs.MLPRun | configs.MiniGPTRun)})
    rates = [rate for rate in rates if experiment.make_run(like | {"learning_rate": rate}, 0) in planned]
    rows = [[experiment.make_run(like | {"learning_rate": rate}, s) for rate in rates] for s in range(experiment.seeds)]
    complete = [row for row in rows if row and all(run in results for run in row)]
    if not complete:
        return None
    scores = np.mean([[results[run].measures["validation"] for run in row] for row in complete], axis=0)
    scores = -scores if measure == "loss" else scores
    if np.isnan(scores).all():
        return None
    return where | {"learning_rate": rates[int(np.nanargmax(scores))]}


def contrast(results: store.Results, experiment: experiments.Experiment, claim: dict[str, Any]) -> Contrast:
    """The mean over seeds of what a claim is about, and its 95 % interval, in the measure's own unit."""
    values = np.asarray(by_seed(results, experiment, claim), float)
    finite = values[np.isfinite(values)]
    n, diverged = len(finite), len(values) - len(finite)
    if n < 2:
        return Contrast(float(finite[0]) if n else math.nan, math.nan, math.nan, n, diverged)
    mean = float(finite.mean())
    half = float(special.stdtrit(n - 1, 0.975) * finite.std(ddof=1) / math.sqrt(n))
    return Contrast(mean, mean - half, mean + half, n, diverged)


def verdict(contrast: Contrast, sign: int) -> str:
    """Whether the results agree with a claim that the contrast has this sign."""
    if contrast.n + contrast.diverged == 0:
        return "not tested"
    if contrast.n + contrast.diverged < MIN_SEEDS:
        return "not tested (smoke test)"
    if contrast.n < MIN_SEEDS:
        return "inconclusive (diverged)"
    if min(sign * contrast.low, sign * contrast.high) > 0:
        return "confirmed"
    return "contradicted" if max(sign * contrast.low, sign * contrast.high) < 0 else "inconclusive"


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p-values. NaN, for a claim that was not tested, stays and does not count."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), math.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected.tolist()


def verdicts(results: store.Results, experiment: experiments.Experiment, view: dict[str, Any]) -> list[str]:
    """Of all claims of a table or figure."""
    return [verdict(ours, claim["sign"]) for claim, ours in judge(results, experiment, view)]


def judge(
    results: store.Results, experiment: experiments.Experiment, view: dict[str, Any]
) -> list[tuple[dict[str, Any], Contrast]]:
    """The claims of a table or figure, each with what came out here."""
    return [(claim, contrast(results, experiment, claim)) for claim in view["claims"]]


def count(verdicts: list[str]) -> list[int]:
    """How many there are of each of `VERDICTS`."""
    return [sum(v.startswith(name) for v in verdicts) for name in VERDICTS]


def printed(view: dict[str, Any], claim: dict[str, Any]) -> tuple[float | None, bool]:
    """The paper's Δ, and whether it stands in the paper rather than being the difference of what stands there."""
    if claim["printed"] is not None:
        return claim["printed"], True
    values: dict[frozenset, float] = {}
    for row in view["rows"]:
        terms = experiments.row_spec(view, row)["contrast"]
        values |= {frozenset(where.items()): 0.0 for _, where in terms[1:]}  # only the difference is printed
        values[frozenset(terms[0][1].items())] = math.nan if row["value"] is None else row["value"]
    terms = [factor * values.get(frozenset(where.items()), math.nan) for factor, where in claim["contrast"]]
    return (None if "at" in claim or math.isnan(sum(terms)) else sum(terms)), False


def printed_deltas(view: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of a table that are a printed Δ."""
    return [claim for claim in view["claims"] if claim["printed"] is not None]


def epochs_to(result: store.Result, accuracy: float) -> float:
    """After how many epochs a run would reach an accuracy: an extrapolation, good for comparing settings.

    A line through the last two thirds of its curve, over the logarithm of epochs.
    """
    epochs, accuracies = (np.asarray(result.curve[name], float) for name in ("epoch", "accuracy"))
    late = epochs >= epochs[-1] / 3
    slope, offset = np.polyfit(np.log(epochs[late]), accuracies[late], 1)
    return float(np.exp(min((accuracy - offset) / slope, 50.0))) if slope > 0 else math.inf
