"""Which parameters are experts, and along which axes: utilization entries matched to the arrays of a tree.

Nothing is guessed from shapes or names. Axis letters: E experts, L layers.
"""

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from excitation_optax import _arrays, _paths, _routing

# For each axis of the utilization, the experts' last: the axes of the array that it is spread over.
Axes = tuple[tuple[int, ...], ...]

_REMEDY = (
    "Count as many experts as there are; let the path end where there are experts only; or set expert_axis (-1 for the "
    "neurons of a Dense kernel, (1, 0) for [E, L, ...]). Separate modules are addressed by 'expert_{expert}', a list "
    "by '{expert}'."
)


class Placement(NamedTuple):
    """Where the axes of the utilization lie in one array."""

    axes: Axes  # of the layers only if one expert owns the whole array
    expert: int | None = None  # that owns it


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
        _routing.check_utilization(f"Utilization at {pattern or _paths.ROOT}", leaf)
    return entries


def match_experts(tree: _paths.Tree, entries: Mapping[str, Any], expert_axis: Any) -> dict[str, dict[int, Placement]]:
    """For each entry, the positions of its arrays in the tree's leaves, and where the utilization lies in them."""
    cover = _cover(tree, entries, "utilization")
    spec_of = specs_by_leaf(tree, expert_axis)
    layers = {}
    for pattern, entry in entries.items():
        shape = _routing.check_shape(pattern, entry)
        position = _number_experts(pattern, cover[pattern], shape)
        whole = [match for match in cover[pattern] if match.is_whole]
        _check_one_layer(pattern, whole)
        layers[pattern] = {
            leaf: _place(tree, leaf, pattern, shape, spec_of.get(leaf), position.get(match.digits))
            for match in whole
            for leaf in tree.parameters_of(match.node)
        }
    return layers


def specs(expert_axis: Any) -> dict[str, Axes | None]:
    """The specs of an `expert_axis` by their patterns, each with a tuple for each axis of the utilization."""
    given = dict(expert_axis) if isinstance(expert_axis, Mapping) else {"": expert_axis}
    joined = _paths.join(given, is_leaf=lambda x: not isinstance(x, Mapping))
    return {path: None if spec is None else _normalized(path, spec) for path, spec in joined.items()}


def _normalized(path: str, spec: Any) -> Axes:
    groups = [g if isinstance(g, tuple) else (g,) for g in (spec if isinstance(spec, tuple) else (spec,))]
    axes = [axis for group in groups for axis in group]
    if not all(groups) or not all(isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in axes):
        raise ValueError(
            f"expert_axis{' at ' if path else ''}{path} must be an int, a tuple with an element for each axis of the "
            f"utilization, experts last, or a mapping from path patterns to these; got {_arrays.show_value(spec)}. "
            "(Under optax.inject_hyperparams, name expert_axis in static_args.)"
        )
    return tuple(tuple(map(int, group)) for group in groups)


def specs_by_leaf(tree: _paths.Tree, expert_axis: Any) -> dict[int, Axes | None]:
    """The spec of each leaf that a pattern of `expert_axis` covers."""
    spec_of = specs(expert_axis(tree.treedef.unflatten(tree.leaves)) if callable(expert_axis) else expert_axis)
    cover = _cover(tree, spec_of, "expert_axis")
    return {leaf: spec_of[name] for name in cover for match in cover[name] for leaf in tree.parameters_of(match.node)}


def _cover(tree: _paths.Tree, patterns: Iterable[str], what: str) -> dict[str, list[_paths.Match]]:
    """The matches of each pattern, which must find a parameter, or one that a mask hides, and share none."""
    owner: dict[int, str] = {}
    cover = {pattern: tree.find(pattern) for pattern in patterns}
    for pattern, matches in cover.items():
        below = [tree.leaves[leaf] for match in matches for leaf in match.node.leaves]
        parameters = [leaf for match in matches for leaf in tree.parameters_of(match.node)]
        if not parameters and not any(isinstance(leaf, optax.MaskedNode) for leaf in below):
            found = "no parameter" + (" (only None, integers, keys or functions)" if below else "")
            raise ValueError(
                f"The {what} path {pattern or _paths.ROOT} matches {found}. {tree.nearest(pattern)} Paths start at the "
                "root of the tree that tx.update is given; `**` is any number of names. describe() shows what matches."
            )
        for leaf in parameters:
            if owner.setdefault(leaf, pattern) != pattern:
                raise ValueError(
                    f"The {what} paths {owner[leaf] or _paths.ROOT} and {pattern or _paths.ROOT} both cover "
                    f"{tree.nodes[leaf]}: every parameter must be covered once. Make one of them narrower."
                )
    return cover


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


def _number_experts(pattern: str, matches: list[_paths.Match], shape: tuple[int, ...]) -> dict[str | None, int]:
    """From the digits in the names of experts to their positions on the axis of experts."""
    written = sorted(sorted({match.digits for match in matches if match.digits is not None}), key=int)
    for first, second in itertools.pairwise(written):
        if int(first) == int(second):
            raise ValueError(f"{pattern} has the same number written as {first} and {second}: which expert is meant?")
    if written and len(written) != shape[-1]:
        raise ValueError(
            f"The utilization path {pattern} finds {len(written)} experts, with the numbers "
            f"{shorten([str(int(text)) for text in written])}; its utilization {list(shape)} has E = {shape[-1]}. "
            "Correct the path, or count as many experts as there are."
        )
    return {text: position for position, text in enumerate(written)}


def _place(tree: _paths.Tree, leaf: int, pattern: str, shape: Any, spec: Any, expert: int | None) -> Placement:
    """Where the axes of a utilization of this shape lie in one array."""
    sizes = list(shape if expert is None else shape[:-1])
    array = np.shape(tree.leaves[leaf])
    axes = tuple((axis,) for axis in range(len(sizes))) if spec is None else spec
    flat = [axis for group in axes for axis in group]
    remedy = _REMEDY if pattern else f"Name the experts: utilization={{'path/of/experts': counts}}. {_REMEDY}"
    if len(axes) != len(sizes):
        problem = f"expert_axis needs one element for each axis of the utilization, {len(sizes)}; it has {len(axes)}."
        if expert is not None:
            problem += " With {expert} in the path, it names the layers' axes only."
    elif any(not -len(array) <= axis < len(array) for axis in flat):
        problem = f"an axis is out of range. {remedy}"
    elif len({axis % len(array) for axis in flat}) != len(flat):
        problem = "expert_axis names one axis twice."
    elif (found := [math.prod(array[axis] for axis in group) for group in axes]) != sizes:
        problem = f"these have {found} entries, not {sizes}. {remedy}"
    else:
        return Placement(tuple(tuple(axis % len(array) for axis in group) for group in axes), expert)
    raise ValueError(
        f"The parameter {tree.nodes[leaf]} {list(array)} cannot be scaled by the utilization at "
        f"{pattern or _paths.ROOT}, whose axes {sizes} run along the parameter's axes {show_axes(axes)}: {problem}"
    )


def shorten(items: Sequence[str]) -> str:
    """A list of items as it is printed, without most of a long one."""
    return ", ".join(items if len(items) < 8 else [*items[:4], "...", items[-1]])


def show_axes(axes: Axes) -> list[int | tuple[int, ...]]:
    """A spec as a user writes it."""
    return [group[0] if len(group) == 1 else group for group in axes]
