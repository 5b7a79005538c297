"""Small functions on arrays that several files share: dtypes, checks of values, and how an error shows what it got."""

import contextlib
import math
import numbers
import operator
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_KINDS = {"booleans": [jnp.bool_], "integers": [jnp.integer], "floating-point numbers": [jnp.floating]}
_KINDS["numbers"] = [jnp.bool_, jnp.integer, jnp.floating]


def float32_or_wider(x: ArrayLike) -> jax.Array:
    """Converts integers and half-precision floats to float32, and leaves float32 and float64 unchanged."""
    x = jnp.asarray(x)  # jnp.promote_types would raise under strict promotion
    wide = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 32
    return x if wide else x.astype(jnp.float32)


def widened(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Converts both to float32, or to float64 if one of them is."""
    a, b = float32_or_wider(a), float32_or_wider(b)
    wide = np.promote_types(a.dtype, b.dtype)
    return a.astype(wide), b.astype(wide)


def divide(a: jax.Array, b: jax.Array, if_zero: int = 0) -> jax.Array:
    """The quotient a / b, and `if_zero` where b is 0."""
    return jnp.where(b == 0, if_zero, a / jnp.where(b == 0, 1, b))


def shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape of an array, of a `jax.ShapeDtypeStruct` or of a number; None for anything else."""
    return () if isinstance(x, numbers.Real) else getattr(x, "shape", None)


def is_array(x: Any) -> bool:
    """Whether it is an array, perhaps traced, or a number, but not a list or the shape of an array."""
    return shape_of(x) is not None and not isinstance(x, jax.ShapeDtypeStruct)


def as_array(what: str, x: Any, kind: str = "numbers", axes: str = "[...]", hint: str = "") -> jax.Array:
    """Converts an array, a number or nested lists to an array of a kind in `_KINDS`; an error names it `what`.

    In `axes`, such as `[..., E]`, an element with dots is any number of axes. An axis of experts, E, has entries.
    """
    with contextlib.suppress(TypeError, ValueError):
        array = jnp.asarray(x)
        last = axes.count(",")
        has_axes = array.ndim >= last if "..." in axes else array.ndim == last + 1
        is_kind = any(jnp.issubdtype(array.dtype, dtype) for dtype in _KINDS[kind])
        if is_kind and has_axes and not ("E" in axes and 0 in array.shape[array.ndim - last :]):
            return array
    raise ValueError(f"{what} must be an array of {kind} {axes}; got {show_value(x)}.{hint}")


def static_int(what: str, x: Any) -> int:
    """Checks a number that sets a shape, so that it must be known while JAX traces."""
    with contextlib.suppress(TypeError):  # a traced value raises this too
        if not isinstance(x, (bool, np.bool_)) and operator.index(x) >= 1:
            return operator.index(x)
    raise ValueError(f"{what} must be an integer, not traced, and at least 1; got {show_value(x)}.")


def is_scalar(x: Any, *kinds: Any) -> bool:
    """Whether it is one number, perhaps traced, of a kind such as `jnp.integer`; not a bool."""
    dtype = x.dtype if hasattr(x, "dtype") else np.dtype(type(x))
    return shape_of(x) == () and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def check_finite(what: str, x: Any, is_positive: bool = False, hint: str = "") -> None:
    """Rejects all but finite numbers that are not negative, or are positive. A traced number has no value yet."""
    value: Any = x
    if is_scalar(x, jnp.integer, jnp.floating):
        if isinstance(x, jax.core.Tracer):
            return
        value = math.inf
        with contextlib.suppress(OverflowError):  # of an integer that no float can hold
            value = float(x)
        if 0 <= value < math.inf and not (is_positive and value == 0):
            return
    sign = "positive" if is_positive else "not negative"
    raise ValueError(f"{what} must be a finite number that is {sign}; got {show_value(value)}.{hint}")


def check_not_negative(what: str, x: ArrayLike) -> None:
    """Rejects negative values where they can be read: not in traced arrays, nor in shapes. A NaN passes."""
    if not is_array(x) or isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)  # jnp would trace the comparison under jax.jit
    if np.any(values < 0):
        raise ValueError(f"{what} must not be negative; got {show_value(x)} with the value {np.nanmin(values)}.")


def show_value(x: Any) -> str:
    """Shows dtype and shape, such as `float32[2, 3]`; a short repr of anything that is no array."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else reprlib.repr(x)
