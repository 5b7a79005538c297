"""The program that reproduces the paper: its messages, what it trains and what not again, and that it survives."""

import collections
import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from examples import datasets, reproduce
from examples.reproduction import engine, report, sections, store, studies, toy
from examples.reproduction.stacks import shared_of

ROOT = pathlib.Path(__file__).parents[1]
TINY = sections.Section(
    "tiny",
    "Tiny",
    seeds=2,
    settings={"dataset": "digits", "width": 16, "depth": 1, "epochs": 2, "subset": 100, "batch_size": 32},
    rows=tuple(sections.row({"strategy": name}) for name in ("vanilla", "zero_sum")),
)
MLPS = [name for name, section in studies.SECTIONS.items() if section.kind == "mlp" and not section.in_study]
NAMES = list(studies.SECTIONS)


pytestmark = pytest.mark.usefixtures("as_users_have_it")


@pytest.fixture
def tiny(monkeypatch):
    """An experiment of four runs on digits, on one device, so that they compile once."""
    monkeypatch.setitem(studies.SECTIONS, "tiny", TINY)
    monkeypatch.setattr(datasets, "load_images", lambda name, data_dir: datasets.load_digits())
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def program(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "examples.reproduce", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"} | env,
    )


def measured(folder):
    """What a sweep has found out, without when and how fast."""
    return {result.run: (result.measures, result.curve) for result in store.Results(folder)}


# Messages.


def test_a_name_that_is_nearly_right():
    with pytest.raises(ValueError, match=r"There is no 'tabel1'; did you mean table1\?"):
        reproduce.Run(names=("fig2", "tabel1")).main()
    with pytest.raises(ValueError, match=r"There is no 'xyz'; there are fig1, fig2, .*, table8"):
        reproduce.Run(names=("xyz",)).main()
    with pytest.raises(ValueError, match="Name at least one table or figure"):
        reproduce.Run(names=()).main()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_run(name):
    reproduce.check_name(name)
    runs = reproduce.Run(names=(name,)).runs(name)
    assert len(set(runs)) == len(runs)
    assert (not runs) == (name in ("fig1", "table8"))


def test_flags_change_the_runs():
    run = lambda **flags: reproduce.Run(names=("table1",), **flags).runs("table1")
    as_it_is = run()
    assert {r.seed for r in run(seeds=2)} == {0, 1}
    for flags in ({"epochs": 3}, {"subset": 1000}, {"dataset": "svhn_cropped"}):
        changed = run(**flags)
        assert len(changed) == len(as_it_is)
        ((name, value),) = flags.items()
        assert {getattr(r, name) for r in changed} == {value}
        assert not set(changed) & set(as_it_is)


def test_runs_of_another_data_set_are_those_that_the_paper_has_there():
    """MoE-ViTs mirror no digits, wherever the name of the data set comes from."""
    changed = reproduce.Run(names=("fig10",), dataset="svhn_cropped", epochs=1).runs("fig10")
    assert set(changed) == set(reproduce.Run(names=("fig11",), epochs=1).runs("fig11"))


def test_missing_data_ends_the_program_with_one_line(tmp_path):
    failed = program("run", "table1", "--data-dir", tmp_path, "--results", tmp_path / "results")
    assert failed.returncode == 1
    assert f"{len(reproduce.Run(names=('table1',)).runs('table1'))} runs, of which 0 are on file" in failed.stdout
    assert failed.stderr.splitlines()[-1].startswith("reproduce: cifar10 is not in")
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_results_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/results"):
        reproduce.Run(names=("table1",), results=tmp_path / "file" / "results").main()


@pytest.mark.parametrize(
    ("name", "dataset", "known"),
    [("table1", "cifar11", "cifar10, cifar100, svhn_cropped"), ("table2", "cifar10", "wikitext-103, wikitext-valid")],
)
def test_a_data_set_of_another_kind(tmp_path, name, dataset, known):
    with pytest.raises(ValueError, match=f"{name} can be run with --dataset {known}; got '{dataset}'"):
        reproduce.Run(names=(name,), dataset=dataset, data_dir=tmp_path, results=tmp_path).main()


