"""The routing log: scalars against numbers worked by hand, what each kind of writer receives, and the alarm.

Axis letters: E experts, L layers, T entries of the history.
"""

import json
import math
import pathlib
import socket
import subprocess
import sys
import textwrap

import dashboards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX

import excitation_optax
from excitation_optax import RoutingCounts, telemetry

ROOT = pathlib.Path(__file__).parents[1]
NAN, INF = math.nan, math.inf
# Loads over the mean: 2, 2, 0, 0 | 1, 1, 1, 1 | 0, 0, 4, 0.
SPLIT = jnp.array([0.5, 0.5, 0.0, 0.0])
EVEN = jnp.array([0.25, 0.25, 0.25, 0.25])
ONE = jnp.array([0.0, 0.0, 0.75, 0.0])
# Three experts, of 8 tokens. Loads over the mean: 3/2, 3/2, 0; entropy log 2 / log 3.
COUNTS = RoutingCounts(jnp.array([4.0, 4.0, 0.0]), jnp.array(8.0))
MIXED = {"layer_10": COUNTS, "layer_2": jnp.stack([SPLIT, ONE])}
EXCITATION = {"excitation/min", "excitation/mean", "excitation/max"}


def scalars(utilization, excitation=None):
    """By name, without the prefix."""
    written = telemetry.RoutingLog().write(0, utilization, excitation)
    assert all(type(value) is float and name.startswith("routing/") for name, value in written.items())
    return {name.removeprefix("routing/"): value for name, value in written.items()}


def phi_of(utilization, strategy=excitation_optax.zero_sum):
    return excitation_optax.excitation(utilization, strategy)


class Board:
    """Records what TensorBoard would be given."""

    def __init__(self):
        self.scalars, self.histograms = [], []

    def add_scalar(self, name, value, step):
        self.scalars.append((step, name, value))

    def add_histogram(self, name, values, step):
        self.histograms.append((step, name, values.tolist()))


class Run:
    """Records what W&B would be given."""

    def __init__(self):
        self.rows = []

    def log(self, row, step):
        self.rows.append((step, row))


# The scalars.


def test_scalars_by_hand():
    entropy = math.log(2) / math.log(3)
    assert scalars(MIXED) == pytest.approx(
        {
            # layer_2[0], layer_2[1], layer_10: 2, 4, 1.5
            "max_over_mean_load/mean": 2.5,
            "max_over_mean_load/p50": 2,
            "max_over_mean_load/p90": 3.6,  # 0.8 of the way from 2 to 4
            "max_over_mean_load/worst": 4,
            "load_entropy/mean": (0.5 + 0 + entropy) / 3,
            "load_entropy/worst": 0,
            "dead_experts/mean": (2 / 4 + 3 / 4 + 1 / 3) / 3,
            "dead_experts/worst": 3 / 4,
            "layers_without_load": 0,
            "layers_not_finite": 0,
        },
        rel=1e-5,
        abs=1e-6,
    )


def test_excitation_by_hand():
    tree = {"a": SPLIT, "b": {"c": jnp.array([0.1, 0.2])}}
    values = scalars(tree, phi_of(tree))  # zero-sum is the load over the mean: 2, 2, 0, 0 | 2/3, 4/3
    assert [values[f"excitation/{name}"] for name in ("min", "mean", "max")] == pytest.approx([0, 1, 2])
    values = scalars(ONE[None], phi_of(ONE[None], excitation_optax.positive_sum))  # 1, 1, 4, 1
    assert [values[f"excitation/{name}"] for name in ("min", "mean", "max")] == [1, 1.75, 4]
    values = scalars({"a": jnp.ones(1), "b": jnp.ones((2, 3))}, {"a": jnp.array([4.0]), "b": jnp.ones((2, 3))})
    assert values["excitation/mean"] == 2  # of the layers' means 4, 1, 1, not of the experts


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (48, 128)])
def test_the_number_of_scalars_does_not_depend_on_the_model(layers, experts):
    u = {f"layer_{n}": jnp.full(experts, 1 / experts) for n in range(layers)}
    assert len(scalars(u)) == 10
    assert scalars(u, phi_of(u)).keys() - scalars(u).keys() == EXCITATION


