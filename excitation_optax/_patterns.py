"""Utilization addressed by patterns of paths, which say loudly what they do not fit."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from excitation_optax import _experts

# As routers, shared experts and attention are named in the models of the documentation.
NOT_EXPERTS = ("*router*", "gate", "*shared*", "*attn*", "*attention*")


def by_pattern(params: Any, patterns: Mapping[str, Any], *, avoid: Sequence[str] = NOT_EXPERTS) -> Any:
    """The tree that holds a value wherever a pattern of paths matches: for `utilization=`, and for `expert_axis=`.

    A pattern is names with slashes between, shell-style: `*` and `?` match within one name, `**` any number of names,
    none included. It may match a parameter or a node, which stands for all parameters below it; of nodes that stand
    above one another, the highest counts.

    Args:
      params: the parameters, or their shapes.
      patterns: from each pattern to its value, such as `RoutingCounts`, an array of fractions, or the axes of experts.
      avoid: patterns of names, lower case, that no covered parameter may have in its path: routers, shared experts
        and attention are not scaled. `()` allows all.

    Returns:
      A nested dict, the value of a pattern at each path that it matched; where it matched several children of a node,
      these are one entry, `{wi,wo}`, since they are one layer.

    Raises:
      ValueError: if a pattern matches no parameter (with the nearest paths), if two patterns cover one parameter, or if
        one covers a parameter to be avoided.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> moe = {"router": jnp.ones((2, 3)), "wi": jnp.ones((3, 2, 4)), "wo": jnp.ones((3, 4, 2))}
      >>> params = {"embed": jnp.ones((5, 2)), "layers": [moe, moe]}
      >>> excitation_optax.by_pattern(params, {"layers/0/w?": 0.2, "layers/1/w?": 0.4})
      {'layers': {'0': {'{wi,wo}': 0.2}, '1': {'{wi,wo}': 0.4}}}
      >>> excitation_optax.by_pattern(params, {"**/*": 0.2})
      Traceback (most recent call last):
      ...
      ValueError: The pattern '**/*' covers layers/0/router, whose name 'router' is one to avoid ('*router*'): ...
    """
    parameters = [path for path, leaf in _experts.leaves_by_path(params).items() if _experts.is_parameter(leaf)]
    found: dict[_experts.Path, str] = {}
    for pattern in patterns:
        nodes = _matching(pattern, parameters)
        for node in nodes:
            _check_new(node, pattern, found)
            _check_avoids(node, pattern, parameters, avoid)
        found |= dict.fromkeys(nodes, pattern)
    return _experts.nested({path: patterns[pattern] for path, pattern in _siblings_together(found).items()})


def _matching(pattern: str, parameters: Sequence[_experts.Path]) -> list[_experts.Path]:
    """The highest nodes whose paths match; a pattern that matches none is an error."""
    parts = tuple(part for part in pattern.split("/") if part)
    heights = ((path[:n] for n in range(len(path) + 1)) for path in parameters)
    nodes = dict.fromkeys(next((node for node in prefixes if _fits(node, parts)), None) for prefixes in heights)
    matching = [node for node in nodes if node is not None]
    if not matching:
        known = {path[:n] for path in parameters for n in range(len(path) + 1)}
        top = ", ".join(sorted({path[0] for path in parameters if path})) or "no names"
        raise ValueError(
            f"The pattern {pattern!r} matches no parameter. Nearest: {_experts.nearest(parts, known)}. At the top "
            f"level are: {top}. `*` is one name, `**` any number of names."
        )
    return matching


def _fits(path: _experts.Path, parts: tuple[str, ...]) -> bool:
    if not parts:
        return not path
    if parts[0] == "**":
        return any(_fits(path[n:], parts[1:]) for n in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], parts[0]) and _fits(path[1:], parts[1:])


def _check_new(node: _experts.Path, pattern: str, found: Mapping[_experts.Path, str]) -> None:
    for other, other_pattern in found.items():
        shorter = min(len(node), len(other))
        if node[:shorter] == other[:shorter]:
            both = _experts.show(max(node, other, key=len))
            raise ValueError(
                f"The patterns {other_pattern!r} and {pattern!r} both cover {both}: each parameter belongs to one. "
                "Make one of them narrower."
            )


def _check_avoids(node: _experts.Path, pattern: str, parameters: Sequence[_experts.Path], avoid: Sequence[str]) -> None:
    for path in parameters:
        if path[: len(node)] == node and (found := to_avoid(path, avoid)):
            raise ValueError(
                f"The pattern {pattern!r} covers {_experts.show(path)}, whose name {found[0]!r} is one to avoid "
                f"({found[1]!r}): routers, shared experts and attention are not scaled. Make the pattern narrower; if "
                "this is an expert nonetheless, pass avoid=() or patterns of your own."
            )


def to_avoid(path: Sequence[str], avoid: Sequence[str] = NOT_EXPERTS) -> tuple[str, str] | None:
    """The name in a path that no expert should have, and the pattern that says so."""
    return next(((name, other) for name in path for other in avoid if fnmatch.fnmatchcase(name.lower(), other)), None)


def _siblings_together(found: Mapping[_experts.Path, str]) -> dict[_experts.Path, str]:
    """Children of a node that one pattern matched, as one path with braces: `layers/0/{wi,wo}`."""
    names: dict[tuple[_experts.Path, str], list[str]] = {}
    for path, pattern in found.items():
        names.setdefault((path[:-1], pattern), []).extend(path[-1:])
    return {
        (*parent, *(together if len(together) < 2 else [f"{{{','.join(together)}}}"])): pattern
        for (parent, pattern), together in names.items()
    }
