"""Logs the routing of a model: a bounded number of scalars, the extreme experts by name, and an alarm.

You pass the writers in. A malformed argument is a `ValueError`. Axis letters: E experts, L layers, N experts in all.
"""

import json
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from excitation_optax import _arrays, _paths, _routing, metrics

__all__ = ["JSONLines", "RoutingLog"]

_MAX_HISTORY = 128  # entries, an even number


class RoutingLog:
    """Writes the routing to TensorBoard, W&B and JSON lines, and keeps the load of the whole run in bounded memory.

    A call of `write` makes one device-to-host transfer, and writes these scalars over the layers (see `metrics`):

    * `max_over_mean_load/mean`, `/p50`, `/p90`, `/worst`; `load_entropy/mean`, `/worst`; `dead_experts/mean`, `/worst`.
    * `layers_without_load`, which load and entropy leave out, and `layers_not_finite`, which make them NaN.
    * `excitation/min`, `/mean` (of the layers' means), `/max`: Phi over all experts.

    TensorBoard also receives histograms of all experts; other writers receive `busiest` and `idlest`. With several
    processes, call it on one, and let the step return whole arrays on every device.

    Attributes:
      names: the layers in natural order (`layer_2` before `layer_10`). A layer of a stack is `path[number]`.
      busiest, idlest: the 5 extremes of the last call, as `(layer, expert, load over the layer's mean)`.
      steps: T integers, the step of the last call in each entry of the history.
      load: `[T, L, E]` float32, the mean utilization of the calls in each entry, masked where a layer has fewer
        experts. When T reaches 128, neighboring entries are averaged, so the history covers the whole run.

    Args:
      *writers: objects with `add_scalar` and `add_histogram`, such as `tensorboardX.SummaryWriter(folder)`, or with
        `log(row, step=...)`, such as `wandb.init()` and `JSONLines(path)`. None is skipped.
      alarm: a function `(step, layer, what)`, called once when experts of a layer die, or when a router collapses.
      alarm_after: calls of `write` in a row after which such a state counts. Small batches miss experts by chance.
      dead_load: an expert is dead if its load over the layer's mean is at most this.
      collapsed_entropy: a router has collapsed if its load entropy is at most this: log K / log E for K equal experts.
      prefix: the first part of every name.

    Example:
      >>> log = telemetry.RoutingLog(alarm=print, alarm_after=2)  # add your writers
      >>> counts = {"experts": excitation_optax.RoutingCounts(jnp.array([6.0, 2.0, 0.0, 4.0]), jnp.array(8.0))}
      >>> log.write(100, counts)["routing/max_over_mean_load/worst"]
      2.0
      >>> scalars = log.write(200, counts, excitation_optax.excitation(counts, excitation_optax.zero_sum))
      200 experts dead experts: 2
      >>> log.busiest[0], log.load.shape
      (('experts', 0, 2.0), (2, 1, 4))
    """

    def __init__(
        self,
        *writers: Any,
        alarm: Callable[[int, str, str], Any] | None = None,
        alarm_after: int = 10,
        dead_load: float = 0.0,
        collapsed_entropy: float = 0.6,
        prefix: str = "routing",
    ):
        self._alarm_after = _arrays.static_int("RoutingLog: alarm_after", alarm_after)
        if not (alarm is None or callable(alarm)):
            raise ValueError(f"RoutingLog: alarm must be a function of (step, layer, what); got {alarm!r}.")
        self._writers = [writer for writer in writers if writer is not None]
        for writer in self._writers:
            if isinstance(writer, type) or not (hasattr(writer, "add_histogram") or hasattr(writer, "log")):
                raise ValueError(
                    "RoutingLog: a writer must have add_scalar and add_histogram, such as tensorboardX.SummaryWriter("
                    f"folder), or log(row, step=...), such as wandb.init() or JSONLines(path); got {writer!r}."
                )
        self._alarm, self._prefix = alarm or (lambda step, layer, what: None), prefix
        self._dead_load, self._collapsed_entropy = dead_load, collapsed_entropy
        self.names, self.steps, self.busiest, self.idlest = [], [], [], []
        self._sizes: dict[str, int] = {}  # E of each layer
        self._present = np.zeros((0, 0), bool)  # [L, E], whether a layer has the expert; N of them are there
        self._totals: list[np.ndarray] = []  # [N], the sum over the calls of an entry of the history
        self._calls, self._span = 0, 1  # all calls of write, and the calls in every entry but the last
        self._dead_for: Any = 0  # [N], calls in a row
        self._collapsed_for: Any = 0  # [L], calls in a row

    @property
    def load(self) -> np.ma.MaskedArray:  # noqa: D102  (the class documents it)
        load = np.ma.masked_all((len(self.steps), *self._present.shape), np.float32)
        for entry, total in enumerate(self._totals):  # the last one may have fewer calls
            load[entry, self._present] = total / min(self._span, self._calls - entry * self._span)
        return load

    def write(self, step: int, utilization: Any, excitation: Any = None) -> dict[str, float]:
        """Writes the routing of a step, and returns the scalars by name, such as `routing/load_entropy/mean`.

        Args:
          step: an integer, larger than at the call before. A resumed run makes a new log, which starts at any step.
          utilization: a tree whose leaves are `RoutingCounts` or arrays `[..., E]`, as `tx.update` received it.
          excitation: the result of `excitation_optax.excitation(utilization, strategy, gamma)`, or None.

        Raises:
          ValueError: if the step does not rise, a leaf is malformed, layers differ, or processes split an array.
        """
        number = np.asarray(step)
        if number.ndim or number.dtype.kind not in "iu" or number <= max(self.steps, default=-np.inf):
            above = f" above {self.steps[-1]}, the last step" if self.steps else ""
            raise ValueError(f"RoutingLog: step must be an integer{above}; got {step!r}. Resumed runs need a new log.")
        step, (leaves, sizes, present) = int(number), flatten(utilization)
        _check_layers(f"the layers at step {step} differ from the calls before", self._sizes or sizes, sizes)
        phi_leaves, phi_sizes, _ = ([], sizes, None) if excitation is None else flatten(excitation, "excitation")
        _check_layers("the excitation has other layers than the utilization", sizes, phi_sizes)
        values = jax.device_get(_pack(*jax.tree.map(_local, (leaves, phi_leaves))))
        self._sizes, self.names, self._present = sizes, list(sizes), present
        total, load, entropy, dead = values[: 4 * len(sizes)].reshape(4, -1)
        u, over_mean, *phi = values[4 * len(sizes) :].reshape(-1, present.sum())
        self._remember(step, u)
        self.busiest, self.idlest = self._first(over_mean, -1), self._first(over_mean, 1)
        found = _scalars(total, load, entropy, dead, present, *phi)
        scalars = {f"{self._prefix}/{name}": float(value) for name, value in found.items()}
        self._send(step, scalars, dict(zip(("load_over_mean", "excitation"), (over_mean, *phi), strict=False)))
        self._raise_alarms(step, over_mean, entropy)
        return scalars

    def _remember(self, step: int, u: np.ndarray) -> None:
        """Adds a call to the history, which merges neighbors first if it is full."""
        if self._calls % self._span:  # the last entry takes more calls
            self.steps.pop()
            u = self._totals.pop() + u
        elif len(self.steps) == _MAX_HISTORY:
            self.steps, self._span = self.steps[1::2], 2 * self._span
            self._totals = [a + b for a, b in zip(self._totals[::2], self._totals[1::2], strict=True)]
        self.steps.append(step)
        self._totals.append(u)
        self._calls += 1

    def _first(self, over_mean: np.ndarray, sign: int) -> list[tuple[str, int, float]]:
        """The experts with the smallest `sign * over_mean`, without NaN."""
        layer, expert = np.nonzero(self._present)
        order = np.argsort(sign * over_mean, kind="stable")[:5]  # NaN is last
        return [(self.names[layer[n]], int(expert[n]), float(over_mean[n])) for n in order if over_mean[n] >= 0]

    def _send(self, step: int, scalars: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        row = scalars | {f"{self._prefix}/busiest": self.busiest, f"{self._prefix}/idlest": self.idlest}
        for writer in self._writers:
            if not hasattr(writer, "add_histogram"):
                writer.log(row, step=step)
                continue
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            for name, values in histograms.items():
                if np.any(finite := np.isfinite(values)):  # a histogram has no bin for NaN
                    writer.add_histogram(f"{self._prefix}/{name}", values[finite], step)

    def _raise_alarms(self, step: int, over_mean: np.ndarray, entropy: np.ndarray) -> None:
        self._dead_for = np.where(over_mean <= self._dead_load, self._dead_for + 1, 0)
        self._collapsed_for = np.where(entropy <= self._collapsed_entropy, self._collapsed_for + 1, 0)
        layer_of, expert = np.nonzero(self._present)
        for layer, name in enumerate(self.names):
            if (dead := expert[(layer_of == layer) & (self._dead_for == self._alarm_after)]).size:
                self._alarm(step, name, f"dead experts: {', '.join(map(str, dead))}")
            if self._collapsed_for[layer] == self._alarm_after:
                self._alarm(step, name, f"collapsed router: load entropy {entropy[layer]:.3g}")


class JSONLines:
    """Writes rows, also your own, to a file: one JSON object per line, flushed after each line.

    NaN and infinity become null, arrays lists, and other objects strings.

    Args:
      path: the file.
      resume_at: None replaces the file. A step keeps the lines up to it, and removes damaged lines with a warning.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> telemetry.JSONLines(path).log({"loss": float("nan")}, step=1)
      >>> telemetry.JSONLines(path, resume_at=1).log({"loss": 2.5}, step=2)
      >>> path.read_text().splitlines()
      ['{"step": 1, "loss": null}', '{"step": 2, "loss": 2.5}']
    """

    def __init__(self, path: str | pathlib.Path, resume_at: int | None = None):
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is None or not self._path.exists():
            self._path.write_bytes(b"")
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        new = self._path.with_name(f"{self._path.name}.new")
        try:  # a full disk fails here, before a line is lost
            new.write_bytes(b"".join(line for line in lines if self._is_kept(line, resume_at)))
            new.replace(self._path)
        finally:
            new.unlink(missing_ok=True)

    def _is_kept(self, line: bytes, resume_at: Any) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= resume_at
        except (ValueError, TypeError, LookupError):  # NUL bytes, a bare number, a line without a step
            warnings.warn(f"{self._path}: a damaged line was removed: {line[:60]!r}", stacklevel=4)
            return False

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Writes the step and the row as one line."""
        to_json = lambda x: np.asarray(x).tolist() if hasattr(x, "dtype") else str(x)
        plain = json.loads(json.dumps({"step": step, **row}, default=to_json), parse_constant=lambda _: None)
        with self._path.open("a", encoding="utf-8") as file:  # closing flushes
            file.write(json.dumps(plain) + "\n")


def flatten(tree: Any, what: str = "utilization") -> tuple[list[Any], dict[str, int], np.ndarray]:
    """The leaves in natural order of their paths, each layer's E by name, and `[L, E]`, whether an expert exists."""
    leaves, sizes = _paths.join(tree, _routing.is_counts), {}
    natural = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
    leaves = {path or _paths.ROOT: leaves[path] for path in sorted(leaves, key=natural)}
    for path, leaf in leaves.items():
        *layers, experts = _routing.check_shape(f"The {what} at {path}", leaf)
        sizes |= {path + (str(list(place)) if place else ""): experts for place in np.ndindex(*layers)}
    if not sizes:
        raise ValueError(f"The {what} must have at least one layer, an array or RoutingCounts; got {tree!r}.")
    return list(leaves.values()), sizes, np.arange(max(sizes.values())) < np.array(list(sizes.values()))[:, None]


@jax.jit
def _pack(u: list[Any], phi: list[Any]) -> jax.Array:
    """All that `write` needs as one array, since every array costs a transfer: 4 values by layer, 2 or 3 by expert."""
    u = [leaf.utilization if _routing.is_counts(leaf) else leaf.astype(jnp.float32) for leaf in u]
    total = [jnp.sum(leaf, axis=-1, keepdims=True) for leaf in u]
    over_mean = [_arrays.divide(leaf * leaf.shape[-1], t) for leaf, t in zip(u, total, strict=True)]
    measures = (metrics.max_over_mean_load, metrics.load_entropy, metrics.dead_experts)
    by_layer = [*total, *(x for measure in measures for x in measure(u))]
    return jnp.concatenate([x.astype(jnp.float32).ravel() for x in (*by_layer, *u, *over_mean, *phi)])


def _local(leaf: Any) -> Any:
    """An array that this process can read without the others."""
    if getattr(leaf, "is_fully_addressable", True):
        return leaf
    if not leaf.is_fully_replicated:
        raise ValueError(
            f"RoutingLog: {leaf.dtype}{list(leaf.shape)} is split over devices of several processes ({leaf.sharding}). "
            "Return it whole on every device: out_shardings=NamedSharding(mesh, PartitionSpec())."
        )
    return leaf.addressable_data(0)


def _check_layers(problem: str, expected: dict[str, int], sizes: dict[str, int]) -> None:
    if expected != sizes:
        show = lambda items: ", ".join(f"{name} [{size}]" for name, size in sorted(items)) or "none"
        missing, new = show(expected.items() - sizes.items()), show(sizes.items() - expected.items())
        raise ValueError(f"RoutingLog: {problem}. Missing: {missing}. New: {new}. Give each model a log of its own.")


def _scalars(total, load, entropy, dead, present, phi=None) -> dict[str, Any]:
    layer, sizes = np.nonzero(present)[0], np.sum(present, axis=-1)
    load, entropy = load[total != 0], entropy[(total != 0) & (sizes > 1)]  # one expert has no entropy
    load, entropy = (values if values.size else np.array([np.nan]) for values in (load, entropy))
    scalars = {"max_over_mean_load/mean": np.mean(load), "max_over_mean_load/worst": np.max(load)}
    scalars |= {f"max_over_mean_load/p{q}": np.percentile(load, q) for q in (50, 90)}
    scalars |= {"load_entropy/mean": np.mean(entropy), "load_entropy/worst": np.min(entropy)}
    scalars |= {"dead_experts/mean": np.mean(dead), "dead_experts/worst": np.max(dead)}
    scalars |= {"layers_without_load": np.sum(total == 0), "layers_not_finite": np.sum(~np.isfinite(total))}
    if phi is not None:
        mean = np.mean(np.bincount(layer, phi) / sizes)
        scalars |= {"excitation/min": np.min(phi), "excitation/mean": mean, "excitation/max": np.max(phi)}
    return scalars
