"""Which parameters are experts, and along which axes: utilization entries matched to the arrays of a tree.

Nothing is guessed from shapes or names: a pattern says which nodes hold experts, and `expert_axis` along which axes.

Axis letters: E experts, L layers.
"""

import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from excitation_optax import _arrays, _paths, _routing, _scaling

Shape = tuple[int, ...]
Axes = tuple[tuple[int, ...], ...]  # for each axis of the utilization, the axes of the array that it is spread over


class Layer(NamedTuple):
    """The arrays that one utilization entry covers."""

    leaves: tuple[int, ...]  # their positions in the tree's leaves
    placements: tuple[_scaling.Placement, ...]
    nodes: tuple[str, ...]  # that its pattern matches


def entries_of(utilization: Any, other_arguments: Iterable[str] = ()) -> dict[str, Any]:
    """The entries of a utilization by their patterns: arrays `[..., E]`, `RoutingCounts`, or the shapes of such."""
    entries = _paths.join(utilization, _routing.is_counts)
    if not entries:
        raise ValueError(
            f"Excitation needs the utilization of at least one layer; got {utilization!r}. Pass it at every update: "
            "tx.update(grads, state, params, utilization={'path/of/experts': counts}), or, in Flax NNX, "
            "optimizer.update(model, grads, utilization=...). If you did, it was dropped on the way: by Flax's own "
            "TrainState.apply_gradients (use excitation_optax.flax.TrainState), or by a wrapper, which must forward "
            "extra arguments. If your trainer calls tx.update itself, use hold_utilization. "
            f"Extra arguments received: {', '.join(other_arguments) or 'none'}."
        )
    for pattern, leaf in entries.items():
        _routing.check_utilization(pattern or _paths.ROOT, leaf)
    return entries


def utilization_shape(leaf: Any) -> Shape:
    """`[..., E]` of an entry."""
    return np.shape(leaf.counts if isinstance(leaf, _routing.RoutingCounts) else leaf)


def is_parameter(x: Any) -> bool:
    """Whether it can be scaled: floating-point arrays, their shapes, and floats; not integers, keys or functions."""
    return isinstance(x, float | complex) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def match_experts(tree: _paths.Tree, entries: Mapping[str, Any], expert_axis: Any) -> dict[str, Layer]:
    """Finds the arrays of each entry, and where the axes of its utilization lie in them.

    Args:
      tree: the parameters, their updates, or their shapes.
      entries: from each pattern to its utilization, or its shape.
      expert_axis: as `scale_by_excitation` takes it.

    Returns:
      A layer for each entry.

    Raises:
      ValueError: if a pattern or an axis does not fit, with the path, the shapes received, and what to do.
    """
    spec_of = specs_by_leaf(tree, expert_axis)
    owner: dict[int, str] = {}  # leaf to pattern
    layers = {}
    for pattern, utilization in entries.items():
        shape = utilization_shape(utilization)
        matches = _find(tree, pattern, "utilization")
        experts = _number_experts(pattern, matches, shape) if _paths.EXPERT in pattern else {}
        matches = [match for match in matches if match.is_whole]
        _check_one_layer(pattern, matches)
        leaves, placements = [], []
        for match in matches:
            expert = experts.get(int(match.digits)) if match.digits is not None else None
            for leaf in tree.leaves_below(match.node):
                if is_parameter(tree.leaves[leaf]):
                    _claim(leaf, pattern, owner, tree, "utilization")
                    leaves.append(leaf)
                    placements.append(_place(tree, leaf, pattern, shape, spec_of.get(leaf), expert))
        layers[pattern] = Layer(tuple(leaves), tuple(placements), tuple(str(match.node) for match in matches))
    return layers


def check_spec(expert_axis: Any) -> None:
    """Raises ValueError for an `expert_axis` that is malformed whatever the parameters are."""
    if not callable(expert_axis):
        _specs(expert_axis)


def _specs(expert_axis: Any) -> dict[str, Axes | None]:
    """The specs of an `expert_axis` by their patterns, in one form."""
    if not isinstance(expert_axis, Mapping):
        return {"": _normalized("expert_axis", expert_axis)}
    specs = {}
    for path, spec in _paths.join(dict(expert_axis), is_leaf=lambda x: not isinstance(x, Mapping)).items():
        specs[path] = _normalized(f"expert_axis at {path or _paths.ROOT}", spec)
    return specs


def _normalized(what: str, spec: Any) -> Axes | None:
    """A spec with a tuple for each axis of the utilization."""

    def is_int(x):
        return isinstance(x, numbers.Integral) and not isinstance(x, bool)

    if spec is None:
        return None
    elements = spec if isinstance(spec, tuple) else (spec,)
    groups = [element if isinstance(element, tuple) else (element,) for element in elements]
    if not all(group and all(map(is_int, group)) for group in groups):
        raise ValueError(
            f"{what} must be an int, a tuple with an element for each axis of the utilization, experts last, or a "
            f"mapping from path patterns to these; got {_arrays.show_value(spec)}. (Under optax.inject_hyperparams, "
            "name expert_axis in static_args.)"
        )
    return tuple(tuple(int(axis) for axis in group) for group in groups)


def specs_by_leaf(tree: _paths.Tree, expert_axis: Any) -> dict[int, Axes]:
    """The spec of each leaf that has one."""
    specs = _specs(expert_axis(tree.treedef.unflatten(tree.leaves)) if callable(expert_axis) else expert_axis)
    if list(specs) == [""]:
        return {} if specs[""] is None else dict.fromkeys(range(len(tree.leaves)), specs[""])
    owner: dict[int, str] = {}
    spec_of: dict[int, Axes] = {}
    for pattern, spec in specs.items():
        for match in _find(tree, pattern, "expert_axis"):
            for leaf in tree.leaves_below(match.node):
                _claim(leaf, pattern, owner, tree, "expert_axis")
                if spec is not None:
                    spec_of[leaf] = spec
    return spec_of


