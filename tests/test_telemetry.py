"""Routing in TensorBoard and W&B: the scalars by hand, and what was written read back from the files.

Axis letters: E experts, L layers, T entries of the history.
"""

import glob
import io
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
import PIL.Image
import pytest
import tensorboardX
import wandb

import excitation_optax
from excitation_optax import RoutingCounts, telemetry

ROOT = pathlib.Path(__file__).parents[1]
NAN = math.nan
# Loads over the mean: 2, 2, 0, 0 | 1, 1, 1, 1 | 4, 0, 0, 0.
SPLIT = jnp.array([0.5, 0.5, 0.0, 0.0])
EVEN = jnp.array([0.25, 0.25, 0.25, 0.25])
ONE = jnp.array([0.0, 0.0, 0.75, 0.0])
# Three experts, of 8 tokens: 3/2, 3/2, 0 over the mean; entropy log 2 / log 3.
COUNTS = RoutingCounts(jnp.array([4.0, 4.0, 0.0]), jnp.array(8.0))
MIXED = {"layer_10": COUNTS, "layer_2": jnp.stack([SPLIT, ONE])}

MEANS = {
    f"{name}/{which}" for name in ("max_over_mean_load", "load_entropy", "dead_experts") for which in ("mean", "worst")
}
ALL = MEANS | {"max_over_mean_load/worst_layer", "layers_without_load", "layers_not_finite"}
EXCITATION = {"excitation/min", "excitation/mean", "excitation/max"}


def scalars(utilization, excitation=None, **kwargs):
    """By name, without the prefix; compiled, since it is meant to be."""
    compiled = jax.jit(lambda u, phi: telemetry.routing_metrics(u, phi, **kwargs))
    values = compiled(utilization, excitation)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in values.values())
    assert all(name.startswith("routing/") for name in values)
    return {name.removeprefix("routing/"): float(value) for name, value in values.items()}


def phi_of(utilization, strategy=excitation_optax.zero_sum):
    return excitation_optax.excitation(utilization, strategy)


# The scalars.


def test_scalars_by_hand():
    assert scalars(MIXED) == pytest.approx(
        {
            # layer_2[0], layer_2[1], layer_10
            "max_over_mean_load/mean": (2 + 4 + 1.5) / 3,
            "max_over_mean_load/worst": 4,
            "max_over_mean_load/worst_layer": 1,
            "load_entropy/mean": (0.5 + 0 + math.log(2) / math.log(3)) / 3,
            "load_entropy/worst": 0,
            "dead_experts/mean": (2 / 4 + 3 / 4 + 1 / 3) / 3,
            "dead_experts/worst": 3 / 4,
            "layers_without_load": 0,
            "layers_not_finite": 0,
            "max_over_mean_load/layer_00": 2,
            "max_over_mean_load/layer_01": 4,
            "max_over_mean_load/layer_02": 1.5,
            "load_entropy/layer_00": 0.5,
            "load_entropy/layer_01": 0,
            "load_entropy/layer_02": math.log(2) / math.log(3),
            "dead_experts/layer_00": 2 / 4,
            "dead_experts/layer_01": 3 / 4,
            "dead_experts/layer_02": 1 / 3,
        },
        rel=1e-5,
        abs=1e-6,
    )


def test_excitation_by_hand():
    # Zero-sum is the load over the mean.
    values = scalars({"a": SPLIT, "b": {"c": jnp.array([0.1, 0.2])}}, phi_of({"a": SPLIT, "b": jnp.array([0.1, 0.2])}))
    assert {name: values[name] for name in EXCITATION} == pytest.approx(
        {"excitation/min": 0, "excitation/mean": 1, "excitation/max": 2}, rel=1e-6
    )
    values = scalars(ONE[None], phi_of(ONE, excitation_optax.positive_sum))
    # 1, 1, 4, 1
    assert (values["excitation/min"], values["excitation/mean"], values["excitation/max"]) == (1, 1.75, 4)


def test_layers_are_weighted_alike_in_the_mean_excitation():
    phi = {"a": jnp.array([2.0]), "b": jnp.ones((2, 3))}
    assert scalars({"u": EVEN}, phi)["excitation/mean"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (16, 4), (17, 4), (100, 64)])
@pytest.mark.parametrize("excited", [False, True])
def test_the_number_of_names_is_bounded(layers, experts, excited):
    u = {"stack": jnp.full((layers, experts), 1 / experts)}
    names = set(scalars(u, phi_of(u) if excited else None))
    each = {f"{name.split('/')[0]}/layer_{n:02}" for name in MEANS for n in range(layers)} if layers <= 16 else set()
    assert names == ALL | (EXCITATION if excited else set()) | each
    assert len(names) <= 12 + 3 * 16


