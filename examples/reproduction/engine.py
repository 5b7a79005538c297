"""Trains many Top-K MLPs at once, stacked (`stacks`).

The data stays on the device as bytes; shuffling, augmentation and evaluation happen there too.

Axis letters: S seeds, M members (the runs of a seed), L hidden layers, E neurons, C classes, B batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples import datasets, training
from examples.reproduction import configs, stacks
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import topk_mlp

Group, Member = stacks.Group, stacks.Member

PAD = 4  # pixels on every side, black, for random crops
HELD_OUT = 5000  # the most images that `validation` is measured on

# Where Optax's defaults are not those of PyTorch, PyTorch's: the paper names no values, and these are the common ones.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = training.OPTIMIZERS | {
    "adamw": functools.partial(optax.adamw, weight_decay=0.01),
    "rmsprop": functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),
    "adagrad": functools.partial(optax.adagrad, initial_accumulator_value=0.0, eps=1e-20),  # in the root
}
ACTIVATIONS = {"relu": nnx.relu, "none": lambda h: h}


class Data(NamedTuple):
    """A data set on a device."""

    train_images: jax.Array  # uint8, with a black border where images are cropped at random
    train_labels: jax.Array
    test_images: jax.Array  # uint8
    test_labels: jax.Array
    mean: jax.Array  # [1, 1, 1, channels] of the training pixels in [0, 1], or 0
    deviation: jax.Array  # or 1
    held_out_images: jax.Array | None = None  # uint8, training images that a subset leaves out, at most `HELD_OUT`
    held_out_labels: jax.Array | None = None


def put(data: datasets.ImageData, shared: configs.MLPRun) -> Data:
    """The data set on JAX's default device, prepared for the runs of a group."""
    train_images, train_labels = data.train_images[: shared.subset], data.train_labels[: shared.subset]
    held_out = slice(len(train_labels), len(train_labels) + HELD_OUT)
    left_out = (data.train_images[held_out], data.train_labels[held_out])
    left_out = left_out if len(left_out[1]) else ()
    mean, deviation = np.float32(0), np.float32(1)
    if shared.normalization == "standard":
        values = np.arange(256) / 255
        channels = range(train_images.shape[-1])
        shares = np.stack([np.bincount(train_images[..., c].ravel(), minlength=256) for c in channels])
        shares = shares / shares.sum(1, keepdims=True)
        mean = (shares @ values).astype(np.float32)
        deviation = np.sqrt(shares @ values**2 - (shares @ values) ** 2).astype(np.float32)
    if shared.augmentation == "crop_flip":
        train_images = np.pad(train_images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    channels = mean.reshape(1, 1, 1, -1), deviation.reshape(1, 1, 1, -1)
    test = data.test_images, data.test_labels
    return Data(*map(jnp.asarray, (train_images, train_labels, *test, *channels, *left_out)))


class VariantMLP(topk_mlp.TopKMLP):
    """A Top-K MLP with a residual connection around each hidden layer but the first, LayerNorm before it, or both."""

    def __init__(self, config: topk_mlp.TopKMLPConfig, residual: bool, layer_norm: bool, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.residual = residual
        norms = config.depth if layer_norm else 0
        self.norms = nnx.List([nnx.LayerNorm(config.width, rngs=rngs) for _ in range(norms)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[B, C]` of inputs `[B, ...]`."""
        return self.logits(self.hidden(x))

    def hidden(self, x: jax.Array) -> list[jax.Array]:
        """The activations that every hidden layer keeps, `[B, E]` each, before a residual is added."""
        kept = [self.layers[0](x.reshape(x.shape[0], -1))]
        for number, layer in enumerate(self.layers[1:]):
            kept.append(layer(self._input(kept, number)))
        return kept

    def logits(self, kept: list[jax.Array]) -> jax.Array:
        """The output layer, applied to the activations that `hidden` returned."""
        return self.head(self._input(kept, len(kept) - 1))

    def _input(self, kept, number):
        """The input `[B, E]` of the layer after hidden layer `number`."""
        h = functools.reduce(jnp.add, kept) if self.residual else kept[-1]
        return self.norms[number](h) if self.norms else h


class Program(stacks.Program):
    """The compiled functions of a group. Sizes are the input's, the number of classes, and the steps of an epoch."""

    together = True
    along = ("accuracy", "entropy", "specialization")
    put = staticmethod(put)

    def __init__(self, shared: configs.MLPRun, strategies: Sequence[str], *sizes: int, **options: Any):
        input_dim, self.num_classes, self.steps_per_epoch = sizes
        self.model_config = topk_mlp.TopKMLPConfig(
            input_dim, shared.width, shared.depth, self.num_classes, shared.sparsity, ACTIVATIONS[shared.activation]
        )
        super().__init__(shared, strategies, *sizes, **options)

    @classmethod
    def limits(cls, shared: Any, max_runs: int | None = None, max_epochs: int | None = None) -> tuple[int, int]:
        """At most `max_runs` runs, as many as are small in memory and time; as many seeds.

        A group has at most `max_epochs` epochs of 50,000 images, over all of its runs: an interruption loses the epochs
        of the groups that are training. The defaults are 18 and 300; 64 and 2000 on an accelerator.
        """
        on_cpu = jax.default_backend() == "cpu"
        max_runs, max_epochs = max_runs or (18 if on_cpu else 64), max_epochs or (300 if on_cpu else 2000)
        images = 1_437 if shared.dataset == "digits" else 50_000
        work = shared.epochs * min(images, shared.subset or images)
        limit = max(1, min(max_runs, 50_000 * max_epochs // work))
        return limit, limit

    @classmethod
    def sizes_of(cls, shared: Any, data: datasets.ImageData) -> tuple[int, ...]:
        """The model's sizes, and steps. Raises ValueError if there is not a single full batch."""
        examples = len(data.train_labels[: shared.subset])
        steps = stacks.steps_of(examples, "training images", shared.batch_size)
        return data.input_dim, data.num_classes, steps

    def make_model(self, seed) -> VariantMLP:
        """The model that every run of a seed starts from."""
        rngs = nnx.Rngs(jax.random.key(seed))
        model = VariantMLP(self.model_config, self.shared.residual, self.shared.layer_norm, rngs=rngs)
        key = jax.random.fold_in(jax.random.key(seed), 2)
        topk_mlp.initialize(model, self.shared.initialization, key)
        return model

    def params_of(self, model):
        """The parameters, with kernels as `[out, in]`: of these, XLA's CPU code makes stacked products faster."""
        return _transposed(nnx.state(model))

    def model_of(self, params):
        """The model of what `params_of` returned."""
        return super().model_of(_transposed(params))

    def make_optimizer(self, member: Member, seed) -> optax.GradientTransformationExtraArgs:
        """The optimizer with its schedule, and Excitation after it."""
        steps = self.shared.epochs * self.steps_per_epoch
        cosine = self.shared.schedule == "cosine"
        # Optax's own schedule requires a number that is not traced.
        decay = (lambda count: 0.5 * (1 + jnp.cos(jnp.pi * count / steps))) if cosine else (lambda count: 1.0)
        epsilon = {"eps": self.shared.epsilon} if self.shared.optimizer in ("adam", "adamw") else {}
        return optax.chain(
            OPTIMIZERS[self.shared.optimizer](lambda count: member.learning_rate * decay(count), **epsilon),
            stacks.excite(self.strategies, self.components, member, None, seed),
        )

    def rows(self, key, data: Data):
        """Indices and a key for each batch of an epoch."""
        return stacks.shuffled(key, len(data.train_labels), self.shared.batch_size)

    def batch(self, data: Data, row):
        """Images and labels."""
        indices, key = row
        return self.normalize(self.augment(key, data.train_images, indices), data), data.train_labels[indices]

    def loss_fn(self, params, member: Member, batch):
        """What is minimized on images and labels, the loss and the routing."""
        images, labels = batch
        logits, utilization = excitation_flax.capture_routing(self.model_of(params))(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (loss, utilization)

    def augment(self, key, images, indices):
        """The images `[B, H, W, 3]` of a batch, each cut out at random from its border and mirrored at random."""
        crop_key, flip_key = jax.random.split(key)
        batch = indices.shape[0]
        border = PAD if self.shared.augmentation == "crop_flip" else 0
        height, width = images.shape[1] - 2 * border, images.shape[2] - 2 * border
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * border + 1)

        def crop(operands):
            index, (top, left) = operands
            return jax.lax.dynamic_slice(images, (index, top, left, 0), (1, height, width, images.shape[3]))[0]

        # One by one, these are copies; XLA's CPU code for a gather is slower.
        images = jax.lax.map(crop, (indices, corners), batch_size=batch if self.wide else None)
        if self.shared.augmentation == "none":
            return images
        mirrored = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        return jnp.where(mirrored, images[:, :, ::-1], images)

    def normalize(self, images, data: Data):
        """Bytes to floats."""
        return (images.astype(jnp.float32) / 255 - data.mean) / data.deviation

    def measure_all(self, params, data: Data) -> dict[str, jax.Array]:
        """Measures of a run on the test images, some of them by layer `[L]`.

        `accuracy` is NaN for a model that diverged; `validation` is the accuracy on training images that the runs leave
        out, if any; `entropy` (nats) is that of the shares of the kept neurons in what a layer passes on; `max_load` is
        that of the busiest neuron, over the mean; `dead` is the share of neurons that no image activates.
        """
        model = self.model_of(params)
        hidden, _ = excitation_flax.capture_routing(model.hidden)(self.normalize(data.test_images, data))
        logits, validation = model.logits(hidden), {}
        if data.held_out_images is not None:
            model.eval()
            found = stacks.accuracy(model(self.normalize(data.held_out_images, data)), data.held_out_labels)
            validation = {"validation": found}
        active = [h != 0 for h in hidden]
        loads = jnp.stack([excitation_optax.count_active(a).utilization for a in active])
        classes = jnp.stack([metrics.class_counts(a, data.test_labels, self.num_classes) for a in active])
        return validation | {
            "accuracy": stacks.accuracy(logits, data.test_labels),
            "entropy": jnp.stack([metrics.routing_entropy(jnp.abs(h)) for h in hidden]),
            "specialization": jax.vmap(metrics.specialization_score)(classes),
            "max_load": metrics.max_over_mean_load(loads),
            "dead": metrics.dead_experts(loads),
        }


def _transposed(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)


program_of = functools.partial(stacks.program_of, Program)
