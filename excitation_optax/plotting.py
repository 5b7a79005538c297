"""Draws routing at the width of a paper's column, in colors that color-blind readers can tell apart.

A function draws into the Axes `ax` if you pass one, otherwise into a new figure that pyplot does not know. A malformed
argument is a `ValueError`. Axis letters: E experts, L layers, T steps. Draw and save in the style:

    with matplotlib.rc_context(plotting.STYLE):
        plotting.load_heat_map(utilization).figure.savefig("load.svg")
"""

import contextlib
import reprlib
from typing import Any

import jax
import numpy as np

from excitation_optax import _arrays, _routing, telemetry

__all__ = ["COLORS", "STYLE", "load_heat_map", "load_over_time"]

# The width of a paper's column, in inches. Text in PDF and SVG stays text, which can be searched and edited.
STYLE = {"figure.figsize": (3.3, 2.2), "figure.dpi": 200, "pdf.fonttype": 42, "svg.fonttype": "none"}
STYLE |= {"font.size": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False}
STYLE |= {"axes.linewidth": 0.6, "axes.spines.right": False, "axes.spines.top": False, "lines.linewidth": 1.2}
# Okabe and Ito's palette: one color for each strategy, and for each component of scale_by_excitation, in every figure.
COLORS = {"baseline": "#666666", "zero_sum": "#0072B2", "positive_sum": "#D55E00", "exp_diff": "#009E73"}
COLORS |= {"global_exp": "#E69F00", "random_boost": "#56B4E9", "inverted": "#CC79A7"}
COLORS |= {"both": "#0072B2", "direction": "#009E73", "norm": "#E69F00"}


def load_heat_map(load: Any, *, ax: Any = None) -> Any:
    """Draws the load of every expert over the mean load of its layer, one row per layer, and returns the Axes.

    Gray is the mean, red is more and blue is less, in powers of two; black is no token, and yellow is not finite. With
    more than 512 experts, a layer shows evenly spaced ranks, from its busiest expert to its idlest.

    Args:
      load: `[L, E]` or `[E]`, as lists or an array, masked if layers differ in E; or a tree as for `RoutingLog.write`.
      ax: the Axes to draw into, or None.

    Example:
      >>> ax = plotting.load_heat_map({"layer_0": np.array([0.25, 0.5, 0.25, 0.0]), "layer_1": np.full(4, 0.25)})
      >>> ax.collections[0].get_array().data  # log2 of the load over the mean; -3 is no token
      array([[ 0.,  1.,  0., -3.],
             [ 0.,  0.,  0.,  0.]])
    """
    load = _layers(load)
    ratio = _over_mean(load, limit=512)
    ax = _draw_cells(ax, np.arange(ratio.shape[1]), ratio)
    ax.set(xlabel="expert" if ratio.shape == load.shape else f"rank by load, of {load.shape[1]:,}", ylabel="layer")
    ax.locator_params(integer=True, nbins=8, min_n_ticks=1)
    return ax


