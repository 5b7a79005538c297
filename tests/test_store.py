"""Configs and their keys; the results file, and what is left of it after a crash, a full disk, or two writers."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import threading
import typing

import pytest

from examples.reproduction import configs, store

ROOT = pathlib.Path(__file__).parents[1]
KINDS = list(configs.KINDS.values())
EXCITED = {kind: kind(strategy="zero_sum") for kind in KINDS}  # vanilla has no gamma
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]


def another(run, name):
    """A value that the field does not have."""
    value, hint = getattr(run, name), typing.get_type_hints(type(run))[name]
    if typing.get_origin(hint) is typing.Literal:
        return next(option for option in typing.get_args(hint) if option not in (value, "vanilla"))
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "-other"
    return 100 if value is None else value + 1 if isinstance(value, int) else value / 2 or 0.5


def made_up(seed=0, dataset="cifar10", **measures):
    run = configs.MLPRun(dataset=dataset, strategy="zero_sum", seed=seed)
    measures = {"accuracy": 0.1 + seed, "entropy": [1.5, 2.5]} | measures
    return store.Result(run, measures, {"epoch": [1, 2], "accuracy": [0.05, 0.1]}, 1.5, {"date": "today"})


def seeds(folder):
    return sorted(result.run.seed for result in store.Results(folder))


# Configs.


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.kind}-{name}" for kind, name in FIELDS])
def test_every_field_is_in_the_key(kind, name):
    run = EXCITED[kind]
    changed = dataclasses.replace(run, **{name: another(run, name)})
    assert changed != run
    assert changed.key != run.key


def test_keys_are_short_and_kinds_have_their_own():
    keys = {run.key for run in EXCITED.values()}
    assert len(keys) == len(KINDS)
    assert all(len(key) == 16 and int(key, 16) for key in keys)


@pytest.mark.parametrize("kind", KINDS, ids=configs.KINDS)
def test_the_baseline_has_no_gamma(kind):
    assert kind(gamma=2.0) == kind(gamma=3.0)
    assert kind(gamma=2.0).key == kind().key
    assert kind(strategy="inverted", gamma=2).key == kind(strategy="inverted", gamma=2.0).key != kind().key


@pytest.mark.parametrize("kind", KINDS, ids=configs.KINDS)
def test_a_config_comes_back_from_json(kind):
    for run in (kind(), kind(strategy="random_boost", gamma=1 / 3, seed=7, subset=100)):
        again = configs.from_json(json.loads(json.dumps(run.to_json())))
        assert again == run
        assert again.key == run.key
        assert type(again) is kind


def test_digits_are_not_mirrored():
    """Neither those of house numbers, unless it is asked for."""
    assert configs.MLPRun().augmentation == "flip"
    assert configs.MLPRun(dataset="svhn_cropped").augmentation == "none"
    assert configs.MLPRun(dataset="svhn_cropped", augmentation="flip").augmentation == "flip"
    assert (configs.ViTRun().flip, configs.ViTRun(dataset="svhn_cropped").flip) == (True, False)


def test_the_rate_of_a_vit_depends_on_its_optimizer():
    assert configs.ViTRun().learning_rate == 1e-4
    assert configs.ViTRun(optimizer="sgd").learning_rate == 0.01
    assert configs.ViTRun(optimizer="sgd", learning_rate=0.01).key == configs.ViTRun(optimizer="sgd").key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: configs.MLPRun(epochs=0), "MLPRun: epochs must be at least 1; got 0"),
        (lambda: configs.GPTRun(subset=0), "GPTRun: subset must be at least 1; got 0"),
        (lambda: configs.GPTRun(warmup=1.5), "GPTRun: warmup is a fraction of the steps, in [0, 1]; got 1.5"),
        (lambda: configs.ViTRun(seed=-1), "ViTRun: seed must not be negative; got -1"),
        (lambda: configs.MLPRun(strategy="zero_sum", gamma=-1.0), "gamma must not be negative; got -1.0"),
        (lambda: configs.MLPRun(strategy="zero_sum", gamma=math.nan), "gamma must not be negative; got nan"),
        (lambda: configs.MLPRun(learning_rate=0.0), "MLPRun: learning_rate must be positive; got 0.0"),
        (lambda: configs.MLPRun(sparsity=90), "MLPRun: sparsity is a share, in [0, 1]; got 90"),
        (
            lambda: configs.from_json({"kind": "cnn"}),
            "kind is one of ['gpt', 'mini_gpt', 'mini_vit', 'mlp', 'vit']; got 'cnn'",
        ),
        (lambda: configs.from_json({"kind": "mlp", "widht": 3}), "widht"),
        (lambda: configs.from_json({"kind": "mlp", "width": "3"}), "Not a config of kind 'mlp'"),
    ],
)
def test_errors_name_what_was_received(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert message in str(error.value)


# Written and read again.


def test_results_come_back(tmp_path):
    results = store.Results(tmp_path / "deep" / "results")
    first = made_up(0, accuracy=1 / 3)
    assert first.run not in results
    results.append([first, made_up(1)])
    results.append([made_up(2), made_up(0, dataset="svhn_cropped")])
    again = store.Results(results.folder)
    assert again.damaged == []
    assert list(again) == list(results)
    assert (len(again), again[first.run]) == (4, first)
    assert sorted(path.name for path in results.folder.iterdir()) == ["mlp-cifar10.jsonl", "mlp-svhn_cropped.jsonl"]


def test_what_is_not_finite_is_null_on_file_and_nan_here(tmp_path):
    curve = {"epoch": [1, 2], "accuracy": [0.5, math.nan]}
    result = dataclasses.replace(made_up(accuracy=math.nan, entropy=[math.inf, 2.5]), curve=curve)
    store.Results(tmp_path).append([result])
    line = json.loads((tmp_path / "mlp-cifar10.jsonl").read_text())
    assert line["measures"] == {"accuracy": None, "entropy": [None, 2.5]}
    (again,) = store.Results(tmp_path)
    assert math.isnan(again.measures["accuracy"])
    assert math.isnan(again.measures["entropy"][0])
    assert again.measures["entropy"][1] == 2.5
    assert again.curve["accuracy"][0] == 0.5
    assert math.isnan(again.curve["accuracy"][1])


def test_the_first_result_of_a_run_counts(tmp_path):
    store.Results(tmp_path).append([made_up(accuracy=0.25)])
    store.Results(tmp_path).append([made_up(accuracy=0.75)])
    (result,) = store.Results(tmp_path)
    assert result.measures["accuracy"] == 0.25


def test_the_results_of_this_repository_are_whole():
    assert store.Results().damaged == []


# Damage.


@pytest.mark.parametrize("left", [1, 20, -20, -2])
def test_a_line_that_was_cut_off_stays_alone(tmp_path, left):
    path = tmp_path / "mlp-cifar10.jsonl"
    store.Results(tmp_path).append([made_up(0), made_up(1)])
    first, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last[:left])
    results = store.Results(tmp_path)
    assert seeds(tmp_path) == [0]
    (message,) = results.damaged
    assert message.startswith(f"{path}, line 2: skipped, as it is damaged (")
    results.append([made_up(1), made_up(2)])
    assert path.read_bytes().startswith(first + last[:left] + b"\n")
    assert seeds(tmp_path) == [0, 1, 2]
    assert store.Results(tmp_path).damaged == [message]


def test_a_line_that_lacks_only_its_newline_is_whole(tmp_path):
    path = tmp_path / "mlp-cifar10.jsonl"
    store.Results(tmp_path).append([made_up(0)])
    path.write_bytes(path.read_bytes()[:-1])
    store.Results(tmp_path).append([made_up(1)])
    assert seeds(tmp_path) == [0, 1]
    assert store.Results(tmp_path).damaged == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line[: len(line) // 2], "damaged"),
        (lambda line: line.replace(b"0.05", b"0.07"), "its checksum is"),
        (lambda line: line.replace(b"today", b"todaz"), "its checksum is"),
        (lambda line: line.replace(b'"checksum": "', b'"checksum": "0'), "that of its content is"),
        (lambda line: line.replace(b'"seed": 1', b'"seed": 8'), f"{made_up(1).run.key} is not that of its config"),
        (lambda line: line.replace(b'"width"', b'"widht"'), "widht"),
        (lambda line: line.replace(b'"mlp"', b'"cnn"'), "'cnn'"),
        (lambda line: line.replace(b'"curve"', b'"curv"'), "curve"),
        (lambda line: b"\0" * len(line), "damaged"),
        (lambda line: b"\xff" + line, "damaged"),
        (lambda line: b"null", "damaged"),
        (lambda line: b"[]", "damaged"),
        (lambda line: b'{"key": "0", "config": []}', "damaged"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_and_skipped(tmp_path, damage, said):
    path = tmp_path / "mlp-cifar10.jsonl"
    store.Results(tmp_path).append([made_up(seed) for seed in range(3)])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage(lines[1]), lines[2], b""]))
    (message,) = store.Results(tmp_path).damaged
    assert message.startswith(f"{path}, line 2: skipped")
    assert said in message
    assert seeds(tmp_path) == [0, 2]


def test_a_line_without_a_checksum_is_one_of_an_earlier_version(tmp_path):
    path = tmp_path / "mlp-cifar10.jsonl"
    store.Results(tmp_path).append([made_up(0, accuracy=1 / 3, entropy=[math.inf, 1e-300, 5])])
    record = json.loads(path.read_text())
    assert len(record.pop("checksum")) == 16
    path.write_text(json.dumps(record) + "\n")
    results = store.Results(tmp_path)
    assert (len(results), results.damaged) == (1, [])


def test_every_flipped_bit_is_found(tmp_path):
    """A line reads as it was written, or not at all. (A name of a field that nobody reads may change.)"""
    path = tmp_path / "mlp-cifar10.jsonl"
    store.Results(tmp_path).append([made_up(1)])
    line, (written,) = path.read_bytes(), store.Results(tmp_path)
    for place in range(len(line) - 1):
        for bit in range(8):
            path.write_bytes(line[:place] + bytes([line[place] ^ 1 << bit]) + line[place + 1 :])
            assert list(store.Results(tmp_path)) in ([], [written]), (place, bit)


# Writing that fails.


@pytest.mark.parametrize("name", ["file", "file/results"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    results = store.Results(tmp_path / name)
    for write in (results.check_writable, lambda: results.append([made_up()])):
        with pytest.raises(OSError, match=f"{tmp_path}/file"):
            write()
    assert len(results) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"cannot be written to; choose another by --results"):
            store.Results(tmp_path).check_writable()
    finally:
        tmp_path.chmod(0o700)


@contextlib.contextmanager
def files_no_longer_than(size):
    """What is written beyond it fails, as on a disk that is full: Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("cut_off", [False, True])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, cut_off):
    path = tmp_path / "mlp-cifar10.jsonl"
    results = store.Results(tmp_path)
    results.append([made_up(0)])
    if cut_off:
        path.write_bytes(path.read_bytes() + b'{"key": ')
    before = path.read_bytes()
    with (
        files_no_longer_than(len(before) + 100),  # the first bytes fit
        pytest.raises(OSError, match=r"results on file are kept, new ones are lost.*mlp-cifar10\.jsonl"),
    ):
        results.append([made_up(1), made_up(2)])
    assert path.read_bytes() == before
    assert made_up(1).run not in results
    results.append([made_up(1), made_up(2)])  # there is room again
    assert seeds(tmp_path) == [0, 1, 2]


# Two writers.


def test_appending_waits_for_another_writer(tmp_path):
    path = tmp_path / "mlp-cifar10.jsonl"
    results = store.Results(tmp_path)
    results.append([made_up(0)])
    before = path.read_bytes()
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = threading.Thread(target=results.append, args=([made_up(1)],))
        writer.start()
        file.write(b'{"half of ')
        writer.join(0.2)
        assert writer.is_alive()
        assert path.read_bytes() == before + b'{"half of '
        file.truncate(len(before))
    writer.join()
    assert seeds(tmp_path) == [0, 1]
    assert store.Results(tmp_path).damaged == []


WRITER = """
import pathlib, sys
from tests import test_store
from examples.reproduction import store

results = store.Results(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for seed in range(int(sys.argv[2]), 60, 2):
    results.append([test_store.made_up(seed, note="x" * 20_000)])
"""


@pytest.mark.slow
def test_two_programs_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen([*command, str(i)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for i in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert seeds(tmp_path) == list(range(60))
    assert store.Results(tmp_path).damaged == []
