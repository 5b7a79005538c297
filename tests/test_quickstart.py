"""The quickstart: it runs, its comparison is paired, its flags do what they say, and the demonstration holds."""

import pathlib
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import datasets, quickstart, training


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        yield


def tiny(tmp_path, **kwargs):
    defaults = {"epochs": 2, "width": 16, "depth": 2, "seeds": 2, "learning_rate": (1e-3, 1e-2)}
    return quickstart.Config(**defaults | {"output": tmp_path / "out" / "picture.png"} | kwargs)


@pytest.mark.slow
def test_it_prints_a_table_and_draws_a_picture(tmp_path, capsys):
    config = tiny(tmp_path)
    results = quickstart.main(config)
    printed = capsys.readouterr().out
    for text in ("1437 training and 360 test images", "baseline", "zero_sum", "positive_sum", "learning rate", "±"):
        assert text in printed
    assert f"{100 * results['baseline'].accuracy[-1, 0].mean():.1f} ±" in printed
    assert str(config.output) in printed
    assert config.output.read_bytes().startswith(b"\x89PNG")
    evaluation = results["zero_sum"]
    assert evaluation.accuracy.shape == (2, 2, 2)  # epochs, learning rates, seeds
    assert evaluation.utilization.shape == (2, 2, 2, 2, 16)  # and layers, neurons
    # K = round(1.6) = 2 neurons at most are active for an image.
    assert np.all(evaluation.utilization.sum(-1) <= 2 + 1e-5)
    assert np.all(evaluation.entropy <= np.log(2) + 1e-5)
    assert np.all((evaluation.specialization >= 0.1 - 1e-5) & (evaluation.specialization <= 1 + 1e-5))


@pytest.mark.slow
def test_the_comparison_is_paired_and_repeats(tmp_path):
    """With gamma = 0 Excitation is the identity: the same initialization and batches give the same curves."""
    data = datasets.load_digits()
    results = quickstart.train(tiny(tmp_path, gamma=0.0), data)
    for name in ("zero_sum", "positive_sum"):
        for mine, baseline in zip(results[name], results["baseline"], strict=True):
            np.testing.assert_allclose(mine, baseline, rtol=1e-6)  # other programs round differently
    again = quickstart.train(tiny(tmp_path, gamma=0.0), data)
    np.testing.assert_array_equal(again["baseline"].entropy, results["baseline"].entropy)
    first, second = results["baseline"].entropy[-1]  # by learning rate
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first, second)


def test_every_optimizer_is_offered_and_descends():
    assert set(typing.get_type_hints(quickstart.Config)["optimizer"].__args__) == set(training.OPTIMIZERS)
    rates = {name: quickstart.Config(optimizer=name).learning_rate for name in training.OPTIMIZERS}
    assert (rates["sgd"], rates["adam"]) == ((0.01, 0.03, 0.1, 0.3), (3e-4, 1e-3, 3e-3, 1e-2))
    params = {"w": jnp.ones(2)}
    for name, make in training.OPTIMIZERS.items():
        tx = make(0.1)
        state, updates = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(params, state, params)
        assert np.all(updates["w"] < 0), name


def test_every_strategy_trains(tmp_path):
    names = typing.get_args(training.Strategy)
    results = quickstart.train(tiny(tmp_path, strategy=names, epochs=1, seeds=1), datasets.load_digits())
    entropies = [tuple(evaluation.entropy.ravel()) for evaluation in results.values()]
    assert tuple(results) == names
    assert len(set(entropies)) == 7


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1; got 0"),
        ({"seeds": 0}, "--seeds must be at least 1; got 0"),
        ({"batch_size": 5000}, "--batch-size must be at most the 1437 training images; got 5000"),
        ({"sparsity": 2.0}, "sparsity"),
        ({"gamma": -1.0}, "--gamma must not be negative; got -1.0"),
        ({"depth": 0}, "--depth must be at least 1; got 0"),
        ({"width": 0}, "--width must be at least 1; got 0"),
        ({"learning_rate": (0.1, 0.0)}, "--learning-rate must be positive; got 0.1 0.0"),
        ({"output": pathlib.Path("picture.xyz")}, "--output must name a .png, .pdf or .svg file; got picture.xyz"),
    ],
)
def test_bad_flags(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quickstart.train(tiny(tmp_path, **kwargs), datasets.load_digits())


def test_a_model_that_diverged_is_named(tmp_path):
    config = tiny(tmp_path, learning_rate=(1e6,), optimizer="sgd", strategy=("baseline",))
    results = quickstart.train(config, datasets.load_digits())
    diverged = np.isnan(results["baseline"].accuracy[-1]).sum()
    assert diverged > 0
    assert f", {diverged} NaN" in quickstart.table(config, results)


def test_digits_are_split_by_class_and_the_split_stays():
    data, again = datasets.load_digits(), datasets.load_digits()
    np.testing.assert_array_equal(data.test_images, again.test_images)
    assert (data.input_dim, data.train_images.dtype, data.train_images.max()) == (64, np.uint8, 255)
    assert np.ptp(np.bincount(data.test_labels)) <= 3


def test_colour_images(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), rng.integers(0, 10, 40, np.int32)
    data = datasets.ImageData(images, labels, images, labels, 10, "noise")
    results = quickstart.train(tiny(tmp_path, batch_size=16, epochs=1, strategy=("positive_sum",)), data)
    assert np.all(np.isfinite(results["positive_sum"].accuracy))


def test_a_folder_that_cannot_be_written_is_found_before_training(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--output", "/dev/null/picture.png"])
    with pytest.raises(SystemExit) as end:
        training.run_program(quickstart.main, quickstart.Config, "examples.quickstart")
    assert str(end.value.code).startswith("quickstart: ")


@pytest.mark.slow
def test_the_demonstration_holds(tmp_path):
    """At every rate the baseline stays behind what zero_sum reaches at its best rate, by 25 points or more."""
    results = quickstart.main(quickstart.Config(output=tmp_path / "picture.png"))
    best = {name: 100 * found.accuracy[-1].mean(-1).max() for name, found in results.items()}
    assert best["zero_sum"] - best["baseline"] >= 25
