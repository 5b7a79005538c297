"""What the training programs share: the optimizer by hand, the metrics of the routing, the log, the flags.

Axis letters: E experts, L layers.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import sys
import time
import types

import dashboards
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from examples import comparison, logs, training
from models import gpt_moe, moe, moe_vit

L, E = 2, 4
# Of 4 tokens in layer 0 and 2 in layer 1, so that utilization is [[1, 0, 1/2, 1/2], [1/2, 1/2, 1/2, 1/2]].
COUNTS = excitation_optax.RoutingCounts(jnp.array([[4.0, 0, 2, 2], [1, 1, 1, 1]]), jnp.array([4.0, 2.0]))


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        yield


def updates_of(config, steps, params, grads, utilization=None, **excite):
    """The update of each step, from a list of gradients."""
    excite = {"strategy": "baseline", "gamma": config.gamma, "seed": config.seed} | excite
    tx = training.make_optimizer(training.base_optimizer(config, steps), **excite)
    update = jax.jit(lambda grads, state: tx.update(grads, state, params, utilization=utilization))
    state, updates = tx.init(params), []
    for grad in grads:
        step_updates, state = update(grad, state)
        updates.append(step_updates)
    return updates


# make_optimizer: the learning rate.


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        # 10 steps of warm-up from a tenth: 0.04, half of the way, the peak. Then
        # a cosine over 90 steps from 0.4 to 0.04: at 40 a third of it is
        # done, 0.04 + 0.36 (1 + cos(pi/3)) / 2 = 0.04 + 0.36 * 3/4; at 55 a half, 0.04 + 0.36 / 2; at 100 all.
        (0.1, {0: 0.04, 5: 0.22, 10: 0.4, 40: 0.31, 55: 0.22, 100: 0.04}),
        # At least one step of warm-up, which is at the peak.
        (0.0, {0: 0.4, 1: 0.4, 100: 0.04}),
        # All of it, from a hundredth: 0.004 + 0.396 / 2, and 0.004 + 0.396 * 0.99.
        (1.0, {0: 0.004, 50: 0.202, 99: 0.39604}),
    ],
)
def test_the_learning_rate_rises_and_falls(warmup, expected):
    """Adam's update is minus the learning rate, as long as the gradient stays the same and positive."""
    config = training.TrainingConfig(learning_rate=0.4, warmup=warmup, weight_decay=0.0)
    params = {"bias": jnp.ones(1)}
    updates = updates_of(config, 100, params, [{"bias": jnp.full(1, 0.5)}] * 101)
    rates = {step: -float(updates[step]["bias"][0]) for step in expected}
    assert rates == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_run_may_be_as_short_as_it_likes(steps, warmup):
    config = training.TrainingConfig(warmup=warmup, learning_rate=0.4, optimizer="sgd")
    updates = updates_of(config, steps, {"w": jnp.ones(1)}, [{"w": jnp.ones(1)}] * steps)
    assert np.all(np.isfinite([update["w"] for update in updates]))


# make_optimizer: weight decay.


def decay_by_path(model, **kwargs):
    """The update by path, of parameters that are all 1 and gradients that are all 0, at a learning rate of 1/2."""
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), nnx.eval_shape(lambda: nnx.state(model())))
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = training.TrainingConfig(learning_rate=0.5, warmup=0.0, **kwargs)
    updates = updates_of(config, 10, params, [zeros, zeros])[1]  # that of step 0 is zero
    by_path = {}
    for path, leaf in nnx.to_flat_state(updates):
        assert np.ptp(leaf[...]) == 0
        by_path["/".join(map(str, path))] = float(leaf[...].ravel()[0])
    return by_path


LAYERS = "layers/stack/"
DECAYED = {
    "head/kernel",
    LAYERS + "attention/qkv/kernel",
    LAYERS + "attention/out/kernel",
    LAYERS + "moe/experts/kernel_in",
    LAYERS + "moe/experts/kernel_out",
    LAYERS + "moe/router/kernel",
}
LEFT = {
    "norm/scale",
    "norm/bias",
    *(LAYERS + name for name in ("norm_attention/scale", "norm_attention/bias", "norm_moe/scale", "norm_moe/bias")),
    *(LAYERS + name for name in ("attention/qkv/bias", "attention/out/bias")),
    *(LAYERS + name for name in ("moe/experts/bias_in", "moe/experts/bias_out")),
}


