"""The log of a training run: JSON lines, a progress bar, and TensorBoard and W&B on request."""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import tqdm

from excitation_optax import plotting, telemetry

SECONDS_BETWEEN_LINES = 10  # of progress, if standard error is not a terminal
LINE = "{desc}: step {n} of {total}{postfix}, about {remaining} left\n"


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

    Args:
      path: the file. It is replaced, unless some steps are `done`: then only lines of later steps are removed.
      steps: the number of steps of the run.
      config: a dataclass of flags, written as the first line; `config.tensorboard` and `config.wandb` are honored.
      label: the name of the run in the bar, in TensorBoard (a folder) and in W&B.
      done: the steps before this log.
      silent: whether to write and show nothing, as in all processes but one.
    """

    def __init__(self, path: pathlib.Path, steps: int, config: Any, *, label: str, done: int = 0, silent: bool = False):
        self._path, self._silent = path, silent
        self._tensorboard: Any = None
        self._wandb: Any = None
        self.skip(0)
        if not silent:  # before the bar, which an error would leave behind
            self._open(config, label, done)
        lines = not sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=steps,
            initial=done,
            desc=label,
            unit="step",
            mininterval=SECONDS_BETWEEN_LINES if lines else 0.5,
            bar_format=LINE if lines else None,
            leave=not lines,
            disable=silent or done >= steps,
        )

    def _open(self, config: Any, label: str, done: int) -> None:
        flags = dataclasses.asdict(config)
        with naming(self._path):
            self._lines = telemetry.JSONLines(self._path, resume_at=done or None)
        if config.tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(config.tensorboard / label), purge_step=done + 1)
        if config.wandb:
            import wandb

            settings = {name: str(value) for name, value in flags.items()}
            self._wandb = wandb.init(project=config.wandb, name=label, config=settings)
        self._routing = telemetry.RoutingLog(self._tensorboard, self._wandb)
        self.write(done, {"config": flags})

    def write(self, step: int, values: dict[str, Any], shown: str = "") -> None:
        """Writes a line `{"step": ..., ...}`; `routing` goes to TensorBoard and W&B only, and `shown` to the bar."""
        if self._silent:
            return
        with naming(self._path):
            self._lines.log({name: value for name, value in values.items() if name != "routing"}, step)
        numbers = {name: x for name, x in values.items() if hasattr(x, "dtype") or type(x) in (int, float)}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if "routing" in values:
            self._routing.write(step, *values["routing"])
        if shown:
            self._bar.set_postfix_str(shown, refresh=False)

    def tell(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            tqdm.tqdm.write(text, file=sys.stderr)

    def start(self, items: int) -> None:
        """Excludes the time before now, such as that of compilation, from all rates and from the time left."""
        self._bar.unpause()
        self.skip(items)

    def advance(self) -> None:
        """Moves the bar by a step."""
        self._bar.update()

    def rate(self, items: int) -> float:
        """Returns tokens (or images) per second since the last call, given the number of tokens so far."""
        then, before = self._rated
        self.skip(items)
        return (items - before) / (self._rated[0] - then)

    def skip(self, items: int) -> None:
        """Excludes the time since the last call, such as that of an evaluation, from the next rate."""
        self._rated = time.perf_counter(), items

    def close(self) -> None:
        """Closes the bar, TensorBoard and W&B."""
        self._bar.refresh()
        self._bar.close()
        if self._tensorboard is not None:
            if steps := self._routing.steps:
                figure = plotting.load_over_time(steps, self._routing.load).figure
                self._tensorboard.add_figure("routing/load_over_time", figure, steps[-1])
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
