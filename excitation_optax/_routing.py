"""Routing counts: how many tokens each expert received. Counts are sums, so they add up before they are divided.

Axis letters: T tokens (all axes of a batch that hold tokens or samples), E experts, K experts per token.
"""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from excitation_optax import _arrays, _paths

_HINT = (
    " A list is a node of the tree: convert it to an array. Experts in separate modules share one array [E], at a path "
    "that ends in a name such as expert_{expert}."
)


class RoutingCounts(NamedTuple):
    r"""The number of tokens that each expert received, and the number of all tokens.

    .. math:: u_k = \frac{1}{|B|} \sum_{x \in B} \mathbb{1}[k \in \mathcal{A}(x)] \qquad \text{(equation 1)}

    Add the counts of micro-batches: sums stay right where padding differs, averages of fractions do not. Addition is in
    float32 or wider; other shapes are a `ValueError`. `scale_by_excitation(axis_name=...)` sums them over devices.

    Attributes:
      counts: `[..., E]` float32, tokens routed to each expert. Leading axes are layers.
      tokens: `[...]` float32, all tokens except the padding.

    Example:
      >>> first = excitation_optax.RoutingCounts(counts=jnp.array([3.0, 1.0]), tokens=jnp.array(4.0))
      >>> second = excitation_optax.RoutingCounts(counts=jnp.array([0.0, 1.0]), tokens=jnp.array(1.0))
      >>> (first + second).utilization
      Array([0.6, 0.4], dtype=float32)
    """

    counts: jax.Array
    tokens: jax.Array

    __array_ufunc__ = None  # otherwise NumPy converts the pair to one array
    __mul__ = __rmul__ = None  # a tuple repeats  # pyrefly: ignore[bad-override-mutable-attribute]

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":  # pyrefly: ignore[bad-override]
        if not isinstance(other, RoutingCounts):
            raise ValueError(f"Only RoutingCounts can be added to RoutingCounts; got {_arrays.show_value(other)}.")
        for name, a, b in zip(self._fields, self, other, strict=True):
            if not (_arrays.is_array(a) and _arrays.is_array(b) and jnp.shape(a) == jnp.shape(b)):
                shown = f"{_arrays.show_value(a)} and {_arrays.show_value(b)}"
                raise ValueError(f"Adding RoutingCounts requires arrays of equal shapes; their {name} are {shown}.")
        return RoutingCounts(*(a + b for a, b in map(_arrays.widened, self, other)))

    def __radd__(self, other: Any) -> "RoutingCounts":
        return self if isinstance(other, int) and other == 0 else self + other  # sum() starts at 0

    @property
    def utilization(self) -> jax.Array:
        """`[..., E]`, the fraction in [0, 1] of the tokens that each expert received; 0 where there were no tokens."""
        check_shape("RoutingCounts", self)  # raises if the two do not fit
        counts, tokens = _arrays.widened(*self)
        return _arrays.divide(counts, jnp.expand_dims(tokens, -1))


def is_counts(x: object) -> TypeGuard[RoutingCounts]:
    """Says where a tree of utilization ends, as `is_leaf=`."""
    return isinstance(x, RoutingCounts)


def check_counts(what: str, entries: Mapping[str, Any], over: str) -> None:
    """Raises ValueError unless all entries are counts, which can be summed over micro-batches or devices."""
    for path, leaf in entries.items():
        if not is_counts(leaf):
            raise ValueError(
                f"{what} at {path or _paths.ROOT} is {_arrays.show_value(leaf)}: pass RoutingCounts, as from "
                f"count_routing. Fractions cannot be summed over {over}."
            )


def sum_over(axis_name: Hashable, entries: Mapping[str, Any]) -> dict[str, RoutingCounts]:
    """Sums the counts of all layers over a mapped axis, in one reduction and in float32 or wider."""
    check_counts("Utilization", entries, f"axis_name={axis_name!r}")
    return jax.lax.psum({path: RoutingCounts(*_arrays.widened(*leaf)) for path, leaf in entries.items()}, axis_name)


def fractions(utilization: ArrayLike | RoutingCounts) -> jax.Array:
    """Converts fractions or `RoutingCounts` to an array `[..., E]` in float32 or wider."""
    if is_counts(utilization):
        check_utilization("Utilization", utilization)
        return utilization.utilization
    u = _arrays.as_array("Utilization", utilization, axes="[..., E]")
    _arrays.check_not_negative("Utilization", u)
    return _arrays.float32_or_wider(u)


def check_shape(what: str, leaf: Any) -> tuple[int, ...]:
    """The shape `[..., E]` of fractions or counts, or of the shapes of such; a ValueError if they have none."""
    counts, name, hint = (leaf.counts, f"{what}: the counts", "") if is_counts(leaf) else (leaf, what, _HINT)
    shape = _arrays.shape_of(counts)
    if not shape or shape[-1] == 0:
        got = _arrays.show_value(counts)
        raise ValueError(f"{name} must be an array with an axis of experts, [..., E]; got {got}.{hint}")
    if is_counts(leaf) and _arrays.shape_of(leaf.tokens) != shape[:-1]:
        raise ValueError(
            f"{what} has counts of shape {list(shape)} and tokens {_arrays.show_value(leaf.tokens)}; tokens must have "
            f"the shape {list(shape[:-1])}, one number for each layer."
        )
    return shape


