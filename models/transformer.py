"""Pre-norm transformer layers with an MoE in each, the body of the MoE-ViT and of the GPT-MoE.

Axis letters: B batch, S sequence, D model width, H heads, E experts, K experts per token, L layers, P positions of a
cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models import checks, moe


def check_config(config: Any) -> None:
    """Raises ValueError if a model's config has no `MoEConfig`, or if num_heads does not divide its width."""
    if not isinstance(config.moe, moe.MoEConfig):
        raise ValueError(f"{type(config).__name__}: moe must be a MoEConfig; got {type(config.moe).__name__}.")
    if config.moe.d_model % config.num_heads:
        raise ValueError(f"d_model must be divisible by num_heads = {config.num_heads}; got {config.moe.d_model}.")


class KVCache(NamedTuple):
    """Keys and values of the positions so far, followed by zeros. A cache of L layers has a leading axis L."""

    keys: jax.Array  # [B, P, H, D / H]
    values: jax.Array  # [B, P, H, D / H]
    length: jax.Array  # [] int32, the positions so far


class Attention(nnx.Module):
    """Multi-head self-attention, by `jax.nn.dot_product_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import transformer
      >>> attention = transformer.Attention(16, num_heads=4, causal=True, rngs=nnx.Rngs(0))
      >>> output, _ = attention(jnp.ones((2, 5, 16)))
      >>> output.shape
      (2, 5, 16)
    """

    def __init__(self, d_model: int, *, num_heads: int, causal: bool, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nnx.Linear(d_model, 3 * d_model, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes attention.

        Args:
          x: `[B, S, D]`.
          where: `[B, S]` boolean; False marks padding, which no position attends to. A cache has no padding.
          cache: the earlier positions, which x follows.

        Returns:
          `[B, S, D]`, and the cache with the positions of x added.
        """
        x = checks.check_array(x, "Attention: x", "floats", ("B", "S", self.qkv.in_features))
        if where is not None:
            x = jnp.where(where[..., None], x, 0)  # a weight of zero times NaN is NaN
        heads = (*x.shape[:2], 3, self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(heads), 2, 0)  # [B, S, H, D / H] each
        mask = (
            None if where is None else jnp.broadcast_to(where[:, None, None], (x.shape[0], 1, x.shape[1], x.shape[1]))
        )
        causal = self.causal
        if cache is not None:
            put = lambda kept, new: lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), cache.length, axis=1)
            key, value = put(cache.keys, key), put(cache.values, value)
            position = cache.length + jnp.arange(x.shape[1], dtype=jnp.int32)
            mask = (jnp.arange(key.shape[1], dtype=jnp.int32)[None] <= position[:, None])[None, None]  # [1, 1, S, P]
            causal = False
            cache = KVCache(key, value, cache.length + x.shape[1])
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code requires it in half precision
            y = jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal, implementation=_implementation(query, key)
            )
        return self.out(y.reshape(x.shape)), cache


def _implementation(query, key):
    """Chooses cuDNN's flash attention if it supports the shapes, forward and backward, otherwise XLA's attention."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    fused = half and even and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return "cudnn" if fused and jax.default_backend() == "gpu" else None


class LayerNorm(nnx.LayerNorm):
    """Layer normalization that computes in float32 and returns the dtype of its input."""

    def __call__(self, x: jax.Array) -> jax.Array:  # pyrefly: ignore
        """Normalizes x `[..., D]`."""
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class Layer(nnx.Module):
    r"""A pre-norm transformer layer whose feed-forward block is an MoE.

    .. math::
      h = x + \mathrm{attention}(\mathrm{norm}(x)), \qquad y = h + \mathrm{MoE}(\mathrm{norm}(h))

    With `residual=False`, for experiments, x and h are not added.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe, transformer
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> layer = transformer.Layer(config, num_heads=4, causal=True, rngs=nnx.Rngs(0))
      >>> output, _ = layer(jnp.ones((2, 5, 16)))
      >>> output.shape
      (2, 5, 16)
    """

    def __init__(self, config: moe.MoEConfig, *, num_heads: int, causal: bool, residual: bool = True, rngs: nnx.Rngs):
        self.residual = residual
        self.norm_attention = LayerNorm(config.d_model, rngs=rngs)
        self.attention = Attention(config.d_model, num_heads=num_heads, causal=causal, dtype=config.dtype, rngs=rngs)
        self.norm_moe = LayerNorm(config.d_model, rngs=rngs)
        self.moe = moe.MoE(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies the layer to x `[B, S, D]`, as `Attention` is applied. `key` is for the router's jitter."""
        x = checks.check_array(x, "Layer: x", "floats", ("B", "S", self.moe.config.d_model))
        y, cache = self.attention(self.norm_attention(x), where, cache)
        h = x + y if self.residual else y
        y = self.moe(self.norm_moe(h), where, key=key)
        return h + y if self.residual else y, cache


class Layers(nnx.Module):
    """L layers in sequence: stacked and scanned, which compiles a single layer, or in a list.

    Stacked, parameters are `[L, ...]`, experts `[L, E, ...]`, and utilization is `[L, E]` at `stack/moe/experts`. In a
    list they are `[E, ...]` and `[E]`, at `list/0/moe/experts` and so on. In both forms utilization follows the leading
    axes in order, so `scale_by_excitation` requires no `expert_axis`.

    Args:
      config: sizes and options of the MoE in each layer.
      num_layers: L.
      num_heads: H.
      causal: whether a position attends only to itself and to earlier ones.
      residual: see `Layer`.
      scan_layers: stack and scan the layers; otherwise they are a list.
      remat: compute each layer again in the backward pass, which saves memory and takes time.
      rngs: the generator of the initial parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe, transformer
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> layers = transformer.Layers(config, num_layers=3, num_heads=4, causal=True, rngs=nnx.Rngs(0))
      >>> output, _ = layers(jnp.ones((2, 5, 16)))
      >>> output.shape, layers.stack.moe.experts.kernel_in.shape
      ((2, 5, 16), (3, 8, 16, 32))
    """

    def __init__(
        self,
        config: moe.MoEConfig,
        *,
        num_layers: int,
        num_heads: int,
        causal: bool,
        residual: bool = True,
        scan_layers: bool = True,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_layers, self.remat = num_layers, remat
        self.deterministic = False  # model.eval() sets it
        make = lambda rngs: Layer(config, num_heads=num_heads, causal=causal, residual=residual, rngs=rngs)
        stack = nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))
        self.stack = stack(rngs) if scan_layers else None
        self.list = None if scan_layers else nnx.List([make(rngs) for _ in range(num_layers)])

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies the layers as one `Layer`; the cache has a leading axis L."""
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def apply(x, layer, cache, key):
            return layer(x, where, cache, key)

        if self.remat:
            apply = nnx.remat(apply)
        if self.stack is not None:
            scan = nnx.scan(apply, in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0), length=self.num_layers)
            return scan(x, nnx.clone(self.stack) if self._keeps_nothing() else self.stack, cache, keys)
        caches = []
        for number, layer in enumerate(self.list or ()):
            x, layer_cache = apply(x, layer, *jax.tree.map(lambda leaf, n=number: leaf[n], (cache, keys)))
            caches.append(layer_cache)
        return x, None if cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)

    def _keeps_nothing(self):
        """Returns whether this call sows nothing, so that a copy of the stack suffices.

        A function that JAX compiles may close over a copy, but not over a stack that `nnx.scan` updates.
        """
        # A capture puts variables into every module; without one, this module has none beside the stack.
        beside_the_stack = nnx.state(self, nnx.Not(nnx.PathContains("stack")))
        return self.deterministic and not nnx.to_flat_state(beside_the_stack)
