"""The Top-K MLP of the paper's sections 4.1 to 4.4 and 4.6: in each hidden layer, every neuron is an expert.

Axis letters: B batch, D inputs of a layer, E neurons of a hidden layer (its experts), K of them kept, C classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import excitation_optax
import excitation_optax.flax


@dataclasses.dataclass(frozen=True)
class TopKMLPConfig:
    """Sizes of a `TopKMLP`. The defaults are the paper's "Micro-MoE".

    Example:
      >>> from models import topk_mlp
      >>> topk_mlp.TopKMLPConfig(input_dim=784).num_kept
      13
    """

    input_dim: int  # values of one input, after flattening
    width: int = 128  # E, neurons in each hidden layer
    depth: int = 4  # hidden layers
    num_classes: int = 10  # C
    sparsity: float = 0.9  # the share of a hidden layer's neurons that a sample does not keep
    activation: Callable[[jax.Array], jax.Array] = nnx.relu  # before Top-K; `lambda h: h` ranks what may be negative

    def __post_init__(self):
        for name in ("input_dim", "width", "depth", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"TopKMLPConfig: {name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"TopKMLPConfig: sparsity is a share in [0, 1]; got {self.sparsity}.")

    @property
    def num_kept(self) -> int:
        """How many neurons of a hidden layer a sample keeps, K = `round(width * (1 - sparsity))`, at least 1."""
        return max(1, round(self.width * (1 - self.sparsity)))


class TopKMLP(nnx.Module):
    r"""An MLP whose hidden layers keep, for each sample, only their K largest activations.

    .. math::
      h^{(l)} = \mathrm{top}_K\big(\mathrm{ReLU}(W^{(l)} h^{(l-1)} + b^{(l)})\big), \qquad
      \mathrm{logits} = W h^{(L)} + b

    A neuron, with its incoming weights and its bias, is an expert, active for a sample if its activation is kept and
    not zero. Each layer sows its `RoutingCounts` at `layers/i`; the output layer `head` is no expert.

    Attributes:
      expert_axis: what `scale_by_excitation` needs for this model: neurons are the last axis of kernels and biases.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import excitation_optax
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import topk_mlp
      >>> config = topk_mlp.TopKMLPConfig(input_dim=4, width=8, depth=2, sparsity=0.75)
      >>> model = topk_mlp.TopKMLP(config, rngs=nnx.Rngs(0))
      >>> logits, utilization = excitation_flax.capture_routing(model)(jnp.ones((3, 2, 2)))
      >>> logits.shape, utilization["layers"][1].counts.shape
      ((3, 10), (8,))
      >>> excitation_optax.describe(nnx.as_pure(nnx.state(model)), utilization, model.expert_axis)
      parameter        shape    scaled by  along
      head/bias        [10]     -
      head/kernel      [8, 10]  -
      layers/0/bias    [8]      layers/0   axis 0 (8)
      layers/0/kernel  [4, 8]   layers/0   axis 1 (8)
      layers/1/bias    [8]      layers/1   axis 0 (8)
      layers/1/kernel  [8, 8]   layers/1   axis 1 (8)
      4 of 6 parameter leaves are scaled: 112 of 202 parameters.

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.1.
    """

    expert_axis = -1

    def __init__(self, config: TopKMLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.input_dim] + [config.width] * config.depth
        self.layers = nnx.List(
            TopKLinear(i, o, config.num_kept, config.activation, rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[B, C]` of inputs `[B, ...]`, floats, which are flattened to `[B, D]`."""
        return self.head(self.hidden(x)[-1])

    def hidden(self, x: jax.Array) -> list[jax.Array]:
        """What every hidden layer passes on, `[B, E]` each: the activations it keeps, and zeros."""
        h = x.reshape(x.shape[0], -1)
        if h.shape[-1] != self.config.input_dim:
            raise ValueError(
                f"TopKMLP: inputs {list(x.shape)} have {h.shape[-1]} values each; input_dim is {self.config.input_dim}."
            )
        activations = []
        for layer in self.layers:
            h = layer(h)
            activations.append(h)
        return activations


