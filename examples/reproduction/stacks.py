"""Trains many models at once: runs that differ in strategy, intensity, learning rate and seed are stacked by `vmap`.

The runs of a seed start from the same parameters and see the same batches, whatever their strategy: so differences
between strategies can be paired by seed. Groups of runs that cannot be stacked, as their models or batches have other
shapes, take turns; with several devices (on CPU, one for each core) there is a group on each.

Axis letters: S seeds, M members (the runs of a seed).
"""

import dataclasses
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples.reproduction import configs, store


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that train stacked: `runs[s][m]`, the same members for every seed."""

    runs: tuple[tuple[Any, ...], ...]

    def __iter__(self):
        return itertools.chain.from_iterable(self.runs)

    @property
    def epochs(self) -> int:
        """The epochs of all its runs together."""
        return sum(run.epochs for run in self)


class Member(NamedTuple):
    """What may differ between the runs of a seed; in a group every array has a leading axis of members."""

    strategy: Any  # its number in the program's strategies
    gamma: Any
    learning_rate: Any
    component: Any = None  # its number in the program's components
    expert_rate: Any = None  # this and the next: only where runs have it
    load_balancing: Any = None


def shared_of(run: Any) -> Any:
    """What runs must have in common to be stacked: everything but what a `Member` and a seed are made of."""
    default = type(run)()
    fields = {name: getattr(default, name) for name in ("seed", *Member._fields) if hasattr(default, name)}
    return dataclasses.replace(run, **fields)


def members_of(group: Group) -> tuple[tuple[str, ...], tuple[configs.Component, ...], Member]:
    """The strategies and components of a group, and its members."""
    runs, found = group.runs[0], {}
    several = {name: tuple(sorted({getattr(run, name) for run in group})) for name in ("strategy", "component")}
    for name in (name for name in Member._fields if hasattr(runs[0], name)):
        values = [getattr(run, name) for run in runs]
        numbered = [several[name].index(value) for value in values] if name in several else None
        found[name] = jnp.array(values, jnp.float32) if numbered is None else jnp.array(numbered)
    return several["strategy"], several["component"], Member(**found)


class Program:
    """The compiled functions of a group: `init`, `train_epoch` and `evaluate`.

    Members choose their strategy and component by number from `strategies` and `components`. A subclass has `_init`,
    `_train_epoch`, `_evaluate` and what stands below without a body.
    """

    along: ClassVar[tuple[str, ...]]  # measures that are kept along training; the others are kept at the end
    limits: Any  # of what runs share: the most runs of a group, and the most seeds
    sizes_of: Any  # of what runs share and data: what the model takes from them
    put: Any  # of data and what runs share: the data on JAX's default device
    loss_fn: Any  # (params, member, batch): what is minimized, and (the loss, the routing)
    make_model: Any  # of a seed: the model that all of its runs start from
    make_optimizer: Any  # of a member and a seed

    def __init__(self, shared: Any, strategies: Sequence[str], *sizes: int, components: Sequence[Any] = ("both",)):
        self.shared, self.strategies, self.components, self.sizes = shared, strategies, components, sizes
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self.make_model(0)))
        self.init = jax.jit(self._init)  # pyrefly: ignore[missing-attribute]
        self.train_epoch = jax.jit(self._train_epoch, donate_argnums=0)  # pyrefly: ignore[missing-attribute]
        self.evaluate = jax.jit(self._evaluate)  # pyrefly: ignore[missing-attribute]

    def train_step(self, state: tuple[Any, Any], member: Member, seed: Any, batch: Any) -> tuple[tuple[Any, Any], Any]:
        """A step of one run: loss, gradient, update."""
        params, opt_state = state
        grads, (loss, utilization) = jax.grad(self.loss_fn, has_aux=True)(params, member, batch)
        updates, opt_state = self.make_optimizer(member, seed).update(grads, opt_state, params, utilization=utilization)
        return (self.after_step(optax.apply_updates(params, updates), utilization), opt_state), loss

    def after_step(self, params: Any, utilization: Any) -> Any:
        """What else changes the parameters at the end of a step."""
        del utilization
        return params

    @classmethod
    def about(cls, data: Any, shared: Any) -> dict[str, Any]:
        """What a result says about its data."""
        return about_images(data, shared.dataset)

    @classmethod
    def prepare(cls, group: Group, data: Any) -> tuple[Any, Member, jax.Array, Any, dict[str, Any]]:
        """The program, members, seeds and data of a group, and what a result says about the data.

        Raises ValueError if the data is too small.
        """
        shared = shared_of(group.runs[0][0])
        strategies, components, members = members_of(group)
        program = program_of(cls, shared, strategies, *cls.sizes_of(shared, data), components=components)
        seeds = jnp.array([row[0].seed for row in group.runs])
        return program, members, seeds, cls.put(data, shared), cls.about(data, shared)

    @classmethod
    def plan(cls, runs: Iterable[Any], **limits: int) -> list[Group]:
        """Groups for the runs, in their order: together they hold every run once. Limits are those of `limits`."""
        stackable: dict[Any, dict[int, list[Any]]] = {}
        for run in dict.fromkeys(runs):
            stackable.setdefault(shared_of(run), {}).setdefault(run.seed, []).append(run)
        groups = []
        for shared, by_seed in stackable.items():
            limit, max_seeds = cls.limits(shared, **limits)
            alike: dict[tuple, list[tuple[Any, ...]]] = {}
            rows = [tuple(row[i : i + limit]) for row in by_seed.values() for i in range(0, len(row), limit)]
            for row in rows:
                alike.setdefault(tuple(dataclasses.replace(run, seed=0) for run in row), []).append(row)
            for members, rows in alike.items():
                seeds = max(1, min(max_seeds, limit // len(members)))
                groups += [Group(tuple(rows[i : i + seeds])) for i in range(0, len(rows), seeds)]
        return groups

    @classmethod
    def train_group(
        cls, group: Group, data: Any, advance: Callable[[int], Any], stopped: Callable[[], bool]
    ) -> list[store.Result] | None:
        """Trains the runs of a group on their data set, on JAX's default device: a result for each, or None if stopped.

        `advance` is called after every epoch with the number of runs that have done it.
        """
        start, runs = time.perf_counter(), list(group)
        program, members, seeds, on_device, about = cls.prepare(group, data)
        states, curve, epochs = program.init(members, seeds), [], runs[0].epochs
        for epoch in range(1, epochs + 1):
            if stopped():
                return None
            states, losses = program.train_epoch(states, members, seeds, epoch, on_device)
            if epoch in evaluated_epochs(epochs):
                curve.append((epoch, *jax.device_get((losses, program.evaluate(states[0], on_device)))))
            jax.block_until_ready(losses)
            advance(len(runs))
        seconds = round((time.perf_counter() - start) / len(runs), 2)
        about = store.environment() | {"date": store.now()} | about | {"stacked": [len(seeds), len(group.runs[0])]}
        short = lambda value: float(f"{float(np.mean(value)):.4g}")  # four digits along the way, all of them at the end
        results = []
        for (s, row), m in itertools.product(enumerate(group.runs), range(len(group.runs[0]))):
            measures = {name: np.asarray(value[s, m], np.float64).tolist() for name, value in curve[-1][2].items()}
            kept = {"epoch": [epoch for epoch, *_ in curve], "train_loss": [short(loss[s, m]) for _, loss, _ in curve]}
            kept |= {name: [short(found[name][s, m]) for *_, found in curve] for name in cls.along}
            results.append(store.Result(row[m], measures, kept, seconds, about))
        return results

    @classmethod
    def train(
        cls,
        runs: Iterable[Any],
        load: Callable[[configs.Run], Any],
        results: store.Results,
        progress: Any,
        **limits: int,
    ) -> None:
        """Trains what is missing among the runs, on all devices, and appends what is finished.

        Groups are planned from all runs, finished or not: then a repeated command trains a run beside the same others,
        and so gives it the same digits.

        `load` reads the data set of a run; `results` has the finished runs, and gets the new ones; `progress` is a
        `tqdm` bar, counting epochs of runs. Raises OSError if a result could not be written.
        """
        pending: queue.SimpleQueue[Group] = queue.SimpleQueue()
        needed: dict[str, configs.Run] = {}
        for group in cls.plan(runs, **limits):
            left = missing(group, results)
            progress.update(group.epochs - left.epochs)
            if left.runs:
                pending.put(left)
                needed.setdefault(left.runs[0][0].dataset, left.runs[0][0])
        sets = {name: load(run) for name, run in needed.items()}
        stop, lock, errors = threading.Event(), threading.Lock(), []

        def advance(epochs: int):
            with lock:
                progress.update(epochs)

        def work(device: jax.Device):
            try:
                with jax.default_device(device):
                    while not stop.is_set() and not pending.empty():
                        group = pending.get_nowait()
                        finished = cls.train_group(group, sets[group.runs[0][0].dataset], advance, stop.is_set)
                        with lock:
                            results.append([r for r in finished or [] if r.run not in results])
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)
                stop.set()

        threads = [threading.Thread(target=work, args=(device,)) for device in jax.local_devices()]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # interrupted: let every group end its epoch
            stop.set()
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
        if errors:
            raise errors[0]


@functools.cache  # groups that differ in members and seeds alone share one
def program_of(kind: Callable[..., Program], *arguments: Any, **options: Any) -> Program:
    """The program of a group."""
    return kind(*arguments, **options)


def about_images(data: Any, dataset: str) -> dict[str, Any]:
    """What a result says about images."""
    state = f"{dataset} ({data.state or 'as TensorFlow Datasets has it'})"
    return {"data": state, "fingerprint": data.fingerprint}


def accuracy(logits: jax.Array, labels: Any) -> jax.Array:
    """NaN if a logit is not finite."""
    return jnp.where(jnp.all(jnp.isfinite(logits)), jnp.mean(jnp.argmax(logits, axis=-1) == labels), jnp.nan)


def any_of(strategies: Sequence[str], number: jax.Array) -> Any:
    """A strategy that is the one of this number, which may be traced."""
    baseline = lambda utilization, gamma: jnp.ones_like(utilization)
    functions = [baseline if name == "vanilla" else getattr(excitation_optax, name) for name in strategies]

    def chosen(utilization, gamma):
        return jnp.stack([f(utilization, gamma) for f in functions])[number]

    def chosen_with_key(utilization, gamma, *, key):
        random = lambda f, name: functools.partial(f, key=key) if name == "random_boost" else f
        keyed = [random(f, name) for name, f in zip(strategies, functions, strict=True)]
        return jnp.stack([f(utilization, gamma) for f in keyed])[number]

    return chosen_with_key if "random_boost" in strategies else chosen


def excite(strategies: Sequence[str], components: Sequence[Any], member: Member, expert_axis: Any, seed: Any) -> Any:
    """Excitation by the member's strategy and component, whose numbers may be traced."""
    strategy = any_of(strategies, member.strategy)
    transforms = [
        excitation_optax.scale_by_excitation(
            strategy, member.gamma, component=component, expert_axis=expert_axis, seed=seed
        )
        for component in components
    ]
    if len(transforms) == 1:
        return transforms[0]

    def update(updates, state, params=None, **extra_args):
        outcomes = [transform.update(updates, state, params, **extra_args) for transform in transforms]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[member.component], *outcomes)

    return optax.GradientTransformationExtraArgs(transforms[0].init, update)


def evaluated_epochs(epochs: int) -> range:
    """About fifteen epochs, evenly spaced, after which runs are evaluated; the last is one of them."""
    every = max(1, epochs // 15)
    return range(epochs - (epochs - 1) // every * every, epochs + 1, every)


def missing(group: Group, results: store.Results) -> Group:
    """The group without the seeds and the members of which all runs are on file."""
    rows = [row for row in group.runs if any(run not in results for run in row)]
    columns = [column for column in zip(*rows, strict=True) if any(run not in results for run in column)]
    return Group(tuple(zip(*columns, strict=True)))