def check_utilization(what: str, leaf: Any) -> None:
    """Raises ValueError for a malformed leaf of `utilization=`: shapes and types, and negative values if readable."""
    check_shape(what, leaf)
    if not is_counts(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{what} must be floating-point fractions in [0, 1]; got {_arrays.show_value(leaf)}. "
            "Put tokens per expert into RoutingCounts(counts, tokens)."
        )
    for x in jax.tree.leaves(leaf):
        _arrays.check_not_negative(what, x)


def count_routing(expert_indices: jax.Array, num_experts: int, where: jax.Array | None = None) -> RoutingCounts:
    """Counts tokens per expert from the experts that each token chose (equation 1 of the paper).

    An expert that a token names twice counts once, and an index outside `[0, E)` counts for no expert. Under expert
    choice, all experts have the same load, so Excitation has no effect: do not pass its token numbers `[E, C]`.

    Args:
      expert_indices: `[T..., K]` integers, the experts of each token, before tokens are dropped for capacity.
      num_experts: E, not traced.
      where: boolean, broadcasts to `[T...]`; False leaves a token (padding) out.

    Returns:
      The counts, `[E]`, summed over all tokens. For stacked layers, use `jax.vmap`.

    Raises:
      ValueError: if an argument has another type or shape, or K is more than E.

    Example:
      >>> chosen = jnp.array([[0, 1], [0, 2], [0, 1]])  # three tokens, two experts each
      >>> excitation_optax.count_routing(chosen, num_experts=4, where=jnp.array([True, True, False])).counts
      Array([2., 1., 1., 0.], dtype=float32)
    """
    hint = " K is the number of experts per token. For router logits use count_logits, for a mask count_active."
    indices = _arrays.as_array("count_routing: expert_indices", expert_indices, "integers", "[..., K]", hint)
    num_experts = _arrays.static_int("count_routing: num_experts", num_experts)
    if indices.shape[-1] > num_experts:
        raise ValueError(
            f"count_routing: expert_indices {_arrays.show_value(indices)} has more experts per token on its last axis "
            f"than num_experts = {num_experts}. With one expert per token, pass expert_indices[..., None]."
        )
    # As int32, since E may be more than an 8-bit index can count to.
    chosen = jax.nn.one_hot(indices.astype(jnp.int32), num_experts, dtype=jnp.bool_)  # [T..., K, E]
    return count_active(jnp.any(chosen, axis=-2), where)


def count_active(active: jax.Array, where: jax.Array | None = None) -> RoutingCounts:
    """Counts tokens per expert from a mask of active experts, such as the neurons of a Top-K layer (equation 1).

    Args:
      active: `[T..., E]` boolean, whether the expert is active for the token.
      where: as for `count_routing`, which also says what is returned and raised.

    Example:
      >>> counts = excitation_optax.count_active(jnp.array([[True, False], [True, True]]))
      >>> counts.counts, counts.tokens
      (Array([2., 1.], dtype=float32), Array(2., dtype=float32))
    """
    hint = " Pass `activations != 0`, or use count_routing for expert indices."
    active = _arrays.as_array("count_active: active", active, "booleans", "[..., E]", hint)
    if where is None:
        tokens = jnp.asarray(active.size // active.shape[-1], jnp.float32)
    else:
        where = token_mask(where, active.shape[:-1])
        active &= jnp.expand_dims(where, -1)
        tokens = jnp.sum(where, dtype=jnp.float32)
    # As int8, which XLA's CPU reductions read directly, so that the mask is written to memory in bytes, not in words.
    counts = jnp.sum(active.astype(jnp.int8), axis=tuple(range(active.ndim - 1)), dtype=jnp.float32)
    return RoutingCounts(counts, tokens)


def count_logits(router_logits: jax.Array, experts_per_token: int, where: jax.Array | None = None) -> RoutingCounts:
    """Counts tokens per expert from router logits: each token goes to its K highest, as `jax.lax.top_k` ranks them.

    If your router adds a bias before the ranking, or chooses among groups of experts, use `count_routing`.

    Args:
      router_logits: `[T..., E]`, logits or probabilities (the ranking is the same).
      experts_per_token: K, not traced.
      where: as for `count_routing`, which also says what is returned and raised.

    Example:
      >>> excitation_optax.count_logits(jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), experts_per_token=1).utilization
      Array([0.5, 0.5, 0. ], dtype=float32)
    """
    hint = " For expert indices use count_routing, for a mask of active experts count_active."
    logits = _arrays.as_array("count_logits: router_logits", router_logits, "floating-point numbers", "[..., E]", hint)
    experts_per_token = _arrays.static_int("count_logits: experts_per_token", experts_per_token)
    num_experts = logits.shape[-1]
    if experts_per_token > num_experts:
        got = f"got {experts_per_token} for {_arrays.show_value(logits)}"
        raise ValueError(f"count_logits: experts_per_token must be at most E = {num_experts}; {got}.")
    return count_routing(jax.lax.top_k(logits, experts_per_token)[1], num_experts, where)


def token_mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a mask to the tokens' shape."""
    where = _arrays.as_array("where", where, "booleans", hint=" Pass `mask != 0`.")
    try:
        return jnp.broadcast_to(where, shape)
    except ValueError as error:
        raise ValueError(f"where {_arrays.show_value(where)} does not fit the tokens {list(shape)}.") from error
