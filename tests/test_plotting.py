"""The figures, by the numbers on their artists; and that they fit a column, alone and in a figure of the caller's.

Axis letters: E experts, L layers, T points in time.
"""

import io
import math

import matplotlib
import matplotlib.figure
import numpy as np
import pytest

import excitation_optax
from excitation_optax import plotting

matplotlib.use("agg")
from matplotlib import pyplot

NAN = math.nan


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def random_load(*shape):
    load = np.random.default_rng(0).random(shape) ** 4
    load[..., ::5] = 0
    return load


def logs(load):
    """Base-2 logarithm of the load over the mean, from -2 to 2; -3 where there is none."""
    ratio = np.asarray(load) / np.asarray(load).mean(axis=-1, keepdims=True)
    return np.where(ratio > 0, np.clip(np.log2(np.where(ratio > 0, ratio, 1)), -2, 2), -3)


def cells(ax):
    (mesh,) = ax.collections
    return mesh.get_array()


def edges(ax):
    """Of the cells, along x and y."""
    coordinates = ax.collections[0].get_coordinates()
    return coordinates[0, :, 0], coordinates[:, 0, 1]


def crosses(ax):
    return [tuple(map(float, xy)) for line in ax.lines if line.get_marker() == "x" for xy in line.get_xydata()]


def colour_of(ax, row, column):
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
    assert crosses(ax) == []


def test_colours_are_the_same_in_every_picture():
    ax = plotting.load_heat_map(np.array([[1.0, 1.0, 1.0, 1.0], [8.0, 0.0, 1.0, 1.0], [0.5, 2.5, 0.9, 0.1]]))
    assert colour_of(ax, 1, 1) == (0, 0, 0, 1)
    mesh = ax.collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-2, 2)
    red, _, blue, _ = colour_of(ax, 1, 0)
    assert red > blue
    red, green, blue, _ = colour_of(ax, 0, 0)
    assert np.ptp([red, green, blue]) < 0.01  # grey is the mean
    bar = ax.figure.axes[1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["1/4", "1/2", "1", "2", "4"]
    assert bar.get_ylabel() == "load / mean (black: 0)"


def test_one_layer_alone():
    np.testing.assert_allclose(cells(plotting.load_heat_map([0.25, 0.75])), [[-1, math.log2(1.5)]])


def test_experts_that_are_not_there_are_blank_and_what_is_not_finite_is_crossed():
    load = np.ma.array([[0.5, 0.5, 9, 9], [0.5, NAN, 0.5, 1], [1, 1, 1, 1]], mask=False)
    load[0, 2:] = np.ma.masked
    ax = plotting.load_heat_map(load)
    np.testing.assert_array_equal(cells(ax).filled(99), [[0, 0, 99, 99], [99] * 4, [0] * 4])
    assert crosses(ax) == [(0, 1), (1, 1), (2, 1), (3, 1)]  # its mean is unknown
    assert colour_of(ax, 0, 2)[3] == 0


def test_infinity_is_crossed_too():
    ax = plotting.load_heat_map([[math.inf, 0.5], [1.0, 1.0]])
    assert crosses(ax) == [(0, 0)]  # one half of an infinity is nothing
    assert cells(ax)[0, 1] == plotting.DEAD


def test_a_layer_without_load_is_black():
    np.testing.assert_array_equal(cells(plotting.load_heat_map(np.zeros((1, 3)))), [[-3, -3, -3]])


def test_of_many_experts_ranks_are_drawn():
    load = np.ma.array(np.random.default_rng(0).permuted(np.tile(np.arange(4096.0), (2, 1)), axis=1), mask=False)
    load[1, :1000] = np.ma.masked
    ax = plotting.load_heat_map(load)
    drawn = cells(ax)
    assert drawn.shape == (2, 512)
    ranks = np.linspace(0, 4095, 512).round()
    np.testing.assert_allclose(drawn[0], logs(np.arange(4096)[::-1])[ranks.astype(int)], rtol=1e-6)
    assert drawn[0, -1] == plotting.DEAD  # the idlest
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn)[1], ranks >= 3096)
    x, _ = edges(ax)
    np.testing.assert_allclose((x[1:] + x[:-1]) / 2, ranks, atol=1)
    assert ax.get_xlabel() == "rank by load, of 4,096 experts"


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_a_heat_map_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"load must be \[L, E\] or \[E\]; got"):
        plotting.load_heat_map(np.ones(shape))


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
    (line,) = ax.lines
    assert list(line.get_ydata()) == [3.5, 3.5]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "layer (rows: experts)")


