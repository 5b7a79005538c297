"""The parts of examples.pod: mesh, batches, checkpoints, what a program is told."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading

import dashboards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import array
from jax.sharding import PartitionSpec

import excitation_optax
from examples import logs, training
from examples.pod import checkpoints, data, parallel, train

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    # Orbax leaves coroutines behind when a file cannot be read.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# The mesh.


def test_the_data_axis_takes_what_is_left():
    assert dict(parallel.make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "expert": 1}
    assert dict(parallel.make_mesh(expert=8).shape) == {"data": 1, "fsdp": 1, "expert": 8}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 3}, {"expert": 16}, {"data": 8, "fsdp": 2}, {"data": 0}])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="there are 8"):
        parallel.make_mesh(**sizes)


def test_batches_and_experts_that_cannot_be_split():
    mesh = parallel.make_mesh(expert=4)
    parallel.check_sizes(mesh, 16, 12)
    with pytest.raises(ValueError, match=r"A batch of 12 .* cannot be split evenly over 8 devices"):
        parallel.check_sizes(mesh, 12, 12)
    with pytest.raises(ValueError, match="6 experts cannot be split evenly over an expert axis of 4"):
        parallel.check_sizes(mesh, 16, 6)


def test_where_parameters_lie():
    """Experts along their axis, the largest other one along fsdp, stacked layers whole; moments as their parameters."""
    mesh = parallel.make_mesh(fsdp=2, expert=2)
    params = {
        "layers": {
            "stack": {"moe": {"experts": {"kernel_in": jnp.zeros((3, 4, 16, 32)), "bias_in": jnp.zeros((3, 4, 32))}}}
        },
        "alone": {"experts": jnp.zeros((4, 64, 64))},
        "head": jnp.zeros((64, 32)),
        "odd": jnp.zeros((65, 63)),
        "small": jnp.zeros(64),
        "number": jnp.zeros(()),
    }
    got = jax.tree.map(lambda s: s.spec, parallel.shardings({"mu": params}, mesh)["mu"])
    assert got["layers"]["stack"]["moe"]["experts"] == {
        "kernel_in": PartitionSpec(None, "expert", None, "fsdp"),
        "bias_in": PartitionSpec(None, "expert", None),  # 384 numbers are not worth it
    }
    assert got["alone"]["experts"] == PartitionSpec("expert", "fsdp", None)
    assert got["head"] == PartitionSpec("fsdp", None)
    assert got["odd"] == PartitionSpec(None, None)
    assert (got["small"], got["number"]) == (PartitionSpec(None), PartitionSpec())


@pytest.mark.slow
def test_a_step_leaves_everything_where_it_lies(tmp_path):
    """Parameters and moments stay split: a device never comes to hold more than its part."""
    config = make_config(tmp_path, fsdp=2, expert=2, d_model=64, d_ff=64, optimizer="adamw")
    mesh = parallel.make_mesh(fsdp=2, expert=2)
    tokens = np.zeros((8, 9), np.int32)
    with jax.set_mesh(mesh):
        _, trainer = train.make_trainer(config, mesh)
        state = trainer.init()
        for _ in range(2):
            state, _ = trainer.step(state, trainer.put(tokens.shape, lambda rows: tokens[rows]))
    parts = 0
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.like), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        parts += leaf.addressable_shards[0].data.shape != leaf.shape
    assert parts >= 3 * 5  # kernels of attention and experts, and their two moments


def test_pmap_splits_no_parameters():
    with pytest.raises(ValueError, match="--fsdp and --expert must be 1"):
        parallel.Trainer(lambda *_: None, lambda: (), parallel.make_mesh(fsdp=2), "pmap")


def test_micro_batches_give_the_means_and_the_counts_of_the_whole_batch():
    def loss_fn(scale, rows):
        counts = excitation_optax.RoutingCounts(jnp.sum(rows, axis=0), jnp.float32(len(rows)))
        return jnp.mean(scale**2 * rows), ({"loss": jnp.mean(rows)}, counts)

    rows = jnp.arange(16, dtype=jnp.float32).reshape(8, 2)  # 0 to 15 have the mean 7.5; columns 0, 2, ... sum to 56
    grads, (logged, counts) = jax.jit(parallel.gradient(loss_fn, micro_batches=4))(jnp.float32(3), rows)
    assert (float(grads), float(logged["loss"])) == (2 * 3 * 7.5, 7.5)
    np.testing.assert_array_equal(counts.counts, [56, 64])
    assert float(counts.tokens) == 8


# Batches.


def test_batches_are_a_function_of_the_step():
    """Every epoch holds every example once, in another order; a part of the rows is a part of the batch."""
    batches = data.Batches(np.arange(12)[:, None], batch_size=4, seed=3)
    assert batches.shape == (4, 1)
    epochs = [
        np.concatenate([batches.rows(step, slice(None))[:, 0] for step in range(3 * e, 3 * e + 3)]) for e in (0, 1)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert epochs[0].tolist() != list(range(12))
    again = data.Batches(np.arange(12)[:, None], batch_size=4, seed=3)
    np.testing.assert_array_equal(again.rows(4, slice(1, 3)), batches.rows(4, slice(None))[1:3])
    other = data.Batches(np.arange(12)[:, None], batch_size=12, seed=4).rows(0, slice(None))[:, 0]
    assert other.tolist() != epochs[0].tolist()


def test_windows_follow_each_other():
    assert data.windows(np.arange(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (3, 9), (5, 6)])
def test_batches_are_prefetched_in_order(first, last):
    threads = set()

    def make(step):
        threads.add(threading.current_thread())
        return step

    assert list(data.prefetch(make, first, last)) == list(range(first, last))
    assert threading.current_thread() not in threads


def test_an_error_while_reading_reaches_the_loop():
    def make(step):
        if step == 2:
            raise OSError("the disk is gone")
        return step

    batches = iter(data.prefetch(make, 0, 5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


# Checkpoints.

CONFIG = {"strategy": "zero_sum", "d_model": 16}


def make_state(mesh, step):
    state = training.TrainState({"w": step + jnp.arange(4096.0).reshape(64, 64)}, (), jnp.array(step, jnp.int32))
    return jax.device_put(state, parallel.shardings(state, mesh))


def open_folder(folder, config=CONFIG, save_every=2, keep=2, **kwargs):
    return checkpoints.Checkpoints(folder, config, save_every, keep, **kwargs)


def fill(folder, steps=range(1, 8), **kwargs):
    """The folder with checkpoints of these steps, from a mesh whose `fsdp` is 2."""
    mesh = parallel.make_mesh(fsdp=2)
    saved = open_folder(folder, **kwargs)
    for step in steps:
        if saved.manager.should_save(step):
            saved.save(step, make_state(mesh, step))
    saved.manager.close()


def restore(folder, fsdp=8, **kwargs):
    mesh = parallel.make_mesh(fsdp=fsdp)
    like = make_state(mesh, 0)
    saved = open_folder(folder, **kwargs)
    try:
        return saved.restore(like)
    finally:
        saved.manager.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and "state" in path.parts)
    return max(files, key=lambda path: path.stat().st_size)


def test_restored_onto_another_mesh(tmp_path):
    fill(tmp_path)
    assert names(tmp_path) == ["4", "6"]
    state, step = restore(tmp_path)
    assert step == 6
    assert int(state.step) == 6
    np.testing.assert_array_equal(state.params["w"], 6 + np.arange(4096.0).reshape(64, 64))
    assert state.params["w"].sharding.spec == PartitionSpec("fsdp", None)
    assert state.params["w"].addressable_shards[0].data.shape == (8, 64)


def test_an_empty_folder_and_one_that_cannot_be_made(tmp_path):
    assert restore(tmp_path / "new") is None
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        restore(tmp_path / "file" / "new")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def collected():
    """What Orbax leaves behind is collected here, and not in another test, where it would be an error."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage):
    """The one before is used, with a warning, and the step can be saved again."""
    fill(tmp_path)
    damage(largest_file(tmp_path / "6"))
    with pytest.warns(UserWarning, match="step 6 .* is damaged; trying the one before"):
        state, step = restore(tmp_path)
    assert (step, int(state.step)) == (4, 4)
    assert names(tmp_path) == ["4", "6.damaged"]
    fill(tmp_path, range(5, 8))
    assert restore(tmp_path)[1] == 6
    damage(largest_file(tmp_path / "6"))  # and once more
    with pytest.warns(UserWarning, match="step 6"):
        assert restore(tmp_path)[1] == 4
    assert names(tmp_path) == ["4", "6.damaged", "6.damaged-2"]


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("text", [b"zero_sum", b"16", b"d_model", b"checksum", b"config_checksum", b"{"])
def test_a_flipped_bit_in_the_config_is_damage(tmp_path, text):
    """It does not make the checkpoint another run's: the sound one before it is used."""
    fill(tmp_path)
    file = tmp_path / "6" / "config" / "metadata"
    content = bytearray(file.read_bytes())
    content[content.index(text) + len(text) - 1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="step 6 .* is damaged; trying the one before"):
        assert restore(tmp_path)[1] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:The checkpoint of step 6:UserWarning")
