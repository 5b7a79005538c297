"""Path patterns, the language of `scale_by_excitation`: which nodes of a tree a pattern matches.

A *path* is the names from the root to a node: dictionary keys, attribute names and list positions, all as strings, so
that one pattern addresses a dict, a list, a named tuple, an `nnx.State` or an Equinox module. A slash in a name
separates two names, as in Haiku. A name that is in the tree as it stands in the pattern is taken literally.
"""

import dataclasses
import difflib
import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import optax

EXPERT = "{expert}"
ROOT = "(root)"


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A node of a tree of names; nodes are numbered in pre-order, so that those below have numbers up to `last`."""

    path: tuple[str, ...]
    parent: "Node | None" = None
    children: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    leaf: int | None = None  # its position among the leaves, if it is one
    is_end: bool = False  # a None or a MaskedNode, which stand for all that might be below them
    is_masked: bool = False
    number: int = 0
    last: int = 0

    def __str__(self) -> str:
        return show(self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A node that a pattern matches, or an end that stands above nodes it might match."""

    node: Node
    wildcards: tuple[tuple[str | None, ...], ...] = ()  # what they stand for, by name of the pattern
    digits: str | None = None  # of the expert
    is_whole: bool = True  # whether all names of the pattern were used; an end may come first


class Tree:
    """The names of a pytree; its `leaves`, `None` and `optax.MaskedNode` among them; and the node of each leaf."""

    def __init__(self, tree: Any):
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_masked(x))
        self.leaves = [leaf for _, leaf in flat]
        self.nodes: list[Node] = []
        self.root = Node(())
        names_of = functools.cache(_names)
        for position, (key_path, leaf) in enumerate(flat):
            node = self.root
            for name in (name for key in key_path for name in names_of(key)):
                if name not in node.children:
                    node.children[name] = Node((*node.path, name), node)
                node = node.children[name]
            if node.leaf is not None:
                raise ValueError(
                    f"Two leaves have the same path {node}: names must differ by more than their type, or where "
                    "slashes stand."
                )
            node.leaf, node.is_masked = position, is_masked(leaf)
            node.is_end = leaf is None or node.is_masked
            self.nodes.append(node)
        self._in_order: list[Node] = []
        self._named: dict[str, list[Node]] = {}
        self._number(self.root)
        self._leaf_nodes = sorted(self.nodes, key=attrgetter("number"))
        self._masked = [node for node in self._leaf_nodes if node.is_masked]
        self._alike = functools.cache(self._names_alike)

    def _number(self, node: Node) -> None:
        node.number = len(self._in_order)
        self._in_order.append(node)
        for name, child in node.children.items():
            self._named.setdefault(name, []).append(child)
            self._number(child)
        node.last = len(self._in_order) - 1

    def leaves_below(self, node: Node) -> list[int]:
        """The positions of the leaves at or below a node."""
        return [below.leaf for below in _within(node, self._leaf_nodes) if below.leaf is not None]

    def find(self, pattern: str) -> list[Match]:
        """The highest nodes that a pattern matches, in the order of the tree, and the ends above possible matches."""
        if pattern.count(EXPERT) > 1:
            raise ValueError(f"The pattern {pattern!r} has {EXPERT} more than once; an expert has one number.")
        try:
            matches = sorted(self._walk(self.root, _split(pattern)), key=lambda match: match.node.number)
        except _MalformedError as error:
            raise ValueError(f"The pattern {pattern!r} is malformed: {error}") from None
        highest: list[Match] = []
        for match in matches:
            if not highest or match.node.number > highest[-1].node.last:
                highest.append(match)
        return highest

    def _walk(
        self, node: Node, names: Sequence[str], wildcards: tuple = (), digits: str | None = None
    ) -> Iterator[Match]:
        """The matches of the names that are left of a pattern, at or below a node."""
        if not names or tuple(names) == ("**",):
            yield Match(node, wildcards, digits)
        elif node.is_end:
            yield Match(node, wildcards, digits, is_whole=False)
        elif names[0] == "**" and "**" not in node.children:
            for child, name in self._below(node, names[1]):
                between = "/".join(child.path[len(node.path) : -1])
                yield from self._walk(child, names[2:], (*wildcards, (between,), name.wildcards), name.digits or digits)
            yield from (Match(masked, is_whole=False) for masked in _within(node, self._masked))
        else:
            for child, name in self._children(node, names[0]):
                yield from self._walk(child, names[1:], (*wildcards, name.wildcards), name.digits or digits)

    def _children(self, node: Node, name: str) -> Iterator[tuple[Node, "_Name"]]:
        """The children of a node that a name of a pattern matches."""
        if name in node.children:
            yield node.children[name], _LITERAL
            return
        alike = self._alike(name)
        for child_name, child in node.children.items():
            if child_name in alike and not alike[child_name].is_numbered_in(node):
                yield child, alike[child_name]

    def _below(self, node: Node, name: str) -> Iterator[tuple[Node, "_Name"]]:
        """The nodes anywhere below a node that a name of a pattern matches."""
        if literal := _within(node, self._named.get(name, []), itself=False):
            yield from ((child, _LITERAL) for child in literal)
            return
        for child_name, match in self._alike(name).items():
            for child in _within(node, self._named[child_name], itself=False):
                if not match.is_numbered_in(child.parent):
                    yield child, match

    def _names_alike(self, name: str) -> dict[str, "_Name"]:
        """Of all names in the tree, those that a name of a pattern matches."""
        if not set(name) & set("*?{}"):
            return {}
        matches = {other: _match_name(name, other) for other in self._named}
        return {other: match for other, match in matches.items() if match is not None}

    def nearest(self, pattern: str) -> str:
        """For an error: the nodes where a pattern leaves the tree, end as it does, or are spelt like it."""
        names = _split(pattern) or [""]
        node, depth = self.root, 0
        while depth < len(names) and names[depth] in node.children:
            node, depth = node.children[names[depth]], depth + 1
        here = _alike(names[min(depth, len(names) - 1)], node.children) or (list(node.children)[:3] if depth else [])
        here = [show((*node.path, name)) for name in here] or ([str(node)] if depth else [])
        same_end = [str(other) for other in self._named.get(names[-1], [])[:3]]
        alike = [str(other) for name in _alike(names[-1], self._named) for other in self._named[name][:1]]
        top = [name for name, child in self.root.children.items() if not child.is_end]
        return (
            f"Nearest: {', '.join(list(dict.fromkeys([*here, *same_end, *alike]))[:3]) or 'none'}. "
            f"At the top level are: {', '.join(sorted(top)) or 'no names'}."
        )


