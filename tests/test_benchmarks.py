"""The benchmarks run, at toy sizes. What they measure there means nothing and is not looked at."""

import dataclasses
import re

import pytest

from benchmarks import gpt_step, moe_layer, sweep, tracing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_users_have_it")]


@pytest.mark.parametrize("section", ["A", "B", "C", "D", "E", "F"])
def test_moe_layer(section, capsys):
    moe_layer.main(moe_layer.Config(sections=(section,), rounds=1, tiny=True))
    printed = capsys.readouterr().out
    assert f"\n{section}  " in printed
    assert "nan" not in printed


def test_gpt_step(capsys):
    config = gpt_step.Config(
        num_experts=4, d_ff=16, d_model=16, num_layers=2, num_heads=2, vocab_size=50, batch_size=2, context=8, steps=1
    )
    gpt_step.main(config)
    printed = capsys.readouterr().out
    assert re.search(r"^positive_sum over the baseline: \d+\.\d{3}, ", printed, re.MULTILINE)
    assert re.search(r"^loss \d+\.\d{4}$", printed, re.MULTILINE)
    assert printed.count("tokens per second") == 2


def test_sweep(capsys):
    """A loop by hand trains as the engine does."""
    config = sweep.Config(rounds=1, tiny=True)
    assert sweep.compare(config) < 1e-5
    sweep.stack(config)
    sweep.products(config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    names = ["A", "fastest", "by", "engine", "B", "seeds", "1", "2", "C", "fastest", "bare", "bare", "engine"]
    assert [row[0] for row in rows] == names
    assert [row[1] for row in rows[6:8]] == ["1", "4"]
    assert all(float(seconds) > 0 for row in rows[6:8] for seconds in row[2:])
    assert all(float(row[-1]) > 0 for row in rows[-3:])


def test_tracing(capsys):
    config = tracing.Config(layers=1, experts=2, rounds=1, step="separate")
    tracing.measure_steps(config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["plain", "both", "direction", "norm"]
    assert all(float(row[2]) > 0 and float(row[5]) > 0 for row in rows)  # seconds to trace, and to compile
    tracing.measure_steps(dataclasses.replace(config, variants=("both",)))
    assert capsys.readouterr().out.splitlines()[1].startswith("both (")
    tracing.measure_updates(config)
    assert capsys.readouterr().out.count("s more than SGD") == 6