def test_a_flipped_byte_in_any_file(tmp_path):
    """Of the newest checkpoint: it is restored as it was saved, or the one before it is."""
    fill(tmp_path / "sound")
    files = [path for path in (tmp_path / "sound" / "6").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 4
    for number, path in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", folder)
        flip(folder / path.relative_to(tmp_path / "sound"))
        state, step = restore(folder)
        assert step in (4, 6)
        np.testing.assert_array_equal(state.params["w"], step + np.arange(4096.0).reshape(64, 64))


def test_a_cloud_without_its_package(monkeypatch):
    """Neither gcsfs nor s3fs is a requirement of the examples."""
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    for address in ("gs://bucket/run", "s3://bucket/run", "cloud://bucket/run"):
        with pytest.raises(ValueError, match=rf"--checkpoints {address} cannot be opened .*pip install gcsfs"):
            open_folder(address)


def test_one_that_was_not_finished_is_passed_over(tmp_path):
    """As a process leaves it that is killed while it saves: the folder's name says that it is not done."""
    fill(tmp_path)
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp-123")
    assert restore(tmp_path)[1] == 4


@pytest.mark.parametrize("error", [PermissionError("not yours"), TimeoutError("slow"), MemoryError()])
def test_a_checkpoint_is_not_blamed_for_what_may_pass(tmp_path, monkeypatch, error):
    fill(tmp_path)
    before = names(tmp_path)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, "restore", fail)
        with pytest.raises(OSError, match=r"step 6 could not be read, for a reason that may pass .* try again"):
            restore(tmp_path)
    assert names(tmp_path) == before
    assert restore(tmp_path)[1] == 6