def test_a_layer_without_load_is_counted_and_left_out_of_load_and_entropy():
    values = scalars({"a": RoutingCounts(jnp.zeros(4), jnp.zeros(())), "b": SPLIT})
    assert (values["layers_without_load"], values["layers_not_finite"]) == (1, 0)
    assert values["max_over_mean_load/mean"] == values["max_over_mean_load/p90"] == 2
    assert values["load_entropy/mean"] == values["load_entropy/worst"] == pytest.approx(0.5)
    assert values["dead_experts/mean"] == 0.75  # 1 and 1/2
    nothing = scalars(jnp.zeros((2, 4)))
    assert nothing["layers_without_load"] == 2
    assert nothing["dead_experts/mean"] == 1
    assert np.isnan([nothing[name] for name in nothing if name.startswith(("max", "load"))]).all()


def test_a_single_expert_has_no_entropy_and_does_not_hide_the_entropy_of_others():
    values = scalars({"a": jnp.array([0.5]), "b": SPLIT})
    assert values["load_entropy/mean"] == values["load_entropy/worst"] == pytest.approx(0.5)
    assert values["max_over_mean_load/mean"] == 1.5


@pytest.mark.parametrize("bad", [NAN, INF])
def test_values_that_are_not_finite_show_in_the_scalars(bad):
    tree = {"a": jnp.stack([EVEN, SPLIT.at[1].set(bad)]), "b": ONE}
    values = scalars(tree, phi_of(tree))
    assert (values["layers_not_finite"], values["layers_without_load"]) == (1, 0)
    assert np.isnan([values[name] for name in values if name.startswith(("max", "load", "excitation"))]).all()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64, np.int32])
def test_every_dtype_of_numpy_and_jax(dtype):
    tree = {"a": np.array([3, 1], dtype), "b": jnp.array([1, 1], jnp.bfloat16)}
    assert scalars(tree)["max_over_mean_load/mean"] == 1.25


@pytest.mark.parametrize(
    ("utilization", "message"),
    [
        ({}, r"The utilization must have at least one layer, .* got \{\}"),
        ({"a": None}, "at least one layer"),
        ({"a/b": EVEN, "a": {"b": EVEN}}, "the same path"),
        ({"a": 0.5}, r"The utilization at a must be an array with an axis of experts, \[\.\.\., E\]; got 0\.5"),
        ({"a": {"b": [0.5, 0.5]}}, "The utilization at a/b/0 must be an array"),
        (jnp.zeros((3, 0)), r"The utilization at \(root\) must be .* axis of experts, .* got float32\[3, 0\]"),
        ({"a": jnp.zeros((0, 3))}, "at least one layer"),
        ({"a": RoutingCounts(jnp.ones((2, 4)), jnp.float32(1))}, r"at a has counts of shape .* and tokens float32\[\]"),
    ],
)
def test_malformed_utilization_is_an_error(utilization, message):
    log = telemetry.RoutingLog()
    with pytest.raises(ValueError, match=message):
        log.write(1, utilization)
    with pytest.raises(ValueError, match=message.replace("utilization", "excitation")):
        log.write(1, EVEN, utilization)
    assert log.steps == []


# Names: paths, and the extremes.


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (
            {"layer_10": EVEN, "layer_2": SPLIT, "layer_1": {"b": ONE, "a": jnp.ones((2, 1, 4))}},
            ["layer_1/a[0, 0]", "layer_1/a[1, 0]", "layer_1/b", "layer_2", "layer_10"],
        ),
        (
            {"layers/10/experts": EVEN, "layers/9/{up,down}": EVEN, "expert_{expert}": EVEN, "**/moe/*": EVEN},
            ["**/moe/*", "expert_{expert}", "layers/9/{up,down}", "layers/10/experts"],
        ),
        ([SPLIT, {"moe": EVEN}], ["0", "1/moe"]),
        (jnp.ones((2, 4)), ["(root)[0]", "(root)[1]"]),
    ],
)
def test_layers_are_named_by_path_in_natural_order(tree, names):
    log = telemetry.RoutingLog()
    log.write(1, tree)
    assert log.names == names


