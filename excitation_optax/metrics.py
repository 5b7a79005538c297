"""What to log about routing: specialization, entropy, load. Pure functions on arrays; nothing here changes training.

Axis letters: T tokens (all axes that hold tokens or samples, in any number), E experts, C classes. Leading axes of an
argument `[..., E]` are layers, each measured by itself.
"""

import jax
import jax.numpy as jnp

from excitation_optax import _arrays, _routing

__all__ = [
    "class_counts",
    "dead_experts",
    "excitation_range",
    "load_entropy",
    "max_over_mean_load",
    "routing_entropy",
    "specialization_score",
]


def class_counts(active: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """How often each expert was active for samples of each class: the matrix S of the paper's section 4.4.

    Args:
      active: `[T, E]` boolean, whether the expert is active for the sample.
      labels: `[T]` integers, the class of each sample; one outside `[0, C)` leaves the sample out.
      num_classes: C.

    Returns:
      `[E, C]` float32; matrices of several batches add up.

    Raises:
      ValueError: if `active` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> active = jnp.array([[True, False], [True, True], [True, False]])
      >>> metrics.class_counts(active, labels=jnp.array([0, 1, 1]), num_classes=2)
      Array([[1., 2.],
             [0., 1.]], dtype=float32)
    """
    if active.dtype != jnp.bool_:
        raise ValueError(f"class_counts: active must be boolean; got {active.dtype}. Pass `activations > 0`.")
    by_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.einsum("te,tc->ec", active.astype(jnp.float32), by_class)


def specialization_score(counts: jax.Array) -> jax.Array:
    r"""How far each expert keeps to a few classes: the Gini-Simpson index, averaged over the active experts.

    .. math::
      \mathcal{S} = \frac{1}{|N_{active}|} \sum_{n \in N_{active}} \sum_{c=1}^{C} p_{n,c}^2, \qquad
      p_{n,c} = \frac{S_{n,c}}{\sum_j S_{n,j}}

    Args:
      counts: `[..., E, C]`, how often each expert was active for each class, as from `class_counts`.

    Returns:
      `[...]`, from 1/C (every expert sees all classes alike) to 1 (each sees one class only). NaN if no expert is
      active: then there is nothing to score.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.specialization_score(jnp.array([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))  # 1, 1/2, not active
      Array(0.75, dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equation 11.
    """
    counts = _arrays.float32_or_wider(counts)
    total = jnp.sum(counts, axis=-1)
    p = counts / jnp.expand_dims(jnp.where(total == 0, 1, total), -1)
    return jnp.sum(p**2, axis=(-2, -1)) / jnp.sum(total > 0, axis=-1).astype(p.dtype)


def routing_entropy(weights: jax.Array, where: jax.Array | None = None) -> jax.Array:
    r"""How undecided the routing of a token is on average, in nats: from 0 (one expert) to log E (all alike).

    .. math::
      H = -\mathbb{E}_x\left[\sum_i p_i \log p_i\right], \qquad p_i = \frac{w_i}{\sum_j w_j}

    The paper does not say of which distribution. For a router, pass its softmax probabilities over all E experts. For a
    Top-K layer of neurons, pass the retained activations: p is then the share of each neuron in what the layer passes
    on, and the entropy is at most log K.

    Args:
      weights: `[T..., E]`, not negative; each token's are divided by their sum. A token whose weights are all zero has
        no distribution, and is left out of the mean.
      where: `[T...]` boolean; False leaves a token (padding) out.

    Returns:
      The mean over the tokens, a scalar; NaN if no token is left.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.routing_entropy(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0]]))  # 0 and log 2
      Array(0.3465736, dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.4.
    """
    weights = _arrays.float32_or_wider(weights)
    total = jnp.sum(weights, axis=-1)
    entropy = _entropy(weights)
    counted = total != 0 if where is None else where & (total != 0)
    return jnp.sum(entropy, where=counted) / jnp.sum(counted).astype(entropy.dtype)


def load_entropy(utilization: jax.Array | _routing.RoutingCounts) -> jax.Array:
    r"""How evenly a batch is spread over the experts: 1 if all carry the same load, 0 if one carries everything.

    .. math::
      H = -\frac{1}{\log E} \sum_i p_i \log p_i, \qquad p_i = \frac{u_i}{\sum_j u_j}

    Args:
      utilization: `[..., E]`, or `RoutingCounts`.

    Returns:
      `[...]` in [0, 1], up to rounding; NaN where there was no load, or where E = 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.load_entropy(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
      Array([0.5, 1. ], dtype=float32)
    """
    utilization = _fractions(utilization)
    entropy = _entropy(utilization) / jnp.log(jnp.asarray(utilization.shape[-1], utilization.dtype))
    return jnp.where(jnp.sum(utilization, axis=-1) == 0, jnp.nan, entropy)


def max_over_mean_load(utilization: jax.Array | _routing.RoutingCounts) -> jax.Array:
    """The busiest expert's load over the mean load: 1 if all carry the same, E if one carries everything.

    Args:
      utilization: `[..., E]`, or `RoutingCounts`.

    Returns:
      `[...]`; NaN where there was no load.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.max_over_mean_load(jnp.array([0.25, 0.75]))
      Array(1.5, dtype=float32)
    """
    utilization = _fractions(utilization)
    return jnp.max(utilization, axis=-1) / jnp.mean(utilization, axis=-1)


def dead_experts(utilization: jax.Array | _routing.RoutingCounts, threshold: float = 0.0) -> jax.Array:
    """The share of experts that were given no token, or no more than a threshold.

    Args:
      utilization: `[..., E]`, or `RoutingCounts`.
      threshold: the utilization up to which an expert counts as dead.

    Returns:
      `[...]` in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.dead_experts(jnp.array([0.0, 0.5, 0.5, 0.0]))
      Array(0.5, dtype=float32)
    """
    utilization = _fractions(utilization)
    dead = (utilization <= threshold).astype(jnp.float32)
    return jnp.mean(jnp.where(jnp.isnan(utilization), jnp.nan, dead), axis=-1)


def excitation_range(excitation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest factor by which a layer's experts are scaled.

    Args:
      excitation: `[..., E]`, a leaf of `excitation_optax.excitation(...)`.

    Returns:
      Two arrays `[...]`, the minimum and the maximum.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import metrics
      >>> metrics.excitation_range(jnp.array([0.5, 1.5, 1.0]))
      (Array(0.5, dtype=float32), Array(1.5, dtype=float32))
    """
    return jnp.min(excitation, axis=-1), jnp.max(excitation, axis=-1)


def _fractions(utilization: jax.Array | _routing.RoutingCounts) -> jax.Array:
    counted = isinstance(utilization, _routing.RoutingCounts)
    return _arrays.float32_or_wider(utilization.utilization if counted else utilization)


def _entropy(weights: jax.Array) -> jax.Array:
    """Entropy in nats of weights over the last axis, divided by their sum; 0 where all are zero."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = weights / jnp.where(total == 0, 1, total)
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