def load_over_time(steps: Any, load: Any, *, ax: Any = None) -> Any:
    """Draws the load of every expert over the mean load of its layer, one column per step, and returns the Axes.

    Colors are those of `load_heat_map`. If there are more than 256 experts in all, a layer shows evenly spaced ranks.

    Args:
      steps: `[T]`, rising.
      load: `[T, L, E]`, such as `RoutingLog.load`, `[T, E]` for one layer, or a list of T loads for `load_heat_map`.
      ax: the Axes to draw into, or None.

    Example:
      >>> load = np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])  # [T, L, E]
      >>> ax = plotting.load_over_time([100, 200], load)
      >>> ax.collections[0].get_array().data.round(2)  # a row for each expert, layer by layer
      array([[ 0.  , -1.  ],
             [ 0.  ,  0.58],
             [ 1.  ,  1.  ],
             [-3.  , -3.  ]])
    """
    steps, frames = np.asarray(steps, float), [_layers(frame) for frame in load]
    shapes = {frame.shape for frame in frames}
    if steps.shape != (len(frames),) or len(shapes) != 1 or not np.all(np.diff(steps) > 0):
        raise ValueError(
            "load_over_time: steps must be [T], rising, and load [T, L, E], [T, E] or T loads of one shape; got steps "
            f"{reprlib.repr(steps.tolist())} and {len(frames)} loads of shapes {reprlib.repr(shapes)}."
        )
    load = np.ma.stack(frames)
    present = ~np.ma.getmaskarray(load[0])  # [L, E]
    sizes = np.sum(present, axis=-1)
    limit = max(2, 256 // len(sizes)) if sizes.sum() > 256 else max(sizes)
    blocks = [_over_mean(load[:, layer, there], limit) for layer, there in enumerate(present)]
    ends = np.cumsum([0, *(block.shape[1] for block in blocks)])
    ax = _draw_cells(ax, steps, np.ma.concatenate(blocks, axis=1).T)
    ax.hlines(ends[1:-1] - 0.5, *ax.get_xlim(), color="white", linewidth=14 / (len(blocks) + 4))
    shown = range(0, len(blocks), -(-len(blocks) // 12))
    ax.set_yticks([(ends[n] + ends[n + 1] - 1) / 2 for n in shown], list(map(str, shown)))
    ax.locator_params(axis="x", integer=True, nbins=5, min_n_ticks=1)
    ax.set(xlabel="step", ylabel="layer (rows: experts" + (", by load)" if max(sizes) > limit else ")"))
    return ax


def _layers(load: Any) -> np.ma.MaskedArray:
    """A load in any form as `[L, E]`."""
    with contextlib.suppress(TypeError, ValueError):
        leaves = jax.tree.leaves(load, is_leaf=_routing.is_counts)
        numbers = not any(_routing.is_counts(leaf) or np.ndim(leaf) for leaf in leaves)  # in nested lists
        leaves, _, present = telemetry.flatten(np.ma.array(load, float) if numbers else load)
        leaves = [leaf.utilization if _routing.is_counts(leaf) else leaf for leaf in leaves]
        array = np.ma.masked_all(present.shape)
        array[present] = np.ma.concatenate([np.ma.asarray(leaf, float).ravel() for leaf in leaves])
        if getattr(load, "ndim", 1) <= 2:
            return array
    got = _arrays.show_value(load)
    raise ValueError(f"A load must be [L, E], [E], or a tree of RoutingCounts or arrays [..., E]; got {got}.")


def _over_mean(load: np.ma.MaskedArray, limit: int) -> np.ma.MaskedArray:
    """Load over the mean of the layer, 0 where that is 0. Of more experts, `limit` ranks; NaN is first."""
    mask = np.ma.getmaskarray(load)
    mean = np.sum(load.filled(0), axis=-1, keepdims=True) / np.sum(~mask, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity over infinity
        ratio = np.ma.array(load.filled(0) / np.where(mean == 0, 1, mean), mask=mask)  # np.ma would mask a NaN
    if ratio.shape[-1] <= limit:
        return ratio
    ranks = np.linspace(0, ratio.shape[-1] - 1, limit).round().astype(int)
    return np.ma.masked_equal(np.sort(ratio.filled(-1), axis=-1)[..., ::-1][..., ranks], -1)


def _draw_cells(ax: Any, x: np.ndarray, ratio: np.ma.MaskedArray) -> Any:
    """Draws a heat map with its color bar. Column n is drawn around x[n], up to half-way to the next."""
    import matplotlib.figure  # late, since it takes a second

    ax = ax or matplotlib.figure.Figure(layout="constrained").subplots()
    first, last = (x[1] - x[0], x[-1] - x[-2]) if len(x) > 1 else (1, 1)
    around = np.array([x[0] - first, *x, x[-1] + last])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.clip(np.log2(ratio.data), -2, 2)
    logs = np.where(ratio.data == 0, -3, np.where(np.isfinite(ratio.data), logs, 3))
    cmap = matplotlib.colormaps["coolwarm"].with_extremes(under="black", over="gold", bad=(0, 0, 0, 0))
    edges = (around[1:] + around[:-1]) / 2, np.arange(len(logs) + 1) - 0.5
    cells = np.ma.array(logs, mask=np.ma.getmaskarray(ratio))
    mesh = ax.pcolormesh(*edges, cells, cmap=cmap, vmin=-2, vmax=2, rasterized=True)  # vectors would show gaps
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    label = "load / mean (black: 0)" if np.all(logs < 3) else "load / mean (yellow: NaN)"
    bar = ax.figure.colorbar(mesh, ax=ax, extend="min", label=label)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    return ax