def test_the_load_is_in_the_order_of_the_names():
    log = telemetry.RoutingLog()
    log.write(1, MIXED)
    assert log.names == ["layer_2[0]", "layer_2[1]", "layer_10"]
    np.testing.assert_array_equal(log.load[0].filled(9), [SPLIT, ONE, [0.5, 0.5, 0, 9]])  # 9: no such expert


def test_the_busiest_and_the_idlest_experts_by_hand():
    log = telemetry.RoutingLog()
    # Over the mean: a: 1.6, 0.4, 1.2, 0.8, of mean 1/4; b: NaN; c[0]: 0.5, 1.5; c[1]: no load.
    log.write(1, {"a": jnp.array([0.4, 0.1, 0.3, 0.2]), "b": EVEN.at[0].set(NAN), "c": jnp.array([[0.2, 0.6], [0, 0]])})
    assert [(name, expert) for name, expert, _ in log.busiest] == [
        ("a", 0),
        ("c[0]", 1),
        ("a", 2),
        ("a", 3),
        ("c[0]", 0),
    ]
    assert [load for *_, load in log.busiest] == pytest.approx([1.6, 1.5, 1.2, 0.8, 0.5])
    assert [(name, expert) for name, expert, _ in log.idlest] == [
        ("c[1]", 0),
        ("c[1]", 1),
        ("a", 1),
        ("c[0]", 0),
        ("a", 3),
    ]
    assert [load for *_, load in log.idlest] == pytest.approx([0, 0, 0.4, 0.5, 0.8])


# The log on the host.


def test_one_transfer_and_one_walk_over_each_tree(monkeypatch):
    fetched, walks = [], []
    device_get, walk = jax.device_get, jax.tree_util.tree_flatten_with_path
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", lambda *a, **k: walks.append(a) or walk(*a, **k))
    log = telemetry.RoutingLog(Board(), Run())
    tree = {f"layer_{n}": RoutingCounts(jnp.ones(4), jnp.float32(2)) for n in range(20)}
    phi = phi_of(tree)
    walks.clear()
    for step in range(3):
        log.write(step, tree, phi)
    # 4 numbers for each of 20 layers; utilization, load over the mean and excitation of 4 experts each.
    assert [x.shape for x in fetched] == [(20 * (4 + 3 * 4),)] * 3
    assert len(walks) == 3 * 2


def test_calls_after_the_first_compile_nothing():
    log = telemetry.RoutingLog()
    log.write(1, MIXED, phi_of(MIXED))
    before = telemetry._pack._cache_size()
    for step in range(2, 5):
        log.write(step, MIXED, phi_of(MIXED))
    assert telemetry._pack._cache_size() == before


@pytest.mark.parametrize("calls", [1, 3, 4, 5, 8, 9, 16, 23])
def test_the_history_is_bounded_and_covers_the_run(calls, monkeypatch):
    monkeypatch.setattr(telemetry, "_MAX_HISTORY", 4)
    loads = np.random.default_rng(0).random((calls, 2, 3)).astype(np.float32)
    log = telemetry.RoutingLog()
    for number, load in enumerate(loads):
        log.write(10 * number, {"moe": jnp.asarray(load)})
    each = 1 if calls <= 4 else 2 if calls <= 8 else 4 if calls <= 16 else 8  # calls in an entry
    parts = [loads[start : start + each] for start in range(0, calls, each)]
    assert len(log.steps) == len(parts) <= 4
    np.testing.assert_allclose(log.load, [part.mean(axis=0) for part in parts], rtol=1e-5)
    np.testing.assert_array_equal(log.steps, [10 * (min(start + each, calls) - 1) for start in range(0, calls, each)])


def test_the_history_keeps_nan_and_masks(monkeypatch):
    monkeypatch.setattr(telemetry, "_MAX_HISTORY", 2)
    log = telemetry.RoutingLog()
    for step, value in enumerate((0.5, NAN, 0.5, 0.5)):
        log.write(step, {"a": jnp.array([value]), "b": EVEN})
    np.testing.assert_array_equal(log.load.data[:, 0, 0], [NAN, 0.5])
    np.testing.assert_array_equal(log.load.mask, [[[False, True, True, True], [False] * 4]] * 2)


