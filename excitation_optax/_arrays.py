"""Small functions on arrays that several files share: dtypes, checks of values, and how an error shows what it got."""

import contextlib
import numbers
import operator
import reprlib
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

NamedTupleType = TypeVar("NamedTupleType", bound=type)


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


def one_if_zero(x: jax.Array) -> jax.Array:
    """A safe denominator; the caller replaces the quotient where x is 0."""
    return jnp.where(x == 0, 1, x)


def is_array(x: Any) -> bool:
    """Arrays, traced ones among them, and numbers; neither lists nor the shapes of arrays."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, numbers.Real))


def shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape of an array, of a `jax.ShapeDtypeStruct` or of a number; None for anything else."""
    return () if isinstance(x, numbers.Real) else getattr(x, "shape", None)


def as_array(what: str, x: Any) -> jax.Array:
    """Converts an array, a number or nested lists of numbers; `what` names the argument in the error."""
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be an array of numbers; got {show_value(x)}.") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise ValueError(f"{what} must be an array of real numbers; got {show_value(x)}.")
    return array


def static_int(what: str, x: Any, at_least: int = 1) -> int:
    """Checks a number that sets a shape, so that it must be known while JAX traces."""
    try:
        number = None if isinstance(x, (bool, np.bool_)) else operator.index(x)
    except TypeError:  # a traced value raises this too
        number = None
    if number is None or number < at_least:
        raise ValueError(f"{what} must be an integer, not traced, and at least {at_least}; got {show_value(x)}.")
    return number


def check_not_negative(what: str, x: ArrayLike) -> None:
    """Rejects negative values where they can be read. Traced arrays have none yet, and a NaN is left to the caller."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)  # jnp would trace the comparison under jax.jit
    if np.any(values < 0):
        raise ValueError(f"{what} must not be negative; got {show_value(x)} with the value {np.nanmin(values)}.")


def show_value(x: Any) -> str:
    """Shows dtype and shape, such as `float32[2, 3]`; a short repr of anything that is no array."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else reprlib.repr(x)


def exportable(cls: NamedTupleType) -> NamedTupleType:
    """Lets `jax.export` serialize functions whose inputs or outputs hold this NamedTuple; a class decorator."""
    with contextlib.suppress(ValueError):  # if the module is loaded twice, JAX keeps the first registration
        jax.export.register_namedtuple_serialization(cls, serialized_name=f"excitation_optax.{cls.__name__}")
    return cls
