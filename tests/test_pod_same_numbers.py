"""One training run gives the same numbers on any number of devices, however they share the work."""

import functools

import jax
import pytest

from examples.pod import parallel
from tools import mesh_numbers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_users_have_it")]
CASES = [(model, optimizer) for model in mesh_numbers.MODELS for optimizer in mesh_numbers.OPTIMIZERS]
TOLERANCE = {"sgd": 1e-5, "adamw": 5e-3}


@functools.cache
def on_one_device(model, optimizer, auxiliary):
    return mesh_numbers.run(model, optimizer, "jit", parallel.make_mesh(devices=jax.devices()[:1]), auxiliary)


def assert_same(got, model, optimizer, kind="jit"):
    losses, params = mesh_numbers.differences(got, on_one_device(model, optimizer, auxiliary=kind == "jit"))
    assert got[0][-1] < got[0][0] - 0.01  # it learns
    assert losses <= 1e-5
    assert params <= TOLERANCE[optimizer]


@pytest.mark.parametrize("mode", mesh_numbers.MODES)
@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_on_eight_devices(model, optimizer, mode):
    kind, sizes = mesh_numbers.MODES[mode]
    assert_same(mesh_numbers.run(model, optimizer, kind, parallel.make_mesh(**sizes)), model, optimizer, kind)


@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_in_two_processes(model, optimizer):
    assert_same(mesh_numbers.in_two_processes(model, optimizer), model, optimizer)
