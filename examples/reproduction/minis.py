"""Trains GPT-MoEs in miniature, stacked (`stacks`): a program for all runs that differ in their optimizer alone.

A group has one seed. Its runs start from the same parameters and see the same windows of text.

Axis letters: M members (the runs of a seed), B batch, S sequence, L layers, E experts.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples import texts, train_gpt_moe
from examples.reproduction import configs, stacks, store
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import gpt_moe, moe

Member = stacks.Member
STEPS = 100  # batches of an epoch
WINDOWS = 512  # of the evaluation text, evenly spaced; as many of the validation text
EVALUATION_BATCH = 64
FILES = {"tinyshakespeare": "tinyshakespeare.txt", "python-reference": None}  # None: it comes with Python
# Losses in nats per byte; by layer, the load of the busiest expert over the mean, and the share of dead experts.
MEASURES = ("loss", "validation", "max_load", "dead")
DIFFER = ("expert_rate", "load_balancing")  # between members, beside what all stacks may differ in


class Text(NamedTuple):
    """Bytes on a device: the training text, and windows `[WINDOWS, S + 1]` of two texts that are not trained on."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array


def make_model(run: configs.MiniGPTRun, seed: Any) -> gpt_moe.GPTMoE:
    """The model that every run of a seed starts from."""
    config = train_gpt_moe.model_config(run, texts.VOCAB_SIZE["bytes"])
    return gpt_moe.GPTMoE(config, rngs=nnx.Rngs(jax.random.key(seed)))


def shared_of(run: configs.MiniGPTRun) -> configs.MiniGPTRun:
    """The config that the runs of a group have in common, without the seed."""
    default = configs.MiniGPTRun()
    names = ("seed", "strategy", "component", "gamma", "learning_rate", *DIFFER)
    return dataclasses.replace(run, **{name: getattr(default, name) for name in names})


def plan(runs: Iterable[configs.MiniGPTRun], max_runs: int | None = None) -> list[stacks.Group]:
    """Groups of at most 16 runs (64 on an accelerator) that have a seed and a model in common, in their order."""
    max_runs = max_runs or (16 if jax.default_backend() == "cpu" else 64)
    return stacks.plan(runs, shared_of, lambda shared: (max_runs, 1))


