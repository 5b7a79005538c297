"""The toy problem of figure 1: trajectories against their closed form, steps, the table and the picture."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from examples.reproduction import store, toy


@pytest.fixture(scope="module")
def outcome():
    return toy.run()


@pytest.mark.parametrize("bowl", list(toy.BOWLS))
@pytest.mark.parametrize(("method", "excitation"), [("SGD", (1, 1)), ("SGD + zero_sum", (1.5, 0.5))])
def test_gradient_descent_on_a_bowl_has_a_closed_form(outcome, bowl, method, excitation):
    curvature, rate = np.array(toy.BOWLS[bowl]), outcome["bowls"][bowl]["learning_rate"]
    assert rate == 1
    steps = np.arange(toy.SHOWN + 1)[:, None]
    expected = (1 - rate * np.array(excitation) * curvature) ** steps
    found = outcome["bowls"][bowl]["methods"][method]
    np.testing.assert_allclose(found["trajectory"], expected, atol=2e-5)
    # Both of its terms fall step by step, so it never rises above the tolerance again.
    losses = 0.5 * (expected**2 @ curvature)
    enough = np.flatnonzero(losses <= toy.TOLERANCE * losses[0])
    if len(enough):
        assert found["steps"] == enough[0]
    else:
        assert found["steps"] > toy.SHOWN


def test_momentum_is_that_of_a_plain_loop(outcome):
    bowl = outcome["bowls"]["busy expert along the short axis"]
    weights, trace = np.ones(2), np.zeros(2)
    for shown in bowl["methods"]["SGD + momentum"]["trajectory"]:
        np.testing.assert_allclose(shown, weights, atol=1e-4)
        trace = 0.9 * trace + np.array(bowl["curvature"]) * weights
        weights = weights - bowl["learning_rate"] * trace


def test_the_multipliers_of_the_figure(outcome):
    assert outcome["utilization"] == [0.75, 0.25]
    assert outcome["excitation"] == [1.5, 0.5]


def test_steps_are_those_from_which_the_loss_stays_small():
    small = toy.TOLERANCE / 2
    assert toy.steps_to_tolerance(np.array([1, 0.5, small, small])) == 2
    assert toy.steps_to_tolerance(np.array([1, small, 0.5, small])) == 3
    assert toy.steps_to_tolerance(np.array([1, small, 0.5])) is None
    assert toy.steps_to_tolerance(np.array([1, small, math.nan, math.nan])) is None


def test_excitation_helps_along_the_long_axis_and_hurts_along_the_short_one(outcome):
    helped, _, hurt = (bowl["methods"] for bowl in outcome["bowls"].values())
    for steps in ("steps", "best_steps"):
        assert helped["SGD + zero_sum"][steps] < helped["SGD"][steps]
        assert hurt["SGD + zero_sum"][steps] > hurt["SGD"][steps]


def test_the_best_rate_is_near_the_one_of_theory_and_never_worse(outcome):
    for bowl in outcome["bowls"].values():
        assert all(found["best_steps"] <= found["steps"] for found in bowl["methods"].values())
        for method, excitation in (("SGD", 1), ("SGD + zero_sum", np.array([1.5, 0.5]))):
            curvature = excitation * np.array(bowl["curvature"])
            assert bowl["methods"][method]["best_rate"] == pytest.approx(2 / sum(curvature), rel=0.2)


def test_a_rate_that_is_too_large_never_arrives():
    _, losses = toy.descend("SGD", jnp.array([0.1, 1.0]), jnp.float32(2.5))
    assert toy.steps_to_tolerance(np.asarray(losses)) is None


def test_saved_and_loaded(tmp_path, outcome):
    assert toy.load(tmp_path) is None
    path = tmp_path / toy.FILE
    store.save_json(path, outcome)
    assert toy.load(tmp_path) == json.loads(json.dumps(outcome)) | {"about": toy.load(tmp_path)["about"]}
    assert {"date", "device"} <= set(toy.load(tmp_path)["about"])
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=rf"{path} is damaged .*; delete it, and run fig1 again"):
        toy.load(tmp_path)


def test_the_table_has_every_method_on_every_bowl(outcome):
    rows = [line for line in toy.markdown(outcome).splitlines() if line.startswith("| ") and "| SGD" in line]
    assert len(rows) == 9
    assert "| busy expert along the long axis | 0.1, 1 | SGD | 33 |" in rows[0]
