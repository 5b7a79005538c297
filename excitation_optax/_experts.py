"""Which parameters are experts, and along which axis: utilization paths matched to parameter paths.

A *path* is a tuple of plain names: dictionary keys, attribute names and list positions as strings, so that a nested
dict addresses a dict, a list, a named tuple, an `nnx.State` or an Equinox module alike. A slash in a name separates two
names: Haiku's flat `{"moe/experts": ...}` is `{"moe": {"experts": ...}}`. Braces around names with commas between stand
for each of them: `{"moe": {"{up,down}": u}}` is one layer of two parameters. Nothing is guessed from shapes.

Axis letters: E experts, L layers.
"""

import dataclasses
import difflib
import fnmatch
import functools
import itertools
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from excitation_optax import _routing

Path = tuple[str, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class children:  # noqa: N801  (it reads as a function where it is used)
    """Experts that are separate children of a path, instead of entries of one array.

    As `expert_axis` it says: of the path where utilization `[E]` stands (or where this spec stands, if that is deeper),
    the children whose names match are the experts, in natural order (`expert_2` before `expert_10`), one entry of
    utilization each. With utilization `[L, E]`, the layers are the leading axes of every child's parameters.

    Attributes:
      pattern: a shell-style pattern over the names of the children: `"expert_*"`, or `"*"` for a list of experts. With
        slashes, over those of grandchildren: `"~/expert_*"`.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> params = {"moe": {"router": jnp.ones(2), "expert_0": jnp.ones(1), "expert_1": jnp.ones(1)}}
      >>> tx = excitation_optax.scale_by_excitation(expert_axis=excitation_optax.children("expert_*"))
      >>> updates, _ = tx.update(params, tx.init(params), utilization={"moe": jnp.array([0.75, 0.25])})
      >>> updates["moe"]["expert_0"], updates["moe"]["expert_1"], updates["moe"]["router"]
      (Array([1.5], dtype=float32), Array([1.], dtype=float32), Array([1., 1.], dtype=float32))
    """

    pattern: str

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(f"children takes one pattern, such as children('expert_*'); got {self.pattern!r}.")


Spec = int | tuple[int, ...] | children


class Match(NamedTuple):
    """How one parameter leaf is scaled: by which utilization leaf, whose axes run along which of its axes."""

    entry: Path
    axes: tuple[int, ...]
    child: int | None = None  # the one expert that the whole leaf belongs to; `axes` are then those of the layers


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """The leaves of a tree by their paths, in the order of `jax.tree.leaves`."""
    leaves: dict[Path, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        names = (jax.tree_util.keystr((key,), simple=True) for key in key_path)
        path = tuple(part for name in names for part in re.split(r"/(?![^{]*})", name))  # not at slashes within braces
        if path in leaves:
            raise ValueError(
                f"Two leaves have the same path {show(path)}: names must differ by more than their type, or where "
                "slashes stand."
            )
        leaves[path] = leaf
    return leaves


def nested(leaves: Mapping[tuple[Any, ...], Any]) -> Any:
    """The nested dict that has these leaves at these paths; of a single leaf at the root, the leaf."""
    if () in leaves:
        return leaves[()]
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def utilization_by_path(utilization: Any, other_arguments: Iterable[str] = ()) -> dict[Path, Any]:
    """The utilization leaves by their paths: arrays `[..., E]` and `RoutingCounts`, or the shapes of such."""
    entries = leaves_by_path(utilization, _routing.is_counts)
    if not entries:
        raise ValueError(
            f"Excitation needs the utilization of at least one layer; got {utilization!r}. Pass it at every update: "
            "tx.update(grads, state, params, utilization={'path': {'of': {'experts': counts}}}), or, in Flax NNX, "
            "optimizer.update(model, grads, utilization=...). If you did, a wrapper around this transformation dropped "
            f"it: it must forward extra arguments. Those that came: {', '.join(other_arguments) or 'none'}."
        )
    for path, leaf in entries.items():
        _check_utilization(path, leaf)
    return entries


def utilization_shape(leaf: Any) -> Shape:
    return np.shape(leaf.counts if isinstance(leaf, _routing.RoutingCounts) else leaf)


def _check_utilization(path: Path, leaf: Any) -> None:
    shape = utilization_shape(leaf)
    if not shape or shape[-1] == 0:
        raise ValueError(
            f"Utilization at {show(path)} must be an array of fractions [..., E] with an axis of experts; got "
            f"{show_value(leaf)}, of shape {list(shape)}. (A Python list is a node of the tree: make it an array. "
            "Experts that are separate children have one array [E] at their parent, and expert_axis=children(...).)"
        )
    if isinstance(leaf, _routing.RoutingCounts):
        if leaf.tokens is None or np.shape(leaf.tokens) != shape[:-1]:
            raise ValueError(
                f"RoutingCounts at {show(path)} have counts of shape {list(shape)} and tokens of shape "
                f"{list(np.shape(leaf.tokens))} ({show_value(leaf.tokens)}); tokens must be {list(shape[:-1])}, one "
                "number for each layer."
            )
    elif not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"Utilization at {show(path)} must be floating-point fractions in [0, 1]; got {leaf.dtype}{list(shape)}. "
            "Tokens per expert go into RoutingCounts(counts, tokens)."
        )


def specs_by_path(expert_axis: Any) -> dict[Path, Spec]:
    """The specs of an `expert_axis` that is not a callable, by the paths at which they stand."""

    def is_int(x):
        return isinstance(x, numbers.Integral) and not isinstance(x, bool)

    def is_spec(x):  # a tuple of ints is a spec; any other tuple is a node of the tree
        return type(x) is tuple and all(isinstance(axis, numbers.Integral) for axis in x)

    specs = leaves_by_path(expert_axis, is_spec)
    for path, spec in specs.items():
        if not (isinstance(spec, children) or all(map(is_int, spec if is_spec(spec) else (spec,)))):
            raise ValueError(
                f"expert_axis at {show(path)} must be an int, a tuple of ints or children(pattern); got "
                f"{show_value(spec)}. (Under optax.inject_hyperparams, name it in static_args.)"
            )
    return specs


def is_function(expert_axis: Any) -> bool:
    """Whether it is a callable of the updates; a module that holds specs may be callable too, but is a tree."""
    is_class = isinstance(expert_axis, type)
    return callable(expert_axis) and not is_class and jax.tree_util.all_leaves([expert_axis])


def match_experts(params: Any, entries: dict[Path, Any], expert_axis: Any) -> dict[Path, Match | None]:
    """Says of each parameter leaf how it is scaled, or None if it is left as it is.

    Args:
      params: the parameters, or their updates, or their shapes.
      entries: the leaves of the utilization, by path.
      expert_axis: as `scale_by_excitation` takes it.

    Returns:
      A dict from the path of each leaf, in the order of `jax.tree.leaves` with `optax.MaskedNode`s as leaves.

    Raises:
      ValueError: if a path or an axis does not fit, with the path, the shapes received, and what to do.
    """
    leaves = leaves_by_path(params, is_masked)
    specs = specs_by_path(expert_axis(params) if is_function(expert_axis) else expert_axis)
    entry_at = _without_braces("utilization", entries)
    spec_at = _without_braces("expert_axis", specs)
    _check_paths("utilization", entry_at, leaves)
    _check_paths("expert_axis", spec_at, leaves)

    @functools.cache
    def number_children(parent: Path, pattern: str, shape: Shape) -> dict[Path, int]:
        frozen_too = leaves_by_path(params, lambda x: x is None or is_masked(x))  # which keep their numbers
        return _number_children(parent, pattern, shape, frozen_too)

    def match(path: Path, leaf: Any) -> Match | None:
        entry_path = _covering(path, entry_at)
        if entry_path is None or not is_parameter(leaf):
            return None
        entry = entry_at[entry_path]
        shape = utilization_shape(entries[entry])
        spec_path = _covering(path, spec_at)
        spec = tuple(range(len(shape))) if spec_path is None else specs[spec_at[spec_path]]
        if not isinstance(spec, children):
            return Match(entry, _place(path, np.shape(leaf), entry, shape, spec))
        parent = entry_path if spec_path is None else max(entry_path, spec_path, key=len)
        below = len(parent) + 1 + spec.pattern.count("/")
        child = number_children(parent, spec.pattern, shape).get(path[:below])
        if child is None:
            return None
        layer_axes = tuple(range(len(shape) - 1))
        return Match(entry, _place(path, np.shape(leaf), entry, shape[:-1], layer_axes), child)

    return {path: match(path, leaf) for path, leaf in leaves.items()}


def is_masked(x: Any) -> bool:
    """`optax.masked` and `optax.partition` put this where a parameter is another transformation's."""
    return isinstance(x, optax.MaskedNode)


def is_parameter(x: Any) -> bool:
    """Floating-point arrays, their shapes, and numbers; not integers, keys, or the functions that some modules hold."""
    return isinstance(x, numbers.Number) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def _without_braces(what: str, paths: Iterable[Path]) -> dict[Path, Path]:
    """Every path that a path with braces stands for, itself where it has none, and where each came from."""
    found: dict[Path, Path] = {}
    for path in paths:
        alternatives = (name[1:-1].split(",") if name[:1] + name[-1:] == "{}" else (name,) for name in path)
        for names in itertools.product(*alternatives):
            one = tuple(part for name in names for part in name.split("/"))
            if one in found:
                raise ValueError(
                    f"The {what} paths {show(found[one])} and {show(path)} both cover {show(one)}: every parameter "
                    "must be covered once."
                )
            found[one] = path
    return found


def _covering(path: Path, prefixes: Iterable[Path]) -> Path | None:
    """The prefix of a path that is in `prefixes`, the shortest."""
    return next((path[:n] for n in range(len(path) + 1) if path[:n] in prefixes), None)


def _check_paths(what: str, paths: Iterable[Path], leaves: dict[Path, Any]) -> None:
    """That each is the path of some parameters, and none below another, as can be where names have slashes."""
    known = {path[:n] for path in leaves for n in range(len(path) + 1)}
    masked = {path for path, leaf in leaves.items() if is_masked(leaf)}
    for path in paths:
        if path and (above := _covering(path[:-1], paths)) is not None:
            raise ValueError(
                f"The {what} path {show(path)} is below another, {show(above)}: every parameter must be covered once. "
                "(A slash in a name separates two names.)"
            )
        if path not in known and _covering(path, masked) is None:
            raise ValueError(
                f"The {what} path {show(path)} matches no parameter. Nearest: {nearest(path, known)}. At the top "
                f"level are: {', '.join(sorted({p[0] for p in leaves if p})) or 'no names'}. Paths start at the root "
                "of the tree that is given to tx.update; describe() shows how they match. (A list is a node of a tree: "
                "axes go in a tuple.)"
            )


def nearest(path: Path, known: Iterable[Path]) -> str:
    """Paths that end as this one does, or with which it ends; then those of similar spelling."""

    def same_end(other):
        shorter = min(len(path), len(other))
        return shorter > 0 and path[-shorter:] == other[-shorter:]

    similar = difflib.get_close_matches(show(path), map(show, sorted(known)), n=3, cutoff=0.3)
    same = sorted(filter(same_end, known), key=lambda other: (len(other), other))
    return ", ".join(list(dict.fromkeys([*map(show, same), *similar]))[:3]) or "none"


def _place(path: Path, shape: Shape, entry: Path, sizes: Shape, spec: int | tuple[int, ...]) -> tuple[int, ...]:
    """The parameter axes, counted from the front, that the utilization axes of these sizes run along."""
    spec = spec if isinstance(spec, tuple) else (spec,)
    problem = (
        f"The parameter {show(path)} {list(shape)} cannot be scaled by the utilization at {show(entry)}, whose axes "
        f"{list(sizes)} run along its axes {list(spec)}:"
    )
    if len(spec) != len(sizes):
        raise ValueError(
            f"{problem} expert_axis must name as many axes as the utilization has, {len(sizes)}, the experts' last; it "
            f"names {len(spec)}."
        )
    if any(not -len(shape) <= axis < len(shape) for axis in spec):
        raise ValueError(
            f"{problem} an axis is out of range. Set expert_axis for this parameter, or let the utilization path end "
            "where there are experts only. Separate modules are children('expert_*')."
        )
    axes = tuple(int(axis) % len(shape) for axis in spec)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{problem} one axis is named twice in expert_axis.")
    found = [shape[axis] for axis in axes]
    if found != list(sizes):
        raise ValueError(
            f"{problem} these have {found} entries, not {list(sizes)}. Count as many experts as there are; let the "
            "utilization path end where there are experts only; or set expert_axis (-1 for the neurons of a Dense "
            "layer of kernel [in, out], (1, 0) for [E, L, ...], children('expert_*') for separate modules, "
            "children('*') for a list of them)."
        )
    return axes


def _number_children(parent: Path, pattern: str, shape: Shape, leaves: Iterable[Path]) -> dict[Path, int]:
    """Numbers the paths below a path that match a pattern, name by name, in natural order."""
    patterns = pattern.split("/")
    above, below = len(parent), len(parent) + len(patterns)
    children = {path[:below] for path in leaves if path[:above] == parent and len(path) >= below}
    in_order = sorted(children, key=lambda path: [natural_order(name) for name in path])
    experts = [path for path in in_order if all(map(fnmatch.fnmatchcase, path[above:], patterns))]
    if len(experts) != shape[-1]:
        found = ", ".join(show(path[above:]) for path in in_order) or "(none)"
        raise ValueError(
            f"children({pattern!r}) finds {len(experts)} experts at {show(parent)}, whose children are {found}; its "
            f"utilization {list(shape)} has E = {shape[-1]}. Mend the pattern, or the path of the utilization."
        )
    return {path: number for number, path in enumerate(experts)}


def natural_order(name: str) -> tuple[list[str | int], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def show(path: Path) -> str:
    return "/".join(path) or "(root)"


def show_value(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else reprlib.repr(x)