LAYER = moe.MoEConfig(d_model=4, d_ff=6, num_experts=E, experts_per_token=2)
SIZES = {"moe": LAYER, "num_layers": L, "num_heads": 2}


def small_gpt_moe():
    return gpt_moe.GPTMoE(gpt_moe.GPTMoEConfig(**SIZES, context=8, vocab_size=11), rngs=nnx.Rngs(0))


def small_moe_vit():
    return moe_vit.MoEViT(moe_vit.MoEViTConfig(**SIZES, image_size=8), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("model", "decayed", "left"),
    [
        (small_gpt_moe, DECAYED | {"tokens/embedding"}, LEFT | {"positions/embedding"}),
        (small_moe_vit, DECAYED | {"patches/kernel"}, LEFT | {"patches/bias", "head/bias", "positions"}),
    ],
)
def test_matrices_decay_and_vectors_do_not(model, decayed, left):
    by_path = decay_by_path(model, weight_decay=0.1)
    assert set(by_path) == decayed | left
    for path, update in by_path.items():
        assert update == pytest.approx(-0.5 * 0.1 if path in decayed else 0.0), path


def test_sgd_decays_nothing():
    by_path = decay_by_path(small_gpt_moe, weight_decay=0.1, optimizer="sgd")
    assert set(by_path.values()) == {0.0}


# make_optimizer: clipping, momentum, Excitation.


def test_gradients_are_clipped_by_their_norm_over_all_leaves():
    config = training.TrainingConfig(optimizer="sgd", learning_rate=0.5, warmup=0.0, clip=2.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    zero, large, small = ({"a": jnp.full(1, 3.0 * c), "b": jnp.full(1, 4.0 * c)} for c in (0, 1, 0.25))
    # A norm of 5 becomes 2; times -1/2: -3/5, -4/5. A norm of 5/4 stays.
    update = updates_of(config, 10, params, [zero, large])[1]
    np.testing.assert_allclose([update["a"][0], update["b"][0]], [-0.6, -0.8], rtol=1e-6)
    update = updates_of(config, 10, params, [zero, small])[1]
    np.testing.assert_allclose([update["a"][0], update["b"][0]], [-0.375, -0.5], rtol=1e-6)


def test_sgd_has_momentum():
    config = training.TrainingConfig(optimizer="sgd", learning_rate=0.5, warmup=0.0)
    updates = updates_of(config, 10, {"w": jnp.zeros(1)}, [{"w": jnp.full(1, 0.1)}] * 2)
    np.testing.assert_allclose(updates[1]["w"], [-0.5 * (0.1 + 0.9 * 0.1)], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("strategy", "gamma", "phi"),
    [
        ("zero_sum", 1.0, [2, 0, 1, 1]),
        ("zero_sum", 2.0, [8 / 3, 0, 2 / 3, 2 / 3]),  # 1, 0, 1/4, 1/4 over their mean, 3/8
        ("positive_sum", 1.0, [2, 1, 1, 1]),
    ],
)
def test_excitation_scales_the_whole_update(optimizer, strategy, gamma, phi):
    """Clipping, Adam's normalization and weight decay come before: without Excitation all is the same but for Phi."""
    params = {"experts": {"kernel": jnp.linspace(1, 2, 12).reshape(3, E)}, "router": {"kernel": jnp.ones((3, E))}}
    grads = [jax.tree.map(lambda p, c=c: c * jnp.cos(p * c), params) for c in (1.0, 2.0, 3.0)]
    utilization = {"experts": jnp.array([1, 0, 0.5, 0.5])}
    flags = {"optimizer": optimizer, "learning_rate": 0.5, "weight_decay": 0.1, "gamma": gamma}
    plain = updates_of(training.TrainingConfig(**flags), 20, params, grads)
    # The experts are on the last axis here.
    config = training.TrainingConfig(**flags)
    excited = updates_of(config, 20, params, grads, utilization, strategy=strategy, expert_axis=1)
    for mine, other in zip(excited[1:], plain[1:], strict=True):
        assert np.all(other["experts"]["kernel"] != 0)
        expected = other["experts"]["kernel"] * np.array([phi])
        np.testing.assert_allclose(mine["experts"]["kernel"], expected, rtol=1e-5)
        np.testing.assert_allclose(mine["router"]["kernel"], other["router"]["kernel"], rtol=1e-6)


def test_the_baseline_has_no_excitation():
    params = {"experts": jnp.ones((E, 3))}
    config = training.TrainingConfig(optimizer="sgd")
    # The warm-up's first and only step is at the peak, and the gradient's norm is clipped to 1.
    assert optax.tree.norm(updates_of(config, 10, params, [params])[0]) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="utilization"):
        updates_of(config, 10, params, [params], strategy="positive_sum")