def test_names_of_single_layers_can_be_left_out_and_the_prefix_chosen():
    assert set(scalars(MIXED, max_layers=2)) == ALL
    prefixed = jax.eval_shape(lambda u: telemetry.routing_metrics(u, max_layers=0, prefix="eval/moe"), MIXED)
    assert set(prefixed) == {f"eval/moe/{n}" for n in ALL}


def test_layers_are_numbered_as_people_count():
    tree = {"layer_10": EVEN, "layer_2": SPLIT, "layer_1": {"b": ONE, "a": jnp.ones((2, 1, 4))}}
    names = ["layer_1/a[0, 0]", "layer_1/a[1, 0]", "layer_1/b", "layer_2", "layer_10"]
    assert telemetry.layer_names(tree) == names
    assert telemetry.layer_names(jax.eval_shape(lambda: tree)) == names
    values = scalars(tree)
    assert [values[f"max_over_mean_load/layer_{n:02}"] for n in range(5)] == [1, 1, 4, 2, 1]
    np.testing.assert_array_equal(telemetry.load_by_layer(tree)[2:], [ONE, SPLIT, EVEN])


def test_a_layer_without_load_is_told_and_left_out_of_what_it_has_none_of():
    idle = RoutingCounts(jnp.zeros(4), jnp.zeros(()))
    values = scalars({"a": idle, "b": SPLIT})
    assert values["layers_without_load"] == 1
    assert values["layers_not_finite"] == 0
    assert values["max_over_mean_load/mean"] == values["max_over_mean_load/worst"] == 2
    assert values["max_over_mean_load/worst_layer"] == 1
    assert values["load_entropy/mean"] == values["load_entropy/worst"] == pytest.approx(0.5)
    assert values["dead_experts/mean"] == 0.75  # 1 and 1/2
    assert np.isnan(values["max_over_mean_load/layer_00"])


def test_no_load_at_all():
    values = scalars(jnp.zeros((2, 4)))
    assert values["layers_without_load"] == 2
    assert all(np.isnan(values[name]) for name in MEANS if not name.startswith("dead"))
    assert values["dead_experts/mean"] == 1


def test_an_only_expert_has_no_entropy_and_does_not_hide_that_of_others():
    values = scalars({"a": jnp.array([0.5]), "b": SPLIT})
    assert values["load_entropy/mean"] == values["load_entropy/worst"] == pytest.approx(0.5)
    assert values["max_over_mean_load/mean"] == 1.5


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_is_not_finite_is_told_and_not_hidden(bad):
    tree = {"a": jnp.stack([EVEN, SPLIT.at[1].set(bad)]), "b": ONE}
    values = scalars(tree, phi_of(tree))
    assert values["layers_not_finite"] == 1
    assert values["layers_without_load"] == 0
    for name in ("max_over_mean_load/mean", "max_over_mean_load/worst", "load_entropy/mean", "load_entropy/worst"):
        assert np.isnan(values[name]), name
    assert values["max_over_mean_load/worst_layer"] == 1
    assert values["max_over_mean_load/layer_00"] == 1
    assert values["max_over_mean_load/layer_02"] == 4
    assert all(np.isnan(values[name]) for name in EXCITATION)


@pytest.mark.parametrize(
    ("utilization", "message"),
    [
        (None, "utilization of at least one layer; got None"),
        ({"a": None}, "utilization of at least one layer"),
        ({"a": jnp.arange(3)}, "must be floating-point fractions"),
        ({"a": jnp.float32(0.5)}, "must be an array of fractions"),
    ],
)
def test_no_utilization_is_an_error(utilization, message):
    for function in (telemetry.routing_metrics, telemetry.layer_names, telemetry.load_by_layer):
        with pytest.raises(ValueError, match=message):
            function(utilization)
    with pytest.raises(ValueError, match=message):
        telemetry.RoutingLog().write(1, utilization)


