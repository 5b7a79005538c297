"""The program that trains MoE-ViTs: a short run, its logs and table; images, flags, errors."""

import contextlib
import io
import json
import os
import pathlib
import runpy
import sys

import dashboards
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import datasets, train_moe_vit

SIZES = {"num_experts": 4, "d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2, "patch_size": 16}
# Ten steps an epoch: of the 1437 training images, seven are left over.
FLAGS = SIZES | {"batch_size": 143, "epochs": 2, "learning_rate": 0.03, "log_every": 4}
ROUTING = {"load_balancing_loss", "router_z_loss", "routing_entropy", "max_over_mean_load", "dead_experts"}
ROUTING |= {"dead_experts_worst_layer"}
LOGGED = {"step", "loss", "accuracy", "images_per_second"} | ROUTING


def train(folder, strategy=("baseline",), **kwargs):
    """The lines of the logs by strategy and seed."""
    config = train_moe_vit.Config(output=folder / "run.png", strategy=strategy, **FLAGS | kwargs)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        runs = train_moe_vit.main(config)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    logs = {path.stem.removeprefix("run-"): read(path) for path in folder.glob("run-*.jsonl")}
    assert {name: rows[1:] for name, rows in logs.items()} == {
        f"{strategy}-{config.seed + i}": rows for strategy, seeds in runs.items() for i, rows in enumerate(seeds)
    }
    return logs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs of the baseline, and of Excitation with gamma = 0, which is the identity."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        logs = train(folder, strategy=("baseline", "zero_sum"), gamma=0.0)
    return logs, printed.getvalue(), folder


def test_a_run_writes_its_log_and_learns(run):
    rows = run[0]["baseline-0"]
    steps = [row for row in rows if "loss" in row]
    epochs = [row for row in rows if "test_accuracy" in row]
    assert rows[0]["step"] == 0
    assert rows[0]["config"]["batch_size"] == 143
    assert rows[0]["config"]["data_dir"] is None
    assert [row["step"] for row in steps] == [4, 8, 12, 16, 20]
    assert all(set(row) == LOGGED for row in steps)
    assert all(np.all(np.isfinite(list(row.values()))) for row in steps)
    assert all(row["images_per_second"] > 0 for row in steps)
    assert [row["step"] for row in epochs] == [10, 20]
    accuracy = epochs[-1]["test_accuracy"]
    assert 360 * accuracy == pytest.approx(round(360 * accuracy))  # of as many test images
    assert steps[0]["loss"] > 2.2  # about log 10
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert accuracy > 0.2  # twice that of a guess


def test_the_comparison_is_paired(run):
    """Strategies start alike and see the same batches."""
    baseline, excited = run[0]["baseline-0"][1:], run[0]["zero_sum-0"][1:]
    for mine, other in zip(excited, baseline, strict=True):
        if "loss" in mine:
            assert mine.pop("excitation_min") == mine.pop("excitation_max") == 1
        rates = {"images_per_second": mine.get("images_per_second")} if "loss" in mine else {}
        assert mine == pytest.approx(other | rates, rel=1e-3, abs=1 / 360)


def test_batches_repeat_with_their_seed():
    data = datasets.load_digits()
    make = lambda seed, step: train_moe_vit.make_task(train_moe_vit.Config(**FLAGS), data).batch(seed, step)
    (images, labels, key), again, later, other = make(0, 3), make(0, 3), make(0, 13), make(1, 3)
    np.testing.assert_array_equal(again[0], images)
    np.testing.assert_array_equal(again[1], labels)
    assert key == again[2]
    for changed in (later, other):
        assert np.any(changed[1] != labels)
        assert changed[2] != key


def test_a_run_ends_with_the_answer(run):
    logs, printed, folder = run
    assert "1437 training and 360 test images" in printed
    accuracies = [f"{100 * logs[f'{name}-0'][-1]['test_accuracy']:.2f}" for name in ("baseline", "zero_sum")]
    assert ["test", "accuracy,", "%", *accuracies] in [line.split() for line in printed.splitlines()]
    assert "1.00 to 1.00" in printed
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[-1].startswith("next: python -m examples.train_moe_vit --strategy baseline ")


@pytest.mark.slow
def test_tensorboard(tmp_path):
    rows = train(tmp_path, epochs=1, strategy=("zero_sum",), tensorboard=tmp_path / "board")["zero_sum-0"]
    events = dashboards.events_of(tmp_path / "board" / "zero_sum-0")
    row, *_, last = rows[1:]
    written = {name: value.simple_value for step, name, value in events if step == row["step"]}
    assert written["routing/max_over_mean_load/mean"] == pytest.approx(row["max_over_mean_load"])
    assert written["routing/excitation/max"] == pytest.approx(row["excitation_max"])
    assert {name: value.simple_value for step, name, value in events}["test_accuracy"] == pytest.approx(
        last["test_accuracy"]
    )


# Images.


def test_pixels_are_from_minus_one_to_one():
    pixels = train_moe_vit.to_unit_range(jnp.array([0, 51, 255], jnp.uint8))
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, [-1, -0.6, 1], rtol=1e-6)


