"""What Excitation will do to a parameter tree, said before it is done."""

import dataclasses
import html
import math
from typing import Any

import numpy as np

from excitation_optax import _experts, _patterns


@dataclasses.dataclass(frozen=True)
class DescribedParameter:
    """One parameter leaf and how it is scaled.

    Attributes:
      path: its path, its names joined by "/".
      shape: its shape; None for what is never scaled: an `optax.MaskedNode`, integers, functions.
      scaled_by: the path of the utilization leaf that scales it, or None if it is left untouched.
      axes: its axes that the axes of that utilization leaf run along, the experts' last; counted from the front.
      expert: the one expert that all of it belongs to, where experts are separate children; else None.
    """

    path: str
    shape: tuple[int, ...] | None
    scaled_by: str | None
    axes: tuple[int, ...] = ()
    expert: int | None = None


COLUMNS = ("parameter", "shape", "scaled by", "along")
MAX_HTML_ROWS = 50  # of those that are scaled, and of those that are not


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns: prints as a table; in a notebook, as one in HTML.

    Attributes:
      parameters: a `DescribedParameter` for each parameter leaf, in the order of `jax.tree.leaves`.
    """

    parameters: tuple[DescribedParameter, ...]

    def __str__(self) -> str:
        rows = [COLUMNS, *map(_row, self.parameters)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, self._summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table of what is scaled, and one of the rest to unfold; without colours, which are left to the theme."""
        scaled = [p for p in self.parameters if p.scaled_by is not None]
        left = [p for p in self.parameters if p.scaled_by is None]
        parts = [f"<p>{html.escape(self._summary())}</p>", _html_table(scaled)]
        if left:
            parts.append(f"<details><summary>{len(left):,} left untouched</summary>{_html_table(left)}</details>")
        return "".join(parts)

    def _summary(self) -> str:
        scaled = [p for p in self.parameters if p.scaled_by is not None]
        size, total = (
            sum(math.prod(p.shape) for p in group if p.shape is not None) for group in (scaled, self.parameters)
        )
        suspect = next((p.path for p in scaled if _patterns.to_avoid(p.path.split("/"))), None)
        return (
            f"{len(scaled)} of {len(self.parameters)} parameter leaves are scaled: {size:,} of {total:,} parameters."
            + (
                f" Is {suspect} to be scaled? It is named like a router, a shared expert or attention."
                if suspect
                else ""
            )
        )


def _row(p: DescribedParameter) -> tuple[str, ...]:
    shape = "-" if p.shape is None else str(list(p.shape))
    along = [f"axis {axis} ({p.shape[axis]})" for axis in p.axes] if p.shape else []
    along += [] if p.expert is None else [f"all of it, as expert {p.expert}"]
    return p.path, shape, p.scaled_by or "-", ", ".join(along)


def _html_table(parameters: list[DescribedParameter]) -> str:
    def row(cells, tag):
        left = ' style="text-align:left"'  # notebooks align to the right
        return f"<tr>{''.join(f'<{tag}{left}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    rows = [row(_row(p), "td") for p in parameters[:MAX_HTML_ROWS]]
    if (more := len(parameters) - MAX_HTML_ROWS) > 0:
        rows.append(row([f"… and {more:,} more: print() shows all", "", "", ""], "td"))
    return f"<table><thead>{row(COLUMNS, 'th')}</thead><tbody>{''.join(rows)}</tbody></table>"


def describe(params: Any, utilization: Any, expert_axis: Any = None) -> Description:
    """Says which parameters will be scaled, by which utilization and along which axis, and which will not.

    Args:
      params: the parameter tree that the optimizer is initialized with, or its shapes (`jax.eval_shape`).
      utilization: as `scale_by_excitation` takes it, or its shapes.
      expert_axis: as `scale_by_excitation` takes it.

    Returns:
      A `Description`, which prints as a table.

    Raises:
      ValueError: as `scale_by_excitation` does at an update with these.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> params = {"router": jnp.ones((2, 4)), "experts": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((4, 3))}}
      >>> excitation_optax.describe(params, {"experts": jnp.ones(4)})
      parameter       shape      scaled by  along
      experts/bias    [4, 3]     experts    axis 0 (4)
      experts/kernel  [4, 2, 3]  experts    axis 0 (4)
      router          [2, 4]     -
      2 of 3 parameter leaves are scaled: 36 of 44 parameters.
    """
    leaves = _experts.leaves_by_path(params, _experts.is_masked)
    matches = _experts.match_experts(params, _experts.utilization_by_path(utilization), expert_axis)

    def row(path, leaf, match):
        shape = np.shape(leaf) if _experts.is_parameter(leaf) else None
        if match is None:
            return DescribedParameter(_experts.show(path), shape, None)
        return DescribedParameter(_experts.show(path), shape, _experts.show(match.entry), match.axes, match.child)

    return Description(tuple(row(path, leaf, matches[path]) for path, leaf in leaves.items()))