def test_load_over_time_of_one_layer():
    load = random_load(3, 5)
    ax = plotting.load_over_time([0, 1, 2], load)
    np.testing.assert_allclose(cells(ax), logs(load).T, rtol=1e-6)
    assert ax.get_ylabel() == "expert"
    assert not ax.lines


def test_load_over_time_of_one_step():
    ax = plotting.load_over_time([100], random_load(1, 2, 3))
    np.testing.assert_array_equal(edges(ax)[0], [99.5, 100.5])


def test_load_over_time_crosses_what_is_not_finite():
    load = np.ones((3, 2, 2))
    load[1, 1, 0] = NAN
    assert crosses(plotting.load_over_time([10, 20, 30], load)) == [(20, 2), (20, 3)]


def test_load_over_time_of_a_large_model_is_bounded_and_keeps_the_extremes():
    load = random_load(5, 48, 128)
    ax = plotting.load_over_time(np.arange(5), load)
    rows = 256 // 48
    assert cells(ax).shape == (48 * rows, 5)
    np.testing.assert_allclose(cells(ax)[::rows], logs(load).max(axis=-1).T, rtol=1e-6)
    assert (cells(ax)[rows - 1 :: rows] == plotting.DEAD).all()
    assert ax.get_ylabel() == "layer (rows: experts, by load)"
    assert len(ax.get_yticks()) <= 12


def test_imbalance_over_time():
    load = np.array([[[0.5, 0.5, 0.5], [1, 0, 0]], [[0.2, 0.6, 0.1], [0, 0, 0]], [[0.2, NAN, 0.1], [0.1, 0.2, 0.3]]])
    ax = plotting.imbalance_over_time([1, 2, 3], load)
    first, second = ax.lines[:2]
    np.testing.assert_array_equal(first.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(first.get_ydata(), [1, 2, NAN])
    np.testing.assert_allclose(second.get_ydata(), [3, NAN, 1.5])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layer 0", "layer 1"]
    assert ax.get_ylim()[0] <= 1
    assert ax.get_ylabel() == "largest load / mean load"


def test_imbalance_of_many_layers_has_a_colour_bar():
    ax = plotting.imbalance_over_time(np.arange(4), random_load(4, 24, 8))
    assert ax.get_legend() is None
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "layer"
    assert bar.get_ylim() == (0, 23)
    luminance = [np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722]) for line in ax.lines[:24]]
    assert np.all(np.diff(luminance) > 0)  # so that it survives print without colours


@pytest.mark.parametrize("function", [plotting.load_over_time, plotting.imbalance_over_time])
@pytest.mark.parametrize(
    ("steps", "shape"), [([1, 2], (3, 4)), ([], (0, 4)), ([1], (4,)), ([2, 1], (2, 4)), ([1], (1, 1, 1, 1))]
)
def test_histories_that_do_not_fit_are_an_error(function, steps, shape):
    with pytest.raises(ValueError, match=rf"{function.__name__}: steps must be \[T\], rising"):
        function(steps, np.ones(shape))


# Excitation.


def test_the_histogram_of_excitation():
    phi = np.array([[0.0, 0.5, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0]])
    ax = plotting.excitation_histogram(phi, bins=6)
    # 0 to 3 in halves
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 4, 0, 0, 1]
    assert [bar.get_x() for bar in ax.patches] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    assert list(ax.lines[0].get_xdata()) == [1, 1]
    assert ax.get_title() == ""


