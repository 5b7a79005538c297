"""The strategies: one function for each equation of Phi(u, gamma), numbered as in arXiv 2602.21798.

E experts of one layer are on the last axis, and expectations run over them; leading axes are layers. The largest entry
is divided out first (in `exp_diff` subtracted), so that every strategy is finite for gamma up to 10. A layer that is
zero everywhere is excited by 1. A NaN stays a NaN. Negative utilization is an error if its values can be read.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from excitation_optax import _arrays, _routing

# `(utilization [..., E], gamma) -> excitation [..., E]`. If it has an unbound keyword `key`, it is random.
Strategy = Callable[..., jax.Array]

_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def zero_sum(utilization: ArrayLike, gamma: ArrayLike) -> jax.Array:
    r"""Amplifies busy experts at the expense of idle ones; the mean excitation of a layer is 1.

    .. math:: \Phi_{ZS}(u_k, \gamma) = \frac{u_k^\gamma}{\mathbb{E}[u^\gamma]} \qquad \text{(equation 6)}

    Args:
      utilization: `[..., E]`, the fraction of the batch that was routed to each expert, in [0, 1].
      gamma: scalar, not negative; 0 is the identity.

    Returns:
      The excitation, `[..., E]`, between 0 and E (an expert with the whole batch gets E).

    Example:
      >>> excitation_optax.zero_sum(jnp.array([0.1, 0.2, 0.3]), 1.0)
      Array([0.5, 1. , 1.5], dtype=float32)
    """
    u = _routing.fractions(utilization)
    largest = jnp.max(u, axis=-1, keepdims=True)
    return _power_over_mean(_arrays.divide(u, largest, if_zero=1), gamma)


def positive_sum(utilization: ArrayLike, gamma: ArrayLike) -> jax.Array:
    r"""Amplifies busy experts and leaves the others unchanged: zero-sum with a lower bound of 1.

    .. math:: \Phi_{PS}(u_k, \gamma) = \max(1, \Phi_{ZS}(u_k, \gamma)) \qquad \text{(equation 7)}

    Shapes are those of `zero_sum`. The excitation lies between 1 and E.

    Example:
      >>> excitation_optax.positive_sum(jnp.array([0.1, 0.2, 0.3]), 1.0)
      Array([1. , 1. , 1.5], dtype=float32)
    """
    return jnp.maximum(1, zero_sum(utilization, gamma))


def exp_diff(utilization: ArrayLike, gamma: ArrayLike) -> jax.Array:
    r"""Amplifies by differences in utilization instead of ratios; the mean excitation of a layer is 1.

    .. math:: \Phi_{ED}(u_k, \gamma) = \frac{\exp(\gamma u_k)}{\mathbb{E}[\exp(\gamma u)]} \qquad \text{(equation 8)}

    Shapes are those of `zero_sum`. The excitation lies between 0 and E, and depends on the scale of utilization.

    Example:
      >>> excitation_optax.exp_diff(jnp.array([0.0, jnp.log(3.0)]), 1.0).round(4)  # exp: 1, 3
      Array([0.5, 1.5], dtype=float32)
    """
    u = _routing.fractions(utilization)
    exponential = jnp.exp(jnp.asarray(gamma, u.dtype) * (u - jnp.max(u, axis=-1, keepdims=True)))
    return exponential / jnp.mean(exponential, axis=-1, keepdims=True)


def global_exp(utilization: ArrayLike, gamma: ArrayLike) -> jax.Array:
    r"""Control: one factor for all experts of a layer, which acts like a higher learning rate.

    .. math:: \Phi_{GE} = \mathbb{E}[\exp(\gamma \cdot \mathrm{ReLU}(u - \mathbb{E}[u]))] \qquad \text{(equation 9)}

    Shapes are those of `zero_sum`. The excitation lies between 1 and exp(gamma).

    Example:
      >>> excitation_optax.global_exp(jnp.array([0.0, 2 * jnp.log(3.0)]), 1.0).round(4)  # above the mean: 0, log 3
      Array([2., 2.], dtype=float32)
    """
    u = _routing.fractions(utilization)
    above = jax.nn.relu(u - jnp.mean(u, axis=-1, keepdims=True))
    return jnp.broadcast_to(jnp.mean(jnp.exp(jnp.asarray(gamma, u.dtype) * above), axis=-1, keepdims=True), u.shape)


def random_boost(utilization: ArrayLike, gamma: ArrayLike, *, key: jax.Array) -> jax.Array:
    r"""Control: zero-sum's factors, shuffled among the experts of a layer at each step.

    .. math:: \Phi_{RB}(u_k, \gamma) = \Phi_{ZS}(u_{\pi(k)}, \gamma) \qquad \pi \text{ a permutation (section 3.2.2)}

    Args:
      utilization: `[..., E]`, as for `zero_sum`. Each layer on the leading axes has its own permutation.
      gamma: as for `zero_sum`.
      key: a PRNG key. `scale_by_excitation` passes `fold_in(key(seed), step)`, the same key to every layer.

    Example:
      >>> shuffled = excitation_optax.random_boost(jnp.array([0.1, 0.2, 0.3]), 1.0, key=jax.random.key(0))
      >>> jnp.sort(shuffled)
      Array([0.5, 1. , 1.5], dtype=float32)
    """
    return jax.random.permutation(key, zero_sum(utilization, gamma), axis=-1, independent=True)


def inverted(utilization: ArrayLike, gamma: ArrayLike) -> jax.Array:
    r"""Control: amplifies idle experts and slows busy ones; the mean excitation of a layer is 1.

    .. math:: \Phi_{Inv}(u_k, \gamma) = \frac{u_k^{-\gamma}}{\mathbb{E}[u^{-\gamma}]} \qquad \text{(equation 10)}

    Shapes are those of `zero_sum`. The excitation lies between 0 and E. Idle experts share all, and the others get 0.

    Example:
      >>> excitation_optax.inverted(jnp.array([0.1, 0.3]), 1.0).round(4)  # 1/u: 10, 10/3
      Array([1.5, 0.5], dtype=float32)
      >>> excitation_optax.inverted(jnp.array([0.0, 0.5, 0.5]), 1.0)
      Array([3., 0., 0.], dtype=float32)
    """
    u = _routing.fractions(utilization)
    smallest = jnp.min(u, axis=-1, keepdims=True)
    return _power_over_mean(_arrays.divide(smallest, u, if_zero=1), gamma)


def clipped(strategy: Strategy, maximum: float) -> Strategy:
    r"""Bounds a strategy: no expert's update is amplified more than `maximum` times.

    .. math:: \Phi(u_k, \gamma) = \min(m, \Phi_{strategy}(u_k, \gamma))

    Zero-sum reaches E where one expert takes the whole batch: that expert then trains at E times your learning rate.

    Args:
      strategy: the strategy to bound; a random one stays random.
      maximum: m, positive and finite; 1 amplifies nothing.

    Raises:
      ValueError: if `strategy` is not a callable of `(utilization, gamma)`, or `maximum` is out of range.

    Example:
      >>> excitation_optax.clipped(excitation_optax.zero_sum, 2.0)(jnp.array([0.0, 0.0, 0.0, 1.0]), 1.0)
      Array([0., 0., 0., 2.], dtype=float32)
    """
    is_random(strategy)  # raises if it is no strategy
    _arrays.check_finite("clipped: maximum", maximum, is_positive=True)
    bound = float(maximum)

    @functools.wraps(strategy)  # so that is_random sees the parameters of the strategy inside
    def clipped_strategy(utilization, gamma, **key):
        return jnp.minimum(strategy(utilization, gamma, **key), bound)

    return clipped_strategy


def is_random(strategy: Strategy) -> bool:
    """Whether a strategy has a keyword `key` that is unbound or None; a ValueError if it is no strategy."""
    what = "strategy must be a callable (utilization, gamma) -> excitation"
    if not callable(strategy):
        raise ValueError(f"{what}; got {strategy!r}. Pass a function such as excitation_optax.zero_sum, not its name.")
    try:
        signature = inspect.signature(strategy)
    except ValueError:  # some callables in C have no signature
        return False
    key = signature.parameters.get("key")
    # functools.partial(strategy, key=k) has a `key` with the default k.
    random = key is not None and key.kind in _KEYWORD and (key.default is key.empty or key.default is None)
    try:
        signature.bind(None, None, **({"key": None} if random else {}))
    except TypeError as error:
        raise ValueError(
            f"{what}; {name(strategy)}{signature} cannot be called like this: {error}. "
            "Bind its other arguments with functools.partial."
        ) from error
    return random


def name(strategy: Strategy) -> str:
    return getattr(strategy, "__name__", repr(strategy))


def _power_over_mean(ratio: jax.Array, gamma: ArrayLike) -> jax.Array:
    """`ratio ** gamma` over its mean in the layer. NaN ** 0 stays NaN, where IEEE 754 says 1."""
    power = jnp.where(jnp.isnan(ratio), ratio, ratio ** jnp.asarray(gamma, ratio.dtype))
    return power / jnp.mean(power, axis=-1, keepdims=True)
