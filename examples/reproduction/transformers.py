"""Transformers with MoE layers: those of the paper's section 4.5, and ours in miniature.

The paper's are MoE-ViTs (figures 6, 10 and 11) and GPT-MoEs (table 2). They are too large to be stacked: a group is one
run. An epoch goes over all examples, shuffled; its last batch is dropped unless it is full.

In miniature, runs of one seed that differ in their optimizer alone are a group. An epoch is `STEPS` random batches.

Axis letters: B batch, S sequence, L layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples import datasets, texts, train_gpt_moe, train_moe_vit, training
from examples.reproduction import configs, stacks
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import gpt_moe, moe, moe_vit, router

Member = stacks.Member
STEPS = 100  # batches of an epoch in miniature
WINDOWS = 512  # of the evaluation text, evenly spaced; as many of the validation text
IMAGES = 4096  # of the test images at most, and half as many for validation


class Examples(NamedTuple):
    """Data on a device. In miniature, the last tenth of the training data is for validation and not trained on."""

    train: Any
    test: Any
    validation: Any = None


class Program(stacks.Program):
    """The compiled functions of a group, of one seed. A subclass has what stands below without a value, and `batch`."""

    together = False
    measure: ClassVar[str]  # what is evaluated on the test data, and on the validation data as `validation`
    evaluation_batch: ClassVar[int]
    model: ClassVar[Callable[..., nnx.Module]]
    config: Any  # of the model

    def make_model(self, seed: Any) -> nnx.Module:
        """The model that every run of a seed starts from."""
        return self.model(self.config(), rngs=nnx.Rngs(jax.random.key(seed)))

    def loss_fn(self, params, member: Member, batch):
        """What is minimized on a batch, the loss and the routing."""
        loss, _, utilization, sown = self.apply(params, batch)
        return loss + member.load_balancing * moe.auxiliary_losses(sown).load_balancing, (loss, utilization)

    def apply(self, params, batch):
        """The mean loss, `measure`, the routing, and the routers' losses."""
        model = excitation_flax.capture_routing(self.model_of(fresh(params)), moe.AuxiliaryLoss)
        inputs, labels = batch
        logits, utilization, sown = model(inputs)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, loss if self.measure == "loss" else stacks.accuracy(logits, labels), utilization, sown

    def measure_all(self, params, data: Examples) -> dict[str, jax.Array]:
        """`measure`; and of each layer `entropy` (nats, of the router's probabilities), `max_load` and `dead`.

        The load is that of the busiest expert, over the mean; dead is the share of experts that no token goes to.
        """
        found, entropy, counts = self.measure_part(params, data.test)
        loads = {"max_load": metrics.max_over_mean_load(counts), "dead": metrics.dead_experts(counts)}
        validation = {} if data.validation is None else {"validation": self.measure_part(params, data.validation)[0]}
        return {self.measure: found, "entropy": entropy} | validation | loads

    def measure_part(self, params, part):
        """`measure`, `entropy` and the routing, in batches of one size."""

        def one(batch):
            _, found, utilization, sown = self.apply(params, batch)
            (entropy,) = [value[...] for path, value in nnx.to_flat_state(sown) if path[-1] == "entropy"]
            return found, jnp.ravel(entropy), routing_of(utilization)

        number = len(part[1])
        size = next(size for size in range(min(self.evaluation_batch, number), 0, -1) if number % size == 0)
        cut = lambda array: array.reshape(-1, size, *array.shape[1:])
        found, entropy, counts = jax.lax.map(one, jax.tree.map(cut, part))
        return jnp.mean(found), jnp.mean(entropy, axis=0), jax.tree.map(functools.partial(jnp.sum, axis=0), counts)


