"""Trains GPT-MoEs in miniature: a program for all runs that differ in their optimizer alone, seconds for each run.

The runs of a seed start from the same parameters and see the same windows of text, so that differences can be paired by
seed.

Axis letters: M members (the runs of a seed), B batch, S sequence, L layers, E experts.
"""

import dataclasses
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples import texts
from examples.reproduction import configs, engine, store
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import gpt_moe, moe

STEPS = 100  # batches of an epoch
WINDOWS = 512  # of the evaluation text, evenly spaced; as many of the validation text
EVALUATION_BATCH = 64
FILES = {"tinyshakespeare": "tinyshakespeare.txt", "python-reference": None}  # None: it comes with Python


class Member(NamedTuple):
    """What may differ between the runs of a seed; in a group every array has a leading axis of members."""

    strategy: jax.Array  # its number in the program's strategies
    gamma: jax.Array
    learning_rate: jax.Array
    expert_rate: jax.Array
    load_balancing: jax.Array
    component: jax.Array  # its number in the program's components


class Text(NamedTuple):
    """Bytes on a device: the training text, and windows `[WINDOWS, S + 1]` of two texts that are not trained on."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array


def make_model(run: configs.MiniGPTRun, seed: Any) -> gpt_moe.GPTMoE:
    """The model that every run of a seed starts from."""
    config = gpt_moe.GPTMoEConfig(
        moe=moe.MoEConfig(
            d_model=run.d_model, d_ff=run.d_ff, num_experts=run.num_experts, experts_per_token=run.experts_per_token
        ),
        num_layers=run.num_layers,
        num_heads=run.num_heads,
        context=run.context,
        vocab_size=texts.VOCAB_SIZE["bytes"],
    )
    return gpt_moe.GPTMoE(config, rngs=nnx.Rngs(jax.random.key(seed)))


def shared_of(run: configs.MiniGPTRun) -> configs.MiniGPTRun:
    """The config that the runs of a group have in common."""
    default = configs.MiniGPTRun()
    names = ("seed", "strategy", "component", "gamma", "learning_rate", "expert_rate", "load_balancing")
    return dataclasses.replace(run, **{name: getattr(default, name) for name in names})


def plan(runs: Iterable[configs.MiniGPTRun], max_runs: int | None = None) -> list[list[configs.MiniGPTRun]]:
    """Groups of runs that have a seed and a model in common, in the order of the runs.

    By default a group has at most 16 runs, and 64 on an accelerator.
    """
    max_runs = max_runs or (16 if jax.default_backend() == "cpu" else 64)
    groups: dict[tuple, list[configs.MiniGPTRun]] = {}
    for run in dict.fromkeys(runs):
        groups.setdefault((shared_of(run), run.seed), []).append(run)
    return [group[i : i + max_runs] for group in groups.values() for i in range(0, len(group), max_runs)]


class Program:
    """The compiled functions of a group: `init`, `train_epoch` and `evaluate`."""

    def __init__(
        self, shared: configs.MiniGPTRun, strategies: tuple[str, ...], components: tuple[configs.Component, ...]
    ):
        self.shared, self.strategies, self.components = shared, strategies, components
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(shared, 0)))
        self.init = jax.jit(self._init)
        self.train_epoch = jax.jit(self._train_epoch, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)

    def make_optimizer(self, member: Member, seed: Any) -> optax.GradientTransformationExtraArgs:
        """AdamW with its schedule, then Excitation, then the static factor on the experts' updates."""
        steps = STEPS * self.shared.epochs
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)
        strategy = engine.any_of(self.strategies, member.strategy)
        excite = functools.partial(excitation_optax.scale_by_excitation, expert_axis=gpt_moe.GPTMoE.expert_axis)
        excitations = [excite(strategy, member.gamma, component=c, seed=seed) for c in self.components]
        return optax.chain(
            optax.adamw(lambda count: member.learning_rate * shape(count), weight_decay=0.01),
            engine.one_of(excitations, member.component),
            excite(jnp.full_like, member.expert_rate),
        )

    def _init(self, members: Member, seed):
        params = nnx.state(make_model(self.shared, seed))
        return jax.vmap(lambda member: (params, self.make_optimizer(member, seed).init(params)))(members)

    def _train_epoch(self, states, members: Member, seed, epoch, text: Text):
        """The states after an epoch, and the mean loss of each member, in nats per byte."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        length = self.shared.context + 1
        starts = jax.random.randint(key, (STEPS, self.shared.batch_size), 0, len(text.train) - length)

        def train(operands):
            state, member = operands
            step = lambda state, starts: self.train_step(
                state, member, seed, text.train[starts[:, None] + jnp.arange(length)]
            )
            return jax.lax.scan(step, state, starts)

        states, losses = jax.lax.map(train, (states, members))
        return states, jnp.mean(losses, axis=-1)

    def train_step(self, state, member: Member, seed, tokens):
        """A step of one run on tokens `[B, S + 1]`: loss, gradient, update."""
        params, opt_state = state

        def loss_fn(params):
            loss, utilization, sown = self.loss(params, tokens)
            total = loss + member.load_balancing * moe.auxiliary_losses(sown).load_balancing
            return total, (loss, utilization)

        grads, (loss, utilization) = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.make_optimizer(member, seed).update(grads, opt_state, params, utilization=utilization)
        return (optax.apply_updates(params, updates), opt_state), loss

    def loss(self, params, tokens):
        """The mean loss in nats per byte of tokens `[B, S + 1]`, the routing, and the routers' losses."""
        params = jax.tree.map(lambda leaf: leaf, params)  # new Variables, of the trace level of this call
        model = excitation_flax.capture_routing(nnx.merge(self.graphdef, params), moe.AuxiliaryLoss)
        logits, utilization, sown = model(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(loss), utilization, sown

    def _evaluate(self, params, text: Text):
        """Measures of every member on the windows that are not trained on."""

        def batches(params, windows):
            def one(tokens):
                loss, utilization, _ = self.loss(params, tokens)
                return loss, jax.tree.leaves(utilization, is_leaf=_is_counts)[0]

            losses, counts = jax.lax.map(one, windows.reshape(-1, EVALUATION_BATCH, windows.shape[-1]))
            return jnp.mean(losses), jax.tree.map(functools.partial(jnp.sum, axis=0), counts)

        def evaluate(params):
            loss, counts = batches(params, text.test)
            return {
                "loss": loss,
                "validation": batches(params, text.validation)[0],
                "max_load": metrics.max_over_mean_load(counts),
                "dead": metrics.dead_experts(counts),
            }

        return jax.lax.map(evaluate, params)


program_of = functools.cache(Program)  # groups that differ in members and seeds alone share one


def load_text(dataset: str, folder: pathlib.Path | None) -> texts.Text:
    """Reads a text of `FILES` as bytes.

    Raises:
      FileNotFoundError: if the folder lacks the file.
    """
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


def train_group(group: list[configs.MiniGPTRun], text: texts.Text, advance: Callable[[int], Any]) -> list[store.Result]:
    """Trains the runs of a group, which have a seed and a model in common.

    Args:
      group: one of `plan`.
      text: the data set of its runs.
      advance: is called after every epoch with the number of runs that have done it.

    Returns:
      A result for each run. Measures are the `loss` in nats per byte, the loss on the `validation` text, and for each
      layer `max_load` (of the busiest expert, over the mean) and `dead` (the share of experts that no token goes to).
    """
    start = time.perf_counter()
    shared, seed = shared_of(group[0]), group[0].seed
    strategies = tuple(sorted({run.strategy for run in group}))
    components = tuple(sorted({run.component for run in group}))
    numbers = lambda name: jnp.array([getattr(run, name) for run in group], jnp.float32)
    members = Member(
        jnp.array([strategies.index(run.strategy) for run in group]),
        numbers("gamma"),
        numbers("learning_rate"),
        numbers("expert_rate"),
        numbers("load_balancing"),
        jnp.array([components.index(run.component) for run in group]),
    )
    program, on_device = program_of(shared, strategies, components), put(text, shared.context)
    states, curve = program.init(members, seed), []
    for epoch in range(1, shared.epochs + 1):
        states, losses = program.train_epoch(states, members, seed, epoch, on_device)
        if epoch in engine.evaluated_epochs(shared.epochs):
            curve.append((epoch, *jax.device_get((losses, program.evaluate(states[0], on_device)))))
        jax.block_until_ready(losses)
        advance(len(group))
    fingerprint = f"{zlib.crc32(text.train.tobytes() + text.evaluation.tobytes()):08x}"
    about = store.environment() | {"date": store.now(), "data": f"{shared.dataset}, as bytes"}
    about |= {"fingerprint": fingerprint, "stacked": [1, len(group)]}
    seconds = round((time.perf_counter() - start) / len(group), 2)
    return [_result(run, m, curve, seconds, about) for m, run in enumerate(group)]


def _result(run: configs.MiniGPTRun, m: int, curve: list, seconds: float, about: dict[str, Any]) -> store.Result:
    along: dict[str, list[float]] = {"epoch": [], "train_loss": []}
    for epoch, losses, measures in curve:
        along["epoch"].append(epoch)
        along["train_loss"].append(float(f"{losses[m]:.4g}"))
        for name, values in measures.items():
            along.setdefault(name, []).append(float(f"{np.mean(values[m]):.4g}"))
    last = {name: np.asarray(values[m], np.float64).tolist() for name, values in curve[-1][2].items()}
    return store.Result(run, last, along, seconds, about)


def train(
    runs: Iterable[configs.MiniGPTRun],
    load: Callable[[str], texts.Text],
    results: store.Results,
    advance: Callable[[int], Any],
) -> None:
    """Trains what is missing among the runs, group by group, and appends every group that is finished.

    Raises:
      OSError: if a result could not be written.
    """
    load = functools.cache(load)
    for group in plan(runs):
        if any(run not in results for run in group):
            finished = train_group(group, load(group[0].dataset), advance)
            results.append([result for result in finished if result.run not in results])
        else:
            advance(len(group) * group[0].epochs)


def _is_counts(node: Any) -> bool:
    return isinstance(node, excitation_optax.RoutingCounts)
