"""What Excitation will do to a parameter tree, before it does it. E is the number of experts."""

import dataclasses
import math
from typing import Any

import numpy as np

from excitation_optax import _experts, _paths


@dataclasses.dataclass(frozen=True)
class DescribedParameter:
    """One parameter and how it is scaled."""

    path: str  # its names, joined by "/"
    shape: tuple[int, ...] | None  # None if it is never scaled: an `optax.MaskedNode`, integers, functions
    scaled_by: str | None = None  # the pattern of its utilization entry
    axes: tuple[int | tuple[int, ...], ...] = ()  # as in `expert_axis`, counted from the front
    expert: int | None = None  # for separate modules, the expert that owns it

    def _row(self) -> tuple[str, ...]:
        along = [] if self.expert is None else [f"all of it, as expert {self.expert}"]
        for axes in self.axes:
            size = math.prod((self.shape or ())[axis] for axis in np.atleast_1d(axes))
            along.append(f"{'axes' if isinstance(axes, tuple) else 'axis'} {axes} ({size})")
        return self.path, "-" if self.shape is None else str(list(self.shape)), self.scaled_by or "-", ", ".join(along)


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns; it prints as a table.

    Attributes:
      parameters: for each parameter, in the order of `jax.tree.leaves`, its `path`, `shape`, `scaled_by` (the pattern),
        `axes` (as in `expert_axis`) and, for separate modules, `expert`.
      nodes: from each pattern to the nodes that it matches, which are one layer.
      doubtful: the parameters whose shapes would also fit another way, if `expert_axis` says nothing about them.
    """

    parameters: tuple[DescribedParameter, ...]
    nodes: dict[str, tuple[str, ...]]
    doubtful: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("parameter", "shape", "scaled by", "along"), *(p._row() for p in self.parameters)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for pattern, nodes in self.nodes.items():
            if nodes not in ((), (pattern,)):
                lines.append(f"{pattern} is one entry: {_experts.shorten(nodes)}")
        sizes = [0 if p.shape is None else math.prod(p.shape) for p in self.parameters]
        scaled = [size for p, size in zip(self.parameters, sizes, strict=True) if p.scaled_by is not None]
        lines.append(
            f"{len(scaled)} of {len(sizes)} parameter leaves are scaled: {sum(scaled):,} of {sum(sizes):,} parameters."
        )
        if self.doubtful:
            lines.append(
                f"Is this meant? {_experts.shorten(self.doubtful)}: by their shapes, these could also be routers, or "
                "have experts along another axis. If so, make the path narrower, or set expert_axis."
            )
        return "\n".join(lines)

    __repr__ = __str__


def describe(params: Any, utilization: Any, expert_axis: Any = None) -> Description:
    """Returns a table of which parameters will be scaled, by which utilization and along which axes.

    It asks about arrays that would also fit another way: `[E, E]`, or a bias `[E]`. It raises what an update would.

    Args:
      params: the parameter tree that the optimizer is initialized with, or its shapes (`jax.eval_shape`).
      utilization: as `scale_by_excitation` takes it, or its shapes.
      expert_axis: as `scale_by_excitation` takes it.

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
    specified = _experts.specs_by_leaf(tree, expert_axis)
    scaled = {leaf: (pattern, place) for pattern in layers for leaf, place in layers[pattern].items()}
    parameters, doubtful = [], []
    for leaf, (node, value) in enumerate(zip(tree.nodes, tree.leaves, strict=True)):
        if leaf in scaled:
            shape, (pattern, (axes, expert)) = np.shape(value), scaled[leaf]
            shown = tuple(_experts.show_axes(axes))
            parameters.append(DescribedParameter(str(node), shape, pattern or _paths.ROOT, shown, expert))
            # A vector per layer is like a router's bias, and of two axes with E entries either could be the experts'.
            is_doubtful = len(shape) == len(axes) or shape.count(shape[len(axes) - 1]) > 1
            if is_doubtful and expert is None and specified.get(leaf) is None:
                doubtful.append(f"{node} {list(shape)}")
        elif value is not None:
            shape = np.shape(value) if _paths.is_parameter(value) else None
            parameters.append(DescribedParameter(str(node), shape))
    nodes = {name: tuple(str(match.node) for match in tree.find(name) if match.is_whole) for name in layers}
    return Description(tuple(parameters), nodes, tuple(doubtful))