class Paper(Program):
    """The compiled functions of a run of the paper's. The first of its sizes is the number of examples."""

    most_steps = 20

    @classmethod
    def plan(cls, runs: Iterable[Any], **limits: int) -> list[stacks.Group]:
        """A group for each run, seed by seed: an interruption leaves what can be compared."""
        del limits
        return [stacks.Group(((run,),)) for run in sorted(dict.fromkeys(runs), key=lambda run: run.seed)]

    def make_optimizer(self, member: Member, seed: Any) -> optax.GradientTransformationExtraArgs:
        """SGD or Adam with warm-up and cosine decay to zero, and Excitation after it."""
        steps = self.shared.epochs * (self.sizes[0] // self.shared.batch_size)
        shape = training.warmup_cosine(1.0, self.shared.warmup, steps)
        optimizer = training.OPTIMIZERS[getattr(self.shared, "optimizer", "adam")]
        return optax.chain(
            optimizer(lambda count: member.learning_rate * shape(count)),
            stacks.excite(self.strategies, self.components, member, None, seed),
        )

    def rows(self, key, data: Examples):
        """Numbers of examples and a key for each batch of an epoch."""
        del data
        return stacks.shuffled(key, self.sizes[0], self.shared.batch_size)


class Mini(Program):
    """The compiled functions of a group in miniature."""

    draws: Any  # of data: how many numbers name examples

    @classmethod
    def limits(cls, shared: Any, max_runs: int | None = None) -> tuple[int, int]:
        """At most 16 runs (64 on an accelerator) of one seed."""
        del shared
        return max_runs or (16 if jax.default_backend() == "cpu" else 64), 1

    def make_optimizer(self, member: Member, seed: Any) -> optax.GradientTransformationExtraArgs:
        """AdamW with its schedule, then Excitation, then the static factor on the experts' updates."""
        steps = STEPS * self.shared.epochs
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)
        # A selection bias has no gradient. Without weight decay, AdamW leaves it alone.
        mask = _is_param if self.shared.router_bias else None
        return optax.chain(
            optax.adamw(lambda count: member.learning_rate * shape(count), weight_decay=0.01, mask=mask),
            stacks.excite(self.strategies, self.components, member, None, seed),
            excitation_optax.scale_by_excitation(jnp.full_like, member.expert_rate),
        )

    def make_model(self, seed: Any) -> nnx.Module:
        """The model, with a selection bias and without residual connections if the runs say so."""
        config = self.config()
        layer = dataclasses.replace(config.moe, selection_bias=self.shared.router_bias > 0)
        config = dataclasses.replace(config, moe=layer, residual=self.shared.residual)
        return self.model(config, rngs=nnx.Rngs(jax.random.key(seed)))

    def after_step(self, params, utilization):
        """The parameters with the selection biases moved, if there are any."""
        if self.shared.router_bias:
            bias = params["layers"]["stack"]["moe"]["router"]["bias"]
            bias[...] = router.update_router_bias(bias[...], routing_of(utilization), self.shared.router_bias)
        return params

    def rows(self, key, data: Examples):
        """Numbers that name the examples of each batch."""
        return jax.random.randint(key, (STEPS, self.shared.batch_size), 0, self.draws(data))


def routing_of(utilization: Any) -> excitation_optax.RoutingCounts:
    """The counts of all layers `[L, E]`."""
    return utilization["layers"]["stack"]["moe"]["experts"]


def fresh(params: Any) -> Any:
    """The parameters in new Variables, of the trace level of the caller."""
    return jax.tree.map(lambda leaf: leaf, params)


def _is_param(params):
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return jax.tree.map(lambda v: isinstance(v, nnx.Param), params, is_leaf=is_variable)


