"""Path patterns, the language of `scale_by_excitation`: which nodes of a tree a pattern matches.

A *path* is the names from the root to a node: dictionary keys, attribute names and list positions, all as strings. A
slash in a name separates two names, as in Haiku. If the tree has a name that equals the pattern's, it is literal.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    is_end: bool = False  # a None or a MaskedNode, which can stand for a whole subtree

    def __str__(self) -> str:
        return "/".join(self.path) or ROOT

    def is_below(self, other: "Node") -> bool:
        return self.path[: len(other.path)] == other.path != self.path


class Match(NamedTuple):
    """A node that a pattern matches, or an end above nodes that it might match."""

    node: Node
    wildcards: tuple[tuple[str | None, ...], ...] = ()  # the text of each wildcard, by name of the pattern
    digits: str | None = None  # of the expert
    is_whole: bool = True  # False for an end that was reached before the last name of the pattern


class Tree:
    """The names of a pytree; its `leaves`, `None` and `optax.MaskedNode` among them; and the node of each leaf."""

    def __init__(self, tree: Any):
        is_end = lambda x: x is None or isinstance(x, optax.MaskedNode)
        leaf_of = join(tree, is_leaf=is_end)
        self.leaves = list(leaf_of.values())
        self._is_parameter = [is_parameter(leaf) for leaf in self.leaves]
        self.treedef = jax.tree.structure(tree, is_leaf=is_end)
        self.nodes: list[Node] = []
        self.root = Node((), leaves=list(range(len(leaf_of))))
        self._named: dict[str, list[Node]] = {}
        self._alike = functools.cache(self._names_alike)
        for position, (path, leaf) in enumerate(leaf_of.items()):
            node = self.root
            for name in path.split("/") if path else ():
                if name not in node.children:
                    node.children[name] = Node((*node.path, name), node)
                    self._named.setdefault(name, []).append(node.children[name])
                node = node.children[name]
                node.leaves.append(position)
            node.is_end = is_end(leaf)
            self.nodes.append(node)
        self._masked = [node for node in self.nodes if node.is_end and self.leaves[node.leaves[0]] is not None]

    def parameters_of(self, node: Node) -> list[int]:
        """The positions of the leaves at or below a node that can be scaled."""
        return [leaf for leaf in node.leaves if self._is_parameter[leaf]]

    def find(self, pattern: str) -> list[Match]:
        """The highest nodes that a pattern matches, in the order of the tree, and the ends above possible matches."""
        if pattern.count(EXPERT) > 1:
            raise ValueError(f"The pattern {pattern!r} has {EXPERT} more than once; an expert has one number.")
        try:
            matches = list(self._walk(Match(self.root), _split(pattern)))
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} is malformed: {error}") from None
        highest: dict[tuple[str, ...], Match] = {}
        for match in sorted(matches, key=lambda match: (match.node.leaves[:1], len(match.node.path))):
            path = match.node.path
            if not any(path[:depth] in highest for depth in range(len(path) + 1)):
                highest[path] = match
        return list(highest.values())

    def _walk(self, match: Match, names: list[str]) -> Iterator[Match]:
        """The matches of the names that remain of a pattern, at or below the node that the first names match."""
        node = match.node
        if not names or names == ["**"]:
            yield match
        elif node.is_end:
            yield match._replace(is_whole=False)
        else:
            is_deep = names[0] == "**" and "**" not in node.children
            name, *rest = names[1:] if is_deep else names
            for child, texts, digits in self._matching(node, name, is_deep):
                between = (("/".join(child.path[len(node.path) : -1]),),) if is_deep else ()
                wildcards = (*match.wildcards, *between, texts)
                yield from self._walk(Match(child, wildcards, digits or match.digits), rest)
            if is_deep:
                yield from (Match(masked, is_whole=False) for masked in self._masked if masked.is_below(node))

    def _matching(self, node: Node, name: str, is_deep: bool) -> Iterator[tuple[Node, tuple, str | None]]:
        """The children of a node, or all nodes below it, that a name of a pattern matches; wildcards; digits."""

        def named(name: str) -> list[Node]:
            if is_deep:
                return [other for other in self._named.get(name, []) if other.is_below(node)]
            return [node.children[name]] if name in node.children else []

        alike: dict[str, Any] = {name: re.fullmatch(re.escape(name), name)} if named(name) else self._alike(name)
        for other, match in alike.items():
            expert = match.re.groupindex.get("expert")
            wildcards = tuple(text for group, text in enumerate(match.groups(), start=1) if group != expert)
            digits = match[expert] if expert else None
            # Haiku and Flax call the first of several modules `linear`, the second `linear_1`.
            is_first = expert is not None and digits is None
            for child in named(other):
                if not (is_first and child.parent and f"{other}_0" in child.parent.children):
                    yield child, wildcards, "0" if is_first else digits

    def _names_alike(self, name: str) -> dict[str, re.Match[str]]:
        """All names in the tree that a name of a pattern matches, if it is more than a literal name."""
        if not set(name) & set("*?{}"):
            return {}
        matches = {other: _compile(name).fullmatch(other) for other in self._named}
        return {other: match for other, match in matches.items() if match}

    def nearest(self, pattern: str) -> str:
        """For an error: the nodes where a pattern leaves the tree, and nodes of the same or a similar name."""
        node, name = self.root, ""
        for name in _split(pattern):
            if name not in node.children:
                break
            node = node.children[name]
        here = [node.children[child] for child in _similar(name, node.children)]
        if node.path:
            here = [*here, *node.children.values()][:3] or [node]
        elsewhere = [other for name in _similar(pattern.split("/")[-1], self._named) for other in self._named[name][:3]]
        shown = ", ".join(list(dict.fromkeys(map(str, [*here, *elsewhere])))[:4])
        top = sorted(name for name, child in self.root.children.items() if not child.is_end)
        hint = f"Nearest: {shown}. " if shown else ""
        return f"{hint}At the top level are: {', '.join(top) or 'no names'}."


def join(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their names, joined by slashes: nested dicts and slashes mean the same."""
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        names = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
        path = "/".join(filter(None, names))
        if path in leaves:
            raise ValueError(
                f'Two leaves have the same path {path or ROOT}: `/` means nesting, and 1 means "1". Rename one of them.'
            )
        leaves[path] = leaf
    return leaves


