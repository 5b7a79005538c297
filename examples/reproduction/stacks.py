"""Trains many models at once: runs that differ in strategy, intensity, learning rate and seed are stacked by `vmap`.

The runs of a seed start from the same parameters and see the same batches, whatever their strategy: so differences
between strategies can be paired by seed. Groups of runs that cannot be stacked, as their models or batches have other
shapes, take turns; with several devices (on CPU, one for each core) there is a group on each. A group that trains for
more than ten minutes writes checkpoints, from which it resumes with the same bits.

Axis letters: S seeds, M members (the runs of a seed).
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from examples.reproduction import configs, inputs, store

CHECKPOINT_SECONDS = 600


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

    @property
    def key(self) -> str:
        """Names the group among checkpoints, by its runs."""
        return hashlib.sha256("".join(run.key for run in self).encode()).hexdigest()[:16]


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
    runs = group.runs[0]
    values = {name: [getattr(run, name) for run in runs] for name in Member._fields if hasattr(runs[0], name)}
    values.setdefault("component", ["both"] * len(runs))
    strategies, components = (tuple(sorted(set(values[name]))) for name in ("strategy", "component"))
    arrays = {name: jnp.array(column, jnp.float32) for name, column in values.items() if not isinstance(column[0], str)}
    arrays["strategy"] = jnp.array([strategies.index(name) for name in values["strategy"]])
    arrays["component"] = jnp.array([components.index(name) for name in values["component"]])
    return strategies, components, Member(**arrays)


def missing(group: Group, results: store.Results) -> Group:
    """The group without the seeds and the members of which all runs are on file."""
    rows = [row for row in group.runs if any(run not in results for run in row)]
    columns = [column for column in zip(*rows, strict=True) if any(run not in results for run in column)]
    return Group(tuple(zip(*columns, strict=True)))


def excite(strategies: Sequence[str], components: Sequence[Any], member: Member, expert_axis: Any, seed: Any) -> Any:
    """Excitation by the member's strategy and component, whose numbers may be traced."""

    def chosen(utilization, gamma, *, key):
        functions = {name: getattr(excitation_optax, name) for name in strategies if name != "vanilla"}
        functions["vanilla"] = lambda utilization, gamma: jnp.ones_like(utilization)
        functions["random_boost"] = functools.partial(excitation_optax.random_boost, key=key)
        return jnp.stack([functions[name](utilization, gamma) for name in strategies])[member.strategy]

    # A strategy with an unbound key is random, and has a state.
    strategy = chosen if "random_boost" in strategies else functools.partial(chosen, key=None)
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


