"""Figures of routing and excitation for papers and notebooks, in maps that colour-blind readers can tell apart.

Every function takes arrays, and draws into `ax` if it is given one; it returns the Axes. For a figure one column wide,
with text that stays text in PDF and SVG, draw and save it under `STYLE`:

    with matplotlib.rc_context(plotting.STYLE):
        plotting.load_heat_map(load).figure.savefig("load.pdf")

Axis letters: E experts, L layers, T points in time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from excitation_optax import _strategies

__all__ = [
    "STYLE",
    "excitation_histogram",
    "imbalance_over_time",
    "load_heat_map",
    "load_over_time",
    "strategy_curves",
    "to_image",
]

STYLE = {
    "figure.figsize": (3.3, 2.2),  # inches: a column of a two-column page
    "figure.dpi": 200,
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # text that can be searched and edited
    "svg.fonttype": "none",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}

MAX_CELLS = 512  # of a heat map, along experts; of more, so many ranks are drawn
LIMIT = 2  # heat maps show loads from 2**-LIMIT to 2**LIMIT times the mean in colours of their own
DEAD = -LIMIT - 1  # where an expert has no load; below all others
# Okabe and Ito's, dark enough for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 0.6)))


def load_heat_map(load: Any, *, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """The load of every expert of every layer, over the mean of its layer.

    Grey is the mean, red more, blue less, in powers of two up to 4 times and down to a quarter; black is no token at
    all. A cross is a load that is not finite. Of layers of more than 512 experts, 512 are drawn, evenly from the
    busiest to the idlest of each layer, and the axis is their rank.

    Args:
      load: `[L, E]` or `[E]`, utilization or any other measure of load, masked where a layer has no such expert: as
        `telemetry.load_by_layer(utilization)` or an entry of `RoutingLog.load`.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes; its colour bar is in `ax.figure.axes` too.

    Raises:
      ValueError: if `load` has another number of axes.

    Example:
      >>> import numpy as np
      >>> from excitation_optax import plotting
      >>> ax = plotting.load_heat_map(np.array([[0.25, 0.5, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]))
      >>> ax.collections[0].get_array().data  # log2 of the load over the mean; -3 is no token
      array([[ 0.,  1.,  0., -3.],
             [ 0.,  0.,  0.,  0.]])
    """
    load = _masked(load)
    if load.ndim not in (1, 2):
        raise ValueError(f"load_heat_map: load must be [L, E] or [E]; got {list(load.shape)}.")
    load = load.reshape(-1, load.shape[-1])
    cells, experts = _ranked(load, MAX_CELLS)
    ax = _axes(ax)
    _draw_cells(ax, _edges(experts), _edges(np.arange(len(cells))), cells)
    ax.set(xlabel=_expert_label(experts, load.shape[1]), ylabel="layer")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
    return ax


def load_over_time(steps: Any, load: Any, *, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """The load of every expert over the mean of its layer, from step to step: layers below each other, lines between.

    Colours are those of `load_heat_map`. If there are more than 256 experts in all, fewer are drawn, evenly from the
    busiest to the idlest of each layer at the time: the edges of a layer are its extremes.

    Args:
      steps: `[T]`, rising; a column is drawn around each, up to half-way to the next.
      load: `[T, L, E]`, or `[T, E]` for one layer, as `RoutingLog.load`.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if the shapes do not go together.

    Example:
      >>> import numpy as np
      >>> from excitation_optax import plotting
      >>> load = np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])  # [T, L, E]
      >>> ax = plotting.load_over_time([100, 200], load)
      >>> ax.collections[0].get_array().data.round(2)  # a row for each expert, layer by layer
      array([[ 0.  , -1.  ],
             [ 0.  ,  0.58],
             [ 1.  ,  1.  ],
             [-3.  , -3.  ]])
    """
    steps, load, one_layer = _history(load_over_time, steps, load)
    sizes = np.sum(~np.ma.getmaskarray(load[0]), axis=-1)  # E of each layer
    limit = max(2, MAX_CELLS // 2 // len(sizes))  # a figure is not as high as it is wide
    layers = [_ranked(layer[:, :size], limit) for layer, size in zip(np.ma.swapaxes(load, 0, 1), sizes, strict=True)]
    cells = np.ma.concatenate([block for block, _ in layers], axis=1).T
    ax = _axes(ax)
    experts = layers[0][1] if one_layer else np.arange(len(cells))
    _draw_cells(ax, _edges(steps), _edges(experts), cells)
    ax.set_xlabel("step")
    _in_thousands(ax)
    if one_layer:
        ax.set_ylabel(_expert_label(experts, sizes[0]))
        ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
    else:
        ax.set_ylabel("layer (rows: experts, by load)" if max(sizes) > limit else "layer (rows: experts)")
        ends = np.cumsum([0, *(block.shape[1] for block, _ in layers)])
        for end in ends[1:-1]:
            ax.axhline(end - 0.5, color="white", linewidth=8 / (len(layers) + 4))
        numbers = range(0, len(layers), -(-len(layers) // 12))
        ax.set_yticks([(ends[n] + ends[n + 1] - 1) / 2 for n in numbers], list(map(str, numbers)))
        ax.tick_params(axis="y", length=0)
    return ax


def imbalance_over_time(steps: Any, load: Any, *, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """The load of each layer's busiest expert over its layer's mean, from step to step: 1 is balance.

    Lines go from dark to light with depth. Where there was no load, or one that is not finite, a line has a gap.

    Args:
      steps: `[T]`, rising.
      load: `[T, L, E]`, or `[T, E]` for one layer, as `RoutingLog.load`.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if the shapes do not go together.

    Example:
      >>> import numpy as np
      >>> from excitation_optax import plotting
      >>> load = np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])  # [T, L, E]
      >>> ax = plotting.imbalance_over_time([100, 200], load)
      >>> [line.get_ydata().tolist() for line in ax.lines[:2]]
      [[1.0, 1.5], [2.0, 2.0]]
    """
    steps, load, _ = _history(imbalance_over_time, steps, load)
    busiest = np.max(_over_mean(load).filled(-np.inf), axis=-1)  # [T, L]; a NaN where one is
    busiest = np.where(busiest > 0, busiest, np.nan)
    layers = busiest.shape[1]
    ax = _axes(ax)
    colours = matplotlib.colormaps["viridis"].resampled(256)
    depth = matplotlib.colors.Normalize(0, max(layers - 1, 1) / 0.9)  # not up to the yellow, which paper swallows
    for layer in range(layers):
        ax.plot(steps, busiest[:, layer], color=colours(depth(layer)), label=f"layer {layer}")
    ax.axhline(1, color="0.6", linewidth=0.6, zorder=0)
    ax.set(xlabel="step", ylabel="largest load / mean load")
    ax.set_ylim(bottom=min(1, ax.get_ylim()[0]))
    _in_thousands(ax)
    if 1 < layers <= 6:
        ax.legend()
    elif layers > 6:
        bar = ax.figure.colorbar(matplotlib.cm.ScalarMappable(depth, colours), ax=ax, label="layer")
        bar.ax.set_ylim(0, layers - 1)
        bar.locator = matplotlib.ticker.MaxNLocator(6, integer=True)
    return ax


def excitation_histogram(
    excitation: Any, *, bins: int = 40, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """How many experts are scaled by how much, counted on a logarithmic axis.

    The dashed line is at 1, where Excitation changes nothing.

    Args:
      excitation: Phi, an array of any shape, such as the leaves of `excitation_optax.excitation(...)`, concatenated.
      bins: of the histogram.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes. If some of Phi is not finite, its title says how much.

    Example:
      >>> import numpy as np
      >>> from excitation_optax import plotting
      >>> ax = plotting.excitation_histogram(np.array([0.0, 0.5, 0.5, 3.0]), bins=3)
      >>> [int(bar.get_height()) for bar in ax.patches]
      [3, 0, 1]
    """
    phi = np.ma.compressed(_masked(excitation))
    finite = phi[np.isfinite(phi)]
    ax = _axes(ax)
    ax.hist(finite, bins=bins, color=COLOURS[0])
    ax.axvline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlabel=r"excitation $\Phi$ (factor of the learning rate)", ylabel="experts")
    if len(finite):
        ax.set_yscale("log")  # a few experts with a large factor are what one looks for
    if len(finite) < len(phi):
        ax.set_title(f"{len(phi) - len(finite):,} of {len(phi):,} not finite", color=COLOURS[1])
    return ax


def strategy_curves(
    strategies: Sequence[_strategies.Strategy],
    gamma: float = 1.0,
    *,
    num_experts: int = 8,
    ax: matplotlib.axes.Axes | None = None,
) -> matplotlib.axes.Axes:
    """Phi of one expert over its utilization u, while the others share the rest alike: top-1 routing of E experts.

    The dotted lines cross where all experts have the same load, 1/E, and every strategy is 1.

    Args:
      strategies: callables `(utilization [..., E], gamma) -> excitation [..., E]`.
      gamma: the intensity.
      num_experts: E, at least 2.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if there are too few experts, or a strategy is random and so has no curve.

    Example:
      >>> import excitation_optax
      >>> from excitation_optax import plotting
      >>> ax = plotting.strategy_curves([excitation_optax.zero_sum, excitation_optax.positive_sum], num_experts=4)
      >>> float(ax.lines[0].get_ydata()[-1])  # all tokens to one of four experts
      4.0
    """
    if num_experts < 2:
        raise ValueError(f"strategy_curves: num_experts must be at least 2; got {num_experts}.")
    share = np.linspace(0, 1, 201, dtype=np.float32)
    others = np.repeat(((1 - share) / (num_experts - 1))[:, None], num_experts - 1, axis=1)
    u = np.concatenate([share[:, None], others], axis=1)  # [points, E]
    ax = _axes(ax)
    looks = itertools.cycle(zip(COLOURS, DASHES, strict=True))
    for strategy, (colour, dashes) in zip(strategies, looks, strict=False):
        name = _strategies.name(strategy)
        if _strategies.is_random(strategy):
            raise ValueError(f"strategy_curves: {name} is random, and so no function of an expert's utilization.")
        phi = np.asarray(strategy(u, gamma))[:, 0]
        ax.plot(share, phi, color=colour, linestyle=dashes, label=name)
    ax.axhline(1, color="0.6", linewidth=0.6, linestyle=":", zorder=0)
    ax.axvline(1 / num_experts, color="0.6", linewidth=0.6, linestyle=":", zorder=0)
    ax.set(xlabel=r"utilization $u$ of one expert", ylabel=r"excitation $\Phi(u, \gamma)$", xlim=(0, 1))
    ax.legend()
    return ax


def to_image(function: Callable[..., matplotlib.axes.Axes], *args: Any, height: float = 2.2) -> np.ndarray:
    """A figure as pixels, for loggers of images: drawn under `STYLE`, without pyplot, which would keep it.

    Args:
      function: of this module.
      *args: what it is to draw.
      height: in inches, of 200 pixels; the width is that of `STYLE`.

    Returns:
      `[pixels, pixels, 3]` bytes, rows first.

    Example:
      >>> import numpy as np
      >>> from excitation_optax import plotting
      >>> plotting.to_image(plotting.load_heat_map, np.ones((2, 4))).shape
      (440, 660, 3)
    """
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((STYLE["figure.figsize"][0], height), layout="constrained")
        canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        function(*args, ax=figure.subplots())
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def _axes(ax: matplotlib.axes.Axes | None) -> matplotlib.axes.Axes:
    if ax is None:
        from matplotlib import pyplot  # late, as it chooses a backend

        return pyplot.subplots(layout="constrained")[1]
    return ax


def _masked(x: Any) -> np.ma.MaskedArray:
    """An array whose mask is as it was: a NaN is not masked."""
    return np.ma.array(np.ma.getdata(x), dtype=float, mask=np.ma.getmaskarray(x))


def _history(function: Callable[..., Any], steps: Any, load: Any) -> tuple[np.ndarray, np.ma.MaskedArray, bool]:
    """Steps `[T]`, load `[T, L, E]`, and whether it came without layers."""
    steps, load = np.asarray(steps, float), _masked(load)
    one_layer = load.ndim == 2
    load = load[:, None] if one_layer else load
    if load.ndim != 3 or steps.shape != load.shape[:1] or not len(steps) or np.any(np.diff(steps) <= 0):
        raise ValueError(
            f"{function.__name__}: steps must be [T], rising, and load [T, L, E] or [T, E]; got steps of shape "
            f"{list(steps.shape)} and load {list(load.shape)}."
        )
    return steps, load, one_layer


def _ranked(load: np.ma.MaskedArray, limit: int) -> tuple[np.ma.MaskedArray, np.ndarray]:
    """Load over the mean, and the experts' numbers; of more than `limit` experts, as many ranks from busiest to idlest.

    Means over neighbours would be near 1 whatever the experts do; ranks keep the extremes.
    """
    ratio, size = _over_mean(load), load.shape[1]
    if size <= limit:
        return ratio, np.arange(size)
    ranks = np.linspace(0, size - 1, limit).round().astype(int)
    # From the end: what is not finite, then by load, and at last what is masked.
    cells = np.sort(np.where(np.ma.getmaskarray(ratio), -np.inf, ratio.data), axis=1)[:, ::-1][:, ranks]
    return np.ma.array(cells, mask=np.isneginf(cells)), ranks


def _over_mean(load: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """Load over the mean of the layer, the last axis; 0 in a layer without any; by hand, as np.ma would mask a NaN."""
    present = ~np.ma.getmaskarray(load)
    values = np.where(present, load.data, 0)
    mean = np.sum(values, axis=-1, keepdims=True) / np.sum(present, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity over infinity is not finite, and is drawn so
        ratio = values / np.where(mean == 0, 1, mean)
    return np.ma.array(ratio, mask=~present)


def _draw_cells(ax: matplotlib.axes.Axes, x: np.ndarray, y: np.ndarray, ratio: np.ma.MaskedArray) -> None:
    """A heat map of loads over the mean, with its colour bar; `x` and `y` are the cells' edges."""
    present = ~np.ma.getmaskarray(ratio)
    positive = ratio.data > 0
    logs = np.clip(np.log2(np.where(positive, ratio.data, 1)), -LIMIT, LIMIT)
    finite = present & np.isfinite(ratio.data)
    colours = matplotlib.colormaps["coolwarm"].with_extremes(under="black", bad=(0, 0, 0, 0))
    # The edges have the colours of their cells, since viewers of vector graphics show a gap where two cells meet.
    mesh = ax.pcolormesh(
        x,
        y,
        np.ma.array(np.where(positive, logs, DEAD), mask=~finite),
        cmap=colours,
        norm=matplotlib.colors.Normalize(-LIMIT, LIMIT),
        edgecolors="face",
        linewidth=0.1,
    )
    rows, columns = np.nonzero(present & ~finite)
    if len(rows):
        ax.plot((x[columns] + x[columns + 1]) / 2, (y[rows] + y[rows + 1]) / 2, "x", color=COLOURS[1], markersize=3)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(mesh, ax=ax, extend="min", label="load / mean (black: 0)")
    powers = range(-LIMIT, LIMIT + 1)
    bar.set_ticks(list(powers), labels=[f"1/{2**-n}" if n < 0 else str(2**n) for n in powers])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Half-way between the centres, and as far beyond the first and the last."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]])


def _expert_label(drawn: np.ndarray, size: int) -> str:
    return "expert" if len(drawn) == size else f"rank by load, of {size:,} experts"


def _in_thousands(ax: matplotlib.axes.Axes) -> None:
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True, min_n_ticks=1))
