"""The figures, by the numbers on their artists; and that they fit a column, without pyplot.

Axis letters: E experts, L layers, T points in time.
"""

import io
import math

import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import pytest

import excitation_optax
from excitation_optax import RoutingCounts, plotting, telemetry

NAN = math.nan
HALVES, QUARTERS = np.array([0.25, 0.75]), np.array([0.5, 0.25, 0.25, 0.0])
COUNTS = RoutingCounts(jnp.array([2.0, 6.0]), jnp.array(8.0))  # as HALVES


def random_load(*shape):
    load = np.random.default_rng(0).random(shape) ** 4
    load[..., ::5] = 0
    return load


def logs(load):
    """Base-2 logarithm of the load over the mean, from -2 to 2; -3 where there is none."""
    ratio = np.asarray(load) / np.asarray(load).mean(axis=-1, keepdims=True)
    return np.where(ratio > 0, np.clip(np.log2(np.where(ratio > 0, ratio, 1)), -2, 2), -3)


def cells(ax):
    return ax.collections[0].get_array()


def edges(ax):
    """The edges of the cells, along x and y."""
    coordinates = ax.collections[0].get_coordinates()
    return coordinates[0, :, 0], coordinates[:, 0, 1]


def color_of(ax, row, column):
    return tuple(ax.collections[0].to_rgba(cells(ax))[row, column])


# Heat maps.


def test_the_load_heat_map():
    load = random_load(3, 7)
    ax = plotting.load_heat_map(load)
    np.testing.assert_allclose(cells(ax), logs(load), rtol=1e-6)
    np.testing.assert_array_equal(edges(ax)[0], np.arange(8) - 0.5)
    np.testing.assert_array_equal(edges(ax)[1], np.arange(4) - 0.5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "layer")
    assert ax.yaxis_inverted()  # the first layer is on top


def test_colors_mean_the_same_in_every_picture():
    ax = plotting.load_heat_map(np.array([[1.0, 1.0, 1.0, 1.0], [8.0, 0.0, 1.0, 1.0], [0.5, 2.5, 0.9, 0.1]]))
    assert color_of(ax, 1, 1) == (0, 0, 0, 1)
    mesh = ax.collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-2, 2)
    red, _, blue, _ = color_of(ax, 1, 0)
    assert red > blue
    red, green, blue, _ = color_of(ax, 0, 0)
    assert np.ptp([red, green, blue]) < 0.01  # grey is the mean
    bar = ax.figure.axes[1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["1/4", "1/2", "1", "2", "4"]
    assert bar.get_ylabel() == "load / mean (black: 0)"


def test_experts_that_are_not_there_are_blank_and_loads_that_are_not_finite_are_yellow():
    load = np.ma.array([[0.5, 0.5, 9, 9], [0.5, NAN, 0.5, 1], [math.inf, 1, 1, 1]], mask=False)
    load[0, 2:] = np.ma.masked
    ax = plotting.load_heat_map(load)
    # The mean of the second layer is unknown; one half of an infinity is nothing.
    np.testing.assert_array_equal(cells(ax).filled(99), [[0, 0, 99, 99], [3] * 4, [3, -3, -3, -3]])
    assert color_of(ax, 0, 2)[3] == 0
    assert color_of(ax, 1, 1) == matplotlib.colors.to_rgba("gold")
    assert ax.figure.axes[1].get_ylabel() == "load / mean (yellow: NaN)"


def test_a_layer_without_load_is_black():
    np.testing.assert_array_equal(cells(plotting.load_heat_map(np.zeros((1, 3)))), [[-3, -3, -3]])


# 1/4 and 3/4 are 1/2 and 3/2 of the mean; 1/2, 1/4, 1/4, 0 are 2, 1, 1, 0.
TWO, FOUR = [-1, math.log2(1.5)], [1, 0, 0, -3]
WIDE = [*TWO, 99, 99]  # 99: no such expert


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (HALVES, [TWO]),
        ([0.25, 0.75], [TWO]),
        ([[0.25, 0.75], (0.75, 0.25)], [TWO, TWO[::-1]]),
        (jnp.asarray(HALVES, jnp.bfloat16), [TWO]),
        (np.array([1, 3]), [TWO]),
        (COUNTS, [TWO]),
        (RoutingCounts(jnp.array([[2.0, 6.0], [3.0, 1.0]]), jnp.array([8.0, 4.0])), [TWO, TWO[::-1]]),
        ([HALVES, HALVES[::-1]], [TWO, TWO[::-1]]),
        ([HALVES, QUARTERS], [WIDE, FOUR]),
        ({"layer_10": QUARTERS, "layer_2": {"moe": COUNTS}}, [WIDE, FOUR]),
        ({"stack": np.stack([HALVES, HALVES])[:, None], "one": QUARTERS}, [FOUR, WIDE, WIDE]),
        ([np.ma.array([0.25, 9, 0.75], mask=[0, 1, 0]), HALVES], [[-1, 99, math.log2(1.5)], [*TWO, 99]]),
    ],
)
def test_every_form_of_a_load(load, expected):
    np.testing.assert_allclose(cells(plotting.load_heat_map(load)).filled(99), expected, rtol=1e-6)
    over_time = cells(plotting.load_over_time([1, 2], [load, load]))
    flat = [value for row in expected for value in row]
    assert over_time.shape[1] == 2
    rows = [value for value in over_time[:, 1].filled(99) if value != 99]
    np.testing.assert_allclose(rows, [value for value in flat if value != 99], rtol=1e-6)


