"""The router of an MoE layer: it scores the experts and selects K of them for each token.

Two ways to balance it: losses (`load_balancing_loss`), or a selection bias without a loss (`update_router_bias`).

Axis letters: T tokens, D model width, E experts, K experts per token, G groups of experts, L layers.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import excitation_optax
from models import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Sizes and options of a `Router`, which `models.moe.MoEConfig` has too."""

    d_model: int  # D
    num_experts: int  # E
    experts_per_token: int  # K
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the logits: over all experts, or of each
    selection_bias: bool = False  # add a `SelectionBias` to the scores for the selection; see `update_router_bias`
    num_groups: int = 1  # G groups of E / G consecutive experts; a token's experts come from its best groups
    groups_per_token: int = 1  # the number of these groups
    # Divide the K gates of a token by their sum. None: if K > 1, since a single gate would always be 1.
    normalize_gates: bool | None = None
    gate_scale: float = 1.0  # a factor of all gates, after normalization
    router_jitter: float = 0.0  # in training, multiply the router's input by noise from 1 - jitter to 1 + jitter

    def __post_init__(self):
        checks.check_sizes(self, "d_model", "num_experts", "experts_per_token", "num_groups", "groups_per_token")
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f'scores must be "softmax" or "sigmoid"; got {self.scores!r}.')
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts = {self.num_experts}; got {self.experts_per_token}."
            )
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups must divide num_experts; got {self.num_groups} for {self.num_experts}.")
        held = self.groups_per_token * (self.num_experts // self.num_groups)
        if not self.experts_per_token <= held <= self.num_experts:
            raise ValueError(
                f"groups_per_token must be at most num_groups = {self.num_groups}, and enough for experts_per_token = "
                f"{self.experts_per_token} of {self.num_experts} experts; got {self.groups_per_token}."
            )
        if not 0 < self.gate_scale < math.inf:
            raise ValueError(f"gate_scale must be positive and finite; got {self.gate_scale}.")
        if not 0 <= self.router_jitter < 1:
            raise ValueError(f"router_jitter must be at least 0 and below 1; got {self.router_jitter}.")


class SelectionBias(nnx.Variable):
    """The NNX variable type of a router's selection bias.

    It is not an `nnx.Param`, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` and `nnx.grad` ignore it. If your loop splits
    the model, use `nnx.split(model, nnx.Param, SelectionBias)`.
    """


class Routes(NamedTuple):
    """The decisions of a router."""

    gates: jax.Array  # [T, K] float32, the weights of the chosen experts
    indices: jax.Array  # [T, K] int32, the chosen experts, best first
    logits: jax.Array  # [T, E] float32
    probabilities: jax.Array  # [T, E] float32, the scores divided by their sum


class Router(nnx.Module):
    r"""Scores all experts and selects K of them for each token, in float32, whatever the dtype of the layer.

    .. math::
      z_t = W_r x_t, \qquad
      s_t = \mathrm{softmax}(z_t) \;\text{or}\; \mathrm{sigmoid}(z_t), \qquad
      \mathcal{A}_t = \mathrm{top}_K(s_t + b), \qquad
      g_{te} = \frac{s_{te}}{\sum_{e' \in \mathcal{A}_t} s_{te'}}

    The bias b affects the selection, but not the gates g.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import router
      >>> config = router.RouterConfig(d_model=16, num_experts=8, experts_per_token=2, selection_bias=True)
      >>> layer = router.Router(config, rngs=nnx.Rngs(0))
      >>> routes = layer(jnp.ones((3, 16)))
      >>> routes.gates.shape, routes.indices.shape, layer.bias.shape
      ((3, 2), (3, 2), (8,))

    References:
      DeepSeek-AI, `DeepSeek-V3 Technical Report <https://arxiv.org/abs/2412.19437>`_, equations 12 to 16.
    """

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (config.d_model, config.num_experts), jnp.float32))  # [D, E]
        self.bias = SelectionBias(jnp.zeros(config.num_experts, jnp.float32)) if config.selection_bias else None  # [E]
        self.deterministic = False  # model.eval() sets it: no jitter

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> Routes:
        """Routes tokens x `[T, D]`; `key` is a JAX key for the jitter.

        Raises:
          ValueError: if x does not fit, or jitter has no key.
        """
        config = self.config
        x = checks.check_array(x, "Router: x", "floats", ("T", config.d_model)).astype(jnp.float32)
        if config.router_jitter and not self.deterministic:
            if key is None:
                raise ValueError("router_jitter requires a key in training: model(x, key=key), or model.eval() before.")
            jitter = config.router_jitter
            x *= jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)
        # HIGHEST: TPUs would otherwise compute this product in bfloat16.
        logits = jnp.matmul(x, self.kernel[...], precision=lax.Precision.HIGHEST)
        # Up to a constant for each token, which the softmax below removes.
        log_scores = logits if config.scores == "softmax" else jax.nn.log_sigmoid(logits)
        probabilities = jax.nn.softmax(log_scores)
        scores = probabilities if config.scores == "softmax" else jax.nn.sigmoid(logits)
        # Scores that are rounded to 0 or 1 still have an order as logarithms.
        ranked = log_scores if self.bias is None and config.num_groups == 1 else scores
        bias = None if self.bias is None else self.bias[...]
        indices = select_experts(
            ranked,
            config.experts_per_token,
            bias,
            num_groups=config.num_groups,
            groups_per_token=config.groups_per_token,
        )
        normalize = config.normalize_gates
        if config.experts_per_token > 1 if normalize is None else normalize:
            # Experts that were not chosen get no gradient, not even by rounding.
            gates = jax.nn.softmax(jnp.take_along_axis(log_scores, indices, axis=-1))
        else:
            gates = jnp.take_along_axis(scores, indices, axis=-1)
        return Routes(gates if config.gate_scale == 1 else config.gate_scale * gates, indices, logits, probabilities)