def _find(tree: _paths.Tree, pattern: str, what: str) -> list[_paths.Match]:
    """The matches of a pattern; that there is no parameter among them is an error, unless they are masked."""
    matches = tree.find(pattern)
    whole = [leaf for match in matches if match.is_whole for leaf in tree.leaves_below(match.node)]
    if not any(match.node.is_masked for match in matches) and not any(
        _paths.is_masked(tree.leaves[leaf]) or is_parameter(tree.leaves[leaf]) for leaf in whole
    ):
        found = "no parameter" + (" (only None, integers, keys or functions)" if whole else "")
        raise ValueError(
            f"The {what} path {pattern or _paths.ROOT} matches {found}. {tree.nearest(pattern)} Paths start at the "
            "root of the tree that tx.update is given; `**` is any number of names. describe() shows what matches."
        )
    return matches


def _claim(leaf: int, pattern: str, owner: dict[int, str], tree: _paths.Tree, what: str) -> None:
    """Notes that a pattern covers a leaf, which no other may."""
    if leaf in owner:
        raise ValueError(
            f"The {what} paths {owner[leaf] or _paths.ROOT} and {pattern or _paths.ROOT} both cover "
            f"{tree.nodes[leaf]}: every parameter must be covered once. Make one of them narrower."
        )
    owner[leaf] = pattern


def _check_one_layer(pattern: str, matches: list[_paths.Match]) -> None:
    """Raises ValueError if a wildcard stands for different names, other than the last, in the nodes of an entry."""
    first: dict[tuple[int, int], tuple[str, _paths.Node]] = {}
    for match in matches:
        for i, groups in enumerate(match.wildcards[:-1]):
            for j, text in enumerate(groups):
                if text is not None and text != first.setdefault((i, j), (text, match.node))[0]:
                    raise ValueError(
                        f"The utilization path {pattern} matches {first[i, j][1]} and {match.node}, which are "
                        "different layers. Each layer needs counts of its own: write one entry for each. (If they are "
                        "one layer, name them in braces, {a,b}; if they are experts, write {expert} for the number.)"
                    )


def _number_experts(pattern: str, matches: list[_paths.Match], shape: Shape) -> dict[int, int]:
    """From the numbers in the names of experts to their positions on the axis of experts."""
    written: dict[int, set[str]] = {}
    for match in matches:
        if match.digits is not None:
            written.setdefault(int(match.digits), set()).add(match.digits)
    for digits in written.values():
        if len(digits) > 1:
            raise ValueError(
                f"The utilization path {pattern} matches the same number written as {' and '.join(sorted(digits))}: "
                "which expert is meant?"
            )
    if written and len(written) != shape[-1]:
        found = shorten([str(number) for number in sorted(written)])
        raise ValueError(
            f"The utilization path {pattern} finds {len(written)} experts, with the numbers {found}; its utilization "
            f"{list(shape)} has E = {shape[-1]}. Correct the path, or count as many experts as there are."
        )
    return {number: position for position, number in enumerate(sorted(written))}


def _place(
    tree: _paths.Tree, leaf: int, pattern: str, shape: Shape, spec: Axes | None, expert: int | None
) -> _scaling.Placement:
    """Where the axes of a utilization of this shape lie in one array."""
    sizes = shape if expert is None else shape[:-1]
    array = np.shape(tree.leaves[leaf])
    axes = tuple((axis,) for axis in range(len(sizes))) if spec is None else spec
    problem = (
        f"The parameter {tree.nodes[leaf]} {list(array)} cannot be scaled by the utilization at "
        f"{pattern or _paths.ROOT}, whose axes {list(sizes)} run along its axes {show_axes(axes)}:"
    )
    if len(axes) != len(sizes):
        layers_only = "" if expert is None else " With {expert} in the path, it names the layers' axes only."
        raise ValueError(
            f"{problem} expert_axis must have one element for each axis of the utilization, {len(sizes)}, experts "
            f"last; it has {len(axes)}.{layers_only}"
        )
    flat = list(itertools.chain.from_iterable(axes))
    if any(not -len(array) <= axis < len(array) for axis in flat):
        raise ValueError(
            f"{problem} an axis is out of range. Set expert_axis for this parameter, or let the path end where there "
            "are experts only. Separate modules are addressed by 'expert_{expert}'."
        )
    placed = tuple(tuple(axis % len(array) for axis in group) for group in axes)
    flat = list(itertools.chain.from_iterable(placed))
    if len(set(flat)) != len(flat):
        raise ValueError(f"{problem} expert_axis names one axis twice.")
    found = [int(np.prod([array[axis] for axis in group])) for group in placed]
    if found != list(sizes):
        raise ValueError(
            f"{problem} these have {found} entries, not {list(sizes)}. Count as many experts as there are; let the "
            "path end where there are experts only; or set expert_axis (-1 for the neurons of a Dense kernel, "
            "(1, 0) for [E, L, ...]). Separate modules are addressed by 'expert_{expert}', a list by '{expert}'."
        )
    return _scaling.Placement(placed, expert)


def shorten(items: Sequence[str]) -> str:
    """A list of items as it is printed, without most of a long one."""
    return ", ".join(items if len(items) < 8 else [*items[:4], "...", items[-1]])


def show_axes(axes: Axes) -> list[int | tuple[int, ...]]:
    """A spec as a user writes it."""
    return [group[0] if len(group) == 1 else group for group in axes]