def test_before_any_write_the_log_is_empty():
    log = telemetry.RoutingLog()
    assert (log.steps, log.names, log.busiest, log.idlest) == ([], [], [], [])
    assert log.load.shape == (0, 0, 0)
    assert log.load.dtype == np.float32


# Errors.


@pytest.mark.parametrize("step", [7, 6, -1, 7.5, 8.0, "8", None, True, [8, 9], jnp.float32(8), np.array([8])])
def test_steps_must_rise(step):
    log = telemetry.RoutingLog()
    log.write(np.int64(7), EVEN)
    with pytest.raises(ValueError, match=r"step must be an integer above 7, the last step; got ") as error:
        log.write(step, EVEN)
    assert f"got {step!r}." in str(error.value)
    log.write(jnp.int32(8), EVEN)
    assert log.steps == [7, 8]


def test_a_resumed_run_starts_a_log_at_any_step():
    log = telemetry.RoutingLog()
    log.write(900, EVEN)
    assert log.steps == [900]
    with pytest.raises(ValueError, match=r"step must be an integer; got 1\.5"):
        telemetry.RoutingLog().write(1.5, EVEN)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"a": EVEN, "b": EVEN}, {"a": EVEN, "c": EVEN}, r"Missing: b \[4\]\. New: c \[4\]\."),
        ({"a": EVEN}, {"a": jnp.array([0.5, 0.5])}, r"Missing: a \[4\]\. New: a \[2\]\."),
        ({"a": EVEN[None]}, {"a": EVEN}, r"Missing: a\[0\] \[4\]\. New: a \[4\]\."),
        ({"a": EVEN, "b": EVEN}, {"a": EVEN}, r"Missing: b \[4\]\. New: none\."),
    ],
)
def test_other_layers_are_an_error(before, after, message):
    log = telemetry.RoutingLog()
    log.write(1, before)
    with pytest.raises(ValueError, match=rf"layers at step 2 differ from the calls before\. {message}"):
        log.write(2, after)
    with pytest.raises(ValueError, match=rf"excitation has other layers than the utilization\. {message}"):
        log.write(2, before, after)
    assert log.steps == [1]


@pytest.mark.parametrize(
    "writer",
    ["out/run", pathlib.Path("out"), 3, [Run()], tensorboardX.SummaryWriter, telemetry.JSONLines, {"log": print}],
)
def test_what_is_no_writer_is_an_error(writer):
    with pytest.raises(ValueError, match="a writer must have add_scalar and add_histogram") as error:
        telemetry.RoutingLog(Run(), writer)
    assert str(error.value).endswith(f"got {writer!r}.")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alarm_after": 0}, "alarm_after must be an integer, not traced, and at least 1; got 0"),
        ({"alarm_after": 2.5}, "got 2.5"),
        ({"alarm": "slack"}, r"alarm must be a function of \(step, layer, what\); got 'slack'"),
    ],
)
def test_malformed_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        telemetry.RoutingLog(**kwargs)


# Writers.


def test_every_writer_receives_every_call():
    board, run, other = Board(), Run(), Run()
    log = telemetry.RoutingLog(board, None, run, other, prefix="eval/moe")
    tree = {"a": SPLIT.at[0].set(NAN), "b": ONE}
    returned = [log.write(step, tree, phi_of(tree)) for step in (10, 20)]
    assert len(returned[0]) == 13
    assert all(name.startswith("eval/moe/") for name in returned[0])
    for step, values in zip((10, 20), returned, strict=True):
        written = {name: value for at, name, value in board.scalars if at == step}
        np.testing.assert_equal(written, values)  # NaN equals NaN
    # Only b is finite; its load over the mean is its zero-sum excitation.
    assert board.histograms[:2] == [(10, f"eval/moe/{name}", [0, 0, 4, 0]) for name in ("load_over_mean", "excitation")]
    assert len(board.histograms) == 4
    for rows in (run.rows, other.rows):
        assert [step for step, _ in rows] == [10, 20]
        np.testing.assert_equal(
            rows[1][1], returned[1] | {"eval/moe/busiest": log.busiest, "eval/moe/idlest": log.idlest}
        )


