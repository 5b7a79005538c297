"""Table 8, what Excitation adds to a training step: the measurements on file, and their table.

`python -m benchmarks.overhead` measures and writes here, to a folder inside the one of the runs.
"""

import json
import pathlib
import sys
from typing import Any, NamedTuple

from examples.reproduction import sections, tables


class Printed(NamedTuple):
    """A row of the paper's Table 8."""

    name: str
    parameters: str
    percent: float  # of a step's time
    spread: float  # the standard deviation, over 3 sessions


PAPER = {
    row["where"]["row"]: Printed(row["label"], row["column"], row["value"], row["spread"])
    for row in sections.paper()["table8"].rows
}
HEADER = ("model", "parameters", "device", "batch", "paper, %", "ours, % [95 %]", "bytes", "FLOPs")
HEADER += ("peak GiB, baseline", "excited")


def path(folder: pathlib.Path) -> pathlib.Path:
    """The file, in the results folder."""
    return folder / "table8" / "overhead.jsonl"


def append(folder: pathlib.Path, entry: dict[str, Any]) -> None:
    """Adds a measured row to the file. The newline before it is for a last line that was cut off."""
    path(folder).parent.mkdir(parents=True, exist_ok=True)
    with path(folder).open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(entry, allow_nan=False)}\n")


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The newest entry of each row on each device, in the paper's order. A damaged line is reported and skipped."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    lines = path(folder).read_bytes().split(b"\n") if path(folder).exists() else []
    for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
        try:
            entry = json.loads(line)
            _cells(entry)  # has all that the table needs
            key = entry["about"]["device"], list(PAPER).index(entry["row"])
            if key not in newest or entry["about"]["date"] >= newest[key]["about"]["date"]:
                newest[key] = entry
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path(folder)}, line {number}: skipped, as it is damaged ({error!r}).", file=sys.stderr)
    return [newest[key] for key in sorted(newest)]


def table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table. Bytes and FLOPs are ratios of the excited step to the baseline's."""
    return tables.table(HEADER, map(_cells, entries), text=3, numbers=7)


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    printed, low_high = PAPER[entry["row"]], entry["interval"]
    ours = "not run"
    if entry["rounds"] is not None:
        ours = f"{entry['overhead_percent']:+.2f} [{low_high[0]:+.2f}, {low_high[1]:+.2f}]"
    return (
        printed.name,
        f"{entry['parameters'] / 1e6:.1f}M",
        entry["about"]["device"],
        str(entry["batch_size"]),
        f"{printed.percent:+.1f} ± {printed.spread:.1f}",
        ours,
        *(f"{entry[name]:.4f}" for name in ("bytes_ratio", "flops_ratio")),
        *(f"{entry['peak_bytes'][name] / 2**30:.2f}" for name in ("vanilla", "excited")),
    )
