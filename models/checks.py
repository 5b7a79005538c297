"""Checks of configs and inputs, which fail early and say what was received."""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_KINDS = {"floats": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}


def check_sizes(config: Any, *names: str, minimum: int = 1) -> None:
    """Raises ValueError if a field of a config is not an integer of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
            raise ValueError(
                f"{type(config).__name__}: {name} must be an integer of at least {minimum}; got {value!r}."
            )


def check_array(x: Any, name: str, kind: str, shape: Sequence[int | str]) -> jax.Array:
    """Converts an input to an array and checks its dtype and shape.

    Args:
      x: the input.
      name: its name in the error, such as "MoE: x".
      kind: "floats", "integers" or "booleans".
      shape: an int for an axis of this size, a letter for an axis of any size, and "..." at the start for any axes.

    Returns:
      x as an array.

    Raises:
      ValueError: if x has another dtype or shape.

    Example:
      >>> from models import checks
      >>> checks.check_array([[1.0, 2.0]], "MoE: x", "floats", ("...", 2)).shape
      (1, 2)
    """
    x = jnp.asarray(x)
    axes = list(shape)
    received = list(x.shape)
    if axes[:1] == ["..."]:
        axes = axes[1:]
        received = received[max(len(received) - len(axes), 0) :]
    fits = len(received) == len(axes) and all(isinstance(a, str) or a == r for a, r in zip(axes, received, strict=True))
    if not fits or not jnp.issubdtype(x.dtype, _KINDS[kind]):
        raise ValueError(
            f"{name} must be an array of {kind} [{', '.join(map(str, shape))}]; got {x.dtype}{list(x.shape)}."
        )
    return x
