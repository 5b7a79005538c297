"""The program that trains GPT-MoEs: short runs, their logs, table and samples; evaluation; errors."""

import contextlib
import io
import itertools
import json
import math
import pathlib
import re
import runpy
import sys

import dashboards
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import texts, train_gpt_moe

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {"num_experts": 4, "d_ff": 16, "d_model": 16, "num_layers": 2, "num_heads": 2, "context": 16}
FLAGS = SIZES | {"batch_size": 8, "steps": 30, "eval_every": 20, "log_every": 5, "learning_rate": 0.02, "prompt": "ab"}
ROUTING = {"load_balancing_loss", "router_z_loss", "routing_entropy", "max_over_mean_load", "dead_experts"}
ROUTING |= {"dead_experts_worst_layer"}
EXCITED = {"excitation_min", "excitation_max"}
LOGGED = {"step", "loss", "tokens_per_second"} | ROUTING


def train(folder, text="abc" * 300, strategy=("baseline", "positive_sum"), **kwargs):
    """What a run returns, the lines of its logs by strategy and seed, and what it prints."""
    (folder / "text").write_text(text)
    flags = FLAGS | {"text": (folder / "text",), "output": folder / "run.png", "strategy": strategy} | kwargs
    printed = io.StringIO()
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(printed):  # Optax's Adam needs it
        runs = train_gpt_moe.main(train_gpt_moe.Config(**flags))
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    logs = {path.stem.removeprefix("run-"): read(path) for path in folder.glob("run-*.jsonl")}
    return runs, logs, printed.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Thirty steps without and with Excitation, on abcabcabc..."""
    folder = tmp_path_factory.mktemp("run")
    return *train(folder), folder


def repeatable(rows):
    """The lines after the first, without what depends on the clock."""
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows[1:]]


def test_a_run_writes_its_logs_and_learns(run):
    runs, logs, _, folder = run
    assert set(logs) == {"baseline-0", "positive_sum-0"}
    for name, rows in logs.items():
        assert rows[1:] == runs[name.removesuffix("-0")][0]
        assert rows[0]["step"] == 0
        assert rows[0]["config"]["context"] == 16
        assert rows[0]["config"]["text"] == [str(folder / "text")]
        steps = [row for row in rows if "loss" in row]
        assert [row["step"] for row in steps] == [5, 10, 15, 20, 25, 30]
        assert all(set(row) == LOGGED | (EXCITED if name == "positive_sum-0" else set()) for row in steps)
        assert all(np.all(np.isfinite(list(row.values()))) for row in steps)
        assert all(row["tokens_per_second"] > 0 for row in steps)
        assert steps[0]["loss"] > 1
        assert steps[-1]["loss"] < 0.1
        # K = 2 of E = 4 experts get a token, so one gets at most twice the mean; the entropy is at most log 4.
        assert all(1 <= row["max_over_mean_load"] <= 2 + 1e-5 for row in steps)
        assert all(0 <= row["routing_entropy"] <= np.log(4) + 1e-5 for row in steps)
        evaluations = [row for row in rows if "evaluation_loss" in row]
        assert [row["step"] for row in evaluations] == [20, 30]
        for row in evaluations:
            assert set(row) == {"step", "evaluation_loss", "perplexity", "bits_per_byte"}
            assert row["perplexity"] == pytest.approx(math.exp(row["evaluation_loss"]))
            assert row["bits_per_byte"] == pytest.approx(row["evaluation_loss"] / math.log(2))  # a token is a byte
        assert evaluations[-1]["evaluation_loss"] < 0.1


def test_strategies_start_alike_and_see_the_same_batches(run):
    """Only updates after the first batches differ."""
    baseline, excited = (repeatable(run[1][f"{name}-0"]) for name in ("baseline", "positive_sum"))
    assert baseline[0]["loss"] != excited[0]["loss"]
    assert baseline[0]["loss"] == pytest.approx(excited[0]["loss"], rel=0.2)


def test_a_run_ends_with_the_answer(run):
    runs, _, printed, folder = run
    assert "the last tenth is evaluated: 810 and 90 tokens" in printed
    losses = [f"{runs[name][0][-1]['evaluation_loss']:.3f}" for name in ("baseline", "positive_sum")]
    lines = [line.split() for line in printed.splitlines()]
    assert ["evaluation", "loss,", "nats", *losses] in lines
    assert "dead experts, %" in printed
    assert "max / mean load" in printed
    assert re.search(r"excitation, range +none +1\.00 to \d\.\d\d\n", printed)
    assert "A code for single bytes takes 1.585 bits per byte." in printed  # log2 3
    for name in ("baseline", "positive_sum"):  # the prompt and what follows, as long as the context
        assert f"sample of {name}: abcabcabcabcabca\n" in printed
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "\nnext: python -m examples.train_gpt_moe " in printed


def test_a_run_repeats_with_its_seed_and_not_with_another(tmp_path, run):
    """TensorBoard changes nothing; it gets what is logged, and the routing."""
    _, logs, printed = train(tmp_path, strategy=("positive_sum",), seeds=2, tensorboard=tmp_path / "board")
    assert set(logs) == {"positive_sum-0", "positive_sum-1"}
    rows = logs["positive_sum-0"]
    assert repeatable(rows) == repeatable(run[1]["positive_sum-0"])
    assert abs(logs["positive_sum-1"][1]["loss"] - rows[1]["loss"]) > 1e-3
    assert "mean ± standard deviation of 2 seeds" in printed
    assert printed.count("sample of") == 1
    events = dashboards.events_of(tmp_path / "board" / "positive_sum-0")
    for row in rows[1:]:
        written = {name: value.simple_value for step, name, value in events if step == row["step"]}
        expected = {name: row[name] for name in row.keys() - {"step"}}
        assert {name: written[name] for name in expected} == pytest.approx(expected)
        if "loss" in row:  # of two layers, by the same function
            assert written["routing/max_over_mean_load/mean"] == pytest.approx(row["max_over_mean_load"])
            assert written["routing/dead_experts/worst"] == pytest.approx(row["dead_experts_worst_layer"])


@pytest.mark.slow
def test_tokens_of_gpt2_with_sgd(tmp_path):
    flags = {"tokenizer": "gpt2", "optimizer": "sgd", "strategy": ("positive_sum",)}
    _, logs, printed = train(tmp_path, text="hello world " * 100, steps=3, log_every=2, **flags)
    # " world" and " hello" by turns, a first "hello", and a space at the end of each part: 1080 and 120 bytes.
    assert "the last tenth is evaluated: 181 and 21 tokens" in printed
    rows = logs["positive_sum-0"]
    assert [row["step"] for row in rows] == [0, 2, 3, 3]
    assert rows[1]["excitation_min"] == 1 < rows[1]["excitation_max"] <= 2  # K = 2: E / K times the mean
    loss = rows[3]["evaluation_loss"]
    assert 10 < loss < 12  # about log 50257, the vocabulary
    assert rows[3]["bits_per_byte"] == pytest.approx(loss / math.log(2) * 21 / 120)


# Evaluation.


def plain_loop(tokens, loss):
    """The mean of a loss of (token before, token) over every token but the first."""
    losses = [loss(before, token) for before, token in itertools.pairwise(tokens)]
    return sum(losses) / len(losses)


# Tokens, and the tokens of a window and the windows of a batch; full and partial windows, full and partial batches.
CASES = [(2, 1, 1), (2, 8, 4), (9, 4, 2), (9, 4, 3), (10, 4, 2), (13, 4, 1), (12, 4, 2), (50, 8, 3), (49, 8, 3)]


@pytest.mark.parametrize(("number", "context", "batch_size"), CASES)
def test_evaluation_is_the_mean_over_all_tokens_but_the_first(number, context, batch_size, monkeypatch):
    tokens = np.random.default_rng(0).integers(1, 100, number)
    loss = lambda before, token: (7 * before + 3 * token) % 13

    def total_loss(graphdef, params, tokens, where):
        assert tokens.shape == (batch_size, context + 1)  # always, so that it is compiled once
        assert where.shape == (batch_size, context)
        return np.sum(loss(tokens[:, :-1], tokens[:, 1:]), where=where)

    monkeypatch.setattr(train_gpt_moe, "total_loss", total_loss)
    text = texts.Text(tokens, tokens, bytes(number), vocab_size=100, description="numbers")
    evaluated = train_gpt_moe.measure(None, None, text, context, batch_size)["evaluation_loss"]
    assert evaluated == pytest.approx(plain_loop(tokens, loss), rel=1e-12)


# Flags and errors.


def test_flags_reach_the_model():
    model = train_gpt_moe.Config(dtype="bfloat16", remat=True, num_experts=8, d_ff=24, context=32).model(11)
    assert (model.moe.dtype, model.remat, model.moe.num_experts, model.moe.d_ff) == (jnp.bfloat16, True, 8, 24)
    assert (model.context, model.vocab_size, model.moe.d_model, model.num_layers) == (32, 11, 128, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1; got 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1; got 0."),
        ({"eval_every": -1}, "--eval-every must be at least 1; got -1."),
        ({"context": 1}, "--context must be at least 2, for a prompt and what follows; got 1."),
        ({"num_heads": 3}, "d_model must be divisible by num_heads = 3; got 128."),
        ({"experts_per_token": 17}, "experts_per_token must be at most num_experts = 16; got 17."),
    ],
)
def test_bad_flags(kwargs, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        train_gpt_moe.Config(**kwargs)
    assert str(error.value) == message


@pytest.mark.parametrize("kwargs", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_flags_of_the_sample_are_found_before_training(kwargs):
    with pytest.raises(ValueError, match=f"--{next(iter(kwargs)).replace('_', '-')}"):
        train_gpt_moe.Config(**kwargs)


@pytest.mark.parametrize("length", [16, 160])  # the last tenth of 160 are 16, one less than a window and its targets
def test_a_text_shorter_than_the_context(tmp_path, length):
    with pytest.raises(
        ValueError, match=r"text; the last tenth is evaluated: .* tokens; each must have more than --context 16\."
    ):
        train(tmp_path, text="a" * length)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# runpy says that the module is imported already.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_bad_flags_of_the_program(monkeypatch, capsys):
    """As `python -m` runs it, without the seconds that another Python takes to start."""
    monkeypatch.setattr(sys, "argv", ["train_gpt_moe", "--steps", "0"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("examples.train_gpt_moe", run_name="__main__")
    assert end.value.code == 2
    assert "--steps must be at least 1; got 0." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_an_error_of_the_program_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt_moe", "--text", str(tmp_path / "nowhere.txt")])
    with pytest.raises(SystemExit, match=r"^train_gpt_moe: .*nowhere\.txt.*$"):  # printed, and the code is 1
        runpy.run_module("examples.train_gpt_moe", run_name="__main__")


@pytest.mark.parametrize("length", [0, 16])
def test_a_prompt_that_does_not_fit_the_context(tmp_path, length):
    with pytest.raises(ValueError, match=rf"--prompt must have from 1 to 15 tokens \(--context\); got {length}\."):
        train(tmp_path, prompt="a" * length)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
