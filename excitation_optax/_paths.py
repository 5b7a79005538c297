"""Path patterns, the language of `scale_by_excitation`: which nodes of a tree a pattern matches.

A *path* is the names from the root to a node: dictionary keys, attribute names and list positions, all as strings, so
that one pattern addresses a dict, a list, a named tuple, an `nnx.State` or an Equinox module. A slash in a name
separates two names, as in Haiku. If the tree has a name that equals the pattern's, the pattern's name is literal.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

EXPERT = "{expert}"
ROOT = "(root)"


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A node of a tree of names."""

    path: tuple[str, ...]
    parent: "Node | None" = None
    children: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    leaves: list[int] = dataclasses.field(default_factory=list)  # positions of the leaves at or below it
    is_leaf: bool = False
    is_end: bool = False  # a None or a MaskedNode, which can stand for a whole subtree

    def __str__(self) -> str:
        return "/".join(self.path) or ROOT

    def is_below(self, other: "Node") -> bool:
        depth = len(other.path)
        return len(self.path) > depth and self.path[:depth] == other.path


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A node that a pattern matches, or an end above nodes that it might match."""

    node: Node
    wildcards: tuple[tuple[str | None, ...], ...] = ()  # the text of each wildcard, by name of the pattern
    digits: str | None = None  # of the expert
    is_whole: bool = True  # False for an end that was reached before the last name of the pattern


class Tree:
    """The names of a pytree; its `leaves`, `None` and `optax.MaskedNode` among them; and the node of each leaf."""

    def __init__(self, tree: Any):
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_masked(x))
        self.leaves = [leaf for _, leaf in flat]
        self.nodes: list[Node] = []
        self.root = Node((), leaves=list(range(len(flat))))
        self._named: dict[str, list[Node]] = {}
        self._alike = functools.cache(self._names_alike)
        names_of = functools.cache(_names)
        for position, (key_path, leaf) in enumerate(flat):
            node = self.root
            for name in (name for key in key_path for name in names_of(key)):
                if name not in node.children:
                    node.children[name] = Node((*node.path, name), node)
                    self._named.setdefault(name, []).append(node.children[name])
                node = node.children[name]
                node.leaves.append(position)
            if node.is_leaf:
                raise ValueError(
                    f"Two leaves have the same path {node}: names must differ by more than their type, or where "
                    "slashes stand."
                )
            node.is_leaf, node.is_end = True, leaf is None or is_masked(leaf)
            self.nodes.append(node)
        self._masked = [node for node, leaf in zip(self.nodes, self.leaves, strict=True) if is_masked(leaf)]

    def find(self, pattern: str) -> list[Match]:
        """The highest nodes that a pattern matches, in the order of the tree, and the ends above possible matches."""
        if pattern.count(EXPERT) > 1:
            raise ValueError(f"The pattern {pattern!r} has {EXPERT} more than once; an expert has one number.")
        try:
            matches = list(self._walk(self.root, _split(pattern)))
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} is malformed: {error}") from None
        highest: dict[tuple[str, ...], Match] = {}
        for match in sorted(matches, key=lambda match: (match.node.leaves[:1], len(match.node.path))):
            path = match.node.path
            if not any(path[:depth] in highest for depth in range(len(path) + 1)):
                highest[path] = match
        return list(highest.values())

    def _walk(
        self, node: Node, names: Sequence[str], wildcards: tuple = (), digits: str | None = None
    ) -> Iterator[Match]:
        """The matches, at or below a node, of the names that remain of a pattern."""
        if not names or list(names) == ["**"]:
            yield Match(node, wildcards, digits)
            return
        if node.is_end:
            yield Match(node, wildcards, digits, is_whole=False)
            return
        is_deep = names[0] == "**" and "**" not in node.children
        name, *rest = names[1:] if is_deep else names
        for child, found in self._matching(node, name, is_deep):
            between = (("/".join(child.path[len(node.path) : -1]),),) if is_deep else ()
            yield from self._walk(child, rest, (*wildcards, *between, found.wildcards), found.digits or digits)
        if is_deep:
            yield from (Match(masked, is_whole=False) for masked in self._masked if masked.is_below(node))

    def _matching(self, node: Node, name: str, is_deep: bool) -> list[tuple[Node, "_Name"]]:
        """The children of a node, or all nodes below it, that a name of a pattern matches."""

        def named(name: str) -> list[Node]:
            if is_deep:
                return [other for other in self._named.get(name, []) if other.is_below(node)]
            return [node.children[name]] if name in node.children else []

        if literal := named(name):
            return [(child, _Name()) for child in literal]
        return [
            (child, found)
            for other, found in self._alike(name).items()
            for child in named(other)
            if not found.is_numbered_beside(child)
        ]

    def _names_alike(self, name: str) -> dict[str, "_Name"]:
        """All names in the tree that a name of a pattern matches."""
        matches = {other: _match_name(name, other) for other in self._named} if set(name) & set("*?{}") else {}
        return {other: match for other, match in matches.items() if match is not None}

    def nearest(self, pattern: str) -> str:
        """For an error: the nodes where a pattern leaves the tree, and nodes of the same or a similar name."""
        names, node = _split(pattern) or [""], self.root
        while len(node.path) < len(names) and names[len(node.path)] in node.children:
            node = node.children[names[len(node.path)]]
        here = [node.children[name] for name in _similar(names[min(len(node.path), len(names) - 1)], node.children)]
        if node.path:
            here = list(dict.fromkeys([*here, *node.children.values()]))[:3] or [node]
        elsewhere = [other for name in _similar(names[-1], self._named) for other in self._named[name][:1]]
        nearest = map(str, [*here, *self._named.get(names[-1], [])[:3], *elsewhere])
        top = sorted(name for name, child in self.root.children.items() if not child.is_end)
        shown = ", ".join(list(dict.fromkeys(nearest))[:4])
        hint = f"Nearest: {shown}. " if shown else ""
        return f"{hint}At the top level are: {', '.join(top) or 'no names'}."


class _Name(NamedTuple):
    """How one name in the tree matches one name of a pattern; literally by default."""

    wildcards: tuple[str | None, ...] = ()
    digits: str | None = None
    is_unnumbered: bool = False  # it matches as number 0 because it has no number

    def is_numbered_beside(self, node: Node) -> bool:
        """Whether a node without a number has a sibling with the number 0."""
        return self.is_unnumbered and node.parent is not None and f"{node.path[-1]}_0" in node.parent.children


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


def _names(key: Any) -> list[str]:
    """The names that a key of a pytree stands for."""
    return [name for name in jax.tree_util.keystr((key,), simple=True).split("/") if name]


def _split(pattern: str) -> list[str]:
    """The names of a pattern; `**` twice in a row is `**`."""
    names = [name for name in pattern.split("/") if name]
    return [name for name, before in zip(names, [None, *names], strict=False) if not name == before == "**"]


def _similar(name: str, names: Iterable[str]) -> list[str]:
    """Names of similar spelling, the closest first, whatever their case."""
    folded = {other.lower(): other for other in names}
    return [folded[other] for other in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.4)]


def _match_name(pattern: str, name: str) -> _Name | None:
    """How a name matches a name of a pattern, or None if it does not."""
    compiled = _compile(pattern)
    if match := compiled.fullmatch(name):
        groups = list(match.groups())
        digits = groups.pop(compiled.groupindex["expert"] - 1) if "expert" in compiled.groupindex else None
        return _Name(tuple(groups), digits)
    # Haiku and Flax call the first of several modules `linear`, the second `linear_1`.
    stem = pattern.removesuffix("_" + EXPERT)
    if stem != pattern and not set(stem) & set("*?") and _compile(stem).fullmatch(name):
        return _Name(digits="0", is_unnumbered=True)
    return None


@functools.cache
def _compile(name: str) -> re.Pattern[str]:
    """A name of a pattern as a regular expression, with a group for each wildcard."""
    if "{}" in name or not re.fullmatch(r"([^{}]|\{[^{}]+\})*", name):
        raise re.error(
            f"{name!r} has braces that are empty, unbalanced or within braces. A slash cannot stand inside braces. The "
            f"number of an expert is {EXPERT}."
        )
    return re.compile("".join(map(_expression, re.findall(r"\{.*?\}|[*?]|[^*?{]+", name))), re.DOTALL)


def _expression(part: str) -> str:
    """The regular expression for braces, for a wildcard, or for the text between them."""
    if part == EXPERT:
        return "(?<![0-9])(?P<expert>[0-9]+)(?![0-9])"
    if part.startswith("{"):
        alternatives = (re.findall(r"[*?]|[^*?]+", text) for text in part[1:-1].split(","))
        return f"(?:{'|'.join(''.join(map(_expression, parts)) for parts in alternatives)})"
    return {"*": "(.*)", "?": "(.)"}.get(part) or re.escape(part)
