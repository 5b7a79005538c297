"""What Excitation will do to a parameter tree, before it does it.

Axis letters: E experts, L layers.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from excitation_optax import _experts, _paths


@dataclasses.dataclass(frozen=True)
class DescribedParameter:
    """One parameter and how it is scaled.

    Attributes:
      path: its path, its names joined by "/".
      shape: its shape; None if it is never scaled: an `optax.MaskedNode`, integers, functions.
      scaled_by: the pattern of the utilization entry that scales it, or None if it is left untouched.
      axes: its axes that the axes of the utilization run along, the experts' last, counted from the front. A tuple
        stands for one axis that is spread over several.
      expert: the one expert that owns all of it, for separate modules; otherwise None.
    """

    path: str
    shape: tuple[int, ...] | None
    scaled_by: str | None = None
    axes: tuple[int | tuple[int, ...], ...] = ()
    expert: int | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns; it prints as a table.

    Attributes:
      parameters: for each parameter, in the order of `jax.tree.leaves`, its `path`, `shape`, `scaled_by` (the pattern),
        `axes` and `expert`.
      nodes: from each pattern to the nodes that it matches, which are one layer.
      doubtful: the parameters whose shapes would also fit another way, if `expert_axis` says nothing about them.
    """

    parameters: tuple[DescribedParameter, ...]
    nodes: dict[str, tuple[str, ...]]
    doubtful: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("parameter", "shape", "scaled by", "along"), *map(_row, self.parameters)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [
            f"{pattern} is one entry: {_experts.shorten(nodes)}"
            for pattern, nodes in self.nodes.items()
            if nodes and nodes != (pattern,)
        ]
        scaled = [p for p in self.parameters if p.scaled_by is not None]
        size, total = (
            sum(math.prod(p.shape) for p in group if p.shape is not None) for group in (scaled, self.parameters)
        )
        lines.append(
            f"{len(scaled)} of {len(self.parameters)} parameter leaves are scaled: {size:,} of {total:,} parameters."
        )
        if self.doubtful:
            lines.append(
                f"Is this meant? {_experts.shorten(self.doubtful)}: by their shapes, these could also be routers, or "
                "have experts along another axis. If so, make the path narrower, or set expert_axis."
            )
        return "\n".join(lines)

    __repr__ = __str__


def describe(params: Any, utilization: Any, expert_axis: Any = None) -> Description:
    """Shows which parameters will be scaled, by which utilization and along which axes, and which will not.

    It lists the nodes of each entry, which make up one layer, and asks about arrays whose shape would also fit another
    way, such as `[E, E]`, or a vector `[E]`, which may be a router's bias.

    Args:
      params: the parameter tree that the optimizer is initialized with, or its shapes (`jax.eval_shape`).
      utilization: as `scale_by_excitation` takes it, or its shapes.
      expert_axis: as `scale_by_excitation` takes it.

    Returns:
      A `Description`, which prints as a table.

    Raises:
      ValueError: as `scale_by_excitation` does at an update with these arguments.

    Example:
      >>> params = {"router": jnp.ones((2, 4)), "experts": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((4, 3))}}
      >>> excitation_optax.describe(params, {"experts": jnp.ones(4)})
      parameter       shape      scaled by  along
      experts/bias    [4, 3]     experts    axis 0 (4)
      experts/kernel  [4, 2, 3]  experts    axis 0 (4)
      router          [2, 4]     -
      2 of 3 parameter leaves are scaled: 36 of 44 parameters.
    """
    tree = _paths.Tree(params)
    layers = _experts.match_experts(tree, _experts.entries_of(utilization), expert_axis)
    said = _experts.specs_by_leaf(tree, expert_axis)
    placed = {
        leaf: (pattern, place)
        for pattern, layer in layers.items()
        for leaf, place in zip(layer.leaves, layer.placements, strict=True)
    }
    parameters, doubtful = [], []
    for leaf, (node, value) in enumerate(zip(tree.nodes, tree.leaves, strict=True)):
        if value is None:
            continue
        shape = np.shape(value) if _experts.is_parameter(value) else None
        if leaf not in placed:
            parameters.append(DescribedParameter(str(node), shape))
            continue
        pattern, place = placed[leaf]
        axes = tuple(_experts.show_axes(place.axes))
        parameters.append(DescribedParameter(str(node), shape, pattern or _paths.ROOT, axes, place.expert))
        if leaf not in said and place.expert is None and _fits_another_way(np.shape(value), len(axes)):
            doubtful.append(f"{node} {list(np.shape(value))}")
    return Description(tuple(parameters), {name: layer.nodes for name, layer in layers.items()}, tuple(doubtful))


def _fits_another_way(shape: tuple[int, ...], axes: int) -> bool:
    """Whether an array `[..., E, ...]` is a vector per layer, as a router's bias is, or has two axes of E entries."""
    return len(shape) == axes or shape.count(shape[axes - 1]) > 1


def _row(p: DescribedParameter) -> tuple[str, ...]:
    shape = "-" if p.shape is None else str(list(p.shape))
    along = [] if p.expert is None else [f"all of it, as expert {p.expert}"]
    for axes in p.axes:
        size = math.prod(np.take(p.shape or (), axes, axis=0).ravel().tolist())
        along.append(f"{'axes' if isinstance(axes, tuple) else 'axis'} {axes} ({size})")
    return p.path, shape, p.scaled_by or "-", ", ".join(along)
