"""The results: JSON lines, one for each finished run, appended as runs finish; and checkpoints of unfinished ones.

Each line has a checksum; lines of earlier versions have none. A damaged line is reported and skipped, and its run is
made again.
"""

import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples import datasets, logs
from examples.reproduction import configs

FOLDER = pathlib.Path(__file__).parents[2] / "results"


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run. Floats that are not finite are null in the file and NaN here."""

    run: configs.Run
    measures: dict[str, Any]  # final values by name, such as accuracy; a list has one entry per layer
    curve: dict[str, list[float]]  # "epoch", and as many values of each measure along training
    seconds: float  # of its device; its share, if it was trained stacked with others
    about: dict[str, Any]  # date, revision, versions, device, data, and how many runs were stacked

    def to_json(self) -> dict[str, Any]:
        """A line of the results file, as a dict."""
        names = ("measures", "seconds", "about", "curve")
        return {"key": self.run.key, "config": self.run.to_json()} | {name: getattr(self, name) for name in names}


class Results:
    """The finished runs in a folder of JSON lines files, which is made when there is something to write."""

    def __init__(self, folder: pathlib.Path = FOLDER):
        self.folder = folder
        self.damaged: list[str] = []  # a message for each line that could not be read
        self._results: dict[str, Result] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = enumerate(path.read_bytes().split(b"\n"), 1)
            for number, line in ((number, line) for number, line in lines if line.strip()):
                try:
                    result = _parse(line)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    self.damaged.append(f"{path}, line {number}: skipped, as it is damaged ({error}). Delete it.")
                else:
                    self._results.setdefault(result.run.key, result)

    def __contains__(self, run: configs.Run) -> bool:
        return run.key in self._results

    def __getitem__(self, run: configs.Run) -> Result:
        return self._results[run.key]

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results.values())

    def __len__(self) -> int:
        return len(self._results)

    def check_writable(self) -> None:
        """Raises OSError if results cannot be written, before anything is trained."""
        problem = f"The results folder {self.folder} cannot be written to; choose another by --results"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{problem} ({error.strerror}).") from error
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(f"{problem}.")

    def append(self, results: list[Result]) -> None:
        """Adds finished runs to the file of their kind and data set. They are on disk when it returns.

        Raises:
          OSError: if they could not be written; the file is then as it was before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files: dict[pathlib.Path, list[Result]] = {}
        for result in results:
            name = f"{result.run.kind}-{result.run.dataset}.jsonl"
            files.setdefault(self.folder / name, []).append(result)
        for path, group in files.items():
            records = [_without_nan(result.to_json()) for result in group]
            lines = [json.dumps(r | {"checksum": _checksum(r)}, allow_nan=False) + "\n" for r in records]
            _append(path, "".join(lines).encode())
            self._results |= {r.run.key: r for r in group}


def load_json(path: pathlib.Path, command: str) -> Any:
    """What a JSON file holds; None if there is none. Raises ValueError if it is damaged; `command` makes it again."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and run {command} again.") from error


def save_json(path: pathlib.Path, outcome: dict[str, Any]) -> None:
    """Writes a JSON file, with what made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = environment() | {"date": now()}
    path.write_text(json.dumps(outcome | {"about": about}) + "\n", encoding="utf-8")


def save_checkpoint(path: pathlib.Path, state: Any, notes: tuple) -> None:
    """Replaces the checkpoint, so that there always is a whole one. `notes` go into JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with logs.naming(temporary):
        with temporary.open("wb") as file:
            np.savez(file, *jax.device_get(jax.tree.leaves(state)), notes=json.dumps(notes))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def restore_checkpoint(path: pathlib.Path, like: Any) -> tuple[Any, list] | None:
    """The state and the notes that were saved; None if there is nothing, or it is damaged and was set aside."""
    if not path.exists():
        return None
    leaves, structure = jax.tree.flatten(like)
    try:
        with path.open("rb") as file, np.load(file) as saved:
            arrays = [saved[f"arr_{i}"] for i in range(len(saved.files) - 1)]
            notes = json.loads(str(saved["notes"]))
        if [(a.shape, a.dtype) for a in arrays] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            raise ValueError("its arrays are not those of this model and optimizer")
    except PermissionError:
        raise
    except datasets.DAMAGED_NPZ as error:
        warnings.warn(
            f"The checkpoint {path} is damaged ({error!r:.200}). It is kept as {logs.set_aside(path).name}, and the "
            "runs start anew.",
            stacklevel=2,
        )
        return None
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays]), notes


def _append(path: pathlib.Path, text: bytes) -> None:
    """Appends the whole text or nothing. Several programs may write to one file."""
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end and not path.read_bytes().endswith(b"\n"):
            text = b"\n" + text  # the last writer was cut off: its line stays apart
        try:
            written = 0
            while written < len(text):
                written += file.write(text[written:])
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            message = f"{error.strerror}; results on file are kept, new ones are lost"
            raise OSError(error.errno, message, path) from error


def _checksum(record: dict[str, Any]) -> str:
    """16 hexadecimal digits made of all of a line but this."""
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> Result:
    record = json.loads(line)
    run = configs.from_json(record["config"])
    if record["key"] != run.key:
        raise ValueError(f"its key {record['key']} is not that of its config, {run.key}")
    measures, curve = _with_nan(record["measures"]), _with_nan(record["curve"])
    if record.get("checksum", checksum := _checksum(record)) != checksum:
        raise ValueError(f"its checksum is {record['checksum']}, that of its content is {checksum}")
    return Result(run, measures, curve, record["seconds"], record["about"])


def _without_nan(tree: Any) -> Any:
    return jax.tree.map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, tree)


def _with_nan(tree: Any) -> Any:
    return jax.tree.map(lambda x: math.nan if x is None else x, tree, is_leaf=lambda x: x is None)


@functools.cache
def environment() -> dict[str, Any]:
    """The software and the machine that make a result."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    kind, on_cpu = jax.devices()[0].device_kind, jax.default_backend() == "cpu"
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{kind}, {cores()} CPU cores" if on_cpu else f"{jax.device_count()} x {kind}",
        "revision": _revision(),
    }


def now() -> str:
    """The date and time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _revision() -> str:
    """$GIT_REVISION, or the revision of git, with a + if tracked files differ from it."""
    if revision := os.environ.get("GIT_REVISION"):
        return revision
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