def _cut(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = len(array) * 9 // 10
    return array[:cut], array[cut:]


def _rgb(images: np.ndarray) -> jax.Array:
    """Images `[B, H, W, 3]`; gray ones are repeated in 3 channels."""
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def _windows(tokens: Any, starts: Any, context: int) -> tuple[Any, Any]:
    """Windows `[B, S]` of a text, and the tokens that follow each of theirs."""
    tokens = tokens[starts[:, None] + np.arange(context + 1)[None]]
    return tokens[:, :-1], tokens[:, 1:]


class GPT(Program):
    """A GPT-MoE. Its sizes are the sequences, the vocabulary, and the bytes per token of the evaluation text."""

    model, measure, evaluation_batch = gpt_moe.GPTMoE, "loss", 64

    @classmethod
    def sizes_of(cls, shared: Any, data: texts.Text) -> tuple[Any, ...]:
        """Of the data. Raises ValueError if there is not a single full batch."""
        sequences = (len(data.train) - 1) // shared.context
        sequences = min(sequences, shared.subset or sequences)
        stacks.steps_of(sequences, f"sequences of {shared.context} tokens", shared.batch_size)
        return sequences, data.vocab_size, len(data.evaluation_bytes) / len(data.evaluation)

    def config(self) -> gpt_moe.GPTMoEConfig:
        """The sizes of the GPT-MoE."""
        options = {"context": self.shared.context, "vocab_size": self.sizes[1]}
        return training.model_config(gpt_moe.GPTMoEConfig, self.shared, **options)


class GPTProgram(Paper, GPT):
    """A GPT-MoE on tokens."""

    @classmethod
    def put(cls, data: texts.Text, shared: Any) -> Examples:
        """The tokens, and windows of the evaluation text with a mask."""
        windows = train_gpt_moe.windows(data.evaluation, shared.context, shared.batch_size)
        return Examples(jnp.asarray(data.train), tuple(map(jnp.asarray, windows)))

    def batch(self, data: Examples, row):
        """Sequences, and the same one token later."""
        return _windows(data.train, row[0] * self.shared.context, self.shared.context)

    def measure_all(self, params, data: Examples) -> dict[str, jax.Array]:
        """The `perplexity` per token and the `bits_per_byte` of the whole evaluation text."""
        totals = jax.lax.map(lambda batch: train_gpt_moe.total_loss(self.graphdef, fresh(params), *batch), data.test)
        loss = jnp.sum(totals) / jnp.sum(data.test[1])
        return {"perplexity": jnp.exp(jnp.minimum(loss, 80.0)), "bits_per_byte": loss / np.log(2) / self.sizes[2]}


class MiniGPTProgram(Mini, GPT):
    """A GPT-MoE on bytes; losses are in nats per byte."""

    @classmethod
    def put(cls, data: texts.Text, shared: Any) -> Examples:
        """The bytes, and evenly spaced windows of those that are not trained on."""
        train, held_out = _cut(data.train)
        starts = lambda tokens: np.linspace(0, len(tokens) - shared.context - 1, WINDOWS).astype(int)
        test, validation = (_windows(part, starts(part), shared.context) for part in (data.evaluation, held_out))
        parts = train[: shared.subset], test, validation
        return Examples(*jax.tree.map(lambda part: jnp.asarray(part, jnp.int32), parts))

    def draws(self, data):
        """The first positions of windows."""
        return len(data.train) - self.shared.context - 1

    def batch(self, data, row):
        """Windows, and the same one byte later."""
        return _windows(data.train, row, self.shared.context)


class ViT(Program):
    """A MoE-ViT. Its sizes are the training images, pixels and classes."""

    model, measure, evaluation_batch = moe_vit.MoEViT, "accuracy", 256

    @classmethod
    def sizes_of(cls, shared: Any, data: datasets.ImageData) -> tuple[int, ...]:
        """Of the data. Raises ValueError if there is not a single full batch."""
        images = len(data.train_labels[: shared.subset])
        stacks.steps_of(images, "training images", shared.batch_size)
        return images, data.train_images.shape[1], data.num_classes

    def config(self) -> moe_vit.MoEViTConfig:
        """The sizes of the MoE-ViT."""
        _, image_size, num_classes = self.sizes
        options = {"image_size": image_size, "num_classes": num_classes, "patch_size": self.shared.patch_size}
        return training.model_config(moe_vit.MoEViTConfig, self.shared, **options)


class ViTProgram(Paper, ViT):
    """A MoE-ViT, measured on all test images."""

    @classmethod
    def put(cls, data: datasets.ImageData, shared: Any) -> Examples:
        """Bytes to train on, and floats to measure on."""
        train = _rgb(data.train_images[: shared.subset]), jnp.asarray(data.train_labels[: shared.subset])
        return Examples(train, (train_moe_vit.to_unit_range(_rgb(data.test_images)), jnp.asarray(data.test_labels)))

    def batch(self, data: Examples, row):
        """Images, cropped at random, and mirrored if the runs say so; and labels."""
        (images, labels), (indices, key) = data.train, row
        images = train_moe_vit.to_unit_range(images[indices])
        return train_moe_vit.augment(key, images, flip=bool(self.shared.flip)), labels[indices]


class MiniViTProgram(Mini, ViT):
    """A MoE-ViT in miniature."""

    @classmethod
    def put(cls, data: datasets.ImageData, shared: Any) -> Examples:
        """Bytes to train on, and floats that are not trained on: whole batches of the first of them."""
        (images, more_images), (labels, more_labels) = _cut(data.train_images), _cut(data.train_labels)

        def first(images, labels, most):
            number, batch = min(len(labels), most), cls.evaluation_batch
            number -= number % batch if number > batch else 0
            return train_moe_vit.to_unit_range(_rgb(images[:number])), jnp.asarray(labels[:number])

        return Examples(
            (_rgb(images[: shared.subset]), jnp.asarray(labels[: shared.subset])),
            first(data.test_images, data.test_labels, IMAGES),
            first(more_images, more_labels, IMAGES // 2),
        )

    def draws(self, data):
        """Numbers past the last image name mirrored images."""
        return (1 if self.shared.dataset in configs.DIGITS else 2) * len(data.train[1])

    def batch(self, data, row):
        """Images and labels."""
        images, labels = data.train
        is_mirrored, rows = row >= len(labels), row % len(labels)
        images = train_moe_vit.to_unit_range(images[rows])
        return jnp.where(is_mirrored[:, None, None, None], images[:, :, ::-1], images), labels[rows]
