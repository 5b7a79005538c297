"""The Top-K MLP of the paper's sections 4.1 to 4.4 and 4.6: every neuron of a hidden layer is an expert.

Axis letters: B batch, D inputs of a layer, E neurons of a hidden layer (its experts), K of them kept, C classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

import excitation_optax
import excitation_optax.flax
from models import checks


@dataclasses.dataclass(frozen=True)
class TopKMLPConfig:
    """Sizes of a `TopKMLP`. The defaults are the paper's "Micro-MoE"; the reproduction uses `depth=3`.

    Example:
      >>> from models import topk_mlp
      >>> topk_mlp.TopKMLPConfig(input_dim=784).num_kept
      13
    """

    input_dim: int  # values of one input after flattening
    width: int = 128  # E, neurons in each hidden layer
    depth: int = 4  # hidden layers
    num_classes: int = 10  # C
    sparsity: float = 0.9  # the share of a hidden layer's neurons that a sample does not keep
    activation: Callable[[jax.Array], jax.Array] = nnx.relu  # before Top-K; `lambda h: h` also ranks negative values

    def __post_init__(self):
        checks.check_sizes(self, "input_dim", "width", "depth", "num_classes")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"TopKMLPConfig: sparsity must be in [0, 1]; got {self.sparsity}.")

    @property
    def num_kept(self) -> int:
        """The number K of neurons that a hidden layer keeps per sample, `round(width * (1 - sparsity))`, at least 1."""
        return max(1, round(self.width * (1 - self.sparsity)))


class TopKMLP(nnx.Module):
    r"""An MLP whose hidden layers keep, for each sample, only their K largest activations.

    .. math::
      h^{(l)} = \mathrm{top}_K\left(\mathrm{ReLU}(W^{(l)} h^{(l-1)} + b^{(l)})\right), \qquad
      \mathrm{logits} = W h^{(L)} + b

    A neuron with its incoming weights and its bias is an expert. It is active for a sample if its activation is kept
    and not zero. Each layer sows its `RoutingCounts` at `layers/i`; the output layer `head` has no experts.

    Attributes:
      expert_axis: the argument of `scale_by_excitation` for this model: neurons are the last axis of all parameters.

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
        """Computes the logits `[B, C]` of inputs `[B, ...]`, floats, which are flattened to `[B, D]`."""
        return self.head(self.hidden(x)[-1])

    def hidden(self, x: jax.Array) -> list[jax.Array]:
        """Computes each hidden layer's activations `[B, E]`, zero where they are not kept."""
        x = jnp.asarray(x)
        if x.ndim == 0 or math.prod(x.shape[1:]) != self.config.input_dim:
            raise ValueError(
                f"TopKMLP: x must be [B, ...] with input_dim = {self.config.input_dim} values for each sample; "
                f"got {x.dtype}{list(x.shape)}."
            )
        h = x.reshape(x.shape[0], -1)
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
        self.deterministic = False  # model.eval() sets it: calls then leave no routing behind

    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the kept activations `[B, E]` of inputs `[B, D]`, and sows which neurons were active."""
        h = keep_top_k(self.activation(super().__call__(x)), self.num_kept)
        excitation_optax.flax.sow_routing(self, excitation_optax.count_active(h != 0))
        return h


def initialize(model: TopKMLP, name: Literal["lecun_normal", "he_normal", "torch"], key: jax.Array) -> None:
    """Draws the parameters of a model anew.

    Args:
      model: a new model.
      name: `lecun_normal`, Flax's default, changes nothing. `he_normal` draws kernels with twice its variance. `torch`
        draws kernels and biases as PyTorch's `Linear` does, uniformly between plus and minus the inverse root of the
        number of inputs.
      key: a JAX key.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from models import topk_mlp
      >>> model = topk_mlp.TopKMLP(topk_mlp.TopKMLPConfig(input_dim=4), rngs=nnx.Rngs(0))
      >>> topk_mlp.initialize(model, "torch", jax.random.key(1))
      >>> bool(abs(model.layers[0].kernel[...]).max() <= 1 / 2)
      True
    """
    if name == "lecun_normal":
        return
    layers = [*model.layers, model.head]
    for layer, (kernel_key, bias_key) in zip(layers, jax.random.split(key, (len(layers), 2)), strict=True):
        kernel, bias = layer.kernel, layer.bias
        assert bias is not None
        if name == "he_normal":
            kernel[...] = jax.nn.initializers.he_normal()(kernel_key, kernel.shape)
        else:
            bound = layer.in_features**-0.5
            kernel[...] = bound * jax.random.uniform(kernel_key, kernel.shape, minval=-1.0, maxval=1.0)
            bias[...] = bound * jax.random.uniform(bias_key, bias.shape, minval=-1.0, maxval=1.0)


def keep_top_k(h: jax.Array, k: int) -> jax.Array:
    """Sets all but the K largest activations of each sample to zero; gradients flow through the kept ones.

    All values that tie with the K-th largest are kept, so the index of a neuron does not matter. If fewer than K
    activations are positive, zeros stay zeros. A NaN is kept.

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
    h = checks.check_array(h, "keep_top_k: h", "floats", ("...", "E"))
    if not 1 <= k <= h.shape[-1]:
        raise ValueError(
            f"keep_top_k: k must be between 1 and {h.shape[-1]}, the last axis of {list(h.shape)}; got {k}."
        )
    return jnp.where(h < kth_largest(jax.lax.stop_gradient(h), k), 0, h)


def kth_largest(h: jax.Array, k: int) -> jax.Array:
    """Finds the K-th largest value over the last axis, `[..., 1]`.

    If all bits below the sign are flipped in negative floats, the bits as integers have the order of the floats. So the
    K-th largest is the largest integer that at least K of them reach. It is found exactly, bit by bit from the highest,
    with one counting pass for each bit. This is faster than sorting where XLA has no fast top-k, as on CPU
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
    """Counts True over the last axis, `[..., 1]`. Adding slices first keeps XLA's CPU code in one loop: 3x faster."""
    slices = jnp.split(mask.astype(jnp.int32), math.gcd(mask.shape[-1], 8), axis=-1)
    return jnp.sum(functools.reduce(jnp.add, slices), axis=-1, keepdims=True)