def test_a_histogram_of_nothing_is_not_written():
    board = Board()
    telemetry.RoutingLog(board).write(1, EVEN * NAN)
    assert len(board.scalars) == 10
    assert board.histograms == []


def test_tensorboard_reads_it_back(tmp_path):
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        log = telemetry.RoutingLog(writer)
        returned = {10 * n: log.write(10 * n, MIXED, phi_of(MIXED)) for n in (1, 2)}
    events = dashboards.events_of(tmp_path)
    for step, expected in returned.items():
        at_step = {name: value for at, name, value in events if at == step}
        written = {name: v.simple_value for name, v in at_step.items() if v.WhichOneof("value") == "simple_value"}
        assert written == pytest.approx(expected, rel=1e-6)
        histogram = at_step["routing/excitation"].histo  # 2, 2, 0, 0 | 0, 0, 4, 0 | 3/2, 3/2, 0
        assert (histogram.num, histogram.min, histogram.max) == (11, 0, 4)
        assert histogram.sum == pytest.approx(11)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_readable_after_every_call(tmp_path):
    path = tmp_path / "folder" / "log.jsonl"
    log = telemetry.RoutingLog(telemetry.JSONLines(path))
    values = log.write(1, {"a": ONE})
    expected = values | {"step": 1, "routing/busiest": [list(row) for row in log.busiest]}
    expected["routing/idlest"] = [["a", 0, 0.0], ["a", 1, 0.0], ["a", 3, 0.0], ["a", 2, 4.0]]
    assert read(path) == [expected]
    log.write(2, {"a": ONE * NAN})
    assert len(read(path)) == 2
    assert read(path)[1]["routing/max_over_mean_load/worst"] is None
    assert "NaN" not in path.read_text()


def test_json_lines_take_rows_of_your_own(tmp_path):
    row = {"nan": NAN, "list": [1, -INF, (np.float32(INF), "x")], "array": np.array([[1.5, NAN]]), "none": None}
    row |= {"jax": jnp.int32(3), "half": jnp.bfloat16(1.5), "config": {"path": pathlib.Path("a/b"), "on": np.True_}}
    telemetry.JSONLines(tmp_path / "log").log(row, step=np.int64(4))
    assert read(tmp_path / "log") == [
        {"step": 4, "nan": None, "list": [1, None, [None, "x"]], "array": [[1.5, None]], "none": None}
        | {"jax": 3, "half": 1.5, "config": {"path": "a/b", "on": True}}
    ]


def test_json_lines_of_a_resumed_run_continue(tmp_path):
    path = tmp_path / "log"
    writer = telemetry.JSONLines(path, resume_at=0)  # no file yet
    for step in (1, 2, 3):
        writer.log({"run": 1}, step)
    with path.open("a") as file:
        file.write('{"step": 2, "ru')  # killed while it was writing
    telemetry.JSONLines(path, resume_at=2).log({"run": 2}, 3)
    assert [(row["step"], row["run"]) for row in read(path)] == [(1, 1), (2, 1), (3, 2)]
    telemetry.JSONLines(path)
    assert path.read_text() == ""


@pytest.mark.parametrize("damage", [b"\0\0\0", b"12", b'{"loss": 1}', b'{"step": null}', b"\xff"])
def test_a_damaged_line_is_removed_with_a_warning(tmp_path, damage):
    path = tmp_path / "log"
    writer = telemetry.JSONLines(path)
    writer.log({"run": 1}, 1)
    path.write_bytes(path.read_bytes() + damage + b"\n")
    writer.log({"run": 1}, 2)
    with pytest.warns(UserWarning, match="a damaged line was removed"):
        telemetry.JSONLines(path, resume_at=2)
    assert [row["step"] for row in read(path)] == [1, 2]


# The alarm.


def alarms(loads, **kwargs):
    """What the alarm was called with, for a log of a layer named moe at steps 10, 20, ..."""
    calls = []
    log = telemetry.RoutingLog(alarm=lambda *call: calls.append(call), **kwargs)
    for number, load in enumerate(loads, 1):
        log.write(10 * number, {"moe": jnp.asarray(load), "other": EVEN})
    return calls


THREE = [0.4, 0.4, 0.2, 0.0]