class Program(stacks.Program):
    """The compiled functions of a group."""

    def __init__(
        self, shared: configs.MiniGPTRun, strategies: tuple[str, ...], components: tuple[configs.Component, ...]
    ):
        super().__init__(shared, strategies, components, lambda: make_model(shared, 0))

    def make_optimizer(self, member: Member, seed: Any) -> optax.GradientTransformationExtraArgs:
        """AdamW with its schedule, then Excitation, then the static factor on the experts' updates."""
        steps, expert_axis = STEPS * self.shared.epochs, gpt_moe.GPTMoE.expert_axis
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)
        return optax.chain(
            optax.adamw(lambda count: member.learning_rate * shape(count), weight_decay=0.01),
            stacks.excite(self.strategies, self.components, member, expert_axis, seed),
            excitation_optax.scale_by_excitation(jnp.full_like, member.expert_rate, expert_axis=expert_axis),
        )

    def _init(self, members: Member, seeds):
        params = nnx.state(make_model(self.shared, seeds[0]))
        return jax.vmap(lambda member: (params, self.make_optimizer(member, seeds[0]).init(params)))(members)

    def _train_epoch(self, states, members: Member, seeds, epoch, text: Text):
        """The states after an epoch, and the mean loss of each member `[1, M]`, in nats per byte."""
        seed, length = seeds[0], self.shared.context + 1
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        starts = jax.random.randint(key, (STEPS, self.shared.batch_size), 0, len(text.train) - length)

        def train(operands):
            state, member = operands
            batch = lambda starts: text.train[starts[:, None] + jnp.arange(length)]
            step = lambda state, starts: self.train_step(state, member, seed, batch(starts))
            return jax.lax.scan(step, state, starts)

        states, losses = jax.lax.map(train, (states, members))
        return states, jnp.mean(losses, axis=-1)[None]

    def loss_fn(self, params, member: Member, tokens):
        """What is minimized on tokens `[B, S + 1]`, the loss and the routing."""
        loss, utilization, sown = self.loss(params, tokens)
        return loss + member.load_balancing * moe.auxiliary_losses(sown).load_balancing, (loss, utilization)

    def loss(self, params, tokens):
        """The mean loss in nats per byte of tokens `[B, S + 1]`, the routing, and the routers' losses."""
        params = jax.tree.map(lambda leaf: leaf, params)  # new Variables, of the trace level of this call
        model = excitation_flax.capture_routing(nnx.merge(self.graphdef, params), moe.AuxiliaryLoss)
        logits, utilization, sown = model(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(loss), utilization, sown

    def _evaluate(self, params, text: Text):
        """`MEASURES` of every member on the windows that are not trained on, with axes `[1, M]`."""

        def batches(params, windows):
            def one(tokens):
                loss, utilization, _ = self.loss(params, tokens)
                is_counts = lambda node: isinstance(node, excitation_optax.RoutingCounts)
                return loss, jax.tree.leaves(utilization, is_leaf=is_counts)[0]

            losses, counts = jax.lax.map(one, windows.reshape(-1, EVALUATION_BATCH, windows.shape[-1]))
            return jnp.mean(losses), jax.tree.map(functools.partial(jnp.sum, axis=0), counts)

        def evaluate(params):
            (loss, counts), (validation, _) = batches(params, text.test), batches(params, text.validation)
            found = loss, validation, metrics.max_over_mean_load(counts), metrics.dead_experts(counts)
            return dict(zip(MEASURES, found, strict=True))

        return jax.tree.map(lambda value: value[None], jax.lax.map(evaluate, params))


program_of = functools.cache(Program)  # groups that differ in members and seeds alone share one


def load_text(dataset: str, folder: pathlib.Path | None) -> texts.Text:
    """Reads a text of `FILES` as bytes. Raises FileNotFoundError if the folder lacks the file."""
    name = FILES[dataset]
    path = None if name is None else (folder or pathlib.Path()) / name
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{dataset} is read from {path}, which is missing; name its folder with --data-dir.")
    return texts.load([path] if path else [], "bytes")


def put(text: texts.Text, context: int) -> Text:
    """The text on JAX's default device. The last tenth of the training text is for validation and not trained on."""

    def windows(tokens):
        starts = np.linspace(0, len(tokens) - context - 1, WINDOWS).astype(int)
        return tokens[starts[:, None] + np.arange(context + 1)]

    cut = len(text.train) * 9 // 10
    parts = text.train[:cut], windows(text.train[cut:]), windows(text.evaluation)
    return Text(*(jnp.asarray(part, jnp.int32) for part in parts))


def prepare(group: stacks.Group, text: texts.Text) -> stacks.Prepared:
    """What a group trains with, on JAX's default device."""
    shared = shared_of(group.runs[0][0])
    strategies, components, members = stacks.choices(group, component=True, also=DIFFER)
    about = {"data": f"{shared.dataset}, as bytes", "fingerprint": text.fingerprint}
    seeds = jnp.array([row[0].seed for row in group.runs])
    return stacks.Prepared(program_of(shared, strategies, components), members, seeds, put(text, shared.context), about)


def train_group(
    group: stacks.Group, text: texts.Text, advance: Callable[[int], Any], stopped: Callable[[], bool]
) -> list[store.Result] | None:
    """Trains the runs of a group, as `stacks.train_group` says."""
    return stacks.train_group(group, lambda: prepare(group, text), MEASURES, advance, stopped)


def train(
    runs: Iterable[configs.MiniGPTRun], load: Callable[[configs.Run], texts.Text], results: store.Results, progress: Any
) -> None:
    """Trains what is missing among the runs, as `stacks.train` says."""
    stacks.train(plan(runs), train_group, load, results, progress)