class TopKLinear(nnx.Linear):
    """A Dense layer, ReLU (or another activation), and Top-K: its neurons are experts.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import topk_mlp
      >>> layer = topk_mlp.TopKLinear(4, 8, num_kept=2, rngs=nnx.Rngs(0))
      >>> bool(jnp.all(jnp.sum(layer(jnp.ones((3, 4))) > 0, axis=-1) <= 2))
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_kept: int,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, rngs=rngs)
        self.num_kept = num_kept
        self.activation = activation
        self.deterministic = False  # set by model.eval(): calls then leave no routing behind

    def __call__(self, x: jax.Array) -> jax.Array:
        """The kept activations `[B, E]` of inputs `[B, D]`, zeros elsewhere. Sows which neurons were active."""
        h = keep_top_k(self.activation(super().__call__(x)), self.num_kept)
        excitation_optax.flax.sow_routing(self, excitation_optax.count_active(h != 0))
        return h


def keep_top_k(h: jax.Array, k: int) -> jax.Array:
    """Sets all but the K largest activations of each sample to zero; gradients flow through those that are kept.

    Values that tie with the K-th largest are all kept. Where fewer than K activations are positive, that leaves zeros
    as they are: no neuron is favoured for its index. A NaN is kept.

    Args:
      h: `[..., E]` floats.
      k: K, between 1 and E.

    Returns:
      `[..., E]`.

    Raises:
      ValueError: if K is not between 1 and E.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import topk_mlp
      >>> topk_mlp.keep_top_k(jnp.array([[3.0, 0.0, 1.0, 2.0], [0.0, 5.0, 0.0, 0.0]]), k=2)
      Array([[3., 0., 0., 2.],
             [0., 5., 0., 0.]], dtype=float32)
    """
    if not 1 <= k <= h.shape[-1]:
        raise ValueError(
            f"keep_top_k: k must be between 1 and {h.shape[-1]}, the last axis of {list(h.shape)}; got {k}."
        )
    return jnp.where(h < kth_largest(jax.lax.stop_gradient(h), k), 0, h)


def kth_largest(h: jax.Array, k: int) -> jax.Array:
    """The K-th largest value over the last axis, `[..., 1]`.

    Floats are ordered as their bits are, read as an integer, if those below the sign are flipped in negative ones. So
    the answer is the largest integer that at least K of them reach, found bit by bit from the highest: exact, with as
    many counting passes as there are bits. Where XLA has no fast top-k, as on CPU, that beats sorting
    (`python -m benchmarks.top_k`).
    """
    integer = jnp.dtype(f"int{8 * h.dtype.itemsize}")
    lowest, highest = jnp.iinfo(integer).min, 8 * h.dtype.itemsize - 2  # the highest bit is the one below the sign
    in_order = lambda bits: jnp.where(bits < 0, bits ^ jnp.array(~lowest, integer), bits)  # its own inverse
    bits = in_order(jax.lax.bitcast_convert_type(h, integer))

    def set_bit(i, threshold):
        higher = threshold | jnp.left_shift(jnp.ones_like(threshold), (highest - i).astype(integer))
        return jnp.where(_count(bits >= higher) >= k, higher, threshold)

    threshold = jnp.where(_count(bits >= 0) >= k, jnp.array(0, integer), jnp.array(lowest, integer))
    threshold = jax.lax.fori_loop(0, highest + 1, set_bit, threshold)
    return jax.lax.bitcast_convert_type(in_order(threshold), h.dtype)


def _count(mask: jax.Array) -> jax.Array:
    """True entries over the last axis, `[..., 1]`. Adding slices first keeps XLA's CPU code in one loop (3x faster)."""
    slices = jnp.split(mask.astype(jnp.int32), math.gcd(mask.shape[-1], 8), axis=-1)
    return jnp.sum(functools.reduce(jnp.add, slices), axis=-1, keepdims=True)