def test_flags_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"--seeds must be at least 1; got 0"):
        reproduce.Run(names=("table1",), seeds=0, results=tmp_path).main()
    for flags in ({"seeds": 2}, {"epochs": 3}, {"subset": 4}, {"dataset": "cifar10"}):
        with pytest.raises(ValueError, match=r"fig1 trains no model: --dataset, --seeds, --epochs and --subset do not"):
            reproduce.Run(names=("fig1",), results=tmp_path, **flags).main()


def test_results_that_are_not_there(tmp_path):
    for command in (reproduce.List, reproduce.Report):
        with pytest.raises(FileNotFoundError, match=f"There is no folder of results {tmp_path}/none; `run` makes one"):
            command(results=tmp_path / "none").main()


def test_data_sets_to_prepare():
    with pytest.raises(ValueError, match=r"The data sets are cifar10, cifar100, svhn_cropped; got 'cifar11'"):
        reproduce.Prepare(names=("cifar11",)).main()


def test_every_core_is_a_device_unless_told_otherwise(monkeypatch):
    code = "import jax; from examples import reproduce; reproduce.use_all_cores(); print(jax.local_device_count())"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    count = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(count.stdout) == store.cores()
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *args: updates.append(args))
    reproduce.use_all_cores()  # these tests have told it: eight
    assert updates == []


def test_the_report_of_other_results_stays_beside_them(tmp_path, capsys):
    """Neither the page nor the README of this repository are touched."""
    own = [ROOT / "docs" / "reproduction.md", ROOT / "README.md"]
    before = [path.read_bytes() for path in own]
    (tmp_path / "results").mkdir()
    reproduce.Report(results=tmp_path / "results").main()
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "results" / page) for page in ("reproduction.md", "studies.md")
    ]
    reproduce.Report(results=tmp_path / "results", docs=tmp_path / "docs").main()
    assert (tmp_path / "docs" / "reproduction.md").is_file()
    assert [path.read_bytes() for path in own] == before
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must have the markers"):
        reproduce.Report(results=tmp_path / "results", docs=tmp_path / "never", readme=readme).main()
    assert not (tmp_path / "never").exists()


# Listing and training.


def test_trained_once_then_never_again(tmp_path, tiny, capsys):
    run = reproduce.Run(names=("tiny",), results=tmp_path)
    run.main()
    assert f"4 runs, of which 0 are on file in {tmp_path}" in capsys.readouterr().out
    path = tmp_path / "mlp-digits.jsonl"
    first, found = path.read_bytes(), measured(tmp_path)
    assert set(found) == set(TINY.runs())
    for accuracy in (measures["accuracy"] for measures, _ in found.values()):
        assert 0 <= accuracy <= 1

    run.main()
    shown = capsys.readouterr().out
    assert "4 runs, of which 4 are on file" in shown
    assert f"To run them again, give an empty folder: --results {tmp_path.with_name('results-again')}" in shown
    assert path.read_bytes() == first

    with pytest.raises(ValueError, match=rf"4 of these 4 runs are in {tmp_path} already; leave --no-resume out"):
        dataclasses.replace(run, resume=False).main()

    lines = first.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:100] + b"\n" + lines[2] + lines[3][:-50])
    run.main()
    shown = capsys.readouterr()
    assert "4 runs, of which 2 are on file" in shown.out
    for number in (2, 4):
        assert f"{path}, line {number}: skipped, as it is damaged" in shown.err
    again = measured(tmp_path)
    assert set(again) == set(found)
    for run_again, values in again.items():  # the damaged two were trained without the others: rounding differs
        chex.assert_trees_all_close(values, found[run_again], rtol=1e-5)
    assert len(path.read_bytes().splitlines()) == 6

    reproduce.List(results=tmp_path).main()
    listed = capsys.readouterr().out.splitlines()
    assert ["tiny", "4", "4", "0.0", "Tiny"] in map(str.split, listed)
    assert ["fig1", "-", "-"] in [line.split()[:3] for line in listed]
    assert {line.split()[0] for line in listed[1:]} == {*NAMES, "tiny"}

    shorter = dataclasses.replace(run, epochs=1, seeds=1)  # other runs
    shorter.main()
    shown = capsys.readouterr().out
    assert "2 runs, of which 0 are on file" in shown
    found = measured(tmp_path)
    assert len(found) == 6
    for run in shorter.runs("tiny"):  # in no table, but printed
        assert re.search(
            rf"^digits, .*epochs 1.*: accuracy {100 * found[run][0]['accuracy']:.2f}$", shown, re.MULTILINE
        )
    reproduce.List(results=tmp_path).main()
    assert "On file too: 2 runs with other settings, which are in none of these." in capsys.readouterr().out


