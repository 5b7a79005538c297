"""Table 8: the benchmark runs, at toy sizes, and its results are read back as they were written."""

import copy
import json
import typing

import jax
import pytest

from benchmarks import overhead as benchmark
from examples.reproduction import overhead

ENTRY = {
    "row": "mlp-2048-2",
    "parameters": 5_824_522,
    "batch_size": 512,
    "rounds": 30,
    "overhead_percent": 0.25,
    "interval": [-0.5, 1.0],
    "bytes_ratio": 1.0003,
    "flops_ratio": 1.0001,
    "peak_bytes": {"vanilla": 2**30, "excited": 2**31},
    "about": {"device": "cpu, 2 CPU cores", "date": "2026-11-22T12:00:00+00:00"},
}


def entry(**changes):
    changed = copy.deepcopy(ENTRY)
    changed["about"].update({name: changes.pop(name) for name in ("device", "date") if name in changes})
    return changed | changes


@pytest.fixture
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_rows_are_timed_or_compiled(tmp_path, capsys):
    rows = ("mlp-2048-2", "vit-512-6-8")
    timed = benchmark.main(benchmark.Config(rows=rows, rounds=2, results=tmp_path, tiny=True))
    assert not any(tmp_path.iterdir())  # tiny ones are not written
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row}: uncounted " in printed
        assert overhead.PAPER[row].name in printed
    compiled = benchmark.main(benchmark.Config(rows=rows[:1], rounds=2, memory_gib=0.0, tiny=True))
    assert "not run: needs " in capsys.readouterr().out
    assert compiled[0]["rounds"] is None
    assert set(compiled[0]["seconds_per_step"].values()) == {None}
    assert compiled[0]["bytes_ratio"] == timed[0]["bytes_ratio"]
    for row in timed:
        assert set(row["seconds_per_step"]) == set(row["peak_bytes"]) == {"uncounted", "vanilla", "excited"}
        assert row["interval"][0] <= row["overhead_percent"] <= row["interval"][1]
        overhead.append(tmp_path, row)
    assert overhead.load(tmp_path) == timed


def test_rows_have_the_sizes_of_the_paper():
    assert list(benchmark.ROWS) == list(overhead.PAPER) == list(typing.get_args(benchmark.RowName))
    params = [benchmark.abstract_model(row)[1] for row in benchmark.ROWS.values()]
    millions = [round(sum(leaf.size for leaf in jax.tree.leaves(p)) / 1e6, 1) for p in params]
    assert millions == [5.8, 20.0, 16.6, 818.4, 56.8, 1662.7]  # the last is printed as 1.64B


def test_the_interval_holds_the_median_whatever_a_few_slow_calls_say():
    seconds = {"excited": [1.02] * 25 + [9.0] * 3 + [1.03, 1.01], "vanilla": [1.0] * 30}
    median, (low, high) = benchmark.percent(seconds, "excited", "vanilla")
    assert median == pytest.approx(2)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_the_newest_entry_of_each_row_and_device_counts(tmp_path):
    newer, older = entry(date="2026-11-23T12:00:00+00:00", batch_size=64), entry()
    other_device, other_row = entry(device="1 x NVIDIA H200"), entry(row="vit-512-6-8")
    for line in (other_row, newer, older, other_device):
        overhead.append(tmp_path, line)
    assert overhead.load(tmp_path) == [other_device, newer, other_row]
    assert overhead.load(tmp_path / "none") == []


@pytest.mark.parametrize(
    "damaged", ['{"row": "mlp-20', "[]", json.dumps(entry(row="no such")), '{"row": "mlp-2048-2"}']
)
def test_a_damaged_line_is_skipped_and_told(damaged, tmp_path, capsys):
    overhead.append(tmp_path, entry(row="mlp-4096-2"))
    with overhead.path(tmp_path).open("a") as file:
        file.write(damaged)  # cut off: no newline
    overhead.append(tmp_path, ENTRY)
    assert overhead.load(tmp_path) == [ENTRY, entry(row="mlp-4096-2")]
    assert "overhead.jsonl, line 3: skipped, as it is damaged" in capsys.readouterr().err


def test_the_table():
    compiled = entry(row="vit-1024-12-32", rounds=None, overhead_percent=None, interval=None)
    _, rule, timed_row, compiled_row = overhead.table([ENTRY, compiled]).split("\n")
    cells = [cell.strip() for cell in timed_row.strip("|").split("|")]
    assert cells == [
        "Top-K MLP, 2 x 2048",
        "5.8M",
        "cpu, 2 CPU cores",
        "512",
        "+33.2 ± 28.4",
        "+0.25 [-0.50, +1.00]",
        "1.0003",
        "1.0001",
        "1.00",
        "2.00",
    ]
    assert "| -1.2 ± 1.9 " in compiled_row
    assert "| not run " in compiled_row
    assert rule == "|" + " --- |" * 3 + " --: |" * 7