@pytest.mark.usefixtures("collected")
def test_all_of_them_damaged(tmp_path):
    fill(tmp_path)
    before = names(tmp_path)
    for step in "46":
        truncate(largest_file(tmp_path / step))
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match=r"All checkpoints .* \[6, 4\]"):
        restore(tmp_path)
    assert names(tmp_path) == before


def test_a_flag_that_may_change(tmp_path, capsys):
    """It is said that it did."""
    fill(tmp_path, config=CONFIG | {"learning_rate": 0.1})
    assert restore(tmp_path, config=CONFIG | {"learning_rate": 0.01}, may_change=["learning_rate"])[1] == 6
    assert "learning_rate: 0.1 there, 0.01 here" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"learning_rate: 0.1 there, 0.01 here"):
        restore(tmp_path, config=CONFIG | {"learning_rate": 0.01})


def test_a_checksum_sees_every_bit_and_every_change_of_place():
    numbers = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)
    states = [
        (numbers, numbers + 1),
        (numbers + 1, numbers),
        (numbers[::-1], numbers + 1),
        (np.roll(numbers, 1, axis=1), numbers + 1),
        (numbers.T, numbers + 1),
    ]
    for place in (0, 1):
        for bit in range(32):
            both = [numbers, numbers + 1]
            flipped = both[place].copy()
            flipped.view(np.uint32)[1, 2] ^= np.uint32(1) << np.uint32(bit)
            both[place] = flipped
            states.append(tuple(both))
    sums = [checkpoints.checksum(jax.tree.map(jnp.asarray, state)) for state in states]
    assert len(set(sums)) == len(sums)
    assert checkpoints.checksum(jax.tree.map(jnp.asarray, states[0])) == sums[0]


@pytest.mark.parametrize("dtype", ["bool", "int4", "uint8", "int16", "bfloat16", "float8_e4m3fn", "key"])
def test_a_checksum_of_what_else_a_state_may_hold(dtype):
    make = lambda i: jax.random.key(i) if dtype == "key" else jnp.full((3,), i, dtype)
    one, other = (checkpoints.checksum({"a": make(i)}) for i in (0, 1))
    assert one != other


