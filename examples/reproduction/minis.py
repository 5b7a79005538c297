"""Trains transformers in miniature, stacked (`stacks`): a program for all runs that differ in their optimizer alone.

A group has one seed. Its runs start from the same parameters and see the same batches.

Axis letters: M members (the runs of a seed), B batch, S sequence, L layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples import datasets, texts, train_gpt_moe, train_moe_vit
from examples.reproduction import configs, stacks
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import gpt_moe, moe, moe_vit, router

Member = stacks.Member
STEPS = 100  # batches of an epoch
WINDOWS = 512  # of the evaluation text, evenly spaced; as many of the validation text
IMAGES = 4096  # of the test images at most, and half as many for validation


class Examples(NamedTuple):
    """Data on a device. The last tenth of the training data is for validation and not trained on."""

    train: Any
    validation: Any
    test: Any


class Program(stacks.Program):
    """The compiled functions of a group, of one seed. A subclass has what stands below without a value, and `batch`."""

    together = False
    measure: ClassVar[str]  # what is evaluated on the test data, and on held-out training data as `validation`
    evaluation_batch: ClassVar[int]
    model: ClassVar[Callable[..., nnx.Module]]
    config: Any  # of the model, as it is with residual connections and without a selection bias
    draws: Any  # of data: how many numbers name examples

    @classmethod
    def limits(cls, shared: Any, max_runs: int | None = None) -> tuple[int, int]:
        """At most 16 runs (64 on an accelerator) of one seed."""
        del shared
        return max_runs or (16 if jax.default_backend() == "cpu" else 64), 1

    def make_model(self, seed: Any) -> nnx.Module:
        """The model, with a selection bias and without residual connections if the runs say so."""
        config = self.config()
        layer = dataclasses.replace(config.moe, selection_bias=self.shared.router_bias > 0)
        config = dataclasses.replace(config, moe=layer, residual=self.shared.residual)
        return self.model(config, rngs=nnx.Rngs(jax.random.key(seed)))

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

    def rows(self, key, data: Examples):
        """Numbers that name the examples of each batch."""
        return jax.random.randint(key, (STEPS, self.shared.batch_size), 0, self.draws(data))

    def after_step(self, params, utilization):
        """The parameters with the selection biases moved, if there are any."""
        if self.shared.router_bias:
            bias = params["layers"]["stack"]["moe"]["router"]["bias"]
            bias[...] = router.update_router_bias(bias[...], routing_of(utilization), self.shared.router_bias)
        return params

    def loss_fn(self, params, member: Member, batch):
        """What is minimized on a batch, the loss and the routing."""
        loss, _, utilization, sown = self.apply(params, batch)
        return loss + member.load_balancing * moe.auxiliary_losses(sown).load_balancing, (loss, utilization)

    def apply(self, params, batch):
        """The mean loss, `measure`, the routing, and the routers' losses."""
        params = jax.tree.map(lambda leaf: leaf, params)  # new Variables, of the trace level of this call
        model = excitation_flax.capture_routing(nnx.merge(self.graphdef, params), moe.AuxiliaryLoss)
        inputs, labels = batch
        logits, utilization, sown = model(inputs)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, loss if self.measure == "loss" else stacks.accuracy(logits, labels), utilization, sown

    def measure_all(self, params, data: Examples):
        """`measure` on test and `validation` data; by layer, the largest load over the mean, and dead experts."""

        def whole(part):
            def one(batch):
                _, found, utilization, _ = self.apply(params, batch)
                return found, routing_of(utilization)

            batch = min(self.evaluation_batch, len(part[1]))
            cut = lambda array: array.reshape(-1, batch, *array.shape[1:])
            found, counts = jax.lax.map(one, jax.tree.map(cut, part))
            return jnp.mean(found), jax.tree.map(functools.partial(jnp.sum, axis=0), counts)

        (test, counts), (validation, _) = whole(data.test), whole(data.validation)
        loads = {"max_load": metrics.max_over_mean_load(counts), "dead": metrics.dead_experts(counts)}
        return {self.measure: test, "validation": validation} | loads