IMAGES = jax.random.normal(jax.random.key(0), (200, 6, 6, 3))


@jax.jit
def flipped(key):
    return train_moe_vit.augment(key, IMAGES, flip=True)


@jax.jit
def shifted(key):
    return train_moe_vit.augment(key, IMAGES, flip=False)


def moves(augmented):
    """How each image was moved: down, right, mirrored. Every image is one of the 162 that are allowed, and one only."""
    padded = np.pad(IMAGES, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    found = [[] for _ in IMAGES]
    for down in range(9):
        for right in range(9):
            crop = padded[:, down : down + 6, right : right + 6]
            for mirrored in (False, True):
                same = np.all(augmented == (crop[:, :, ::-1] if mirrored else crop), axis=(1, 2, 3))
                for number in np.flatnonzero(same):
                    found[number].append((down - 4, right - 4, mirrored))
    assert all(len(moves) == 1 for moves in found)
    return np.array([moves[0] for moves in found])


def test_images_are_shifted_by_at_most_four_pixels():
    found = moves(np.asarray(shifted(jax.random.key(1))))
    for axis in (0, 1):
        assert set(found[:, axis]) == set(range(-4, 5))  # 200 images take all of them
    assert len({tuple(move) for move in found}) > 50  # of 81: down and right are independent
    assert not np.any(found[:, 2])


def test_half_of_the_images_are_mirrored_if_asked():
    plain, found = (moves(np.asarray(augment(jax.random.key(1)))) for augment in (shifted, flipped))
    np.testing.assert_array_equal(plain[:, :2], found[:, :2])
    assert 0.4 < np.mean(found[:, 2]) < 0.6


def test_augmentation_goes_by_its_key():
    first = flipped(jax.random.key(1))
    assert (first.shape, first.dtype) == (IMAGES.shape, IMAGES.dtype)
    np.testing.assert_array_equal(flipped(jax.random.key(1)), first)
    assert np.mean(np.all(flipped(jax.random.key(2)) == first, axis=(1, 2, 3))) < 0.1


def test_digits_are_enlarged():
    data, small = train_moe_vit.load(train_moe_vit.Config()), datasets.load_digits()
    assert (data.train_images.shape, data.test_images.shape) == ((1437, 32, 32, 3), (360, 32, 32, 3))
    assert data.train_images.dtype == np.uint8
    np.testing.assert_array_equal(data.test_labels, small.test_labels)
    for images, originals in ((data.train_images, small.train_images), (data.test_images, small.test_images)):
        for row, column, channel in ((0, 0, 0), (3, 3, 1), (4, 3, 2), (17, 30, 0), (31, 31, 2)):
            np.testing.assert_array_equal(images[:, row, column, channel], originals[:, row // 4, column // 4, 0])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_test_image_counts_once(batch_size, monkeypatch):
    """Images that hold what is predicted: five of seven are right."""
    labels = np.array([3, 1, 4, 1, 5, 9, 2])
    images = np.array([3, 1, 4, 0, 5, 9, 6])
    sizes = []

    def count_correct(graphdef, params, images, labels):
        sizes.append(len(images))
        return jnp.sum(images == labels)

    monkeypatch.setattr(train_moe_vit, "count_correct", count_correct)
    assert train_moe_vit.measure(None, None, images, labels, batch_size) == {"test_accuracy": 5 / 7}
    assert sizes == {1: [1] * 7, 3: [3, 3, 1], 7: [7], 100: [7]}[batch_size]


# Flags and errors.


def test_flags_reach_the_model():
    model = train_moe_vit.Config(dtype="bfloat16", num_experts=8, experts_per_token=3, d_ff=24, patch_size=4).model()
    layer = model.moe
    assert (layer.dtype, layer.num_experts, layer.experts_per_token, layer.d_ff) == (jnp.bfloat16, 8, 3, 24)
    assert (layer.d_model, model.num_layers, model.num_heads, model.num_patches) == (128, 4, 4, 64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1; got 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1; got 0."),
        ({"gamma": -1.0}, "--gamma must not be negative; got -1.0."),
        ({"patch_size": 5}, "image_size must be divisible by patch_size = 5; got 32."),
        ({"num_heads": 3}, "d_model must be divisible by num_heads = 3; got 128."),
        ({"experts_per_token": 17}, "experts_per_token must be at most num_experts = 16; got 17."),
    ],
)
def test_bad_flags(kwargs, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        train_moe_vit.Config(**kwargs)
    assert str(error.value) == message


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match="--batch-size must be at most the 1437 training images; got 5000"):
        train(tmp_path, batch_size=5000)
    assert not list(tmp_path.glob("*.jsonl"))


def run_module(monkeypatch, *flags):
    """The program as `python -m` runs it, without the seconds that another Python takes to start. Its exit code."""
    monkeypatch.setattr(sys, "argv", ["train_moe_vit", *flags])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("examples.train_moe_vit", run_name="__main__")
    return end.value.code


# runpy says that the module is imported already.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_errors_of_the_program(monkeypatch, capsys, tmp_path):
    output = ("--output", str(tmp_path / "a.png"))
    assert run_module(monkeypatch, "--warmup", "2") == 2
    assert "--warmup is a fraction of the steps, in [0, 1]; got 2.0." in capsys.readouterr().err
    assert run_module(monkeypatch, *output, "--strategy", "some") == 2
    assert "positive_sum" in capsys.readouterr().err
    message = "train_moe_vit: --batch-size must be at most the 1437 training images; got 5000."
    assert run_module(monkeypatch, *output, "--batch-size", "5000") == message  # printed, and the code is 1


# CIFAR-10.

TFDS = pathlib.Path(os.environ.get("TFDS_DATA_DIR", pathlib.Path.home() / "tensorflow_datasets"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (TFDS / "cifar10").is_dir(), reason="no prepared CIFAR-10 in TFDS_DATA_DIR")
def test_two_steps_on_cifar10(tmp_path, capsys):
    flags = {"data_dir": TFDS, "epochs": 1, "batch_size": 25_000, "log_every": 1}
    rows = train(tmp_path, strategy=("positive_sum",), **flags)["positive_sum-0"]
    assert "50000 training and 10000 test images" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert set(rows[2]) == LOGGED | {"excitation_min", "excitation_max"}
    assert np.isfinite(rows[2]["loss"])
    assert rows[0]["config"]["data_dir"] == str(TFDS)
    assert 0 < rows[3]["test_accuracy"] < 0.5