class Program:
    """The compiled functions of a group: `init`, `rows_of_epoch`, `train_steps` and `evaluate`.

    Members choose their strategy and component by number from `strategies` and `components`. States and measures have
    leading axes `[S, M]`. A subclass has what stands below without a value.
    """

    together: ClassVar[bool]  # whether the members of a seed make a step side by side, or train one after the other
    along: ClassVar[tuple[str, ...]] = ()  # measures that are kept along training too; none: all
    most_steps: ClassVar[int | None] = None  # of a call of `train_steps`; None: an epoch
    limits: Any  # of what runs share: the most runs of a group, and the most seeds
    sizes_of: Any  # of what runs share and data: what the model takes from them
    put: Any  # of data and what runs share: the data on JAX's default device
    loss_fn: Any  # (params, member, batch): what is minimized, and (the loss, the routing)
    make_model: Any  # of a seed: the model that all of its runs start from
    make_optimizer: Any  # of a member and a seed
    rows: Any  # of a key and data: arrays with a leading axis of steps
    batch: Any  # of data and a row: the batch of a step
    measure_all: Any  # of params and data: measures by name

    def __init__(self, shared: Any, strategies: Sequence[str], *sizes: int, components: Sequence[Any] = ("both",)):
        self.shared, self.strategies, self.components, self.sizes = shared, strategies, components, sizes
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self.make_model(0)))
        # Seeds that take turns leave a CPU's caches to one seed's models; wider devices train them side by side.
        self.wide = self.together and jax.default_backend() != "cpu"
        self.init = jax.jit(self._init)
        self.rows_of_epoch = jax.jit(self._rows_of_epoch)
        self.train_steps = jax.jit(self._train_steps, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)

    def _init(self, members: Member, seeds):
        """Parameters and optimizer states: of a seed, all members have the same parameters."""

        def one(seed, member):
            params = self.params_of(self.make_model(seed))
            return params, self.make_optimizer(member, seed).init(params)

        return jax.vmap(lambda seed: jax.vmap(functools.partial(one, seed))(members))(seeds)

    def params_of(self, model: nnx.Module) -> Any:
        """What is trained of a model."""
        return nnx.state(model)

    def model_of(self, params: Any) -> Any:
        """The model of what `params_of` returned."""
        return nnx.merge(self.graphdef, params)

    def _rows_of_epoch(self, seeds, epoch, data):
        """The rows of all steps, with leading axes of seeds and steps."""
        key = lambda seed: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        return jax.vmap(lambda seed: self.rows(key(seed), data))(seeds)

    def _train_steps(self, states, members: Member, seeds, rows, data):
        """The states of every run after the steps of these rows, and the loss of each step, `[S, M, steps]`."""

        def train_seed(operands):
            states, seed, rows = operands

            def step(state, row, member):
                return self.train_step(state, member, seed, self.batch(data, row))

            if self.together:
                members_step = lambda states, row: jax.vmap(step, in_axes=(0, None, 0))(states, row, members)
                states, losses = jax.lax.scan(members_step, states, rows)
                return states, losses.T
            alone = lambda run: jax.lax.scan(functools.partial(step, member=run[1]), run[0], rows)
            return jax.lax.map(alone, (states, members))

        return jax.lax.map(train_seed, (states, seeds, rows), batch_size=seeds.shape[0] if self.wide else None)

    def train_epoch(self, states, members: Member, seeds, epoch, data):
        """The states after an epoch of every run, and the mean losses."""
        rows = self.rows_of_epoch(seeds, epoch, data)
        states, losses = self.train_steps(states, members, seeds, rows, data)
        return states, jnp.mean(losses, axis=-1)

    def _evaluate(self, params, data):
        one = functools.partial(self.measure_all, data=data)
        return jax.lax.map(jax.vmap(one) if self.together else functools.partial(jax.lax.map, one), params)

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
    def prepare(cls, group: Group, data: Any) -> tuple[Any, Member, jax.Array, Any]:
        """The program, members, seeds and data of a group.

        Raises ValueError if the data is too small.
        """
        shared = shared_of(group.runs[0][0])
        strategies, components, members = members_of(group)
        program = program_of(cls, shared, strategies, *cls.sizes_of(shared, data), components=components)
        seeds = jnp.array([row[0].seed for row in group.runs])
        return program, members, seeds, cls.put(data, shared)

    @classmethod
    def plan(cls, runs: Iterable[Any], **limits: int) -> list[Group]:
        """Groups for the runs, in their order: together they hold every run once. Limits are those of `limits`."""
        planned = []
        for shared, alike in configs.grouped(dict.fromkeys(runs), shared_of).items():
            limit, max_seeds = cls.limits(shared, **limits)
            by_seed = configs.grouped(alike, lambda run: run.seed).values()
            rows = [row for of_a_seed in by_seed for row in _cut(of_a_seed, limit)]
            without_seed = lambda row: tuple(dataclasses.replace(run, seed=0) for run in row)
            for members, same in configs.grouped(rows, without_seed).items():
                planned += map(Group, _cut(same, max(1, min(max_seeds, limit // len(members)))))
        return planned

    @classmethod
    def train_group(
        cls, group: Group, data: Any, advance: Any, stopped: Callable[[], bool], checkpoint: pathlib.Path | None = None
    ) -> list[store.Result] | None:
        """Trains the runs of a group on their data set, on JAX's default device: a result for each, or None if stopped.

        `advance` is called along the way with the epochs of runs that were trained since, and a line about them.
        `checkpoint` is where the group is saved. Delete the file once the results are on file.
        """
        start, runs = time.perf_counter(), list(group)
        program, members, seeds, on_device = cls.prepare(group, data)
        states, last_epoch = program.init(members, seeds), runs[0].epochs
        # The first epoch, the losses of its steps so far, measures by epoch, and the seconds before a checkpoint.
        progress: list[Any] = [1, [], [], 0.0]
        if checkpoint and (found := store.restore_checkpoint(checkpoint, states)):
            states, progress = found
        first, losses, curve, before = progress
        reached, saved = 0.0, start
        for epoch in range(first, last_epoch + 1):
            rows = program.rows_of_epoch(seeds, epoch, on_device)
            steps = jax.tree.leaves(rows)[0].shape[1]
            while len(losses) < steps:
                if stopped():
                    return None
                if checkpoint and time.perf_counter() - saved >= CHECKPOINT_SECONDS:
                    saved = time.perf_counter()
                    store.save_checkpoint(checkpoint, states, (epoch, losses, curve, before + saved - start))
                cut = slice(len(losses), len(losses) + (cls.most_steps or steps))
                part = jax.tree.map(lambda array, cut=cut: array[:, cut], rows)
                states, of_part = program.train_steps(states, members, seeds, part, on_device)
                losses += np.moveaxis(np.asarray(of_part), -1, 0).tolist()  # waits for it
                now = epoch - 1 + len(losses) / steps
                advance((now - reached) * len(runs), f"loss {np.mean(losses[-1]):.3f}")
                reached = now
            if epoch in evaluated_epochs(last_epoch):
                measures = {"train_loss": np.mean(losses, axis=0)}
                measures |= jax.device_get(program.evaluate(states[0], on_device))
                curve.append((epoch, {name: np.asarray(value).tolist() for name, value in measures.items()}))
            losses = []
        seconds = round((before + time.perf_counter() - start) / len(runs), 2)
        about = store.environment() | {"date": store.now()} | inputs.about(runs[0], data)
        about["stacked"] = [len(seeds), len(group.runs[0])]
        short = lambda value: float(f"{float(np.mean(value)):.4g}")  # four digits along the way, all of them at the end
        (_, last), results = curve[-1], []
        names = [name for name in last if name != "train_loss"]
        for (s, m), run in zip(np.ndindex(len(seeds), len(group.runs[0])), runs, strict=True):
            measures = {name: last[name][s][m] for name in names}
            kept: dict[str, list[Any]] = {"epoch": [epoch for epoch, _ in curve]}
            for name in ("train_loss", *(cls.along or names)):
                kept[name] = [short(found[name][s][m]) for _, found in curve]
            results.append(store.Result(run, measures, kept, seconds, about))
        return results

    @classmethod
    def train(cls, runs: Iterable[Any], load: Any, results: store.Results, progress: Any, **limits: int) -> None:
        """Trains what is missing among the runs, on all devices, and appends what is finished.

        `load` reads the data set of a run; `progress` is a `tqdm` bar, counting epochs of runs. Groups are planned from
        all runs, finished or not: a repeated command trains a run beside the same others.
        """
        unfinished, needed = [], {}
        for group in cls.plan(runs, **limits):
            left = missing(group, results)
            progress.update(group.epochs - left.epochs)
            if left.runs:
                unfinished.append(left)
                needed.setdefault(left.runs[0][0].dataset, left.runs[0][0])
        sets = {name: load(run) for name, run in needed.items()}
        pending, stop, lock = iter(unfinished), threading.Event(), threading.Lock()

        def advance(epochs: float, seen: str):
            with lock:
                progress.set_postfix_str(seen, refresh=False)
                progress.update(epochs)

        def work(device: jax.Device):
            with jax.default_device(device):
                for group in pending:  # an iterator that the devices share
                    if stop.is_set():
                        return
                    checkpoint = results.folder / "checkpoints" / f"{group.key}.npz"
                    data = sets[group.runs[0][0].dataset]
                    finished = cls.train_group(group, data, advance, stop.is_set, checkpoint)
                    with lock:
                        results.append([r for r in finished or [] if r.run not in results])
                    if finished:
                        checkpoint.unlink(missing_ok=True)  # only now: the disk may be full

        devices = jax.local_devices()
        with futures.ThreadPoolExecutor(len(devices)) as pool:
            tasks = [pool.submit(work, device) for device in devices]
            try:
                futures.wait(tasks, return_when=futures.FIRST_EXCEPTION)
            finally:  # failed or interrupted: let every group end its epoch
                stop.set()
        for task in tasks:
            task.result()


def steps_of(examples: int, unit: str, batch_size: int) -> int:
    """The steps of an epoch: its full batches. Raises ValueError if there is none."""
    if batch_size > examples:
        raise ValueError(f"batch_size must be at most the {examples} {unit}; got {batch_size}.")
    return examples // batch_size


def shuffled(key: jax.Array, examples: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of examples and a key for each batch of an epoch; the last batch is dropped unless it is full."""
    steps = examples // batch_size
    order = jax.random.permutation(key, examples)[: steps * batch_size].reshape(steps, batch_size)
    return order, jax.random.split(jax.random.fold_in(key, 1), steps)


def _cut(items: Sequence[Any], length: int) -> list[tuple[Any, ...]]:
    return [tuple(items[i : i + length]) for i in range(0, len(items), length)]


# Groups that differ in members and seeds alone share one. A compiled program takes thousands of the 65,530 memory maps
# that Linux allows a process, so only the latest are kept.
@functools.lru_cache(maxsize=8)
def program_of(kind: Callable[..., Program], *arguments: Any, **options: Any) -> Program:
    """The program of a group."""
    return kind(*arguments, **options)


def accuracy(logits: jax.Array, labels: Any) -> jax.Array:
    """NaN if a logit is not finite."""
    return jnp.where(jnp.all(jnp.isfinite(logits)), jnp.mean(jnp.argmax(logits, axis=-1) == labels), jnp.nan)


def evaluated_epochs(epochs: int) -> range:
    """About fifteen epochs, evenly spaced, after which runs are evaluated; the last is one of them."""
    every = max(1, epochs // 15)
    return range(epochs - (epochs - 1) // every * every, epochs + 1, every)