def routing_of(utilization: Any) -> excitation_optax.RoutingCounts:
    """The counts of all layers `[L, E]`."""
    return utilization["layers"]["stack"]["moe"]["experts"]


def _is_param(params):
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return jax.tree.map(lambda v: isinstance(v, nnx.Param), params, is_leaf=is_variable)


def _cut(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = len(array) * 9 // 10
    return array[:cut], array[cut:]


class GPTProgram(Program):
    """The model takes bytes `[B, S]`, and the labels are the bytes that follow each; losses are in nats per byte."""

    model, measure, evaluation_batch = gpt_moe.GPTMoE, "loss", 64

    @classmethod
    def sizes_of(cls, shared: Any, data: texts.Text) -> tuple[int, ...]:
        """Nothing: there are 256 bytes."""
        return ()

    @classmethod
    def put(cls, data: texts.Text, shared: Any) -> Examples:
        """The bytes, and evenly spaced windows of those that are not trained on."""
        train, held_out = _cut(data.train)

        def windows(tokens):
            starts = np.linspace(0, len(tokens) - shared.context - 1, WINDOWS).astype(int)
            tokens = tokens[starts[:, None] + np.arange(shared.context + 1)]
            return tokens[:, :-1], tokens[:, 1:]

        parts = train[: shared.subset], windows(held_out), windows(data.evaluation)
        return Examples(*jax.tree.map(lambda part: jnp.asarray(part, jnp.int32), parts))

    def config(self) -> gpt_moe.GPTMoEConfig:
        """The sizes of the GPT-MoE."""
        return train_gpt_moe.model_config(self.shared, texts.VOCAB_SIZE["bytes"])

    def draws(self, data):
        """The first positions of windows."""
        return len(data.train) - self.shared.context - 1

    def batch(self, data, row):
        """Windows, and the same one byte later."""
        tokens = data.train[row[:, None] + jnp.arange(self.shared.context + 1)]
        return tokens[:, :-1], tokens[:, 1:]


class ViTProgram(Program):
    """The model takes images `[B, H, W, 3]` of the sizes (H, C). Gray images are repeated in 3 channels."""

    model, measure, evaluation_batch = moe_vit.MoEViT, "accuracy", 256

    @classmethod
    def sizes_of(cls, shared: Any, data: datasets.ImageData) -> tuple[int, ...]:
        """Pixels and classes."""
        return data.train_images.shape[1], data.num_classes

    @classmethod
    def put(cls, data: datasets.ImageData, shared: Any) -> Examples:
        """Bytes to train on, and floats that are not trained on: whole batches of the first of them."""
        (images, more_images), (labels, more_labels) = _cut(data.train_images), _cut(data.train_labels)
        rgb = lambda images: jnp.broadcast_to(images, (*images.shape[:-1], 3))

        def first(images, labels, most):
            number, batch = min(len(labels), most), cls.evaluation_batch
            number -= number % batch if number > batch else 0
            return train_moe_vit.to_unit_range(rgb(images[:number])), jnp.asarray(labels[:number])

        return Examples(
            (rgb(images[: shared.subset]), jnp.asarray(labels[: shared.subset])),
            first(more_images, more_labels, IMAGES // 2),
            first(data.test_images, data.test_labels, IMAGES),
        )

    def config(self) -> moe_vit.MoEViTConfig:
        """The sizes of the MoE-ViT."""
        image_size, num_classes = self.sizes
        sizes = {"image_size": image_size, "num_classes": num_classes, "patch_size": self.shared.patch_size}
        return train_moe_vit.model_config(self.shared, **sizes)

    def draws(self, data):
        """Numbers past the last image name mirrored images."""
        return (1 if self.shared.dataset in configs.DIGITS else 2) * len(data.train[1])

    def batch(self, data, row):
        """Images and labels."""
        images, labels = data.train
        is_mirrored, rows = row >= len(labels), row % len(labels)
        images = train_moe_vit.to_unit_range(images[rows])
        return jnp.where(is_mirrored[:, None, None, None], images[:, :, ::-1], images), labels[rows]