def test_a_step_is_gradient_and_update():
    """w of 3 with the loss w^2 x: a gradient of 2 * 3 * 0.5 = 3, times the learning rate 0.1 and Phi, here 2."""
    tx = training.make_optimizer(optax.sgd(0.1), strategy="zero_sum")
    utilization = {"experts": jnp.array([1.0, 0.0])}
    loss_fn = lambda params, x: (jnp.sum(params["experts"] ** 2) * x, ({"loss": x}, utilization))
    state = training.TrainState.create({"experts": jnp.array([3.0, 3.0])}, tx)
    state, logged, routing = training.train_step(jax.grad(loss_fn, has_aux=True), tx, state, jnp.float32(0.5))
    np.testing.assert_allclose(state.params["experts"], [3 - 0.1 * 3 * 2, 3], rtol=1e-6)
    assert (int(state.step), float(logged["loss"])) == (1, 0.5)
    assert routing is not None


def test_auxiliary_losses_are_added_by_their_weights():
    graphdef, params = nnx.split(small_gpt_moe())
    tokens = jnp.arange(16).reshape(2, 8) % 11

    @jax.jit
    def loss(params, **weights):
        minimized, logged, utilization, logits = training.routed_loss(
            nnx.merge(graphdef, params), tokens, tokens, **weights
        )
        assert (logits.shape, len(jax.tree.leaves(utilization))) == ((2, 8, 11), 2)  # counts and tokens of the stack
        return minimized, logged

    plain, logged = loss(params, load_balancing=0.0, router_z=0.0)
    assert plain == logged["loss"] > 0
    assert min(float(logged["load_balancing_loss"]), float(logged["router_z_loss"])) > 0
    expected = logged["loss"] + 0.5 * logged["load_balancing_loss"] + 0.25 * logged["router_z_loss"]
    np.testing.assert_allclose(loss(params, load_balancing=0.5, router_z=0.25)[0], expected, rtol=1e-6)


# routing_metrics.

COMMON = {
    "max_over_mean_load": 1.5,  # 1 / (1/2) in layer 0, 1 in layer 1
    "dead_experts": 0.125,  # one of four, and none
    "dead_experts_worst_layer": 0.25,
}


@pytest.mark.parametrize(
    ("strategy", "gamma", "stacked", "expected"),
    [
        ("baseline", 1.0, True, {}),
        ("zero_sum", 1.0, False, {"excitation_min": 0.0, "excitation_max": 2.0}),
        ("zero_sum", 2.0, True, {"excitation_min": 0.0, "excitation_max": 8 / 3}),
        ("positive_sum", 1.0, True, {"excitation_min": 1.0, "excitation_max": 2.0}),
    ],
)
def test_routing_metrics_by_hand(strategy, gamma, stacked, expected):
    layers = [excitation_optax.RoutingCounts(COUNTS.counts[n], COUNTS.tokens[n]) for n in range(L)]
    utilization = {"layers": {"stack": COUNTS} if stacked else {"list": layers}}
    logged = training.routing_metrics(utilization, strategy=strategy, gamma=gamma, step=jnp.int32(3))
    assert all(jnp.shape(value) == () for value in logged.values())
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(COMMON | expected, rel=1e-5)