def test_load_by_layer_is_masked_where_there_is_no_expert():
    tree = {"a": COUNTS, "b": jnp.array([0.25, NAN, 0.25, 0.5]), "c": jnp.ones((2, 1), jnp.bfloat16)}
    load = telemetry.load_by_layer(tree)
    assert load.dtype == np.float32
    absent = [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    np.testing.assert_array_equal(np.ma.getmaskarray(load), np.array(absent, bool))
    np.testing.assert_array_equal(load[0, :3], [0.5, 0.5, 0])
    np.testing.assert_array_equal(load.data[1], [0.25, NAN, 0.25, 0.5])  # a NaN is not masked
    np.testing.assert_array_equal(load[2:, 0], [1, 1])


# The log: on the host.


def test_what_is_written_is_returned():
    log = telemetry.RoutingLog()
    values = log.write(7, MIXED, phi_of(MIXED))
    assert {name.removeprefix("routing/"): value for name, value in values.items()} == pytest.approx(
        scalars(MIXED, phi_of(MIXED))
    )
    assert log.names == ["layer_2[0]", "layer_2[1]", "layer_10"]
    np.testing.assert_array_equal(log.load[0], telemetry.load_by_layer(MIXED))


def test_one_transfer_for_each_call(monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    log = telemetry.RoutingLog()
    tree = {f"layer_{n}": RoutingCounts(jnp.ones(4), jnp.float32(2)) for n in range(20)}
    for step in range(3):
        log.write(step, tree, phi_of(tree))
    # one array each: 12 scalars, and utilization and excitation of 20 layers of 4 experts
    assert [x.shape for x in fetched] == [(12 + 2 * 20 * 4,)] * 3


def test_calls_after_the_first_compile_nothing():
    log = telemetry.RoutingLog()
    log.write(1, MIXED, phi_of(MIXED))
    before = telemetry._pack._cache_size()
    for step in range(2, 5):
        log.write(step, MIXED, phi_of(MIXED))
    assert telemetry._pack._cache_size() == before


@pytest.mark.parametrize("calls", [1, 3, 4, 5, 8, 9, 16, 23])
def test_the_history_is_bounded_and_covers_the_run(calls):
    loads = np.random.default_rng(0).random((calls, 2, 3)).astype(np.float32)
    log = telemetry.RoutingLog(history=4)
    for number, load in enumerate(loads):
        log.write(10 * number, {"moe": jnp.asarray(load)})
    each = 1 if calls <= 4 else 2 if calls <= 8 else 4 if calls <= 16 else 8  # calls in an entry
    parts = [loads[start : start + each] for start in range(0, calls, each)]
    assert len(log.steps) == len(parts) <= 4
    np.testing.assert_allclose(log.load, [part.mean(axis=0) for part in parts], rtol=1e-5)
    np.testing.assert_array_equal(log.steps, [10 * (min(start + each, calls) - 1) for start in range(0, calls, each)])


def test_the_history_keeps_nan_and_masks():
    log = telemetry.RoutingLog(history=2)
    for value in (0.5, NAN, 0.5, 0.5):
        log.write(int(log.steps[-1]) + 1 if len(log.steps) else 0, {"a": jnp.array([value]), "b": EVEN})
    np.testing.assert_array_equal(log.load.data[:, 0, 0], [NAN, 0.5])
    np.testing.assert_array_equal(log.load.mask, [[[False, True, True, True], [False] * 4]] * 2)


def test_numpy_and_half_precision_are_welcome():
    values = telemetry.RoutingLog().write(0, {"a": np.array([0.75, 0.25], np.float16), "b": EVEN.astype(jnp.bfloat16)})
    assert values["routing/max_over_mean_load/mean"] == 1.25


def test_other_layers_than_before_are_an_error():
    log = telemetry.RoutingLog()
    log.write(1, {"a": EVEN, "b": EVEN})
    with pytest.raises(ValueError, match=r"step 2 are not those .* Missing: b \[4\]. New: c \[4\]\.") as error:
        log.write(2, {"a": EVEN, "c": EVEN})
    assert "a prefix, of its own" in str(error.value)
    assert log.steps.tolist() == [1]


def test_other_experts_than_before_are_an_error():
    log = telemetry.RoutingLog()
    log.write(1, {"a": EVEN})
    with pytest.raises(ValueError, match=r"Missing: a \[4\]\. New: a \[2\]\."):
        log.write(2, {"a": jnp.array([0.5, 0.5])})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"image_every": 0}, "image_every must be at least 1"), ({"history": 3}, "even"), ({"history": 0}, "2 or more")],
)
def test_numbers_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        telemetry.RoutingLog(**kwargs)


def test_pictures_without_matplotlib_are_an_error_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "excitation_optax.plotting", raising=False)
    monkeypatch.delattr(excitation_optax, "plotting", raising=False)
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        with pytest.raises(ImportError, match=r"pip install '.\[telemetry\]' in a checkout, or pass image_every=None"):
            telemetry.RoutingLog(writer)
        telemetry.RoutingLog(writer, image_every=None).write(1, EVEN)
    telemetry.RoutingLog().write(1, EVEN)


# What was written, read back.


