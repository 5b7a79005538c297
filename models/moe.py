"""The Mixture-of-Experts layer: a router that sends each token to K of E experts, the experts, and shared ones.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token, C rows of an expert.
"""

import dataclasses
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import excitation_optax
import excitation_optax.flax
import excitation_optax.metrics
from models import dispatch, expert_parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOptions:
    """What MoE layers and the models made of them share, beside their sizes. Sizes come first, so all by keyword."""

    gated: bool = False  # experts are silu(x W_gate) * (x W_in) W_out, not gelu(x W_in) W_out
    use_bias: bool = True  # in the experts; the router has none
    num_shared_experts: int = 0  # experts that every token goes to, as one MLP of their joint width
    # Whether the K gates of a token sum to 1, or are the router's probabilities. None: if K > 1, since with one expert
    # the gate would always be 1, and the router would not learn.
    normalize_gates: bool | None = None
    router_jitter: float = 0.0  # the router's input is multiplied by noise from 1 - jitter to 1 + jitter in training
    capacity_factor: float | None = None  # an expert takes at most this times K T / E of T tokens; None drops none
    backend: dispatch.Backend | None = None  # see `dispatch.apply_experts`; None is the platform's
    expert_parallel_axis: str | None = None  # the axis of the mesh (jax.set_mesh) along which experts are split
    dtype: Any = jnp.float32  # what experts compute in; parameters and router are float32

    def __post_init__(self):
        dispatch.check_backend(self.backend, self.capacity_factor is not None)
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor must be positive, such as 1.25, or None to drop no token; got {self.capacity_factor}."
            )
        if not 0 <= self.router_jitter < 1:
            raise ValueError(f"router_jitter must be at least 0 and below 1; got {self.router_jitter}.")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must not be negative; got {self.num_shared_experts}.")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, such as jnp.bfloat16; got {self.dtype}.")


@dataclasses.dataclass(frozen=True)
class MoEConfig(MoEOptions):
    """Sizes and options of an `MoE` layer.

    Example:
      >>> from models import moe
      >>> moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2).capacity_factor is None
      True
    """

    d_model: int  # D
    d_ff: int  # F
    num_experts: int  # E
    experts_per_token: int  # K

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "d_model", "d_ff", "num_experts", "experts_per_token")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts = {self.num_experts}; got {self.experts_per_token}."
            )


def config_of_layers(config: Any) -> MoEConfig:
    """The `MoEConfig` of a model's MoE layers, from the fields of the same names in the model's config."""
    return MoEConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(MoEConfig)})


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError if a field of a config is not an integer of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be an integer of at least 1; got {value!r}.")


class AuxiliaryLoss(nnx.Intermediate):
    """The NNX variable type that routers sow their losses into, while `capture_routing(model, AuxiliaryLoss)` runs.

    `auxiliary_losses` reads what was captured. Outside of a capture nothing is sown.
    """


class AuxiliaryLosses(NamedTuple):
    """Means over the layers. A loss function adds the first two, with weights such as 0.01 and 0.001.

    What a layer adds that is called several times in one forward pass is the sum of its calls.
    """

    load_balancing: jax.Array  # [] float32; about 1 when all experts are as busy, E / K when K of them take everything
    router_z: jax.Array  # [] float32
    entropy: jax.Array  # [] float32, nats; `metrics.routing_entropy` of the router's probabilities, to be logged


def auxiliary_losses(sown: nnx.State) -> AuxiliaryLosses:
    """The auxiliary losses of a model, from what `capture_routing(model, AuxiliaryLoss)` returned third.

    Raises:
      ValueError: if no router sowed any.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import moe
      >>> layer = moe.MoE(moe.MoEConfig(d_model=4, d_ff=8, num_experts=2, experts_per_token=2), rngs=nnx.Rngs(0))
      >>> run = excitation_flax.capture_routing(layer, moe.AuxiliaryLoss)
      >>> output, utilization, sown = run(jnp.ones((3, 4)))
      >>> round(float(moe.auxiliary_losses(sown).load_balancing), 3)
      1.0
    """
    values: dict[str, list[jax.Array]] = {name: [] for name in AuxiliaryLosses._fields}
    for path, variable in nnx.to_flat_state(sown) if isinstance(sown, nnx.State) else ():
        if path[-1] in values:
            values[path[-1]].append(jnp.ravel(variable[...]))
    if not values["load_balancing"]:
        raise ValueError(
            "auxiliary_losses: nothing was sown. Pass what capture_routing(model, AuxiliaryLoss) gave third."
        )
    return AuxiliaryLosses(**{name: jnp.mean(jnp.concatenate(losses)) for name, losses in values.items()})