def is_parameter(x: Any) -> bool:
    """Whether it can be scaled: floating-point arrays, their shapes, and floats; not integers, keys or functions."""
    return isinstance(x, float | complex) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def _split(pattern: str) -> list[str]:
    """The names of a pattern; `**` twice in a row is `**`."""
    names = [name for name in pattern.split("/") if name]
    return [name for name, before in zip(names, [None, *names], strict=False) if not name == before == "**"]


def _similar(name: str, names: Iterable[str]) -> list[str]:
    """Names of similar spelling, whatever their case, the closest first."""
    folded: dict[str, list[str]] = {}
    for other in sorted(names, key=lambda other: other != name):
        folded.setdefault(other.lower(), []).append(other)
    close = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.4)
    return [other for lower in close for other in folded[lower]]


@functools.cache
def _compile(name: str) -> re.Pattern[str]:
    """A name of a pattern as a regular expression, with a group for each wildcard and one for the expert's digits."""
    if "{}" in name or not re.fullmatch(r"([^{}]|\{[^{}]+\})*", name):
        raise re.error(
            f"{name!r} has empty, unbalanced or nested braces, or a slash in braces. An expert's number is {EXPERT}."
        )
    stem = name.removesuffix("_" + EXPERT)
    if stem != name and not set(stem) & set("*?"):  # `linear_{expert}` also matches `linear`
        return re.compile(f"{_expression(name)}|{_expression(stem)}", re.DOTALL)
    return re.compile(_expression(name), re.DOTALL)


def _expression(text: str) -> str:
    """The regular expression for text with wildcards and braces."""
    parts = re.findall(r"\{.*?\}|[*?]|[^*?{]+", text)
    if len(parts) > 1:
        return "".join(map(_expression, parts))
    if text == EXPERT:
        return "(?<![0-9])(?P<expert>[0-9]+)(?![0-9])"
    if text.startswith("{"):
        return f"(?:{'|'.join(map(_expression, text[1:-1].split(',')))})"
    return {"*": "(.*)", "?": "(.)"}.get(text) or re.escape(text)
