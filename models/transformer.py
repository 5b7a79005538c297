"""Pre-norm transformer layers with an MoE in each: what the MoE-ViT and the GPT-MoE are made of.

Axis letters: B batch, S sequence, D model width, H heads, E experts, K experts per token, L layers, P positions of a
cache.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models import moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions(moe.MoEOptions):
    """What transformers with MoE layers share, beside their sizes: `models.moe.MoEOptions`, and these."""

    scan_layers: bool = True  # parameters stacked on a leading axis L, and one compiled layer; else a list of layers
    remat: bool = False  # compute each layer again in the backward pass, instead of keeping what it computed


class KVCache(NamedTuple):
    """The keys and values of the positions so far, and zeros beyond. Of several layers, with a leading axis L."""

    keys: jax.Array  # [B, P, H, D / H]
    values: jax.Array  # [B, P, H, D / H]
    length: jax.Array  # [] int32, the positions so far


class Attention(nnx.Module):
    """Multi-head self-attention, by `jax.nn.dot_product_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe, transformer
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> attention = transformer.Attention(config, num_heads=4, causal=True, rngs=nnx.Rngs(0))
      >>> output, _ = attention(jnp.ones((2, 5, 16)))
      >>> output.shape
      (2, 5, 16)
    """

    def __init__(self, config: moe.MoEConfig, num_heads: int, causal: bool, *, rngs: nnx.Rngs):
        width = config.d_model
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nnx.Linear(width, 3 * width, dtype=config.dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends.

        Args:
          x: `[B, S, D]`.
          where: `[B, S]` boolean; False marks padding, which no position attends to. Not with a cache.
          cache: of earlier positions, which x follows.

        Returns:
          `[B, S, D]`, and the cache with the positions of x added.
        """
        if where is not None:
            x = jnp.where(where[..., None], x, 0)  # a weight of zero does not make up for a NaN
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
        with jax.numpy_dtype_promotion("standard"):  # in half precision, JAX's own code needs it
            y = jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=causal, implementation=_implementation(query, key)
            )
        return self.out(y.reshape(x.shape)), cache


def _implementation(query, key):
    """Flash attention where cuDNN has it, forward and backward; else XLA's."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    fused = half and even and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return "cudnn" if fused and jax.default_backend() == "gpu" else None


class LayerNorm(nnx.LayerNorm):
    """Layer normalization in float32, whatever the model computes in."""

    def __call__(self, x: jax.Array) -> jax.Array:  # pyrefly: ignore
        """In the shape and dtype of x `[..., D]`."""
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class Layer(nnx.Module):
    r"""A pre-norm transformer layer whose feed-forward block is an MoE.

    .. math::
      h = x + \mathrm{attention}(\mathrm{norm}(x)), \qquad y = h + \mathrm{MoE}(\mathrm{norm}(h))

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

    def __init__(self, config: moe.MoEConfig, num_heads: int, causal: bool, *, rngs: nnx.Rngs):
        self.norm_attention = LayerNorm(config.d_model, rngs=rngs)
        self.attention = Attention(config, num_heads, causal, rngs=rngs)
        self.norm_moe = LayerNorm(config.d_model, rngs=rngs)
        self.moe = moe.MoE(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """`[B, S, D]` and the cache, of x `[B, S, D]`; see `Attention`. The key is for the router's jitter."""
        y, cache = self.attention(self.norm_attention(x), where, cache)
        x += y
        return x + self.moe(self.norm_moe(x), where, key=key), cache


class Layers(nnx.Module):
    """L layers, one after the other: stacked and scanned, so that one layer is compiled, or a list.

    Stacked, parameters are `[L, ...]`, experts `[L, E, ...]`, and utilization `[L, E]` at `stack/moe/experts`; in a
    list, `[E, ...]` and `[E]` at `list/0/moe/experts` and so on. Either way utilization follows the leading axes in
    order, so `scale_by_excitation` needs no `expert_axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import moe, transformer
      >>> config = moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2)
      >>> options = transformer.TransformerOptions()
      >>> layers = transformer.Layers(config, options, num_layers=3, num_heads=4, causal=True, rngs=nnx.Rngs(0))
      >>> output, _ = layers(jnp.ones((2, 5, 16)))
      >>> output.shape, layers.stack.moe.experts.kernel_in.shape
      ((2, 5, 16), (3, 8, 16, 32))
    """

    def __init__(
        self,
        config: moe.MoEConfig,
        options: TransformerOptions,
        num_layers: int,
        num_heads: int,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.options, self.num_layers = options, num_layers
        self.deterministic = False  # set by model.eval()
        make = lambda rngs: Layer(config, num_heads, causal, rngs=rngs)
        if options.scan_layers:
            self.stack = nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
        else:
            self.list = nnx.List([make(rngs) for _ in range(num_layers)])

    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """As a `Layer`; the cache has a leading axis L."""
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def apply(x, layer, cache, key):
            return layer(x, where, cache, key)

        if self.options.remat:
            apply = nnx.remat(apply)
        if self.options.scan_layers:
            scan = nnx.scan(apply, in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0), length=self.num_layers)
            # In evaluation nothing is sown, so a copy will do, which a function compiled by JAX may close over.
            copied = self.deterministic and not hasattr(self, "__captures__")
            return scan(x, nnx.clone(self.stack) if copied else self.stack, cache, keys)
        caches = []
        for number, layer in enumerate(self.list):
            x, layer_cache = apply(x, layer, *jax.tree.map(lambda leaf, n=number: leaf[n], (cache, keys)))
            caches.append(layer_cache)
        return x, None if cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def check_heads(d_model: int, num_heads: int) -> None:
    """Raises ValueError if the width cannot be divided into heads."""
    if d_model % num_heads:
        raise ValueError(f"d_model must be divisible by num_heads = {num_heads}; got {d_model}.")