def select_experts(
    scores: jax.Array,
    experts_per_token: int,
    bias: jax.Array | None = None,
    *,
    num_groups: int = 1,
    groups_per_token: int = 1,
) -> jax.Array:
    """Selects the K experts `[T, K]` with the highest biased scores, best first, from each token's best groups.

    The score of a group is the sum of its two highest biased scores, as in DeepSeek-V3.

    Args:
      scores: `[T, E]` floats.
      experts_per_token: K.
      bias: `[E]` floats, added to the scores of every token.
      num_groups: G; a group is E / G consecutive experts.
      groups_per_token: how many groups a token may select from.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import router
      >>> scores = jnp.array([[0.9, 0.1, 0.6, 0.5]])
      >>> router.select_experts(scores, 1), router.select_experts(scores, 1, num_groups=2)  # 1.0 against 1.1
      (Array([[0]], dtype=int32), Array([[2]], dtype=int32))
    """
    scores = lax.stop_gradient(scores)
    if bias is not None:
        scores += lax.stop_gradient(bias)[None]
    if groups_per_token < num_groups:
        groups = scores.reshape(scores.shape[0], num_groups, -1)
        best_two = lax.top_k(groups, min(2, groups.shape[-1]))[0]
        kept = lax.top_k(jnp.sum(best_two, axis=-1), groups_per_token)[1]  # [T, groups_per_token]
        is_kept = jnp.any(jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_), axis=1)  # [T, G]
        scores = jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(scores.shape)
    return lax.top_k(scores, experts_per_token)[1]


