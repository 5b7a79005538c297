"""Metrics of routing to log: specialization, entropy, load. They are pure functions and do not change training.

Each metric takes an array, nested lists of numbers, or a tree of these, and returns the same tree of metrics. Metrics
of utilization take `RoutingCounts` too.

Axis letters: T tokens (all axes that hold tokens or samples, in any number), E experts, C classes. Leading axes of an
argument `[..., E]` are layers, each measured on its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from excitation_optax import _arrays, _routing

__all__ = [
    "class_counts",
    "dead_experts",
    "load_entropy",
    "max_over_mean_load",
    "routing_entropy",
    "specialization_score",
]


def class_counts(active: Any, labels: jax.Array, num_classes: int) -> Any:
    """Counts how often each expert was active for samples of each class: the matrix S of the paper's section 4.4.

    Args:
      active: `[T, E]` boolean, whether the expert is active for the sample; or a tree of these, one for each layer.
      labels: `[T]` integers, the class of each sample; one outside `[0, C)` leaves the sample out.
      num_classes: C.

    Returns:
      `[E, C]` float32 for each mask; add the matrices of several batches.

    Raises:
      ValueError: if `active` is not boolean `[T, E]`, `labels` are not integers `[T]`, or `num_classes` is not a
        positive integer.

    Example:
      >>> from excitation_optax import metrics
      >>> active = jnp.array([[True, False], [True, True], [True, False]])
      >>> metrics.class_counts(active, labels=jnp.array([0, 1, 1]), num_classes=2)
      Array([[1., 2.],
             [0., 1.]], dtype=float32)
    """
    num_classes = _arrays.static_int("class_counts: num_classes", num_classes)
    labels = _arrays.as_array("class_counts: labels", labels)

    def counts(leaf):
        mask = _arrays.as_array("active", leaf)
        if mask.dtype != jnp.bool_ or mask.ndim != 2:
            raise ValueError(f"active must be boolean [T, E]; got {_arrays.show_value(mask)}. Pass `activations > 0`.")
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != mask.shape[:1]:
            raise ValueError(
                f"labels must be integers [T] = [{mask.shape[0]}], one for each sample; got "
                f"{_arrays.show_value(labels)}."
            )
        by_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        return jnp.einsum("te,tc->ec", mask.astype(jnp.float32), by_class)

    return _map("class_counts", counts, active)


def specialization_score(counts: Any) -> Any:
    r"""Measures how few classes each expert serves: the Gini-Simpson index, averaged over the active experts.

    .. math::
      \mathcal{S} = \frac{1}{|N_{active}|} \sum_{n \in N_{active}} \sum_{c=1}^{C} p_{n,c}^2, \qquad
      p_{n,c} = \frac{S_{n,c}}{\sum_j S_{n,j}}

    Args:
      counts: `[..., E, C]`, how often each expert was active for each class, as from `class_counts`; or a tree of
        these.

    Returns:
      `[...]`, from 1/C (every expert sees all classes equally) to 1 (each sees one class only). NaN if no expert is
      active.

    Raises:
      ValueError: if `counts` are not arrays `[..., E, C]`.

    Example:
      >>> from excitation_optax import metrics
      >>> metrics.specialization_score(jnp.array([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))  # 1, 1/2, not active
      Array(0.75, dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equation 11.
    """

    def score(leaf):
        s = _arrays.as_array("counts", leaf)
        if s.ndim < 2 or 0 in s.shape[-2:]:
            raise ValueError(f"counts must be an array [..., E, C]; got {_arrays.show_value(s)}. See class_counts.")
        s = _arrays.float32_or_wider(s)
        total = jnp.sum(s, axis=-1)
        p = s / jnp.expand_dims(jnp.where(total == 0, 1, total), -1)
        return jnp.sum(p**2, axis=(-2, -1)) / jnp.sum(total > 0, axis=-1).astype(p.dtype)

    return _map("specialization_score", score, counts)


def routing_entropy(weights: Any, where: jax.Array | None = None) -> Any:
    r"""Measures the mean entropy of a token's routing, in nats: from 0 (one expert) to log E (all experts equally).

    .. math::
      H = -\mathbb{E}_x\left[\sum_i p_i \log p_i\right], \qquad p_i = \frac{w_i}{\sum_j w_j}

    The paper does not name the distribution. For a router, pass its softmax probabilities over all E experts. For a
    Top-K layer of neurons, pass the retained activations: p is then each neuron's share of the layer's output, and the
    entropy is at most log K.

    Args:
      weights: `[T..., E]`, not negative, or a tree of these. Each token's weights are divided by their sum. A token
        whose weights are all zero has no distribution and is left out of the mean.
      where: `[T...]` boolean; False leaves a token (padding) out.

    Returns:
      The mean over the tokens, a scalar; NaN if no token is left.

    Raises:
      ValueError: if `weights` are not arrays `[T..., E]`, or `where` is not boolean or does not fit.

    Example:
      >>> from excitation_optax import metrics
      >>> metrics.routing_entropy(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0]]))  # 0 and log 2
      Array(0.3465736, dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.4.
    """

    def mean_entropy(leaf):
        w = _arrays.as_array("weights", leaf)
        if w.ndim == 0 or w.shape[-1] == 0:
            raise ValueError(f"weights must be an array [T..., E]; got {_arrays.show_value(w)}.")
        w = _arrays.float32_or_wider(w)
        counted = jnp.sum(w, axis=-1) != 0
        if where is not None:
            counted &= _routing.token_mask(where, counted.shape)
        entropy = _entropy(w)
        return jnp.sum(entropy, where=counted) / jnp.sum(counted).astype(entropy.dtype)

    return _map("routing_entropy", mean_entropy, weights)


def load_entropy(utilization: Any) -> Any:
    r"""Measures how evenly the experts are loaded: 1 if all have the same load, 0 if one expert has all of it.

    .. math::
      H = -\frac{1}{\log E} \sum_i p_i \log p_i, \qquad p_i = \frac{u_i}{\sum_j u_j}

    Args:
      utilization: `[..., E]` or `RoutingCounts`, or a tree of these.

    Returns:
      `[...]` in [0, 1], up to rounding; NaN where there was no load, or where E = 1.

    Raises:
      ValueError: if there is no axis of experts, or a value is negative.

    Example:
      >>> from excitation_optax import metrics
      >>> metrics.load_entropy(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
      Array([0.5, 1. ], dtype=float32)
    """

    def normalized_entropy(leaf):
        u = _routing.fractions(leaf)
        entropy = _entropy(u) / jnp.log(jnp.asarray(u.shape[-1], u.dtype))
        return jnp.where(jnp.sum(u, axis=-1) == 0, jnp.nan, entropy)

    return _map("load_entropy", normalized_entropy, utilization)


def max_over_mean_load(utilization: Any) -> Any:
    """Divides the busiest expert's load by the mean load: 1 if all have the same, E if one expert has all of it.

    Args:
      utilization: `[..., E]` or `RoutingCounts`, or a tree of these.

    Returns:
      `[...]`; NaN where there was no load.

    Raises:
      ValueError: if there is no axis of experts, or a value is negative.

    Example:
      >>> from excitation_optax import metrics
      >>> metrics.max_over_mean_load(jnp.array([0.25, 0.75]))
      Array(1.5, dtype=float32)
    """

    def max_over_mean(leaf):
        u = _routing.fractions(leaf)
        return jnp.max(u, axis=-1) / jnp.mean(u, axis=-1)

    return _map("max_over_mean_load", max_over_mean, utilization)


def dead_experts(utilization: Any, threshold: float = 0.0) -> Any:
    """Measures the share of experts whose utilization is at most a threshold, by default 0.

    Args:
      utilization: `[..., E]` or `RoutingCounts`, or a tree of these.
      threshold: the utilization up to which an expert counts as dead.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: if there is no axis of experts, or a value is negative.

    Example:
      >>> from excitation_optax import metrics
      >>> metrics.dead_experts(jnp.array([0.0, 0.5, 0.5, 0.0]))
      Array(0.5, dtype=float32)
    """

    def dead_share(leaf):
        u = _routing.fractions(leaf)
        dead = (u <= threshold).astype(jnp.float32)
        return jnp.mean(jnp.where(jnp.isnan(u), jnp.nan, dead), axis=-1)

    return _map("dead_experts", dead_share, utilization)


def _map(name: str, metric: Callable[[Any], jax.Array], tree: Any) -> Any:
    """The metric of every leaf, with the leaf's path in its error."""
    is_leaf = lambda x: _routing.is_counts(x) or _is_numbers(x)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    if not leaves:
        raise ValueError(f"{name} requires an array, or a tree with at least one; got {_arrays.show_value(tree)}.")
    results = []
    for path, leaf in leaves:
        try:
            results.append(metric(leaf))
        except ValueError as error:
            at = f" at {jax.tree_util.keystr(path, simple=True, separator='/')}" if path else ""
            raise ValueError(f"{name}{at}: {error}") from error
    return treedef.unflatten(results)


def _is_numbers(x: Any) -> bool:
    """Nested lists of scalars are one array; a list of arrays is a tree."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(_arrays.shape_of(y) == () or _is_numbers(y) for y in x)


def _entropy(weights: jax.Array) -> jax.Array:
    """Entropy in nats of weights over the last axis, divided by their sum; 0 where all are zero."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = weights / jnp.where(total == 0, 1, total)
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