class MoE(nnx.Module):
    r"""A Mixture-of-Experts layer: every token goes to the K experts that the router scores highest.

    .. math::
      p_t = \mathrm{softmax}(W_r x_t), \qquad
      y_t = \sum_{e \in \mathrm{top}_K(p_t)} g_{te} \, f_e(x_t) \; [+ f_{\mathrm{shared}}(x_t)], \qquad
      g_{te} = p_{te} \Big/ \sum_{e' \in \mathrm{top}_K(p_t)} p_{te'}

    Dropless unless a capacity factor is given. It sows its `RoutingCounts`, taken at the router before any token is
    dropped, at `experts`, and its auxiliary losses at `router`. Any leading axes of the input are tokens.

    Attributes:
      expert_axis: what `scale_by_excitation` needs for this layer: experts are the leading axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import moe
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> layer = moe.MoE(config, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (4, 5, 16))
      >>> output, utilization, sown = excitation_flax.capture_routing(layer, moe.AuxiliaryLoss)(x)
      >>> output.shape, float(utilization["experts"].utilization.sum())
      ((4, 5, 16), 2.0)
      >>> sorted(moe.auxiliary_losses(sown)._fields)
      ['entropy', 'load_balancing', 'router_z']

    References:
      Shazeer et al., `Outrageously Large Neural Networks <https://arxiv.org/abs/1701.06538>`_, 2017;
      Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021;
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.5.
    """

    expert_axis = None

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.num_shared_experts:
            self.shared = MLP(config, config.num_shared_experts * config.d_ff, rngs=rngs)

    def __call__(self, x: jax.Array, where: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        """Routes tokens.

        Args:
          x: `[..., D]` floats.
          where: `[...]` boolean; False marks padding, which goes to no expert, is not counted, and comes out as zeros.
          key: a JAX key for the router's jitter, if there is any.

        Returns:
          `[..., D]`, in the dtype of x.

        Raises:
          ValueError: if a shape does not fit, or jitter has no key.
        """
        x = jnp.asarray(x)
        if x.shape[-1] != self.config.d_model:
            raise ValueError(f"MoE: the last axis of x {list(x.shape)} must be d_model = {self.config.d_model}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"MoE: x must be floats; got {x.dtype}{list(x.shape)}.")
        if where is not None and (where.shape != x.shape[:-1] or where.dtype != jnp.bool_):
            raise ValueError(
                f"MoE: where must be boolean {list(x.shape[:-1])}, an entry for every token of x {list(x.shape)}; "
                f"got {where.dtype}{list(where.shape)}."
            )
        tokens = x.reshape(-1, self.config.d_model)
        is_token = None if where is None else where.reshape(-1)
        if is_token is not None:
            tokens = jnp.where(is_token[:, None], tokens, 0)  # whatever padding holds, NaN too
        gates, indices = self.router(tokens, is_token, key)
        counts = excitation_optax.count_routing(indices, self.config.num_experts, is_token)
        excitation_optax.flax.sow_routing(self.experts, counts)
        if is_token is not None:
            indices = jnp.where(is_token[:, None], indices, self.config.num_experts)  # to no expert
        y = self.experts(tokens, indices, gates)
        if self.config.num_shared_experts:
            shared = self.shared(tokens).astype(y.dtype)
            y += shared if is_token is None else jnp.where(is_token[:, None], shared, 0)
        return y.astype(x.dtype).reshape(x.shape)


class Router(nnx.Module):
    """Scores experts, in float32 whatever the layer computes in, and sows its auxiliary losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> router = moe.Router(config, rngs=nnx.Rngs(0))
      >>> gates, indices = router(jnp.ones((3, 16)))
      >>> gates.shape, indices.shape
      ((3, 2), (3, 2))
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (config.d_model, config.num_experts), jnp.float32))  # [D, E]
        self.deterministic = False  # set by model.eval(): no jitter

    def __call__(
        self, x: jax.Array, where: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Gates `[T, K]` float32 and experts `[T, K]` int32, best first, of tokens x `[T, D]`."""
        x = x.astype(jnp.float32)
        if self.config.router_jitter and not self.deterministic:
            if key is None:
                raise ValueError("router_jitter needs a key in training: model(x, key=key), or model.eval() before.")
            jitter = self.config.router_jitter
            x *= jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)
        # HIGHEST, as TPUs would otherwise take this product in bfloat16.
        logits = jnp.matmul(x, self.kernel[...], precision=lax.Precision.HIGHEST)
        probabilities = jax.nn.softmax(logits)
        scores, indices = lax.top_k(logits, self.config.experts_per_token)
        normalize = self.config.normalize_gates
        if self.config.experts_per_token > 1 if normalize is None else normalize:
            gates = jax.nn.softmax(scores)  # and so no gradient for experts that were not chosen, not even by rounding
        else:
            gates = jnp.exp(scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        if hasattr(self, "__captures__"):  # set by nnx.capture; nothing is left in the model by other calls
            self._sow("load_balancing", load_balancing_loss(probabilities, indices, where))
            self._sow("router_z", router_z_loss(logits, where))
            self._sow("entropy", excitation_optax.metrics.routing_entropy(probabilities, where))
        return gates, indices

    def _sow(self, name, loss):
        self.sow(AuxiliaryLoss, name, loss, reduce_fn=operator.add, init_fn=int)


def load_balancing_loss(probabilities: jax.Array, indices: jax.Array, where: jax.Array | None = None) -> jax.Array:
    r"""How unevenly a router loads its experts: 1 if all are as likely, and up to E / K.

    .. math::
      \frac{E}{K} \sum_{e=1}^{E} u_e \, \frac{1}{T} \sum_{t=1}^{T} p_{te}

    with the utilization u, which has no gradient. For K = 1 it is the Switch Transformer's; times K it is the one of
    Hugging Face's `transformers`.

    Args:
      probabilities: p, `[T, E]`.
      indices: the chosen experts, `[T, K]` integers.
      where: `[T]` boolean; False leaves a token (padding) out.

    Returns:
      A float32 scalar; 0 if there are no tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import moe
      >>> moe.load_balancing_loss(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([[0], [0]]))
      Array(1.5, dtype=float32)

    References:
      Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, equation 4.
    """
    num_experts, choices = probabilities.shape[-1], indices.shape[-1]
    utilization = excitation_optax.count_routing(indices, num_experts, where).utilization
    mean = _mean_over_tokens(probabilities, where)
    return num_experts / choices * jnp.sum(utilization * mean)


def router_z_loss(logits: jax.Array, where: jax.Array | None = None) -> jax.Array:
    r"""Keeps the router's logits small, where float32 is precise: the mean of the squared log-sum-exp.

    .. math::
      \frac{1}{T} \sum_{t=1}^{T} \Big( \log \sum_{e=1}^{E} \exp z_{te} \Big)^2

    Args:
      logits: z, `[T, E]`.
      where: `[T]` boolean; False leaves a token (padding) out.

    Returns:
      A float32 scalar; 0 if there are no tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import moe
      >>> moe.router_z_loss(jnp.log(jnp.array([[0.5, 0.5]])))
      Array(0., dtype=float32)

    References:
      Zoph et al., `ST-MoE <https://arxiv.org/abs/2202.08906>`_, equation 5.
    """
    return _mean_over_tokens(jax.nn.logsumexp(logits, axis=-1) ** 2, where)


def _mean_over_tokens(x, where):
    """The mean over the leading axis; 0 if there is nothing to take it of."""
    if where is None:
        return jnp.sum(x, axis=0) / max(x.shape[0], 1)
    is_token = jnp.expand_dims(where, tuple(range(1, x.ndim)))
    return jnp.sum(jnp.where(is_token, x, 0), axis=0) / jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)


class MLP(nnx.Module):
    """A feed-forward block: what one expert is, and what shared experts are together.

    Parameters: `kernel_in` `[D, F]`, `kernel_out` `[F, D]`; with `use_bias` also `bias_in` `[F]`, `bias_out` `[D]`; if
    `gated` also `kernel_gate` and `bias_gate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> moe.MLP(config, rngs=nnx.Rngs(0))(jnp.ones((3, 16))).shape
      (3, 16)
    """

    def __init__(self, config: MoEConfig, d_ff: int | None = None, stack: tuple[int, ...] = (), *, rngs: nnx.Rngs):
        self.config = config
        d_ff = config.d_ff if d_ff is None else d_ff
        init = nnx.initializers.lecun_normal(batch_axis=tuple(range(len(stack))))

        def linear(name, fan_in, fan_out):
            setattr(self, f"kernel_{name}", nnx.Param(init(rngs.params(), (*stack, fan_in, fan_out), jnp.float32)))
            if config.use_bias:
                setattr(self, f"bias_{name}", nnx.Param(jnp.zeros((*stack, fan_out), jnp.float32)))

        linear("in", config.d_model, d_ff)
        if config.gated:
            linear("gate", config.d_model, d_ff)
        linear("out", d_ff, config.d_model)

    def params(self) -> dict[str, jax.Array]:
        """The parameters by name, in the dtype that the layer computes in."""
        names = [f"{kind}_{name}" for kind in ("kernel", "bias") for name in ("in", "gate", "out")]
        return {name: getattr(self, name)[...].astype(self.config.dtype) for name in names if hasattr(self, name)}

    def function(self) -> dispatch.Expert:
        """What it computes, as `models.dispatch` takes it."""
        return gated_mlp if self.config.gated else gelu_mlp

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` of x `[..., D]`."""
        return self.function()(dispatch.dense, self.params(), x.astype(self.config.dtype))


def gelu_mlp(linear: dispatch.Linear, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    r"""One expert: :math:`W_o \, \mathrm{gelu}(W_i x + b_i) + b_o`, with the tanh form of GELU, as in `jax.nn.gelu`.

    Args:
      linear: the product of rows with the kernel of their expert, plus its bias.
      params: `kernel_in`, `kernel_out`, and `bias_in`, `bias_out` if it has them.
      x: rows `[..., D]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import dispatch, moe
      >>> params = {"kernel_in": jnp.ones((2, 3)), "kernel_out": jnp.ones((3, 2))}
      >>> moe.gelu_mlp(dispatch.dense, params, jnp.ones((5, 2))).shape
      (5, 2)
    """
    h = linear(x, params["kernel_in"], params.get("bias_in"))
    return linear(jax.nn.gelu(h), params["kernel_out"], params.get("bias_out"))


def gated_mlp(linear: dispatch.Linear, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    r"""One gated expert: :math:`W_o (\mathrm{silu}(W_g x + b_g) \odot (W_i x + b_i)) + b_o`; see `gelu_mlp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import dispatch, moe
      >>> params = {"kernel_in": jnp.ones((2, 3)), "kernel_gate": jnp.ones((2, 3)), "kernel_out": jnp.ones((3, 2))}
      >>> moe.gated_mlp(dispatch.dense, params, jnp.ones((5, 2))).shape
      (5, 2)

    References:
      Shazeer, `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_.
    """
    gate = jax.nn.silu(linear(x, params["kernel_gate"], params.get("bias_gate")))
    h = gate * linear(x, params["kernel_in"], params.get("bias_in"))
    return linear(h, params["kernel_out"], params.get("bias_out"))


class Experts(MLP):
    """E experts: an `MLP` whose parameters are stacked on a leading axis, each expert initialized by itself.

    Utilization is sown here, so that it covers all of these parameters and no router.

    Example:
      >>> from flax import nnx
      >>> from models import moe
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> moe.Experts(config, rngs=nnx.Rngs(0)).kernel_in.shape
      (8, 16, 32)
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        super().__init__(config, stack=(config.num_experts,), rngs=rngs)
        self.deterministic = False  # set by model.eval(): calls then leave no routing behind

    def __call__(self, x: jax.Array, indices: jax.Array, gates: jax.Array) -> jax.Array:  # pyrefly: ignore
        """The gated sum of each token's experts, `[T, D]` float32, of x `[T, D]`, indices and gates `[T, K]`."""
        config = self.config
        arguments = (self.function(), self.params(), x.astype(config.dtype), indices, gates)
        if config.expert_parallel_axis is not None:
            return expert_parallel.apply_experts(
                *arguments,
                axis=config.expert_parallel_axis,
                backend=config.backend,
                capacity_factor=config.capacity_factor,
            )
        capacity = dispatch.expert_capacity(
            config.capacity_factor, indices.shape[0], indices.shape[1], config.num_experts
        )
        return dispatch.apply_experts(*arguments, backend=config.backend, capacity=capacity)