def read_image(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def write_six(log):
    """Six calls at steps 10, 20, ..., 60, of which the fourth has a NaN in both; the scalars that they returned."""
    returned = []
    for number in range(1, 7):
        u = {"a": jnp.stack([EVEN, ONE]), "b": COUNTS}
        if number == 4:
            u["a"] = u["a"].at[0, 0].set(NAN)
        returned.append(log.write(10 * number, u, phi_of(u)))
    return returned


def test_tensorboard(tmp_path):
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        returned = write_six(telemetry.RoutingLog(writer, image_every=3))
    events = dashboards.events_of(tmp_path)
    for number, expected in enumerate(returned, 1):
        at_step = {name: value for step, name, value in events if step == 10 * number}
        written = {name: v.simple_value for name, v in at_step.items() if v.WhichOneof("value") == "simple_value"}
        assert written == pytest.approx(expected, rel=1e-6, nan_ok=True)
        # Zero-sum: 1, 1, 1, 1 | 0, 0, 4, 0 | 3/2, 3/2, 0; the first of these are NaN in the fourth call.
        histogram = at_step["routing/excitation"].histo
        assert (histogram.num, histogram.min, histogram.max) == (7 if number == 4 else 11, 0, 4)
        assert histogram.sum == pytest.approx(7 if number == 4 else 11)
        images = {name: v.image for name, v in at_step.items() if v.WhichOneof("value") == "image"}
        assert set(images) == ({"routing/load", "routing/load_over_time"} if number in (3, 6) else set())
        for image in images.values():
            assert read_image(image.encoded_image_string).shape == (image.height, image.width, 3)
    assert np.isnan(returned[3]["routing/excitation/mean"])
    names = {name for _, name, _ in events}
    assert len(names) == len(returned[0]) + 3


def test_a_picture_is_of_the_calls_since_the_one_before(tmp_path, monkeypatch):
    drawn = []
    plotting = pytest.importorskip("excitation_optax.plotting")
    blank = np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(plotting, "to_image", lambda *args, **kwargs: drawn.append(args) or blank)
    loads = np.random.default_rng(0).random((6, 2, 3)).astype(np.float32)
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        log = telemetry.RoutingLog(writer, image_every=3)
        for step, load in enumerate(loads):
            log.write(step, {"moe": jnp.asarray(load)})
    assert [args[0] for args in drawn] == [plotting.load_heat_map, plotting.load_over_time] * 2
    np.testing.assert_allclose(drawn[0][1], loads[:3].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(drawn[2][1], loads[3:].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(drawn[3][1], np.arange(6))
    np.testing.assert_array_equal(drawn[3][2], loads)


def test_wandb(wandb_offline):
    with wandb.init(project="routing") as run:
        returned = write_six(telemetry.RoutingLog(wandb_run=run, image_every=3))
        run.log({"loss": 2.5}, step=60)  # yours goes into the same row
        assert run.summary["routing/dead_experts/worst"] == 0.75
    rows = dashboards.rows_of(wandb_offline)
    assert sorted(rows) == [10, 20, 30, 40, 50, 60]
    for number, expected in enumerate(returned, 1):
        row = rows[10 * number]
        numbers = {name: float(row[name]) for name in expected}
        assert numbers == pytest.approx(expected, rel=1e-6, nan_ok=True)
        histogram = row["routing/excitation"]
        assert histogram["_type"] == "histogram"
        assert sum(histogram["values"]) == (7 if number == 4 else 11)
        assert (histogram["bins"][0], histogram["bins"][-1]) == (0, 4)
        assert ("routing/load" in row) == ("routing/load_over_time" in row) == (number in (3, 6))
    assert rows[60]["loss"] == 2.5
    (files,) = glob.glob(f"{wandb_offline}/wandb/offline-run-*/files")
    image = rows[60]["routing/load"]
    assert read_image((pathlib.Path(files) / image["path"]).read_bytes()).shape == (image["height"], image["width"], 3)


def test_where_nothing_is_finite_there_is_no_histogram(tmp_path):
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        log = telemetry.RoutingLog(writer, image_every=1)
        log.write(1, {"a": EVEN * NAN}, {"a": EVEN * NAN})
        log.write(2, {"a": EVEN})
    names = {name for _, name, _ in dashboards.events_of(tmp_path)}
    assert "routing/excitation" not in names
    assert {"routing/load", "routing/excitation/max"} < names


# Several processes.


@pytest.mark.slow
def test_one_process_of_several_logs_alone():
    """Process 0 logs counts that are whole on every device; the other one waits at the end."""
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
        assert out.endswith("done\n"), err


def test_parameters_of_one_layer_are_one_layer():
    params = {f"layer_{n}": {"mlp": {"router": jnp.ones((2, 4)), "up": jnp.ones((4, 2))}} for n in range(2)}
    params["layer_1"]["mlp"]["down"] = jnp.ones((4, 2))
    u = jnp.array([0.75, 0.25, 0.0, 0.0])
    utilization = excitation_optax.by_pattern(params, {"layer_0/mlp/up": u[::-1], "layer_1/mlp/*[pn]": u})
    assert telemetry.layer_names(utilization) == ["layer_0/mlp/up", "layer_1/mlp/{down,up}"]
    np.testing.assert_array_equal(telemetry.load_by_layer(utilization), [u[::-1], u])
