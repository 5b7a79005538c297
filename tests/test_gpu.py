"""The run for a GPU: its driver, and every part at toy sizes on a CPU."""

import platform

import pytest

from benchmarks import gpu
from examples.reproduction import store


def config(tmp_path, tiny=True, **options):
    return gpu.Config(results=tmp_path, tiny=tiny, **options)


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(tmp_path, monkeypatch):
    parts = {
        "hangs": gpu.Part(True, 2.0, "http.server 0 --bind 127.0.0.1", ""),
        "fails": gpu.Part(False, 60.0, "no_such_module", ""),
        "works": gpu.Part(False, 60.0, "platform", ""),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    outcomes = gpu.main(config(tmp_path, tiny=False, parts=tuple(parts)))
    assert [outcome.split(" after ")[0] for outcome in outcomes] == [
        "hangs: was stopped",
        "fails: failed with code 1",
        "works: finished",
    ]
    assert platform.platform() in (tmp_path / "gpu" / "works.txt").read_text()
    assert "No module named no_such_module" in (tmp_path / "gpu" / "fails.txt").read_text()


def test_parts_without_time_are_not_started(tmp_path):
    assert gpu.main(config(tmp_path, parts=("table8",), minutes=0.01)) == ["table8: no time was left"]


def test_unknown_parts():
    with pytest.raises(ValueError, match=r"--parts can name table8, .*; got tabel8"):
        gpu.Config(parts=("tabel8",))


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_parts(part, tmp_path):
    (outcome,) = gpu.main(config(tmp_path, parts=(part,), minutes=20))
    assert outcome.startswith(f"{part}: finished"), (tmp_path / "gpu" / f"{part}.txt").read_text()[-2000:]


def test_the_revision_travels(monkeypatch):
    monkeypatch.setenv("GIT_REVISION", "0123456789ab")
    assert store._revision() == "0123456789ab"
