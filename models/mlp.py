"""The feed-forward block, for the experts of an MoE layer and for its shared experts.

Axis letters: D model width, F hidden width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import checks, grouped


class MLP(nnx.Module):
    """A feed-forward block, `gelu_mlp` or `gated_mlp`.

    Parameters: `kernel_in` `[D, F]`, `kernel_out` `[F, D]`; with `use_bias` also `bias_in` `[F]`, `bias_out` `[D]`;
    with `gated` also `kernel_gate` and `bias_gate`. They are float32; `dtype` is the dtype of the computation. `stack`
    adds leading axes to all parameters, as for E experts, each of which is initialized independently.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import mlp
      >>> mlp.MLP(16, 32, rngs=nnx.Rngs(0))(jnp.ones((3, 16))).shape
      (3, 16)
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        gated: bool = False,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        stack: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal(batch_axis=tuple(range(len(stack))))
        kernel = lambda *shape: nnx.Param(init(rngs.params(), (*stack, *shape), jnp.float32))
        bias = lambda size: nnx.Param(jnp.zeros((*stack, size), jnp.float32)) if use_bias else None
        self.d_model, self.gated, self.dtype = d_model, gated, dtype
        self.kernel_in = kernel(d_model, d_ff)
        self.kernel_gate = kernel(d_model, d_ff) if gated else None
        self.kernel_out = kernel(d_ff, d_model)
        self.bias_in = bias(d_ff)
        self.bias_gate = bias(d_ff) if gated else None
        self.bias_out = bias(d_model)

    def params(self) -> dict[str, jax.Array]:
        """Returns the parameters by name, in the dtype of the computation."""
        named = {
            "kernel_in": self.kernel_in,
            "kernel_gate": self.kernel_gate,
            "kernel_out": self.kernel_out,
            "bias_in": self.bias_in,
            "bias_gate": self.bias_gate,
            "bias_out": self.bias_out,
        }
        return {name: param[...].astype(self.dtype) for name, param in named.items() if param is not None}

    @property
    def function(self) -> grouped.Expert:
        """The function that this block computes."""
        return gated_mlp if self.gated else gelu_mlp

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x `[..., D]`; returns `[..., D]` in the dtype of the computation."""
        x = checks.check_array(x, "MLP: x", "floats", ("...", self.d_model))
        return self.function(grouped.linear, self.params(), x.astype(self.dtype))


def gelu_mlp(linear: grouped.Linear, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    r"""One expert: :math:`W_o \, \mathrm{gelu}(W_i x + b_i) + b_o`, with the tanh form of GELU, as in `jax.nn.gelu`.

    Args:
      linear: the product of rows with the kernel of their expert, plus its bias.
      params: `kernel_in`, `kernel_out`, and `bias_in`, `bias_out` if there are biases.
      x: rows `[..., D]`.

    Returns:
      `[..., D]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import grouped, mlp
      >>> params = {"kernel_in": jnp.ones((2, 3)), "kernel_out": jnp.ones((3, 2))}
      >>> mlp.gelu_mlp(grouped.linear, params, jnp.ones((5, 2))).shape
      (5, 2)
    """
    h = linear(x, params["kernel_in"], params.get("bias_in"))
    return linear(jax.nn.gelu(h), params["kernel_out"], params.get("bias_out"))


def gated_mlp(linear: grouped.Linear, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    r"""One gated expert: :math:`W_o (\mathrm{silu}(W_g x + b_g) \odot (W_i x + b_i)) + b_o`; see `gelu_mlp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import grouped, mlp
      >>> params = {"kernel_in": jnp.ones((2, 3)), "kernel_gate": jnp.ones((2, 3)), "kernel_out": jnp.ones((3, 2))}
      >>> mlp.gated_mlp(grouped.linear, params, jnp.ones((5, 2))).shape
      (5, 2)

    References:
      Shazeer, `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_.
    """
    gate = jax.nn.silu(linear(x, params["kernel_gate"], params.get("bias_gate")))
    h = gate * linear(x, params["kernel_in"], params.get("bias_in"))
    return linear(h, params["kernel_out"], params.get("bias_out"))