def test_layers_may_differ_in_their_number_of_experts():
    layers = [
        excitation_optax.RoutingCounts(jnp.array([3.0, 1.0]), jnp.float32(4)),  # 3/4 and 1/4: 3/2 of the mean
        excitation_optax.RoutingCounts(jnp.array([4.0, 0, 0, 0]), jnp.float32(4)),  # 4 times the mean, 3/4 dead
    ]
    logged = training.routing_metrics(layers, strategy="zero_sum")
    names = ("max_over_mean_load", "dead_experts", "excitation_min", "excitation_max")
    assert [float(logged[name]) for name in names] == pytest.approx([(1.5 + 4) / 2, 0.75 / 2, 0.0, 4.0])


@pytest.mark.parametrize("seed", [0, 5])
def test_the_logged_excitation_is_the_one_applied(seed):
    """Also where it is random: the ratio of updates with and without it, over every step."""
    params = {"experts": jnp.ones((L, E, 3)), "router": jnp.ones(3)}
    counts = excitation_optax.RoutingCounts(jnp.array([[7.0, 1, 3, 5], [4, 6, 2, 4]]), jnp.array([8.0, 8.0]))
    utilization = {"experts": counts}
    flags = {"optimizer": "sgd", "seed": seed, "warmup": 0.0}
    config = training.TrainingConfig(gamma=1.5, **flags)
    excited = updates_of(config, 10, params, [params] * 4, utilization, strategy="random_boost")
    plain = updates_of(training.TrainingConfig(**flags), 10, params, [params] * 4)
    orders = []
    for step in range(1, 4):
        phi = np.asarray(excited[step]["experts"] / plain[step]["experts"])
        excite = {"strategy": "random_boost", "gamma": 1.5, "seed": seed}
        logged = training.routing_metrics(utilization, step=jnp.int32(step), **excite)
        assert float(logged["excitation_min"]) == pytest.approx(phi.min(), rel=1e-5)
        assert float(logged["excitation_max"]) == pytest.approx(phi.max(), rel=1e-5)
        key = jax.random.fold_in(jax.random.key(seed), step)
        expected = excitation_optax.excitation(utilization, excitation_optax.random_boost, 1.5, key=key)["experts"]
        np.testing.assert_allclose(phi, np.broadcast_to(expected[..., None], phi.shape), rtol=1e-5)
        orders.append(tuple(np.argsort(phi[..., 0]).ravel()))
    assert len(set(orders)) > 1  # shuffled anew


# The log.