@pytest.mark.parametrize("change", [{"strategy": "positive_sum"}, {"d_model": 32}, {"more": 1}])
def test_a_checkpoint_of_another_run(tmp_path, change):
    fill(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"is of another run .*{name}: .* there, {change[name]!r} here.*Nothing was"):
        restore(tmp_path, config=CONFIG | change)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_sigterm_is_heard_once_and_given_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with checkpoints.preemption() as preempted:
            assert not preempted(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preempted(2)
            assert not heard
            os.kill(os.getpid(), signal.SIGTERM)  # the second goes where it went before
            assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


# The program.


def preempted_at(step):
    """Stands for a SIGTERM in this step."""
    return lambda: contextlib.nullcontext(lambda number: number == step)


TINY = {"num_experts": 4, "d_ff": 8, "d_model": 16, "num_layers": 1, "num_heads": 2, "context": 8, "batch_size": 8}


def make_config(tmp_path, **changes):
    fields = TINY | {"steps": 6, "log_every": 1, "strategy": "positive_sum", "log": tmp_path / "log.jsonl"} | changes
    return train.Config(**fields)


def logged(config):
    lines = [json.loads(line) for line in config.log.read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "tokens_per_second"} for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 3}, "there are 8"),
        ({"expert": 8}, "4 experts cannot be split evenly over an expert axis of 8"),
        ({"batch_size": 12}, r"A batch of 12 \(--batch-size over --micro-batches\) cannot be split"),
        ({"micro_batches": 3}, "--batch-size 8 is not a multiple of --micro-batches 3"),
        ({"fsdp": 0}, "--fsdp must be at least 1"),
        ({"coordinator": "here:1"}, "--coordinator, --processes and --process go together"),
        ({"processes": 2, "process": 1}, "--coordinator, --processes and --process go together"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "--process is a number from 0 to 1; got 2"),
        ({"coordinator": "here:1", "processes": 2, "process": 1, "cluster": True}, "leave --coordinator out"),
        ({"coordinator": "here", "processes": 2, "process": 1}, "--coordinator is HOST:PORT; got 'here'"),
        ({"parallel": "pmap", "fsdp": 2}, "--fsdp and --expert must be 1"),
    ],
)
def test_errors_of_the_program(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(make_config(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_no_cluster(tmp_path, monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"--cluster found no other processes .*Start them by srun"):
        train.main(make_config(tmp_path, cluster=True))


@pytest.mark.slow
def test_a_run_goes_on_and_its_log_too(tmp_path, capsys):
    """Ended after 4 of 6 steps: what follows is as if it had not been."""
    whole = make_config(tmp_path, log=tmp_path / "whole.jsonl")
    expected = train.main(whole)
    parts = make_config(tmp_path, checkpoints=str(tmp_path / "saved"), save_every=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "preemption", preempted_at(5))
        with pytest.raises(SystemExit) as ended:
            train.main(parts)
    assert ended.value.code == 0
    assert "preempted: saved step 5 of 6" in capsys.readouterr().out
    (tmp_path / "saved" / "5").rename(tmp_path / "lost")  # as if it had been killed: it goes on from step 4
    state = train.main(parts)
    assert "resuming from step 4" in capsys.readouterr().out
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(parts) == logged(whole)
    lines = [json.loads(line) for line in parts.log.read_text().splitlines()]
    assert [line["step"] for line in lines if "config" in line] == [0, 4]
    assert all(line["tokens_per_second"] > 0 for line in lines if "max_over_mean_load" in line)


@pytest.mark.slow
def test_it_says_what_it_does_and_logs_beside_the_checkpoints(tmp_path, capsys):
    config = make_config(tmp_path, log=None, checkpoints=str(tmp_path / "saved"), steps=2, expert=2, fsdp=2)
    train.main(config)
    assert (tmp_path / "saved" / "log.jsonl").is_file()
    shown = capsys.readouterr()
    first, second, *_, last = shown.out.splitlines()
    assert first.startswith("mesh data 2 x fsdp 2 x expert 2 of 8 devices (cpu) in 1 processes; ")
    assert re.search(r"; [\d,]+ parameters; 64 tokens per step$", first)
    assert (second, last) == ("compiling", "checkpoint of step 2 saved, the last")
    assert re.search(r"positive_sum: step 2 of 2, evaluation loss \d\.\d+, about 00:00 left", shown.err)
    train.main(config)
    assert "resuming from step 2, the last: nothing is left to do" in capsys.readouterr().out
    on_a_cloud = dataclasses.replace(config, checkpoints="gs://bucket/run")
    assert on_a_cloud.log_path == pathlib.Path("out") / "pod-positive_sum.jsonl"
    assert dataclasses.replace(config, log=tmp_path / "a").log_path == tmp_path / "a"


@pytest.mark.parametrize(
    ("name", "value"), [("strategy", "zero_sum"), ("optimizer", "sgd"), ("d_ff", 16), ("num_layers", 2), ("seed", 1)]
)
def test_what_makes_a_run_another(tmp_path, name, value):
    here, there = (make_config(tmp_path, **flags).identity() for flags in ({}, {name: value}))
    assert {key for key in here if here[key] != there[key]} == {name}


def test_a_run_without_checkpoints_can_be_preempted(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.end(make_config(tmp_path, preemption_exit_code=143), None, 2)
    assert ended.value.code == 143
    assert "without --checkpoints, nothing is saved" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_two_thousand_steps_leave_nothing_behind(kind, tmp_path, monkeypatch):
    """Memory is flat, nothing is compiled after the first steps, and only what is logged is brought to the host."""
    compiled, copied, seen = [], [], []
    listen = lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    write, to_host = logs.Log.write, array.ArrayImpl._value

    def watch(log, step, values, shown=""):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        seen.append((step, len(compiled), len(copied), len(values), len(jax.live_arrays()), megabytes))
        write(log, step, values, shown)

    # On CPU, jax.transfer_guard does not see what comes from the device.
    monkeypatch.setattr(array.ArrayImpl, "_value", property(lambda a: copied.append(a.shape) or to_host.__get__(a)))
    monkeypatch.setattr(logs.Log, "write", watch)
    flags = {"steps": 2000, "log_every": 200, "eval_every": 10_000, "parallel": kind}
    try:
        train.main(make_config(tmp_path, **flags, checkpoints=str(tmp_path / "saved"), save_every=10_000))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    (_, compiles, copies, _, arrays, memory), *later = [entry for entry in seen if 400 <= entry[0] < 2000]
    assert len(later) == 7
    assert compiles > 0
    for i, (_, later_compiles, later_copies, logged_values, later_arrays, later_memory) in enumerate(later, start=1):
        assert later_compiles == compiles
        assert 0 < later_copies - copies <= i * logged_values
        assert abs(later_arrays - arrays) <= 4  # batches that are prefetched
        assert later_memory - memory < 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_tensorboard_has_the_routing_of_all_devices(kind, tmp_path):
    config = make_config(tmp_path, steps=2, log_every=1, parallel=kind, tensorboard=tmp_path / "board")
    train.main(config)
    events = dashboards.events_of(tmp_path / "board" / config.strategy)
    for row in logged(config):
        written = {name: value.simple_value for step, name, value in events if step == row["step"]}
        assert written["routing/max_over_mean_load/mean"] == pytest.approx(row["max_over_mean_load"])
        assert written["loss"] == pytest.approx(row["loss"])


@pytest.mark.slow
def test_steps_that_are_not_finite_end_the_run(tmp_path):
    """Of a learning rate that makes it diverge: what is saved is of before, and goes on with a smaller one."""
    flags = {"steps": 30, "clip": 1e30, "optimizer": "sgd", "max_skips": 3, "save_every": 1, "keep": 1}
    flags |= {"checkpoints": str(tmp_path / "saved")}
    config = make_config(tmp_path, learning_rate=1e30, **flags)
    with pytest.raises(ValueError, match=r"3 steps in a row, up to step .*not finite"):
        train.main(config)
    assert logged(config)[-1]["skipped_in_a_row"] == 3
    first_skipped = next(line["step"] for line in logged(config) if line["skipped_in_a_row"])
    assert names(tmp_path / "saved") == [str(first_skipped - 1)]


def test_a_run_goes_on_after_a_damaged_line_of_the_log_and_not_from_another_run(tmp_path):
    flags = {"checkpoints": str(tmp_path / "saved"), "steps": 4, "save_every": 2, "eval_every": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "preemption", preempted_at(2))
        with pytest.raises(SystemExit):
            train.main(make_config(tmp_path, **flags))
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"7\n" + path.read_bytes() + b"\0" * 80)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"is of another run \(strategy: 'positive_sum' there, 'zero_sum' here\)"):
        train.main(make_config(tmp_path, **flags | {"strategy": "zero_sum"}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.warns(UserWarning, match=r"log\.jsonl: a damaged line was removed"):
        train.main(make_config(tmp_path, **flags))
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_collapse_is_warned_of(tmp_path, capsys):
    """Of 64 experts, 8 sequences of 8 tokens cannot reach all."""
    train.main(make_config(tmp_path, num_experts=64, max_dead=0.01))
    assert re.search(r"step 1: in one layer \d+% of the experts got no token", capsys.readouterr().err)
    train.main(make_config(tmp_path, num_experts=64, max_dead=1.0))
    assert "got no token" not in capsys.readouterr().err