class _Name(NamedTuple):
    """How one name in the tree matches one name of a pattern."""

    wildcards: tuple[str | None, ...] = ()
    digits: str | None = None
    unnumbered: str | None = None  # the name itself, if it matches as number 0 for want of a number

    def is_numbered_in(self, parent: Node | None) -> bool:
        """Whether it matches only for want of a number, and there is a sibling with the number 0."""
        return self.unnumbered is not None and parent is not None and f"{self.unnumbered}_0" in parent.children


_LITERAL = _Name()


def join(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their names, joined by slashes: nested dicts and slashes mean the same."""
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = "/".join(name for key in key_path for name in _names(key))
        if path in leaves:
            raise ValueError(f"Two leaves have the same path {path or ROOT}: `/` and nested dicts mean the same.")
        leaves[path] = leaf
    return leaves


def is_masked(x: Any) -> bool:
    """`optax.masked` and `optax.partition` put this where a parameter is another transformation's."""
    return isinstance(x, optax.MaskedNode)


def show(path: Sequence[str]) -> str:
    return "/".join(path) or ROOT


def _names(key: Any) -> tuple[str, ...]:
    """The names that a key of a pytree stands for."""
    return tuple(name for name in jax.tree_util.keystr((key,), simple=True).split("/") if name)


def _split(pattern: str) -> list[str]:
    """The names of a pattern; `**` twice in a row is `**`."""
    names = [name for name in pattern.split("/") if name]
    return [name for name, before in zip(names, [None, *names], strict=False) if not name == before == "**"]


def _alike(name: str, names: Iterable[str]) -> list[str]:
    """Names that are spelt like a name, the closest first, whatever their case."""
    folded = {other.lower(): other for other in names}
    return [folded[other] for other in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.4)]


def _within(node: Node, nodes: Sequence[Node], itself: bool = True) -> Sequence[Node]:
    """Of nodes in pre-order, those below a node, or the node itself."""
    first = bisect_left(nodes, node.number + (not itself), key=attrgetter("number"))
    return nodes[first : bisect_right(nodes, node.last, key=attrgetter("number"))]


def _match_name(pattern: str, name: str) -> _Name | None:
    """How a name matches a name of a pattern, or None if it does not."""
    compiled = _compile(pattern)
    if match := compiled.fullmatch(name):
        expert = compiled.groupindex.get("expert", 0) - 1
        return _Name(
            tuple(text for i, text in enumerate(match.groups()) if i != expert), match.groupdict().get("expert")
        )
    # Haiku and Flax call the first of several modules `linear`, the second `linear_1`.
    stem = pattern.removesuffix("_" + EXPERT)
    if stem != pattern and not set(stem) & set("*?") and _compile(stem).fullmatch(name):
        return _Name(digits="0", unnumbered=name)
    return None


@functools.cache
def _compile(name: str) -> re.Pattern[str]:
    """A name of a pattern as a regular expression, with a group for each wildcard."""
    if "{}" in name or not re.fullmatch(r"([^{}]|\{[^{}]+\})*", name):
        raise _MalformedError(
            f"{name!r} has braces that are empty, unbalanced or within braces. A slash cannot stand inside braces. The "
            f"number of an expert is {EXPERT}."
        )
    return re.compile("".join(map(_expression, re.findall(r"\{.*?\}|[*?]|[^*?{]+", name))), re.DOTALL)


def _expression(part: str) -> str:
    """The regular expression for braces, for a wildcard, or for what stands between them."""
    if part == EXPERT:
        return "(?<![0-9])(?P<expert>[0-9]+)(?![0-9])"
    if part.startswith("{"):
        alternatives = (re.findall(r"[*?]|[^*?]+", text) for text in part[1:-1].split(","))
        return f"(?:{'|'.join(''.join(map(_expression, parts)) for parts in alternatives)})"
    return {"*": "(.*)", "?": "(.)"}.get(part) or re.escape(part)


class _MalformedError(ValueError):
    """A name that is no pattern."""
