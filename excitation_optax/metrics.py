"""Metrics of routing to log, as pure functions: specialization, entropy, load. The paper is arXiv 2602.21798.

The first argument is an array, nested lists of numbers, or a tree of these, and the result is the same tree of metrics.
Utilization can be `RoutingCounts` too. A `ValueError` names the path of a malformed leaf. Axis letters: T tokens (all
axes that hold tokens or samples), E experts, C classes. Leading axes of `[..., E]` are layers, each measured alone.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from excitation_optax import _arrays, _routing

__all__ = ["class_counts", "dead_experts", "load_entropy", "max_over_mean_load", "routing_entropy"]
__all__ += ["specialization_score"]


def _of_each_leaf(metric: Any) -> Any:
    """Lets the first argument of a metric be a tree; an error names the leaf."""
    signature, name = inspect.signature(metric), metric.__name__

    @functools.wraps(metric)
    def of_tree(*args, **kwargs):
        tree, *others = signature.bind(*args, **kwargs).args
        if not jax.tree.leaves(tree):
            raise ValueError(f"{name} requires an array, or a tree with at least one; got {_arrays.show_value(tree)}.")

        def of_leaf(path, leaf):
            try:
                return metric(leaf, *others)
            except ValueError as error:
                at = f" at {jax.tree_util.keystr(path, simple=True, separator='/')}" if path else ""
                raise ValueError(f"{name}{at}: {error}") from error

        return jax.tree.map_with_path(of_leaf, tree, is_leaf=lambda x: _routing.is_counts(x) or _is_numbers(x))

    return of_tree


def _is_numbers(x: Any) -> bool:
    """Nested lists of scalars are one array; a list of arrays is a tree."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(_arrays.shape_of(y) == () or _is_numbers(y) for y in x)


@_of_each_leaf
def class_counts(active: Any, labels: jax.Array, num_classes: int) -> Any:
    """Counts how often each expert was active for samples of each class, `[E, C]` float32. Add several batches' counts.

    Args:
      active: `[T, E]` boolean, whether the expert is active for the sample.
      labels: `[T]` integers, the class of each sample; one outside `[0, C)` leaves the sample out.
      num_classes: C. The result is the matrix S of section 4.4 of the paper.

    Example:
      >>> active = jnp.array([[True, False], [True, True], [True, False]])
      >>> metrics.class_counts(active, labels=jnp.array([0, 1, 1]), num_classes=2)
      Array([[1., 2.],
             [0., 1.]], dtype=float32)
    """
    num_classes = _arrays.static_int("num_classes", num_classes)
    mask = _arrays.as_array("active", active, "booleans", "[T, E]", " Pass `activations > 0`.")
    labels = _arrays.as_array("labels", labels, "integers", "[T]")
    if labels.shape != mask.shape[:1]:
        raise ValueError(f"labels must be [T] = [{len(mask)}], one a sample; got {_arrays.show_value(labels)}.")
    by_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.einsum("te,tc->ec", mask.astype(jnp.float32), by_class)


@_of_each_leaf
def specialization_score(counts: Any) -> Any:
    r"""Measures how few classes an expert serves, `[...]`: from 1/C (all classes equally) to 1 (one class only).

    It is Simpson's index, averaged over the active experts (equation 11 of the paper); NaN if there are none.
    Counts `[..., E, C]`, as from `class_counts`, say how often each expert was active for each class.

    .. math:: \mathcal{S} = \frac{1}{|N_{active}|} \sum_{n \in N_{active}} \sum_{c=1}^{C} p_{n,c}^2, \qquad
      p_{n,c} = \frac{S_{n,c}}{\sum_j S_{n,j}}

    Example:
      >>> metrics.specialization_score(jnp.array([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))  # 1, 1/2, not active
      Array(0.75, dtype=float32)
    """
    s = _arrays.float32_or_wider(_arrays.as_array("counts", counts, axes="[..., E, C]", hint=" See class_counts."))
    p = _shares(s)
    return jnp.sum(p**2, axis=(-2, -1)) / jnp.sum(jnp.sum(s, axis=-1) > 0, axis=-1).astype(p.dtype)


@_of_each_leaf
def routing_entropy(weights: Any, where: jax.Array | None = None) -> Any:
    r"""Measures the mean entropy of the tokens' routing, in nats: from 0 (one expert) to log E (all experts equally).

    .. math:: H = -\mathbb{E}_x\left[\sum_i p_i \log p_i\right], \qquad p_i = \frac{w_i}{\sum_j w_j}

    For a router, pass its softmax probabilities. For a Top-K layer of neurons, pass the retained activations: p is then
    each neuron's share of the layer's output, and the entropy is at most log K (section 4.4 of the paper).

    Args:
      weights: `[T..., E]`, not negative. A token whose weights are all zero is left out of the mean.
      where: `[T...]` boolean; False leaves a token (padding) out. If no token is left, the result is NaN.

    Example:
      >>> metrics.routing_entropy(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0]]))  # 0 and log 2
      Array(0.3465736, dtype=float32)
    """
    w = _arrays.float32_or_wider(_arrays.as_array("weights", weights, axes="[T..., E]"))
    counted = jnp.sum(w, axis=-1) != 0
    if where is not None:
        counted &= _routing.token_mask(where, counted.shape)
    return jnp.sum(_entropy(w), where=counted) / jnp.sum(counted).astype(w.dtype)


@_of_each_leaf
def load_entropy(utilization: Any) -> Any:
    r"""Measures how evenly the experts are loaded, `[...]`: 1 if all have the same load, 0 if one expert has all of it.

    .. math:: H = -\frac{1}{\log E} \sum_i p_i \log p_i, \qquad p_i = \frac{u_i}{\sum_j u_j}

    Utilization is `[..., E]` or `RoutingCounts`. The result is NaN where there was no load, or where E = 1.

    Example:
      >>> metrics.load_entropy(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
      Array([0.5, 1. ], dtype=float32)
    """
    u = _routing.fractions(utilization)
    entropy = _entropy(u) / jnp.log(jnp.asarray(u.shape[-1], u.dtype))
    return jnp.where(jnp.sum(u, axis=-1) == 0, jnp.nan, entropy)


@_of_each_leaf
def max_over_mean_load(utilization: Any) -> Any:
    """Divides the busiest expert's load by the mean load, `[...]`: 1 if all have the same, E if one expert has all.

    Utilization is as for `load_entropy`. The result is NaN where there was no load.

    Example:
      >>> metrics.max_over_mean_load(jnp.array([0.25, 0.75]))
      Array(1.5, dtype=float32)
    """
    u = _routing.fractions(utilization)
    return jnp.max(u, axis=-1) / jnp.mean(u, axis=-1)


@_of_each_leaf
def dead_experts(utilization: Any, threshold: float = 0.0) -> Any:
    """Measures the share of experts whose utilization is at most a threshold, `[...]` in [0, 1].

    Utilization is as for `load_entropy`.

    Example:
      >>> metrics.dead_experts(jnp.array([0.0, 0.5, 0.5, 0.0]))
      Array(0.5, dtype=float32)
    """
    u = _routing.fractions(utilization)
    return jnp.mean(jnp.where(jnp.isnan(u), jnp.nan, (u <= threshold).astype(jnp.float32)), axis=-1)


def _shares(x: jax.Array) -> jax.Array:
    """Divides by the sum over the last axis; 0 where all are zero."""
    return _arrays.divide(x, jnp.sum(x, axis=-1, keepdims=True))


def _entropy(weights: jax.Array) -> jax.Array:
    p = _shares(weights)
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
