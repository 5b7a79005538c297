"""The engine of the reproduction: its epoch against a loop for one purpose, and how many models it should stack.

    python -m benchmarks.sweep              # minutes to half an hour
    python -m benchmarks.sweep --tiny       # at toy sizes, to see that it runs

A  an epoch of three seeds by three strategies of SGD Top-K MLPs, on one device: the engine's, which knows all models,
   optimizers, strategies and augmentations, and one written by hand for just this group. Calls are interleaved, ratios
   are taken within a round, and both must arrive at the same losses
B  seconds per epoch and model against the number of models that are stacked, on one device, and on all devices at once,
   with a group on each: on CPU, every core is a device
C  an epoch of 18 models, three seeds by three strategies by two learning rates, on one device, against its bare matrix
   products: those of six models that share their batches, three times, in the faster of two layouts of the weights

Images are random bytes of CIFAR-10's size, mirrored at random. Losses are of the epochs' means.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import quickstart_epoch, timing
from examples import datasets, reproduce
from examples.reproduction import configs, engine, store
from models import topk_mlp

RUN = configs.MLPRun(strategy="zero_sum")
STRATEGIES = ("vanilla", "zero_sum", "positive_sum")
STACKS = ((1, 1), (1, 2), (1, 3), (1, 6), (1, 9), (1, 18), (3, 1), (3, 2), (3, 3), (3, 6))  # seeds, models of each


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the engine's epochs."""

    rounds: int = 5
    """Calls of every variant."""
    tiny: bool = False
    """Small images, models and batches, few stacks, and at most two devices."""

    @property
    def run(self) -> configs.MLPRun:
        """What all models have in common."""
        return dataclasses.replace(RUN, width=16, depth=2, batch_size=32) if self.tiny else RUN


def make_data(config: Config) -> datasets.ImageData:
    """Random bytes."""
    random = np.random.default_rng(0)
    count, shape = (100, (8, 8, 3)) if config.tiny else (50_000, (32, 32, 3))
    images = random.integers(0, 256, (count, *shape), np.uint8)
    labels = random.integers(0, 10, count, np.int32)
    return datasets.ImageData(images, labels, images[:10], labels[:10], 10, "random bytes")


def make_group(run: configs.MLPRun, seeds: int, strategies: tuple[str, ...], rates: int = 1) -> engine.Group:
    """Strategies times learning rates, for each seed."""
    changes: list[dict[str, Any]] = [
        {"strategy": strategy, "learning_rate": run.learning_rate / (1 + i)}
        for strategy in strategies
        for i in range(rates)
    ]
    return engine.Group(
        tuple(tuple(dataclasses.replace(run, seed=seed, **c) for c in changes) for seed in range(seeds))
    )


def repeated(train_epoch: Callable, states) -> Callable[[], jax.Array]:
    """A call that trains another epoch and returns its losses `[S, M]`."""
    epochs = itertools.count(1)

    def call():
        nonlocal states
        states, losses = train_epoch(states, next(epochs))
        return jax.block_until_ready(losses)

    return call


# ------------------------------------------------------------------------------------------------------------- engine


def engines(group: engine.Group, data: datasets.ImageData, on_device: engine.Data) -> Callable[[], jax.Array]:
    """As `engine.train_group` trains."""
    run = group.runs[0][0]
    strategies = tuple(sorted({run.strategy for run in group}))
    members = engine.Member(
        jnp.array([strategies.index(run.strategy) for run in group.runs[0]]),
        jnp.array([run.gamma for run in group.runs[0]], jnp.float32),
        jnp.array([run.learning_rate for run in group.runs[0]], jnp.float32),
    )
    seeds = jnp.array([row[0].seed for row in group.runs])
    shared = dataclasses.replace(run, seed=0, strategy="vanilla", learning_rate=1.0)
    steps = len(data.train_labels) // run.batch_size
    program = engine.program_of(shared, strategies, data.input_dim, data.num_classes, steps)
    return repeated(
        lambda states, epoch: program.train_epoch(states, members, seeds, epoch, on_device),
        program.init(members, seeds),
    )


# ------------------------------------------------------------------------------------------------------------ by hand


def excited(u):
    """Phi `[M, E]` of vanilla, zero-sum and positive-sum, in this order, at an intensity of 1; u is `[M, E]`."""
    zero_sum = u / jnp.mean(u, axis=-1, keepdims=True)
    return jnp.stack([jnp.ones_like(u[0]), zero_sum[1], jnp.maximum(1, zero_sum[2])])


def loss_fn(kept, params, images, labels):
    """The cross-entropy of one model, and the utilization `[E]` of each hidden layer."""
    h, utilization = images, []
    for kernel, bias in params[:-1]:
        h = topk_mlp.keep_top_k(jnp.maximum(h @ kernel + bias, 0), kept)
        utilization.append(jnp.mean(h != 0, axis=0, dtype=jnp.float32))
    kernel, bias = params[-1]
    log_p = jax.nn.log_softmax(h @ kernel + bias)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1)), utilization


