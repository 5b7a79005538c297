"""Small functions on arrays that several files share: dtypes, checks of values, and how an error shows what it got."""

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
        number = None if isinstance(x, bool) else operator.index(x)
    except TypeError:  # a traced value raises this too
        number = None
    if number is None or number < at_least:
        raise ValueError(f"{what} must be an integer, not traced, and at least {at_least}; got {show_value(x)}.")
    return number


def check_not_negative(what: str, x: ArrayLike, hint: str = "") -> None:
    """Rejects negative values where they can be read. Traced arrays have none yet, and a NaN is left to the caller."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)  # jnp would trace the comparison under jax.jit
    if np.any(values < 0):
        raise ValueError(f"{what} must not be negative; got {show_value(x)} with the value {np.nanmin(values)}.{hint}")


def show_value(x: Any) -> str:
    """Shows dtype and shape, such as `float32[2, 3]`; a short repr of anything that is no array."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else reprlib.repr(x)


def exportable(cls: NamedTupleType) -> NamedTupleType:
    """Lets `jax.export` serialize functions whose inputs or outputs hold this NamedTuple; a class decorator."""
    try:
        jax.export.register_namedtuple_serialization(cls, serialized_name=f"excitation_optax.{cls.__name__}")
    except ValueError:
        pass  # the module is loaded a second time, and JAX keeps the registration of the first
    return cls
