"""The log of a training run: JSON lines, a progress bar, and TensorBoard and W&B where they are asked for."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import tqdm

from excitation_optax import plotting, telemetry

SECONDS_BETWEEN_LINES = 10  # of the progress, where standard error is not a terminal


@contextlib.contextmanager
def naming(path: pathlib.Path | str) -> Iterator[None]:
    """Adds the file to an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def set_aside(path: Any) -> Any:
    """Renames a damaged file or folder to NAME.damaged, NAME.damaged-2, ..., and returns the new path."""
    names = itertools.chain([".damaged"], (f".damaged-{number}" for number in itertools.count(2)))
    kept = next(new for new in (path.with_name(path.name + name) for name in names) if not new.exists())
    path.rename(kept)
    return kept


class Log:
    """JSON lines in a file, and a progress bar.

    The file is replaced, unless some steps are `done`: then only lines of later steps are removed. `config` is a
    dataclass of flags; its `tensorboard` and `wandb` are honored. `label` names the run in the bar, in TensorBoard (a
    folder) and in W&B. If `silent`, as in all processes but one, nothing is written or shown.
    """

    def __init__(self, path: pathlib.Path, steps: int, config: Any, *, label: str, done: int = 0, silent: bool = False):
        self.path = pathlib.Path(os.devnull) if silent else path
        self._steps, self._label, self._silent = steps, label, silent
        self._tensorboard = self._wandb = None
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = length_until(self.path, done) if done else 0
            self._file = self.path.open("a", encoding="utf-8")
            if self.path.is_file():
                self._file.truncate(kept)
        # disable=None: no bar where standard error is not a terminal.
        self._bar = tqdm.tqdm(
            total=steps, initial=done, unit="step", mininterval=0.5, desc=label, disable=True if silent else None
        )
        self._last_write = (time.perf_counter(), 0)
        self._last_line = -math.inf
        self._started: tuple[float, int] | None = None  # a time and the steps done then, without compilation
        if config.tensorboard and not silent:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(config.tensorboard / label), purge_step=done + 1)
        if config.wandb and not silent:
            import wandb

            settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
            self._wandb = wandb.init(project=config.wandb, name=label, config=settings)
        self._routing = telemetry.RoutingLog(self._tensorboard, self._wandb)
        try:
            self.write(done, {"config": dataclasses.asdict(config)})
        except OSError:
            with contextlib.suppress(OSError):  # it cannot be written to, and closing tries to
                self._file.close()
            raise

    def write(self, step: int, values: dict[str, Any], shown: str = "") -> dict[str, Any]:
        """Writes a line `{"step": ..., ...}` and returns it. NaN and infinities become null; `routing` goes to the
        dashboards only."""
        values = dict(values)
        routing = values.pop("routing", None)
        numbers = {
            name: value for name, value in values.items() if hasattr(value, "dtype") or type(value) in (int, float)
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if routing is not None and (self._tensorboard or self._wandb):
            self._routing.write(step, *routing)
        line = {"step": step} | jax.tree.map(_to_json, values)
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if shown and not self._silent:
            self._show(step, shown)
        return line

    def _show(self, step: int, shown: str) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = now
            if self._started is not None and step < self._steps:
                then, done = self._started
                left = (now - then) / (step - done) * (self._steps - step)
                shown += f", about {tqdm.tqdm.format_interval(left)} left"
            print(f"{self._label}: step {step} of {self._steps}, {shown}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """A line above the bar."""
        if not self._silent:
            tqdm.tqdm.write(text, file=sys.stderr)

    def start(self, step: int, items: int) -> None:
        """Leaves the time until now out of rates, such as that of compilation."""
        self._started = time.monotonic(), step
        self.skip(items)

    def advance(self) -> None:
        """One more step on the bar."""
        self._bar.update()

    def rate(self, items: int) -> float:
        """Tokens (or images) per second since the last call, given those so far."""
        now = time.perf_counter()
        (then, before), self._last_write = self._last_write, (now, items)
        return (items - before) / (now - then)

    def skip(self, items: int) -> None:
        """Leaves the time since the last call out of the next rate, such as that of an evaluation."""
        self._last_write = (time.perf_counter(), items)

    def close(self) -> None:
        """Ends the bar, the file and the dashboards."""
        self._bar.close()
        with naming(self.path):
            self._file.close()
        if self._tensorboard is not None:
            if steps := self._routing.steps:
                figure = plotting.load_over_time(steps, self._routing.load).figure
                self._tensorboard.add_figure("routing/load_over_time", figure, steps[-1])
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def length_until(path: pathlib.Path, step: int) -> int:
    """The bytes of a log before the first line of a later step. Damaged lines count for nothing, with a warning."""
    length = 0
    for number, line in enumerate(io.BytesIO(path.read_bytes() if path.exists() else b""), 1):
        if not line.endswith(b"\n"):  # it was cut off
            break
        try:
            found = json.loads(line)["step"]
            if type(found) is not int:
                raise ValueError(f"step {found!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"{path}, line {number}: skipped, as it is damaged ({error!r:.100}).", stacklevel=2)
        else:
            if found > step:
                break
        length += len(line)
    return length


def _to_json(value):
    if isinstance(value, str | int | bool | None):
        return value
    if isinstance(value, pathlib.Path):
        return str(value)
    return value if math.isfinite(value := float(value)) else None
