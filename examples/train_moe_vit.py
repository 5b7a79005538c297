"""Trains MoE-ViTs on images, without and with Excitation, and ends with a table and a picture.

    python -m examples.train_moe_vit                               # scikit-learn's digits, at 32x32
    python -m examples.train_moe_vit --data-dir DIR                # CIFAR-10
    python -m examples.train_moe_vit --data-dir DIR --strategy baseline zero_sum positive_sum --seeds 3

`training.routed_loss` and `training.train_step` show all that Excitation requires: loss, gradient, update.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples import comparison, datasets, training
from models import moe_vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(comparison.Config):
    """Train MoE-ViTs without and with Excitation; compare test accuracy and routing."""

    data_dir: pathlib.Path | None = None
    """The folder of CIFAR-10, as TensorFlow Datasets prepares it or as its makers publish it (cifar-10-python.tar.gz).
    Without it, scikit-learn's digits are used."""
    patch_size: int = 8
    """Pixels on each side of a patch; the images are 32x32. Patches of 4 learn more in an epoch and take four times as
    long."""
    epochs: int | None = None
    """Passes over the training images; by default 8 for CIFAR-10, 40 for digits."""
    batch_size: int = 128
    """Images of a step."""
    output: pathlib.Path = pathlib.Path("out/train_moe_vit.png")

    def __post_init__(self):
        super().__post_init__()
        self.model()  # it checks its sizes

    def model(self) -> moe_vit.MoEViTConfig:
        """The model's config."""
        return training.model_config(moe_vit.MoEViTConfig, self, patch_size=self.patch_size)


def loss_fn(graphdef, params, batch, *, flip: bool, **weights: float):
    """What is minimized on images, labels and a key, what is logged, and the routing."""
    images, labels, key = batch
    images = augment(key, to_unit_range(images), flip=flip)
    model = nnx.merge(graphdef, params)
    minimized, logged, utilization, logits = training.routed_loss(model, images, labels, **weights)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return minimized, (logged | {"accuracy": accuracy}, utilization)


def to_unit_range(images):
    """Bytes from 0 to 255 as floats from -1 to 1. Images stay bytes in memory."""
    return images.astype(jnp.float32) / 127.5 - 1


def augment(key, images, flip: bool):
    """Images `[B, H, W, 3]`, each shifted by up to 4 pixels at random; with `flip`, half of them are mirrored."""
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (images.shape[0], 2), 0, 9)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    crop = lambda image, shift: jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), images.shape[1:])
    images = jax.vmap(crop)(padded, shifts)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1)) & flip
    return jnp.where(mirrored, images[:, :, ::-1], images)


@functools.partial(jax.jit, static_argnums=0)
def count_correct(graphdef, params, images, labels):
    """The number of images whose class is predicted correctly."""
    model = nnx.merge(graphdef, params)
    model.eval()
    return jnp.sum(jnp.argmax(model(to_unit_range(images)), axis=-1) == labels)


def measure(graphdef, params, images, labels, batch_size: int = 500) -> dict[str, float]:
    """What is logged about the test images."""
    batches = (slice(start, start + batch_size) for start in range(0, len(labels), batch_size))
    correct = sum(int(count_correct(graphdef, params, images[batch], labels[batch])) for batch in batches)
    return {"test_accuracy": correct / len(labels)}


def load(config: Config) -> datasets.ImageData:
    """CIFAR-10; or digits, enlarged to 32x32 and in three channels."""
    if config.data_dir is not None:
        return datasets.load_images("cifar10", config.data_dir)
    digits = datasets.load_digits()
    train_images, test_images = (
        np.kron(images, np.ones((1, 4, 4, 3), np.uint8)) for images in (digits.train_images, digits.test_images)
    )
    return dataclasses.replace(digits, train_images=train_images, test_images=test_images)


def make_task(config: Config, data: datasets.ImageData) -> comparison.Task:
    """What `comparison.compare` has to know. Images are shuffled anew in each epoch; digits are never mirrored."""
    examples = len(data.train_labels)
    rows_of_epoch = functools.lru_cache(1)(functools.partial(comparison.shuffled, examples, config.batch_size))
    per_epoch = len(rows_of_epoch(config.seed, 1))

    def batch(seed, step):
        epoch, number = divmod(step, per_epoch)
        rows = rows_of_epoch(seed, epoch + 1)[number]
        key = jax.random.fold_in(jax.random.key(seed), 1)  # apart from the keys of random strategies
        return data.train_images[rows], data.train_labels[rows], jax.random.fold_in(key, step)

    return comparison.Task(
        data=f"{data.description}: {examples} training and {len(data.test_labels)} test images",
        model=lambda seed: moe_vit.MoEViT(config.model(), rngs=nnx.Rngs(seed)),
        loss_fn=functools.partial(loss_fn, flip=config.data_dir is not None),
        batch=batch,
        evaluate=functools.partial(measure, images=data.test_images, labels=data.test_labels),
        steps=per_epoch * (config.epochs or (40 if config.data_dir is None else 8)),
        evaluate_every=per_epoch,
        batch_items=config.batch_size,
        items="images",
        measures={"test accuracy, %": ("test_accuracy", 100, 2)},
    )


def main(config: Config) -> comparison.Runs:
    """Loads the data, trains all strategies, prints the table and draws the picture."""
    runs, _ = comparison.compare(config, make_task(config, load(config)))
    here = f" --data-dir {config.data_dir}" if config.data_dir else ""
    print(f"next: python -m examples.train_moe_vit{here} --strategy baseline zero_sum positive_sum --seeds 3")
    return runs


if __name__ == "__main__":
    training.run_program(main, Config, "examples.train_moe_vit")