@pytest.mark.parametrize(
    "load",
    [
        np.ones((2, 3, 4)),
        np.ones(()),
        0.5,
        np.zeros((0, 4)),
        np.zeros((3, 0)),
        [],
        {},
        None,
        "load",
        {"a": 0.5},
        {"a": np.zeros((0, 4))},
        [[0.5, 0.5], [1.0]],
        [0.5, "x"],
        np.array(["a", "b"]),
        {"a": RoutingCounts(jnp.ones((2, 4)), jnp.ones(3))},
    ],
)
def test_anything_else_is_an_error(load):
    with pytest.raises(ValueError, match=r"^A load must be \[L, E\], \[E\], or a tree of RoutingCounts or arrays"):
        plotting.load_heat_map(load)
    with pytest.raises(ValueError, match=r"^A load must be"):
        plotting.load_over_time([1], [load])


def test_of_many_experts_ranks_are_drawn():
    load = np.ma.array(np.random.default_rng(0).permuted(np.tile(np.arange(4096.0), (2, 1)), axis=1), mask=False)
    load[1, :1000] = np.ma.masked
    ax = plotting.load_heat_map(load)
    drawn = cells(ax)
    assert drawn.shape == (2, 512)
    ranks = np.linspace(0, 4095, 512).round()
    np.testing.assert_allclose(drawn[0], logs(np.arange(4096)[::-1])[ranks.astype(int)], rtol=1e-6)
    assert drawn[0, -1] == -3  # the idlest
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn)[1], ranks >= 3096)
    assert ax.get_xlabel() == "rank by load, of 4,096"


# Over time.


def test_load_over_time():
    load = np.ma.array(random_load(3, 2, 4) + 0.01, mask=False)
    load[:, 1, 3] = np.ma.masked
    ax = plotting.load_over_time([10, 20, 40], load)
    expected = np.concatenate([logs(load.data[:, 0]), logs(load.data[:, 1, :3])], axis=1).T
    np.testing.assert_allclose(cells(ax), expected, rtol=1e-6)
    np.testing.assert_array_equal(edges(ax)[0], [5, 15, 30, 50])
    np.testing.assert_array_equal(edges(ax)[1], np.arange(8) - 0.5)
    assert list(ax.get_yticks()) == [1.5, 5]  # the middle of rows 0 to 3, and of 4 to 6
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
    (line,) = ax.collections[1].get_segments()
    np.testing.assert_array_equal(line, [[5, 3.5], [50, 3.5]])  # between the layers
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "layer (rows: experts)")