def test_a_disk_too_full_to_resume_loses_no_line(tmp_path, monkeypatch):
    def fail(path, data):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left on device"):
            telemetry.JSONLines(path, resume_at=1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    telemetry.JSONLines(path, resume_at=1)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_an_expert_is_dead_after_some_calls_and_the_alarm_comes_once():
    assert alarms([THREE] * 2, alarm_after=3) == []
    assert alarms([THREE] * 9, alarm_after=3) == [(30, "moe", "dead experts: 3")]
    assert alarms([THREE, THREE, EVEN] * 3, alarm_after=3) == []  # by chance, now and then
    two_periods = alarms([THREE] * 4 + [EVEN] + [THREE] * 4, alarm_after=3)
    assert two_periods == [(30, "moe", "dead experts: 3"), (80, "moe", "dead experts: 3")]


def test_experts_that_die_later_get_an_alarm_of_their_own():
    loads = [THREE] + [[0.5, 0.3, 0.0, 0.0]] * 4
    expected = [(20, "moe", "dead experts: 3"), (30, "moe", "dead experts: 2")]
    assert alarms(loads, alarm_after=2, collapsed_entropy=0) == expected


def test_the_dead_load_is_over_the_mean():
    load = [0.55, 0.39, 0.06, 0.0]  # 2.2, 1.56, 0.24, 0
    assert alarms([load], alarm_after=1, dead_load=0.25, collapsed_entropy=0) == [(10, "moe", "dead experts: 2, 3")]
    assert alarms([load], alarm_after=1, dead_load=0.23, collapsed_entropy=0) == [(10, "moe", "dead experts: 3")]


def test_a_collapsed_router():
    collapsed = [0.999, 0.999, 0.001, 0.001]  # -2 (0.4995 log 0.4995 + 0.0005 log 0.0005) / log 4
    calls = alarms([EVEN, collapsed, collapsed, collapsed], alarm_after=2)
    assert calls == [(30, "moe", "collapsed router: load entropy 0.506")]
    assert alarms([collapsed] * 3, alarm_after=2, collapsed_entropy=0.5) == []


def test_no_load_is_dead_but_not_collapsed_and_nan_is_neither():
    assert alarms([jnp.zeros(4)], alarm_after=1) == [(10, "moe", "dead experts: 0, 1, 2, 3")]
    assert alarms([EVEN * NAN] * 2, alarm_after=1) == []


def test_an_alarm_can_end_the_run_after_the_step_was_written():
    def stop(step, layer, what):
        raise RuntimeError(f"{step}: {layer}: {what}")

    run = Run()
    log = telemetry.RoutingLog(run, alarm=stop, alarm_after=1)
    with pytest.raises(RuntimeError, match="5: a: dead experts: 0, 1, 3"):
        log.write(5, {"a": ONE})
    assert [step for step, _ in run.rows] == log.steps == [5]


# Several processes.


@pytest.mark.slow
def test_one_process_of_several_logs_alone():
    """Process 0 logs counts that are whole on every device; the other process waits at the end."""
    code = textwrap.dedent("""
        import sys
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
        import jax.numpy as jnp
        from jax.experimental import multihost_utils
        from jax.sharding import NamedSharding, PartitionSpec
        from excitation_optax import RoutingCounts, telemetry

        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        make = lambda: {"moe": RoutingCounts(jnp.array([3.0, 1.0, 0.0, 0.0]), jnp.array(4.0))}
        whole = jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))()
        split = jax.jit(lambda: make()["moe"].utilization, out_shardings=NamedSharding(mesh, PartitionSpec("data")))()
        if jax.process_index() == 0:
            log = telemetry.RoutingLog()
            assert log.write(1, whole)["routing/max_over_mean_load/worst"] == 3
            try:
                telemetry.RoutingLog().write(1, split)
            except ValueError as error:
                assert "split over devices of several processes" in str(error), error
            else:
                raise AssertionError
        multihost_utils.sync_global_devices("end")
        print("done")
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = lambda process: subprocess.Popen(
        [sys.executable, "-c", code, str(process), address], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    processes = [run(0), run(1)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "done" in out  # Gloo writes into the same line now and then
