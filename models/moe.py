"""The Mixture-of-Experts layer: a router that sends each token to K of E experts, the experts, and shared experts.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

import dataclasses
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import excitation_optax
import excitation_optax.flax
import excitation_optax.metrics
from models import checks, dispatch, expert_parallel, grouped, mlp, router


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(router.RouterConfig):
    """Sizes and options of an `MoE` layer, besides the fields of `models.router.RouterConfig`.

    Example:
      >>> from models import moe
      >>> moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2).capacity_factor is None
      True
    """

    d_ff: int  # F
    gated: bool = False  # experts are silu(x W_gate) * (x W_in) W_out instead of gelu(x W_in) W_out
    use_bias: bool = True  # in the experts; the router's kernel has none
    num_shared_experts: int = 0  # experts that every token goes to, computed as one wide MLP
    capacity_factor: float | None = None  # an expert takes at most this times K T / E of T tokens; None drops none
    backend: grouped.Backend | None = None  # see `models.grouped.apply_experts`; None is the platform's default
    expert_parallel_axis: str | None = None  # the axis of the mesh (jax.set_mesh) along which experts are split
    dtype: Any = jnp.float32  # of the experts' computation; parameters and router are float32

    def __post_init__(self):
        super().__post_init__()
        checks.check_sizes(self, "d_ff")
        checks.check_sizes(self, "num_shared_experts", minimum=0)
        grouped.check_backend(self.backend, self.capacity_factor is not None)
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor must be positive, such as 1.25, or None to drop no token; got {self.capacity_factor}."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, such as jnp.bfloat16; got {self.dtype}.")


class MoE(nnx.Module):
    r"""A Mixture-of-Experts layer: every token goes to the K experts that the router ranks highest.

    .. math::
      y_t = \sum_{e \in \mathcal{A}_t} g_{te} \, f_e(x_t) \; [+ f_{\mathrm{shared}}(x_t)]

    with the chosen experts A and the gates g of `models.router.Router`. The layer drops no token unless a capacity
    factor is given. It sows `RoutingCounts` at `experts`, taken before a capacity drops tokens, and the losses at
    `router`. All axes of the input but the last are tokens.

    Attributes:
      expert_axis: the argument of `scale_by_excitation` for this layer: experts are the leading axis.

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
        self.router = router.Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        options: dict[str, Any] = {"gated": config.gated, "use_bias": config.use_bias, "dtype": config.dtype}
        shared = lambda width: mlp.MLP(config.d_model, width, **options, rngs=rngs)
        self.shared = shared(config.num_shared_experts * config.d_ff) if config.num_shared_experts else None

    def __call__(self, x: jax.Array, where: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: `[..., D]` floats.
          where: `[...]` boolean; False marks padding, which goes to no expert, is not counted, and comes out as zeros.
          key: a JAX key for the router's jitter, if there is any.

        Returns:
          `[..., D]`, in the dtype of x.

        Raises:
          ValueError: if a dtype or a shape does not fit, or jitter has no key.
        """
        config = self.config
        x = checks.check_array(x, "MoE: x", "floats", ("...", config.d_model))
        tokens, is_token = x.reshape(-1, config.d_model), None
        if where is not None:
            is_token = checks.check_array(where, "MoE: where", "booleans", x.shape[:-1]).reshape(-1)
            tokens = jnp.where(is_token[:, None], tokens, 0)  # padding may hold anything, even NaN
        routes = self.router(tokens, key=key)
        counts = excitation_optax.count_routing(routes.indices, config.num_experts, is_token)
        excitation_optax.flax.sow_routing(self.experts, counts)
        _sow_losses(self.router, routes, counts, is_token)
        indices = routes.indices
        if is_token is not None:
            indices = jnp.where(is_token[:, None], indices, config.num_experts)  # no expert
        y = self.experts(tokens, indices, routes.gates)
        if self.shared is not None:
            shared = self.shared(tokens).astype(y.dtype)
            y += shared if is_token is None else jnp.where(is_token[:, None], shared, 0)
        return y.astype(x.dtype).reshape(x.shape)


class Experts(mlp.MLP):
    """E experts: an `MLP` whose parameters are stacked on a leading axis.

    Utilization is sown here, so that it covers all of these parameters and not the router.

    Example:
      >>> from flax import nnx
      >>> from models import moe
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> moe.Experts(config, rngs=nnx.Rngs(0)).kernel_in.shape
      (8, 16, 32)
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config.d_model,
            config.d_ff,
            gated=config.gated,
            use_bias=config.use_bias,
            dtype=config.dtype,
            stack=(config.num_experts,),
            rngs=rngs,
        )
        self.config = config
        self.deterministic = False  # model.eval() sets it: calls then leave no routing behind

    def __call__(self, x: jax.Array, indices: jax.Array, gates: jax.Array) -> jax.Array:  # pyrefly: ignore
        """Computes the gated sum of the experts, `[T, D]` float32, from x `[T, D]`, and indices and gates `[T, K]`."""
        config = self.config
        arguments = (self.function, self.params(), x.astype(config.dtype), indices, gates)
        if config.expert_parallel_axis is not None:
            return expert_parallel.apply_experts(
                *arguments,
                axis=config.expert_parallel_axis,
                backend=config.backend,
                capacity_factor=config.capacity_factor,
            )
        tokens, choices = indices.shape
        capacity = dispatch.expert_capacity(config.capacity_factor, tokens, choices, config.num_experts)
        return grouped.apply_experts(*arguments, backend=config.backend, capacity=capacity)


class AuxiliaryLoss(nnx.Intermediate):
    """The NNX variable type of the routers' losses.

    Layers sow them while `capture_routing(model, AuxiliaryLoss)` runs, and `auxiliary_losses` reads them. Other calls
    compute and keep no losses.
    """


class AuxiliaryLosses(NamedTuple):
    """Means over the layers. Add the first two to your loss, with weights such as 0.01 and 0.001.

    If a layer is called several times in one forward pass, its losses are summed. If micro-batches hold different
    numbers of tokens, weight the losses of each by its share of the tokens (`RoutingCounts.tokens`).
    """

    load_balancing: jax.Array  # [] float32; `models.router.load_balancing_loss`
    router_z: jax.Array  # [] float32; `models.router.router_z_loss`
    entropy: jax.Array  # [] float32, nats; `metrics.routing_entropy` of the router's probabilities, for the log


def _sow_losses(layer, routes, counts, is_token):
    # A capture of this type puts a variable into every module, and sow writes into it. Without a capture, sow would
    # leave the losses in the model, where nnx.split treats them as parameters.
    if not nnx.to_flat_state(nnx.state(layer, AuxiliaryLoss)):
        return
    losses = AuxiliaryLosses(
        router.load_balancing_loss(counts, routes.probabilities, is_token),
        router.router_z_loss(routes.logits, is_token),
        excitation_optax.metrics.routing_entropy(routes.probabilities, is_token),
    )
    for name, loss in losses._asdict().items():
        layer.sow(AuxiliaryLoss, name, loss, reduce_fn=operator.add, init_fn=int)


def auxiliary_losses(sown: nnx.State) -> AuxiliaryLosses:
    """Reads the auxiliary losses of a model from the third result of `capture_routing(model, AuxiliaryLoss)`.

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
            "auxiliary_losses: nothing was sown. Pass the third result of capture_routing(model, AuxiliaryLoss)(...)."
        )
    return AuxiliaryLosses(**{name: jnp.mean(jnp.concatenate(losses)) for name, losses in values.items()})