@pytest.mark.parametrize(("phi", "title"), [([1.0, NAN, math.inf], "2 of 3 not finite"), ([NAN], "1 of 1 not finite")])
def test_excitation_that_is_not_finite_is_told(phi, title):
    ax = plotting.excitation_histogram(np.array(phi))
    ax.figure.canvas.draw()
    assert ax.get_title() == title


def test_the_curves_of_the_strategies():
    strategies = [excitation_optax.zero_sum, excitation_optax.positive_sum, excitation_optax.exp_diff]
    ax = plotting.strategy_curves(strategies, gamma=2.0, num_experts=5)
    u = ax.lines[0].get_xdata()
    others = (1 - u) / 4
    square = (u**2 + 4 * others**2) / 5
    np.testing.assert_allclose(ax.lines[0].get_ydata(), u**2 / square, rtol=1e-4)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), np.maximum(1, u**2 / square), rtol=1e-4)
    exponential = (np.exp(2 * u) + 4 * np.exp(2 * others)) / 5
    np.testing.assert_allclose(ax.lines[2].get_ydata(), np.exp(2 * u) / exponential, rtol=1e-4)
    for line in ax.lines[:3]:  # 1 where all have 1/5
        assert np.interp(0.2, u, line.get_ydata()) == pytest.approx(1, rel=1e-3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["zero_sum", "positive_sum", "exp_diff"]
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines[:3]}) == 3


def test_strategies_without_a_curve():
    with pytest.raises(ValueError, match="random_boost is random"):
        plotting.strategy_curves([excitation_optax.random_boost])
    with pytest.raises(ValueError, match="num_experts must be at least 2; got 1"):
        plotting.strategy_curves([excitation_optax.zero_sum], num_experts=1)


# All of them.

LOAD = random_load(6, 3, 8)
CALLS = {
    "load_heat_map": (LOAD[0],),
    "load_over_time": (np.arange(6) * 1000, LOAD),
    "imbalance_over_time": (np.arange(6) * 1000, LOAD),
    "excitation_histogram": (LOAD,),
    "strategy_curves": ([excitation_optax.zero_sum, excitation_optax.inverted],),
}
each_figure = pytest.mark.parametrize("name", CALLS)


def test_every_figure_is_among_them():
    assert {name for name in plotting.__all__ if callable(getattr(plotting, name))} == {*CALLS, "to_image"}


@each_figure
def test_it_draws_where_it_is_told(name):
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert getattr(plotting, name)(*CALLS[name], ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert not pyplot.get_fignums()


@each_figure
@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_it_is_saved_as_vectors_with_text(name, kind):
    with matplotlib.rc_context(plotting.STYLE | {"svg.hashsalt": "same"}):
        figure = getattr(plotting, name)(*CALLS[name]).figure
        file = io.BytesIO()
        figure.savefig(file, format=kind)
    content = file.getvalue()
    assert tuple(figure.get_size_inches()) == (3.3, 2.2)
    if kind == "svg":
        assert b"<text" in content
        assert content.count(b"<image") <= 1  # the colour bar's
    else:
        assert b"/FontType 3" not in content


@each_figure
def test_nothing_is_cut_off_at_the_width_of_a_column(name):
    with matplotlib.rc_context(plotting.STYLE):
        figure = getattr(plotting, name)(*CALLS[name]).figure
        figure.canvas.draw()
    box = figure.get_tightbbox(figure.canvas.get_renderer())  # in inches, of all that is drawn
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= 3.3
    assert box.y1 <= 2.2


def test_an_image_is_drawn_without_pyplot():
    image = plotting.to_image(plotting.load_heat_map, LOAD[0], height=1.5)
    assert image.shape == (300, 660, 3)
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert not pyplot.get_fignums()
