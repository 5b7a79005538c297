"""MoE-ViT, the vision transformer of the paper's section 4.5: an MoE in place of every feed-forward block.

Axis letters: B batch, H and W pixels of an image, S patches, D model width, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import moe, transformer


@dataclasses.dataclass(frozen=True)
class MoEViTConfig(transformer.TransformerOptions):
    """Sizes and options of a `MoEViT`.

    The paper's "17M" is `MoEViTConfig(64, 2, 128, 256, 4, num_heads=4)`, its "4M" `MoEViTConfig(32, 8, 512, 32, 2,
    num_heads=8)`, where heads and the width of the 4M's experts are our reading.

    Example:
      >>> from models import moe_vit
      >>> config = moe_vit.MoEViTConfig(
      ...     num_experts=64, experts_per_token=2, d_model=128, d_ff=256, num_layers=4, num_heads=4
      ... )
      >>> config.num_patches
      64
    """

    num_experts: int
    experts_per_token: int
    d_model: int  # D
    d_ff: int  # the hidden width of an expert
    num_layers: int
    num_heads: int
    image_size: int = 32  # pixels, of height and of width
    patch_size: int = 4  # pixels
    num_classes: int = 10  # C

    def __post_init__(self):
        self.moe_config()  # checks what MoE layers need
        moe.check_sizes(self, "num_layers", "num_heads", "image_size", "patch_size", "num_classes")
        transformer.check_heads(self.d_model, self.num_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be divisible by patch_size = {self.patch_size}; got {self.image_size}.")

    def moe_config(self) -> moe.MoEConfig:
        """That of its MoE layers."""
        return moe.config_of_layers(self)

    @property
    def num_patches(self) -> int:
        """S."""
        return (self.image_size // self.patch_size) ** 2


class MoEViT(nnx.Module):
    """A vision transformer with an MoE in every layer, learned positions, and the mean over patches before the head.

    It sows `RoutingCounts` at `layers/stack/moe/experts` (see `models.transformer.Layers`), and the routers' losses.

    Attributes:
      expert_axis: what `scale_by_excitation` needs for this model: layers and experts are the leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import moe_vit
      >>> config = moe_vit.MoEViTConfig(
      ...     num_experts=4, experts_per_token=2, d_model=16, d_ff=32, num_layers=3, num_heads=2, image_size=8
      ... )
      >>> model = moe_vit.MoEViT(config, rngs=nnx.Rngs(0))
      >>> logits, utilization = excitation_flax.capture_routing(model)(jnp.ones((2, 8, 8, 3)))
      >>> logits.shape, utilization["layers"]["stack"]["moe"]["experts"].counts.shape
      ((2, 10), (3, 4))

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 4.5;
      Dosovitskiy et al., `An Image is Worth 16x16 Words <https://arxiv.org/abs/2010.11929>`_.
    """

    expert_axis = None

    def __init__(self, config: MoEViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.d_model, config.dtype
        self.patches = nnx.Linear(3 * config.patch_size**2, width, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), (config.num_patches, width), jnp.float32))
        self.layers = transformer.Layers(
            config.moe_config(), config, config.num_layers, config.num_heads, causal=False, rngs=rngs
        )
        self.norm = transformer.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits `[B, C]`, float32, of images `[B, H, W, 3]`, floats. The key is for the routers' jitter.

        Raises:
          ValueError: if the images are not floats of this shape.
        """
        config = self.config
        shape = (config.image_size, config.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != shape or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"MoEViT takes images [B, {shape[0]}, {shape[1]}, 3] as floats; got {images.dtype}{list(images.shape)}."
            )
        x = self.patches(split_into_patches(images, config.patch_size).astype(config.dtype))
        x += jnp.broadcast_to(self.positions[...].astype(config.dtype), x.shape)
        x, _ = self.layers(x, key=key)
        return self.head(jnp.mean(self.norm(x).astype(jnp.float32), axis=1))


def split_into_patches(images: jax.Array, size: int) -> jax.Array:
    """`[B, S, 3 size^2]` of images `[B, H, W, 3]`, row by row.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import moe_vit
      >>> moe_vit.split_into_patches(jnp.ones((2, 8, 12, 3)), 4).shape
      (2, 6, 48)
    """
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
