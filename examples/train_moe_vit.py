"""Trains a MoE-ViT on images, with or without Excitation.

    python -m examples.train_moe_vit                                            # scikit-learn's digits, at 32x32
    python -m examples.train_moe_vit --data-dir DIR                             # CIFAR-10, by TensorFlow Datasets
    python -m examples.train_moe_vit --data-dir DIR --strategy positive_sum     # the same, excited

`train_step` is all there is to it: loss, gradient, update.
"""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from examples import datasets, training
from excitation_optax import flax as excitation_flax
from models import moe, moe_vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.TrainingConfig):
    """Train a MoE-ViT on CIFAR-10, or on scikit-learn's digits if no --data-dir is given."""

    data_dir: pathlib.Path | None = None
    """Where TensorFlow Datasets has CIFAR-10 prepared, such as ~/tensorflow_datasets; without it, digits."""
    num_experts: int = 16
    experts_per_token: int = 2
    d_model: int = 128
    d_ff: int = 128
    """The hidden width of an expert."""
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 8
    """Pixels; the images are 32x32. Patches of 4 learn more in an epoch, and take four times as long."""
    epochs: int | None = None
    """By default 8 for CIFAR-10, 40 for digits."""
    batch_size: int = 128

    def __post_init__(self):
        """Errors before anything is loaded or trained; the model's own config checks its sizes."""
        super().__post_init__()
        training.check_positive(self, "batch_size", *(["epochs"] if self.epochs is not None else []))
        self.model()

    @property
    def flip(self) -> bool:
        """Whether half of the training images are mirrored; digits are not."""
        return self.data_dir is not None

    def model(self) -> moe_vit.MoEViTConfig:
        """That of the model."""
        layer = moe.MoEConfig(
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            dtype=jnp.dtype(self.dtype),
        )
        return moe_vit.MoEViTConfig(
            moe=layer, num_layers=self.num_layers, num_heads=self.num_heads, patch_size=self.patch_size
        )


def train_step(config, graphdef, tx, params, opt_state, step, images, labels, key):
    """One step: loss, gradient, update. Returns what is to be logged too."""

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        losses = moe.auxiliary_losses(sown)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return training.add_auxiliary(config, loss, losses), (loss, accuracy, utilization, losses)

    images = augment(key, to_unit_range(images), flip=config.flip)
    grads, (loss, accuracy, utilization, losses) = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
    params = optax.apply_updates(params, updates)
    logged = {"loss": loss, "accuracy": accuracy} | training.routing_metrics(config, utilization, losses, step)
    return params, opt_state, logged


def to_unit_range(images):
    """Pixels from -1 to 1 as floats, of pixels in 0 to 255 as bytes, which is how they stay in memory."""
    return images.astype(jnp.float32) / 127.5 - 1


def augment(key, images, flip: bool):
    """Images `[B, H, W, 3]` shifted by up to 4 pixels, every one by its own shift, and half of them mirrored."""
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (images.shape[0], 2), 0, 9)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    crop = lambda image, shift: jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), images.shape[1:])
    images = jax.vmap(crop)(padded, shifts)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1)) & flip
    return jnp.where(mirrored, images[:, :, ::-1], images)


def evaluate(predict, params, images, labels, batch_size: int = 500) -> float:
    """The share of images that are classified right."""
    correct = 0
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        correct += int(np.sum(np.asarray(predict(params, images[batch])) == labels[batch]))
    return correct / len(labels)


def load(config: Config) -> datasets.ImageData:
    """CIFAR-10, or digits, enlarged to 32x32 and in three channels."""
    if config.data_dir is not None:
        return datasets.load_tfds("cifar10", config.data_dir)
    digits = datasets.load_digits()
    enlarge = lambda images: np.tile(images.repeat(4, axis=1).repeat(4, axis=2), (1, 1, 1, 3))
    return dataclasses.replace(
        digits, train_images=enlarge(digits.train_images), test_images=enlarge(digits.test_images)
    )


def main(config: Config) -> float:
    """Loads the data, trains, writes the log, and returns the test accuracy."""
    data = load(config)
    examples = len(data.train_labels)
    if config.batch_size > examples:
        raise ValueError(f"--batch-size must be at most the {examples} training images; got {config.batch_size}.")
    steps_per_epoch = examples // config.batch_size
    epochs = config.epochs or (40 if config.data_dir is None else 8)
    steps = epochs * steps_per_epoch
    model_config = config.model()
    make = lambda: moe_vit.MoEViT(model_config, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(make())
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{data.description}: {examples} training and {len(data.test_labels)} test images; {size:,} parameters")
    tx = training.make_optimizer(config, steps, moe_vit.MoEViT.expert_axis)
    opt_state = tx.init(params)
    step = jax.jit(functools.partial(train_step, config, graphdef, tx), donate_argnums=(0, 1))

    @jax.jit
    def predict(params, images):
        model = nnx.merge(graphdef, params)
        model.eval()
        return jnp.argmax(model(to_unit_range(images)), axis=-1)

    log = training.Log(config, "train_moe_vit", steps)
    augmentation_key = jax.random.fold_in(jax.random.key(config.seed), 1)  # apart from random strategies' keys
    number, accuracy = 0, 0.0
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng((config.seed, epoch)).permutation(examples)
        for batch in order[: steps_per_epoch * config.batch_size].reshape(steps_per_epoch, -1):
            key = jax.random.fold_in(augmentation_key, number)
            images, labels = data.train_images[batch], data.train_labels[batch]
            params, opt_state, logged = step(params, opt_state, number, images, labels, key)
            number += 1
            log.advance()
            if number % config.log_every == 0:
                logged = jax.device_get(logged)  # wait for it
                logged["images_per_second"] = log.rate(number * config.batch_size)
                log.write(number, logged, f"loss {logged['loss']:.3f}")
        accuracy = evaluate(predict, params, data.test_images, data.test_labels)
        log.write(number, {"epoch": epoch, "test_accuracy": accuracy}, f"test accuracy {100 * accuracy:.1f} %")
        log.skip(number * config.batch_size)
    log.close()
    print(f"{config.strategy}: test accuracy {100 * accuracy:.2f} % after {epochs} epochs; log: {log.path}")
    return accuracy


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=Config.__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"train_moe_vit: {error}")