def test_figure_1_needs_no_data(tmp_path, capsys, monkeypatch):
    outcome = {"made": "up", "bowls": {}, "excitation": [1.5, 0.5], "utilization": [], "tolerance": 1, "most_steps": 1}
    outcomes = iter([outcome])
    monkeypatch.setattr(toy, "run", lambda: next(outcomes))
    for _ in range(2):  # what is there is not made again
        reproduce.Run(names=("fig1",), results=tmp_path).main()
        assert capsys.readouterr().out == f"fig1 is on file in {tmp_path / 'fig1'}\n"
        assert toy.load(tmp_path)["made"] == "up"
    reproduce.List(results=tmp_path).main()
    assert ["fig1", "-", "done"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]


def test_table_8_says_how_it_is_measured(tmp_path, capsys):
    reproduce.Run(names=("table8",), results=tmp_path).main()
    assert f"table8 is measured by: python -m benchmarks.overhead --results {tmp_path}" in capsys.readouterr().out


def test_a_full_disk_names_the_report(tmp_path, monkeypatch):
    def write(results, docs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write", write)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        reproduce.Report(results=tmp_path).main()


def noise(name, size=40):
    """Images and labels like those of a data set."""
    rng, classes = np.random.default_rng(0), datasets.NUM_CLASSES[name]
    images, labels = rng.integers(0, 256, (size, 32, 32, 3), np.uint8), rng.integers(0, classes, size, np.int32)
    return datasets.ImageData(images, labels, images, labels, classes, name)


def test_the_data_sets_of_figure_8(tmp_path, monkeypatch):
    """SVHN and CIFAR-100 are read by their names, and each has its classes."""
    trained = []

    def train_group(group, data, advance, stopped, checkpoint):
        trained.append((group.runs[0][0].dataset, data.num_classes))
        return [store.Result(run, {"accuracy": 0.5}, {}, 1.0, {}) for run in group]

    monkeypatch.setattr(engine.Program, "train_group", train_group)
    monkeypatch.setattr(datasets, "load_images", lambda name, data_dir: noise(name))
    reproduce.Run(names=("fig8",), results=tmp_path, data_dir=tmp_path, epochs=1).main()
    assert set(trained) == {("svhn_cropped", 10), ("cifar100", 100)}
    assert len(store.Results(tmp_path)) == 42


# Every experiment.


def shapes(name):
    """The groups of an experiment, two steps of one seed each, of at most three layers and as many images.

    Those alike in size and optimizer are there once.
    """
    small = {"epochs": 1, "seed": 0, "batch_size": 8, "subset": 16}
    short = [dataclasses.replace(run, depth=min(3, run.depth), **small) for run in studies.SECTIONS[name].runs()]
    groups = {}
    for group in engine.Program.plan(short):
        run = group.runs[0][0]
        groups.setdefault((run.depth, run.width, run.sparsity, run.optimizer, run.dataset), group)
    return groups


SHAPES = {shape: group for name in MLPS for shape, group in shapes(name).items()}


@pytest.mark.parametrize("name", MLPS)
def test_every_experiment_is_traced(name):
    """Shapes and choices fit together; nothing is compiled. What an experiment has of another's is left to that one."""
    mine = [group for group in shapes(name).values() if group in SHAPES.values()]
    for group in mine:
        run = group.runs[0][0]
        strategies = tuple(sorted({run.strategy for run in group}))
        program = engine.program_of(shared_of(run), strategies, 3072, 10, 2)
        like = jax.ShapeDtypeStruct
        count, size = len(group.runs[0]), 40 if run.augmentation == "crop_flip" else 32
        members = engine.Member(like((count,), np.int32), like((count,), np.float32), like((count,), np.float32))
        seeds, labels = like((1,), np.int32), like((2 * run.batch_size,), np.int32)
        images, channel = like((2 * run.batch_size, size, size, 3), np.uint8), like((1, 1, 1, 3), np.float32)
        data = engine.Data(images, labels, like((8, 32, 32, 3), np.uint8), like((8,), np.int32), channel, channel)
        states = jax.eval_shape(program.init, members, seeds)
        after, losses = jax.eval_shape(program.train_epoch, states, members, seeds, 1, data)
        assert after == states
        assert losses.shape == (1, count)
        assert jax.eval_shape(program.evaluate, states[0], data)["dead"].shape == (1, count, run.depth)


TFDS = pathlib.Path(os.environ.get("TFDS_DATA_DIR", pathlib.Path.home() / "tensorflow_datasets"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (TFDS / "cifar10").is_dir(), reason="no prepared CIFAR-10 in TFDS_DATA_DIR")
def test_cifar10_real(tmp_path):
    failed = program(
        *("run", "table1", "--data-dir", TFDS, "--results", tmp_path, "--epochs", 1, "--seeds", 1, "--subset", 1024)
    )
    assert failed.returncode == 0, failed.stderr
    results = store.Results(tmp_path)
    assert len(results) == 18
    for result in results:
        assert np.isfinite(result.measures["accuracy"])
        assert result.about["data"].startswith("cifar10 (")


# Killed, again and again.

DRIVER = """
import pathlib, sys, time
from examples import datasets
from examples.reproduction import configs, engine, store

folder, patience = pathlib.Path(sys.argv[1]), float(sys.argv[2])

class Bar:
    def update(self, epochs):
        if epochs == 2:  # of a group; finished ones come with all of theirs
            print("epoch", flush=True)
    def set_postfix_str(self, seen, refresh):
        pass

class SlowFile:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, text):  # some bytes at a time
        print("write", flush=True)
        time.sleep(patience)
        return self.file.write(text[:400])

opened = pathlib.Path.open
pathlib.Path.open = lambda path, mode="r", **how: (
    SlowFile(opened(path, mode, **how)) if mode == "ab" else opened(path, mode, **how)
)
results = store.Results(folder)
for message in results.damaged:
    print("damaged", message, flush=True)
runs = [
    configs.MLPRun(
        dataset="digits", strategy=strategy, seed=seed, width=16, depth=1, epochs=4, subset=100, batch_size=32
    )
    for seed in range(14)
    for strategy in ("vanilla", "zero_sum")
]
engine.Program.train(runs, lambda name: datasets.load_digits(), results, Bar(), max_runs=2)
"""


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    """Every run is there once and as in a sweep that nobody disturbed; what was cut off is said and made again."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    start = lambda folder, patience: subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / folder), str(patience)],
        **{"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "text": True},
    )
    undisturbed = start("undisturbed", 0)
    undisturbed.communicate()
    assert undisturbed.returncode == 0

    moments, told = random.Random(0), set()
    for number in range(10):
        process = start("killed", 0.05)
        awaited, left = ("write", moments.randrange(2, 5)) if number % 2 else ("epoch", moments.randrange(1, 20))
        for line in process.stdout:
            if line.startswith("damaged"):
                told.add(line.removeprefix("damaged").strip())
            left -= line.startswith(awaited)
            if left == 0:
                break
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert process.returncode == -9
    before = store.Results(tmp_path / "killed")
    assert 0 < len(before) < 28
    last = start("killed", 0)
    lines = last.communicate()[0].splitlines()
    told |= {line.removeprefix("damaged").strip() for line in lines if line.startswith("damaged")}
    assert last.returncode == 0

    results = store.Results(tmp_path / "killed")
    assert set(results.damaged) == told
    assert measured(tmp_path / "killed") == measured(tmp_path / "undisturbed")
    assert len(results) == 28
    keys = collections.Counter()
    for line in (tmp_path / "killed" / "mlp-digits.jsonl").read_text().splitlines():
        try:
            keys[json.loads(line)["key"]] += 1
        except ValueError:
            keys["damaged"] += 1
    assert keys.pop("damaged", 0) == len(told) > 0
    assert set(keys.values()) == {1}


TRANSFORMERS = """
import pathlib, resource, sys
from examples import datasets, reproduce, texts
from examples.reproduction import configs, inputs, store, transformers
from examples.reproduction import stacks
from tests.test_engine import Bar

folder, fail = pathlib.Path(sys.argv[1]), sys.argv[2:] == ["full"]
sizes = {"num_experts": 4, "experts_per_token": 2, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
vit = configs.ViTRun(**sizes, dataset="digits", strategy="random_boost", batch_size=16, epochs=12, subset=48)
gpt = configs.GPTRun(**sizes, dataset="abc", strategy="positive_sum", batch_size=4, epochs=12, subset=14, context=8)
parts = [b"abcab" * n for n in (40, 13)]
text = texts.Text(*(texts.encode(part, "bytes") for part in parts), parts[1], 256, "abc")
transformers.Paper.most_steps, stacks.CHECKPOINT_SECONDS = 1, 0
save, restore = store.save_checkpoint, store.restore_checkpoint
store.save_checkpoint = lambda *args: (print("save", flush=True), save(*args), print("saved", flush=True))

def counted(path, like):
    found = restore(path, like)
    print("restored" if found else "anew", flush=True)
    return found

store.restore_checkpoint = counted
results = store.Results(folder)
append = results.append

def append_to_full_disk(new):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # the first bytes fit
    append(new)

if fail:
    results.append = append_to_full_disk
transformers.ViTProgram.train([vit], lambda run: datasets.load_digits(), results, Bar())
transformers.GPTProgram.train([gpt], lambda run: text, results, Bar())
"""


@pytest.fixture(scope="module")
def transformers_job(tmp_path_factory):
    """Starts a program that trains a MoE-ViT and a GPT-MoE, with a checkpoint after each of twelve epochs."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    pipe = subprocess.PIPE
    return lambda folder, *flags: subprocess.Popen(
        [sys.executable, "-c", TRANSFORMERS, str(folder), *flags],
        **{"cwd": ROOT, "env": env, "stdout": pipe, "stderr": pipe, "text": True},
    )


@pytest.fixture(scope="module")
def undisturbed(transformers_job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    job = transformers_job(folder)
    assert "restored" not in job.communicate()[0]
    assert job.returncode == 0
    assert not list((folder / "checkpoints").iterdir())
    return measured(folder)


@pytest.mark.slow
def test_transformers_killed_ten_times(tmp_path, transformers_job, undisturbed):
    """While they train, or write a checkpoint; the results are those of a run that nobody disturbed."""
    moments, restored = random.Random(0), 0
    for _ in range(10):
        job = transformers_job(tmp_path)
        awaited, left = moments.choice(["save", "saved"]), moments.randrange(1, 4)
        for line in job.stdout:
            restored += line == "restored\n"
            left -= line == awaited + "\n"
            if left == 0:
                break
        time.sleep(moments.uniform(0, 0.02))
        job.kill()
        job.communicate()
    assert restored > 3
    job = transformers_job(tmp_path)
    assert "damaged" not in job.communicate()[1]
    assert job.returncode == 0
    assert measured(tmp_path) == undisturbed
    assert not list((tmp_path / "checkpoints").glob("*.npz"))


@pytest.mark.slow
def test_transformers_whose_result_does_not_fit_on_the_disk(tmp_path, transformers_job, undisturbed):
    """The checkpoint stays, so that little is trained again."""
    job = transformers_job(tmp_path, "full")
    _, errors = job.communicate()
    assert job.returncode == 1
    assert "File too large; results on file are kept, new ones are lost" in errors.splitlines()[-1]
    assert not (tmp_path / "vit-digits.jsonl").read_bytes()
    assert len(list((tmp_path / "checkpoints").glob("*.npz"))) == 1
    output, _ = (job := transformers_job(tmp_path)).communicate()
    assert (job.returncode, output.split().count("restored")) == (0, 1)
    assert measured(tmp_path) == undisturbed


@pytest.mark.slow
def test_transformers_whose_checkpoint_has_a_flipped_bit(tmp_path, transformers_job, undisturbed):
    job = transformers_job(tmp_path)
    for _ in range(8):
        job.stdout.readline()
    job.kill()
    job.communicate()
    (path,) = (tmp_path / "checkpoints").glob("*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    output, errors = (job := transformers_job(tmp_path)).communicate()
    assert (job.returncode, "restored" in output) == (0, False)
    assert f"The checkpoint {path} is damaged" in errors
    assert measured(tmp_path) == undisturbed
    assert [kept.name for kept in (tmp_path / "checkpoints").iterdir() if kept.suffix == ".damaged"] == [
        f"{path.name}.damaged"
    ]
