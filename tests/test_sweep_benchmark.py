"""The benchmark of the engine runs, at toy sizes, and its loop by hand trains as the engine does."""

import pytest

from benchmarks import sweep


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_sweep(capsys):
    config = sweep.Config(rounds=1, tiny=True)
    assert sweep.compare(config) < 1e-5
    sweep.stack(config)
    sweep.products(config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [row[0] for row in rows] == [
        "A",
        "fastest",
        "by",
        "engine",
        "B",
        "seeds",
        "1",
        "2",
        "C",
        "fastest",
        "bare",
        "bare",
        "engine",
    ]
    assert [row[1] for row in rows[6:8]] == ["1", "4"]
    assert all(float(seconds) > 0 for row in rows[6:8] for seconds in row[2:])
    assert all(float(row[-1]) > 0 for row in rows[-3:])
