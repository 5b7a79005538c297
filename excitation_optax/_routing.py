"""Routing counts: how many tokens each expert was given, kept as sums so that they add up before they are divided.

Axis letters: T tokens (all axes of a batch that hold tokens or samples, in any number), E experts, K experts per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from excitation_optax import _arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingCounts:
    r"""Tokens per expert and tokens in all; utilization is their quotient, taken once, at the end.

    .. math::
      u_k = \frac{1}{|\mathcal{B}|} \sum_{x \in \mathcal{B}} \mathbb{1}[k \in \mathcal{A}(x)]

    Adding two of them is right for micro-batches, and `jax.lax.psum` of one is right across devices, however unequal
    their padding: numerators and denominators add up, which averages of fractions do not. Under `jax.pmap` or
    `jax.shard_map` this sum is yours to write: **without it every replica scales its update by its own share of the
    batch, and the replicas drift apart in silence.** Under `jax.jit` with sharded inputs counts are global already.

    Attributes:
      counts: `[..., E]` float32, tokens routed to each expert. Leading axes, if any, are layers.
      tokens: `[...]` float32, tokens in all, those that `where` left out not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> first = excitation_optax.RoutingCounts(counts=jnp.array([3.0, 1.0]), tokens=jnp.array(4.0))
      >>> second = excitation_optax.RoutingCounts(counts=jnp.array([0.0, 1.0]), tokens=jnp.array(1.0))
      >>> (first + second).utilization
      Array([0.6, 0.4], dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equation 1.
    """

    counts: jax.Array
    tokens: jax.Array

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        return RoutingCounts(self.counts + other.counts, self.tokens + other.tokens)

    def __radd__(self, other: int) -> "RoutingCounts":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum() works

    @property
    def utilization(self) -> jax.Array:
        """`[..., E]`, the fraction in [0, 1] of the tokens that each expert was given; 0 where there were no tokens."""
        counts, tokens = (_arrays.float32_or_wider(x) for x in (self.counts, self.tokens))
        tokens = jnp.expand_dims(tokens, -1)
        return jnp.where(tokens == 0, 0, counts / jnp.where(tokens == 0, 1, tokens))


def is_counts(x: object) -> bool:
    """For `is_leaf=`: where a tree of utilization ends."""
    return isinstance(x, RoutingCounts)


def count_routing(expert_indices: jax.Array, num_experts: int, where: jax.Array | None = None) -> RoutingCounts:
    """Counts from the experts that each token chose.

    An expert that a token names twice is counted once (equation 1 counts tokens, not choices); an index outside
    `[0, E)`, as some routers give to dropped tokens, counts for no expert.

    Args:
      expert_indices: `[T..., K]` integers, the experts of each token, before any token is dropped for capacity. From
        an argmax `[T...]`, pass `indices[..., None]`.
      num_experts: E.
      where: `[T...]` boolean, or of a shape that broadcasts to it; False leaves a token (padding) out.

    Returns:
      The counts, `[E]`, summed over all tokens. For stacked layers, `jax.vmap` this function over the layers.

    Raises:
      ValueError: if the indices are not integers, `num_experts` is not positive, K is more than E, or `where` does not
        fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> chosen = jnp.array([[0, 1], [0, 2], [0, 1]])  # three tokens, two experts each
      >>> excitation_optax.count_routing(chosen, num_experts=4, where=jnp.array([True, True, False])).counts
      Array([2., 1., 1., 0.], dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equation 1.
    """
    expert_indices = jnp.asarray(expert_indices)
    if not jnp.issubdtype(expert_indices.dtype, jnp.integer):
        raise ValueError(
            f"count_routing: expert_indices must be integers [..., K]; got {_describe(expert_indices)}. "
            "For the router's scores use count_logits, for a mask of active experts count_active."
        )
    if expert_indices.ndim == 0:
        raise ValueError(
            "count_routing: expert_indices must have an axis of the K experts of a token, [..., K]; got []."
        )
    if num_experts < 1:
        raise ValueError(f"count_routing: num_experts must be at least 1; got {num_experts}.")
    if expert_indices.shape[-1] > num_experts:
        raise ValueError(
            f"count_routing: the last axis of expert_indices {_describe(expert_indices)} holds the K experts of one "
            f"token, at most num_experts = {num_experts}. With one expert per token, pass expert_indices[..., None]."
        )
    # As int32, since E may be more than an 8-bit index can count to.
    chosen = jax.nn.one_hot(expert_indices.astype(jnp.int32), num_experts, dtype=jnp.bool_)  # [T..., K, E]
    return count_active(jnp.any(chosen, axis=-2), where)


def count_active(active: jax.Array, where: jax.Array | None = None) -> RoutingCounts:
    """Counts from a mask of active experts, such as the neurons that a Top-K layer retained.

    Args:
      active: `[T..., E]` boolean, whether the expert is active for the token.
      where: `[T...]` boolean, or of a shape that broadcasts to it; False leaves a token (padding) out.

    Returns:
      The counts, `[E]`, summed over all tokens. For stacked layers, `jax.vmap` this function over the layers.

    Raises:
      ValueError: if `active` is not boolean or has no axis of experts, or if `where` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> counts = excitation_optax.count_active(jnp.array([[True, False], [True, True]]))
      >>> counts.counts, counts.tokens
      (Array([2., 1.], dtype=float32), Array(2., dtype=float32))

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equation 1.
    """
    active = jnp.asarray(active)
    if active.dtype != jnp.bool_ or active.ndim == 0:
        raise ValueError(
            f"count_active: active must be a boolean mask [..., E]; got {_describe(active)}. "
            "Pass `activations != 0`, or use count_routing for expert indices."
        )
    token_axes = tuple(range(active.ndim - 1))
    if where is None:
        tokens = jnp.asarray(active.size // max(active.shape[-1], 1), jnp.float32)
    else:
        where = _broadcast_where(where, active.shape[:-1])
        active &= jnp.expand_dims(where, -1)
        tokens = jnp.sum(where, dtype=jnp.float32)
    # As int8, which XLA's CPU reductions read as it is, so that the mask is written to memory in bytes, not in words.
    return RoutingCounts(jnp.sum(active.astype(jnp.int8), axis=token_axes, dtype=jnp.float32), tokens)


def count_logits(router_logits: jax.Array, experts_per_token: int, where: jax.Array | None = None) -> RoutingCounts:
    """Counts from a router's scores: each token goes to the K experts with the highest, as `jax.lax.top_k` ranks them.

    For models that give out their router logits and nothing else. A model that routes otherwise (a bias added before
    the ranking, groups of experts, expert choice) must be counted from its own choice, by `count_routing`.

    Args:
      router_logits: `[T..., E]`, logits or probabilities (the ranking is the same).
      experts_per_token: K.
      where: `[T...]` boolean, or of a shape that broadcasts to it; False leaves a token (padding) out.

    Returns:
      The counts, `[E]`, summed over all tokens. For stacked layers, `jax.vmap` this function over the layers.

    Raises:
      ValueError: if K is not between 1 and E, or `where` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> excitation_optax.count_logits(jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), experts_per_token=1).utilization
      Array([0.5, 0.5, 0. ], dtype=float32)
    """
    router_logits = jnp.asarray(router_logits)
    num_experts = router_logits.shape[-1] if router_logits.ndim else 0
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(
            f"count_logits: experts_per_token must be between 1 and E = {num_experts}, the last axis of the router "
            f"logits {_describe(router_logits)}; got {experts_per_token}."
        )
    return count_routing(jax.lax.top_k(router_logits, experts_per_token)[1], num_experts, where)


def _broadcast_where(where: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f"where must be boolean; got {_describe(where)}. Pass `mask != 0`.")
    try:
        return jnp.broadcast_to(where, shape)
    except ValueError as error:
        raise ValueError(f"where {_describe(where)} does not fit the tokens {list(shape)} it is to mask.") from error


def _describe(x: jax.Array) -> str:
    return f"{x.dtype}{list(x.shape)}"
