"""The benchmark of the engine runs, at toy sizes, and its loop by hand trains as the engine does."""

import pytest

from benchmarks import sweep


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_sweep(capsys):
    config = sweep.Config(rounds=1, tiny=True)
    assert sweep.compare(config) < 1e-5
    sweep.stack(config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [row[0] for row in rows] == ["A", "fastest", "by", "engine", "B", "seeds", "1", "2"]
    assert [row[1] for row in rows[-2:]] == ["1", "4"]
    assert all(float(seconds) > 0 for row in rows[-2:] for seconds in row[2:])