def by_hand(run: configs.MLPRun, data: datasets.ImageData, on_device: engine.Data) -> Callable[[], jax.Array]:
    """The same three seeds by three strategies, and nothing else."""
    kept, examples = round(run.width * (1 - run.sparsity)), len(data.train_labels)
    steps = examples // run.batch_size
    mean, deviation = jnp.asarray(on_device.mean), jnp.asarray(on_device.deviation)
    grad_fn = jax.vmap(jax.value_and_grad(functools.partial(loss_fn, kept), has_aux=True), in_axes=(0, None, None))

    def init(seed):
        config = topk_mlp.TopKMLPConfig(data.input_dim, run.width, run.depth, data.num_classes, run.sparsity)
        model = topk_mlp.TopKMLP(config, rngs=nnx.Rngs(jax.random.key(seed)))
        layers: list[Any] = [*model.layers, model.head]
        params = [(layer.kernel[...], layer.bias[...]) for layer in layers]
        return jax.tree.map(lambda x: jnp.stack([x] * 3), params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_epoch(states, epoch, train_images, train_labels):
        def train_seed(operands):
            (params, count), seed = operands
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
            order = jax.random.permutation(key, examples)[: steps * run.batch_size].reshape(steps, run.batch_size)

            def step(state, batch):
                (params, count), (indices, key) = state, batch
                _, flip_key = jax.random.split(key)
                images = jax.lax.map(lambda i: train_images[i], indices)  # copies, faster here than a gather
                flip = jax.random.bernoulli(flip_key, 0.5, (run.batch_size, 1, 1, 1))
                images = jnp.where(flip, images[:, :, ::-1], images)
                images = ((images.astype(jnp.float32) / 255 - mean) / deviation).reshape(run.batch_size, -1)
                (loss, utilization), grads = grad_fn(params, images, train_labels[indices])
                rate = run.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / (run.epochs * steps)))
                factors = [rate * excited(u) for u in utilization] + [rate]
                params = [
                    (kernel - (phi[:, None] if i < run.depth else phi) * d_kernel, bias - phi * d_bias)
                    for i, ((kernel, bias), (d_kernel, d_bias), phi) in enumerate(
                        zip(params, grads, factors, strict=True)
                    )
                ]
                return (params, count + 1), loss

            keys = jax.random.split(jax.random.fold_in(key, 1), steps)
            state, losses = jax.lax.scan(step, (params, count), (order, keys))
            return state, jnp.mean(losses, axis=0)

        return jax.lax.map(train_seed, (states, jnp.arange(3)))

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init(seed) for seed in range(3)))
    return repeated(
        lambda states, epoch: train_epoch(states, epoch, on_device.train_images, on_device.train_labels),
        (params, jnp.zeros(3, jnp.int32)),
    )


# ----------------------------------------------------------------------------------------------------------- sections


def compare(config: Config) -> float:
    """A. Returns the largest relative difference of the losses of the first epoch."""
    run, data = config.run, make_data(config)
    on_device = engine.put(data, run)
    group = make_group(run, 3, STRATEGIES)
    variants = {"by hand": by_hand(run, data, on_device), "engine": engines(group, data, on_device)}
    first, second = (np.asarray(call()) for call in variants.values())
    difference = float(np.max(np.abs(second / first - 1)))
    seconds = timing.interleave(variants, config.rounds)
    print(f"\nA  {3 * len(STRATEGIES)} models; the losses of an epoch differ by {difference:.0e} at most")
    timing.print_ratios(seconds, to="by hand")
    return difference


def stack(config: Config) -> None:
    """B."""
    run, data = config.run, make_data(config)
    devices = jax.local_devices()[: 2 if config.tiny else None]
    stacks = ((1, 1), (2, 2)) if config.tiny else STACKS
    on_devices = {}
    for device in devices:
        with jax.default_device(device):
            on_devices[device] = engine.put(data, run)
    everywhere = f"all {len(devices)} devices"
    print(f"\nB  seconds per epoch and model\n{'seeds':>8}{'models':>8}{'one device':>14}{everywhere:>16}")
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        for seeds, count in stacks:
            group = make_group(run, seeds, ("zero_sum",), count)

            def start(device, group=group):
                with jax.default_device(device):
                    return engines(group, data, on_devices[device])

            epochs = {device: start(device) for device in devices}

            def train(device, epochs=epochs):
                with jax.default_device(device):
                    return epochs[device]()

            one = functools.partial(train, devices[0])
            every = lambda train=train: list(pool.map(train, devices))
            seconds = timing.interleave({"one": one, "all": every}, config.rounds)
            models = {"one": seeds * count, "all": seeds * count * len(devices)}
            each = {name: statistics.median(times) / models[name] for name, times in seconds.items()}
            print(f"{seeds:>8}{seeds * count:>8}{each['one']:>14.4f}{each['all']:>16.4f}", flush=True)


def products(config: Config) -> None:
    """C."""
    run, data = config.run, make_data(config)
    model = topk_mlp.TopKMLPConfig(data.input_dim, run.width, run.depth, data.num_classes, run.sparsity)
    steps = 3 * (len(data.train_labels) // run.batch_size)
    make = functools.partial(quickstart_epoch.make_products, models=6, steps=steps, config=model, batch=run.batch_size)
    variants: dict[str, Callable[[], Any]]
    variants = {f"bare products, weights {weights}": make(weights, shared=True) for weights in ("gio", "goi")}
    bare = list(variants)
    variants["engine"] = engines(make_group(run, 3, STRATEGIES, 2), data, engine.put(data, run))
    seconds = timing.interleave(variants, config.rounds)
    print("\nC  18 models")
    timing.print_ratios(seconds, to=timing.fastest_of(seconds, bare))


def main(config: Config) -> None:
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {store.cores()} cores")
    compare(config)
    stack(config)
    products(config)


if __name__ == "__main__":
    arguments = tyro.cli(Config, description=Config.__doc__)
    reproduce.use_all_cores()
    main(arguments)