def update_router_bias(
    bias: jax.Array,
    counts: excitation_optax.RoutingCounts,
    rate: float | jax.Array,
    *,
    axis_name: Any = None,
) -> jax.Array:
    r"""Moves a selection bias towards an even load: balancing without a loss.

    .. math::
      b_e' = b_e + \eta \, \mathrm{sign}(\bar{c} - c_e), \qquad b_e \leftarrow b_e' - \frac{1}{E} \sum_{e'} b_{e'}'

    The mean of the bias is removed because it changes no selection and would drift. Call this once for each optimizer
    step. With gradient accumulation, pass the sum of the micro-batches' counts. Under `jax.jit` with sharded inputs,
    counts are global already.

    Args:
      bias: b, `[E]`, or `[L, E]` for stacked layers.
      counts: c, `RoutingCounts` of this shape, as `capture_routing` returns them: before a capacity drops tokens.
      rate: the update speed; DeepSeek-V3 used 0.001.
      axis_name: the mapped axis, or a tuple of them, under `jax.shard_map` or `jax.pmap`: counts are summed over it.

    Returns:
      The new bias.

    Raises:
      ValueError: if the counts are not `RoutingCounts` of the bias's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> from models import router
      >>> counts = excitation_optax.RoutingCounts(jnp.array([6.0, 1.0, 1.0]), jnp.array(4.0))
      >>> router.update_router_bias(jnp.zeros(3), counts, 0.75)  # -0.75, 0.75, 0.75, less their mean 0.25
      Array([-1. ,  0.5,  0.5], dtype=float32)

    References:
      DeepSeek-AI, `DeepSeek-V3 Technical Report <https://arxiv.org/abs/2412.19437>`_, section 2.1.2.
    """
    if not isinstance(counts, excitation_optax.RoutingCounts):
        raise ValueError(f"update_router_bias: counts must be RoutingCounts; got {type(counts).__name__}.")
    bias = checks.check_array(bias, "update_router_bias: bias", "floats", jnp.shape(counts.counts))
    loads = counts.counts if axis_name is None else lax.psum(counts.counts, axis_name)
    mean = jnp.mean(loads, axis=-1, keepdims=True)
    bias = bias + jnp.asarray(rate, bias.dtype) * jnp.sign(mean - loads).astype(bias.dtype)
    return bias - jnp.mean(bias, axis=-1, keepdims=True)


def load_balancing_loss(
    counts: excitation_optax.RoutingCounts,
    probabilities: jax.Array,
    where: jax.Array | None = None,
    *,
    tokens: float | jax.Array | None = None,
) -> jax.Array:
    r"""Measures how unevenly a router loads its experts: 1 for an even load, and up to E / K.

    .. math::
      E \sum_{e=1}^{E} \frac{c_e}{\sum_{e'} c_{e'}} \, \frac{1}{T} \sum_{t=1}^{T} p_{te}

    The counts c have no gradient. For K = 1 it is equation 4 of the
    `Switch Transformers <https://arxiv.org/abs/2101.03961>`_; times K it is the loss of Hugging Face's `transformers`.

    Args:
      counts: c, `[E]`. With gradient accumulation, pass the counts of the whole batch.
      probabilities: p, `[T, E]`: `Routes.probabilities`.
      where: `[T]` boolean; False leaves a token (padding) out.
      tokens: T, by default the tokens that `where` leaves. With gradient accumulation, pass the tokens of the whole
        batch: then the losses of the micro-batches add up to the loss of the batch, even if their padding differs.

    Returns:
      A float32 scalar; 0 if there are no tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> from models import router
      >>> counts = excitation_optax.count_routing(jnp.array([[0], [0]]), num_experts=2)
      >>> router.load_balancing_loss(counts, jnp.array([[0.75, 0.25], [0.75, 0.25]]))
      Array(1.5, dtype=float32)
    """
    share = counts.counts / jnp.maximum(jnp.sum(counts.counts), 1)
    return probabilities.shape[-1] * jnp.sum(share * _mean_over_tokens(probabilities, where, tokens))


def router_z_loss(
    logits: jax.Array, where: jax.Array | None = None, *, tokens: float | jax.Array | None = None
) -> jax.Array:
    r"""Keeps the router's logits small, where float32 is precise (`ST-MoE <https://arxiv.org/abs/2202.08906>`_).

    .. math::
      \frac{1}{T} \sum_{t=1}^{T} \left( \log \sum_{e=1}^{E} \exp z_{te} \right)^2

    Args:
      logits: z, `[T, E]`: `Routes.logits`.
      where: `[T]` boolean; False leaves a token (padding) out.
      tokens: T, as in `load_balancing_loss`.

    Returns:
      A float32 scalar; 0 if there are no tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import router
      >>> router.router_z_loss(jnp.log(jnp.array([[0.5, 0.5]])))
      Array(0., dtype=float32)
    """
    return _mean_over_tokens(jax.nn.logsumexp(logits, axis=-1) ** 2, where, tokens)


def _mean_over_tokens(x, where, tokens):
    """Sums over the leading axis, and divides by `tokens`."""
    if where is not None:
        x = jnp.where(jnp.expand_dims(where, tuple(range(1, x.ndim))), x, 0)
    if tokens is None:
        tokens = x.shape[0] if where is None else jnp.sum(where, dtype=x.dtype)
    return jnp.sum(x, axis=0) / jnp.maximum(tokens, 1)