def test_load_over_time_of_one_layer_and_of_one_step():
    load = random_load(3, 5)
    np.testing.assert_allclose(cells(plotting.load_over_time([0, 1, 2], load)), logs(load).T, rtol=1e-6)
    ax = plotting.load_over_time([100], random_load(1, 2, 3))
    np.testing.assert_array_equal(edges(ax)[0], [99.5, 100.5])


def test_load_over_time_of_the_log():
    log = telemetry.RoutingLog()
    for step in (100, 200):
        log.write(step, {"a": COUNTS, "b": jnp.asarray(QUARTERS)})
    np.testing.assert_allclose(cells(plotting.load_over_time(log.steps, log.load)).T, [TWO + FOUR] * 2, rtol=1e-6)


def test_load_over_time_of_a_large_model_is_bounded_and_keeps_the_extremes():
    load = random_load(5, 48, 128)
    ax = plotting.load_over_time(np.arange(5), load)
    rows = 256 // 48
    assert cells(ax).shape == (48 * rows, 5)
    np.testing.assert_allclose(cells(ax)[::rows], logs(load).max(axis=-1).T, rtol=1e-6)
    assert (cells(ax)[rows - 1 :: rows] == -3).all()
    assert ax.get_ylabel() == "layer (rows: experts, by load)"
    assert len(ax.get_yticks()) <= 12


@pytest.mark.parametrize(
    ("steps", "load"),
    [
        ([1, 2], np.ones((3, 4))),
        ([], np.ones((0, 4))),
        ([], telemetry.RoutingLog().load),
        ([2, 1], np.ones((2, 4))),
        ([1, 1], np.ones((2, 4))),
        ([1, NAN], np.ones((2, 4))),
        ([1, 2], [HALVES, QUARTERS]),
        (1, np.ones((1, 4))),
    ],
)
def test_histories_that_do_not_fit_are_an_error(steps, load):
    with pytest.raises(ValueError, match=r"^load_over_time: steps must be \[T\], rising, and load \[T, L, E\]"):
        plotting.load_over_time(steps, load)


# Colors.


def test_every_strategy_has_a_color_of_its_own():
    strategies = {"zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"}
    assert all(callable(getattr(excitation_optax, name)) for name in strategies)
    assert len({plotting.COLORS[name] for name in strategies | {"baseline"}}) == 7
    assert len({plotting.COLORS[name] for name in ("baseline", "both", "direction", "norm")}) == 4
    # Luminances differ within the components, so that print without colors shows them.
    luminance = [
        np.dot(matplotlib.colors.to_rgb(plotting.COLORS[c]), [0.2126, 0.7152, 0.0722]) for c in ("both", "norm")
    ]
    assert abs(np.diff(luminance)) > 0.2


# All figures.

LOAD = random_load(6, 3, 8)
CALLS = {
    "load_heat_map": (LOAD[0],),
    "load_over_time": (np.arange(6) * 1000, LOAD),
}
each_figure = pytest.mark.parametrize("name", CALLS)


def test_every_figure_is_among_them():
    assert {name for name in plotting.__all__ if callable(getattr(plotting, name))} == set(CALLS)


@each_figure
def test_it_draws_where_it_is_told(name):
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert getattr(plotting, name)(*CALLS[name], ax=right) is right
    assert right.has_data()
    assert not left.has_data()


@each_figure
@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_its_text_stays_text_and_nothing_is_cut_off_at_the_width_of_a_column(name, kind):
    file = io.BytesIO()
    with matplotlib.rc_context(plotting.STYLE | {"svg.hashsalt": "same"}):
        figure = getattr(plotting, name)(*CALLS[name]).figure
        figure.savefig(file, format=kind)
        box = figure.get_tightbbox()  # in inches, of all that is drawn
    assert tuple(figure.get_size_inches()) == (3.3, 2.2)
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= 3.3
    assert box.y1 <= 2.2
    content = file.getvalue()
    if kind == "svg":
        assert content.count(b"<text") > 5
        assert content.count(b"<image") <= 2  # the cells and the color bar
    else:
        assert b"/FontType 3" not in content
