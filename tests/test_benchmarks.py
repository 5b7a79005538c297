"""The benchmarks run, at toy sizes. What they measure there means nothing and is not looked at."""

import jax
import pytest

from benchmarks import gpt_step, moe_layer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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
    assert "step 1: loss" in printed
    assert "tokens per second" in printed