def read(path):
    """The lines of a log, as strict JSON: no NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def open_log(path, steps=10, **kwargs):
    flags = {name: kwargs.pop(name) for name in ("tensorboard", "wandb", "gamma") if name in kwargs}
    return logs.Log(path, steps, training.TrainingConfig(**flags), **{"label": "run"} | kwargs)


def test_the_log_is_lines_of_json_with_the_config_first(tmp_path):
    path = tmp_path / "new" / "folder" / "log.jsonl"
    log = open_log(path, gamma=2.0)
    log.advance()
    log.write(1, {"loss": jnp.float32(0.5), "count": np.int32(3), "epoch": 2}, "loss 0.5")
    # A line is there as soon as it is written.
    assert read(path)[1] == {"step": 1, "loss": 0.5, "count": 3, "epoch": 2}
    values = {"nan": jnp.float32(np.nan), "inf": math.inf, "minus": jnp.float32(-np.inf), "nothing": None}
    log.write(2, values | {"path": pathlib.Path("a") / "b", "name": "x", "flag": True, "many": (1, pathlib.Path("c"))})
    log.close()
    first, _, last = read(path)
    assert first == {"step": 0, "config": dataclasses.asdict(training.TrainingConfig(gamma=2.0))}
    assert last == {
        **{"step": 2, "nan": None, "inf": None, "minus": None, "nothing": None},
        **{"path": str(pathlib.Path("a") / "b"), "name": "x", "flag": True, "many": [1, "c"]},
    }
    open_log(path).close()
    assert len(read(path)) == 1  # it replaces the one before


def test_a_run_that_resumes_keeps_its_lines(tmp_path):
    """Later lines and damaged lines, which a full disk or a bad sector leaves, go."""
    path = tmp_path / "log.jsonl"
    lines = [b'{"step": %d}\n' % step for step in range(5)]
    path.write_bytes(b"".join([*lines[:2], b"\0\0\0\n", *lines[2:], b'{"step": 5, "lo']))
    with pytest.warns(UserWarning, match=r"log\.jsonl: a damaged line was removed"):
        open_log(path, done=3).close()
    assert path.read_bytes().startswith(b"".join([*lines[:4], b'{"step": 3, "config"']))
    assert path.read_bytes().count(b"\n") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        open_log(pathlib.Path("/dev/full"))
    (tmp_path / "picture.png").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*picture\.png'"),
        comparison.figure(tmp_path / "picture.png", 4) as figure,
    ):
        figure.subplots().plot([1, 2])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out"):
        open_log(tmp_path / "file" / "out" / "log")


def test_the_rate_is_that_since_the_last_call(tmp_path):
    start = time.perf_counter()
    log = open_log(tmp_path / "log")
    opened = time.perf_counter()
    time.sleep(0.02)
    before = time.perf_counter()
    first = log.rate(1000)
    after = time.perf_counter()
    assert 1000 / (after - start) <= first <= 1000 / (before - opened)
    time.sleep(0.02)
    again = time.perf_counter()
    second = log.rate(4000)  # 3000 more
    assert 3000 / (time.perf_counter() - before) <= second <= 3000 / (again - after)
    log.close()
    log.close()


def test_without_a_terminal_lines_say_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0)
    log = open_log(tmp_path / "log", steps=4)
    log.start(0)
    for step in range(1, 5):
        log.write(step, {}, f"loss {step}")
        log.advance()
    log.close()
    lines = capsys.readouterr().err.replace("\r", "").splitlines()
    assert lines[0] == "run: step 0 of 4, about ? left"
    assert re.fullmatch(r"run: step 1 of 4, loss 1, about \d\d:\d\d left", lines[1])
    assert "run: step 4 of 4, loss 4, about 00:00 left" in lines


# TensorBoard and W&B.


def log_two_steps(path, **flags):
    """The second with a broken utilization; an evaluation follows each."""
    log = open_log(path, **flags)
    metrics = jax.jit(lambda counts: training.routing_metrics({"moe": counts}, strategy="zero_sum", whole=True))
    for step, counts in [(5, COUNTS), (6, excitation_optax.RoutingCounts(COUNTS.counts * jnp.nan, COUNTS.tokens))]:
        log.write(step, jax.device_get(metrics(counts)) | {"loss": step / 2})
        log.write(step, {"evaluation_loss": 1.5})
    log.close()


EXPECTED = {"loss": 2.5, "evaluation_loss": 1.5, "max_over_mean_load": 1.5}
# Of utilization [1, 0, 1/2, 1/2] and [1/2, 1/2, 1/2, 1/2], whose zero-sum is 2, 0, 1, 1 and 1, 1, 1, 1.
EXPECTED |= {"routing/max_over_mean_load/worst": 2, "routing/dead_experts/worst": 0.25, "routing/excitation/max": 2}


def test_tensorboard_has_all_that_is_logged_and_the_routing(tmp_path):
    log_two_steps(tmp_path / "log", tensorboard=tmp_path / "board")
    events = dashboards.events_of(tmp_path / "board" / "run")
    written = {name: value.simple_value for step, name, value in events if step == 5}
    assert {name: written[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    (histogram,) = [value.histo for step, name, value in events if (step, name) == (5, "routing/excitation")]
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (8, 0, 2, 8)
    broken = {name: value.simple_value for step, name, value in events if step == 6}
    assert broken["routing/layers_not_finite"] == 2
    assert np.isnan(broken["routing/excitation/max"])
    assert all("routing" not in line for line in read(tmp_path / "log")[1:])


def test_tensorboard_of_a_run_that_resumes_drops_what_was_later(tmp_path):
    (tmp_path / "log").write_text("")
    open_log(tmp_path / "log", tensorboard=tmp_path / "board", done=7).close()
    events = dashboards.raw_events_of(tmp_path / "board" / "run")
    assert [event.step for event in events if event.HasField("session_log")] == [8]


@pytest.fixture
def wandb_rows(monkeypatch):
    """The rows by step that W&B is given; a recording run stands for W&B, which need not be installed."""
    rows = {}
    run = types.SimpleNamespace(log=lambda row, step: rows.setdefault(step, {}).update(row), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **settings: run, __spec__="not None: it is installed")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return rows


def test_wandb_has_all_that_is_logged_and_the_routing(tmp_path, wandb_rows):
    log_two_steps(tmp_path / "log", wandb="project")
    assert {name: float(wandb_rows[5][name]) for name in EXPECTED} == pytest.approx(EXPECTED)
    assert wandb_rows[5]["routing/busiest"][0] == ("moe[0]", 0, 2)
    assert wandb_rows[6]["routing/layers_not_finite"] == 2


def test_silent_processes_write_nothing(tmp_path, capsys, wandb_rows):
    log = open_log(tmp_path / "log", tensorboard=tmp_path / "board", wandb="project", silent=True)
    log.write(10, {"loss": 1.0, "routing": ({"moe": COUNTS}, None)}, "loss")
    log.tell("a line")
    log.close()
    assert not list(tmp_path.iterdir())
    assert not wandb_rows
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("flag", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_dashboard_that_is_not_installed_is_an_error_at_once(monkeypatch, flag, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError, match=rf"--{flag} requires {package}: pip install -e '\.\[telemetry\]'"):
        training.TrainingConfig(**{flag: "out"})
    training.TrainingConfig()


# The table.


def test_the_table_at_the_end():
    line = lambda loss, load, low, high: (
        {"loss": loss, "max_over_mean_load": load, "dead_experts": 0.25}
        | ({"excitation_min": low, "excitation_max": high} if low else {})
    )
    runs = {
        "baseline": [[line(9, 9, None, None), line(1.0, 2.0, None, None)], [line(3.0, 4.0, None, None)]],
        "zero_sum": [[line(1.0, 1.0, 0.5, 2.0)], [line(None, 1.0, 1.0, 3.0)]],  # the second diverged
    }
    table = comparison.table(runs, {"loss": ("loss", 1, 1)}).splitlines()
    assert table[0] == "at the end, mean ± standard deviation of 2 seeds"
    assert table[1].split() == ["baseline", "zero_sum"]
    assert table[2].split() == ["loss", "2.0", "±", "1.4", "1.0,", "1", "NaN"]  # 1 and 3: the root of 2
    assert table[3].split()[-6:] == ["3.00", "±", "1.41", "1.00", "±", "0.00"]
    assert table[4].split()[-6:] == ["25.0", "±", "0.0", "25.0", "±", "0.0"]
    assert table[5].split()[-4:] == ["none", "0.75", "to", "2.50"]


# Flags.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate must be positive; got 0.0."),
        ({"learning_rate": math.nan}, "--learning-rate must be positive; got nan."),
        ({"clip": math.inf}, "--clip must be positive; got inf."),
        ({"gamma": -0.5}, "--gamma must not be negative; got -0.5."),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative; got -0.1."),
        ({"load_balancing": -0.1}, "--load-balancing must not be negative; got -0.1."),
        ({"router_z": math.nan}, "--router-z must not be negative; got nan."),
        ({"warmup": -0.1}, "--warmup is a fraction of the steps, in [0, 1]; got -0.1."),
        ({"log_every": 0}, "--log-every must be at least 1; got 0."),
    ],
)
def test_bad_flags(kwargs, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        training.TrainingConfig(**kwargs)
    assert str(error.value) == message


def test_flags_at_the_edge_are_good():
    training.TrainingConfig(gamma=0.0, weight_decay=0.0, load_balancing=0.0, router_z=0.0, warmup=1.0, log_every=1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strategy": ()}, "--strategy must name different strategies, at least one; got []."),
        (
            {"strategy": ("inverted", "inverted")},
            "--strategy must name different strategies, at least one; got ['inverted', 'inverted'].",
        ),
        ({"seeds": 0}, "--seeds must be at least 1; got 0."),
        ({"output": pathlib.Path("a.txt")}, "--output must name a .png, .pdf or .svg file; got a.txt."),
    ],
)
def test_bad_flags_of_comparisons(kwargs, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        comparison.Config(**kwargs)
    assert str(error.value) == message
