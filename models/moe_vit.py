"""The MoE-ViT, the vision transformer of the paper's section 4.5: an MoE in place of every feed-forward block.

Axis letters: B batch, H and W pixels of an image, S patches, D model width, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import checks, moe, transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEViTConfig:
    """Sizes and options of a `MoEViT`.

    The paper's "17M" is the example below. Its "4M" has 32 experts, top-8, d_model=512 and 2 layers. The paper does not
    give d_ff of the 4M (32 here) or the numbers of heads (4 and 8 here).

    Example:
      >>> from models import moe, moe_vit
      >>> layer = moe.MoEConfig(d_model=128, d_ff=256, num_experts=64, experts_per_token=2)
      >>> moe_vit.MoEViTConfig(moe=layer, num_layers=4, num_heads=4).num_patches
      64
    """

    moe: moe.MoEConfig  # the MoE of each layer; its d_model and dtype are those of the whole model
    num_layers: int  # L
    num_heads: int
    image_size: int = 32  # pixels of height and of width
    patch_size: int = 4  # pixels
    num_classes: int = 10  # C
    scan_layers: bool = True  # see `models.transformer.Layers`, also for remat and residual
    remat: bool = False
    residual: bool = True

    def __post_init__(self):
        checks.check_sizes(self, "num_layers", "num_heads", "image_size", "patch_size", "num_classes")
        transformer.check_config(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be divisible by patch_size = {self.patch_size}; got {self.image_size}.")

    @property
    def num_patches(self) -> int:
        """The number of patches of an image, S."""
        return (self.image_size // self.patch_size) ** 2


class MoEViT(nnx.Module):
    """A vision transformer with an MoE in every layer, learned positions, and the mean over patches before the head.

    It sows `RoutingCounts` at `layers/stack/moe/experts` (see `models.transformer.Layers`) and the routers' losses.

    Attributes:
      expert_axis: the argument of `scale_by_excitation` for this model: layers and experts are the leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from excitation_optax import flax as excitation_flax
      >>> from models import moe, moe_vit
      >>> layer = moe.MoEConfig(d_model=16, d_ff=32, num_experts=4, experts_per_token=2)
      >>> config = moe_vit.MoEViTConfig(moe=layer, num_layers=3, num_heads=2, image_size=8)
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
        width, dtype = config.moe.d_model, config.moe.dtype
        self.patches = nnx.Linear(3 * config.patch_size**2, width, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), (config.num_patches, width), jnp.float32))
        self.layers = transformer.Layers(
            config.moe,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            causal=False,
            residual=config.residual,
            scan_layers=config.scan_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = transformer.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Computes the logits `[B, C]`, float32, of images `[B, H, W, 3]`, floats. `key` is for the routers' jitter.

        Raises:
          ValueError: if the images are not floats of this shape.
        """
        config, dtype = self.config, self.config.moe.dtype
        shape = ("B", config.image_size, config.image_size, 3)
        images = checks.check_array(images, "MoEViT: images", "floats", shape)
        x = self.patches(split_into_patches(images, config.patch_size).astype(dtype))
        x += jnp.broadcast_to(self.positions[...].astype(dtype), x.shape)
        x, _ = self.layers(x, key=key)
        return self.head(jnp.mean(self.norm(x).astype(jnp.float32), axis=1))


def split_into_patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images `[B, H, W, 3]` into patches `[B, S, 3 size^2]`, row by row.

    Example:
      >>> import jax.numpy as jnp
      >>> from models import moe_vit
      >>> moe_vit.split_into_patches(jnp.ones((2, 8, 12, 3)), 4).shape
      (2, 6, 48)
    """
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
