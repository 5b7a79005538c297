"""Quickstart: Top-K MLPs trained without and with Excitation, on real images, side by side.

    python -m examples.quickstart                                           # scikit-learn's digits, half a minute
    python -m examples.quickstart --dataset cifar10 --data-dir DIR          # CIFAR-10

Every strategy trains the same models: the same initialization and the same batches for each seed. `train_step` shows
all that Excitation requires of a training loop.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

import excitation_optax
from examples import comparison, datasets, training
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import topk_mlp

# Epochs and batch size of each data set, unless flags say otherwise.
EPOCHS = {"digits": 150, "cifar10": 30}
BATCH_SIZE = {"digits": 128, "cifar10": 512}
LEARNING_RATE = {
    "digits": {"sgd": 0.05, "momentum": 0.01, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "adagrad": 0.01},
    "cifar10": {"sgd": 0.01, "momentum": 0.01, "adam": 1e-4, "adamw": 1e-4, "rmsprop": 1e-4, "adagrad": 1e-3},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Top-K MLPs without and with Excitation; compare test accuracy, routing entropy and specialization.

    With no flags it takes half a minute on two cores, and downloads nothing.
    """

    dataset: Literal["digits", "cifar10"] = "digits"
    """digits comes with scikit-learn; cifar10 is read from --data-dir."""
    data_dir: pathlib.Path | None = None
    """The folder of CIFAR-10, as TensorFlow Datasets prepares it or as its makers publish it (cifar-10-python.tar.gz);
    by default $TFDS_DATA_DIR, otherwise ~/tensorflow_datasets."""
    strategy: tuple[training.Strategy, ...] = ("baseline", "zero_sum", "positive_sum")
    """The strategies to compare; baseline is the optimizer without Excitation."""
    gamma: float = 1.0
    """The intensity of Excitation."""
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"] = "sgd"
    """The optimizer that Excitation is chained after."""
    learning_rate: float | None = None
    """Constant; by default, what fits the data set and the optimizer."""
    epochs: int | None = None
    """By default 150 for digits, 30 for cifar10."""
    batch_size: int | None = None
    """By default 128 for digits, 512 for cifar10. The last batch of an epoch is dropped unless it is full."""
    width: int = 128
    """Neurons in each hidden layer; each is an expert."""
    depth: int = 4
    """Hidden layers."""
    sparsity: float = 0.9
    """The share of a hidden layer's neurons that a sample does not keep."""
    seeds: int = 3
    """Models per strategy, trained side by side."""
    output: pathlib.Path = pathlib.Path("out/quickstart.png")
    """Where the picture goes."""

    def __post_init__(self):
        """Errors before anything is loaded or trained."""
        training.check_positive(self, "epochs", "batch_size", "seeds", "width", "depth")
        training.check(self, "must be positive", lambda x: 0 < x < math.inf, "learning_rate")
        training.check(self, "must not be negative", lambda x: 0 <= x < math.inf, "gamma")
        training.check(self, "is a share in [0, 1]", lambda x: 0 <= x <= 1, "sparsity")
        if self.data_dir is not None and self.dataset == "digits":
            raise ValueError("--data-dir goes with --dataset cifar10; digits come with scikit-learn.")
        comparison.check(self)


class Evaluation(NamedTuple):
    """Measured on the test images. In a training run every array has a leading axis of seeds."""

    accuracy: jax.Array  # []; NaN for a model that diverged
    entropy: jax.Array  # [L], nats, of the shares of the kept neurons in what a hidden layer passes on
    specialization: jax.Array  # [L], from 1/C to 1
    utilization: jax.Array  # [L, E]


def train_step(graphdef, tx, params, opt_state, images, labels):
    """One step: loss, gradient, update. The routing that the model emits is all that Excitation asks for."""

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        logits, utilization = excitation_flax.capture_routing(model)(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, utilization

    grads, utilization = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
    return optax.apply_updates(params, updates), opt_state


def evaluate(graphdef, num_classes, params, images, labels) -> Evaluation:
    """Accuracy of one model, and what its hidden layers do."""
    model = nnx.merge(graphdef, params)
    hidden, _ = excitation_flax.capture_routing(model.hidden)(images)
    logits = model.head(hidden[-1])
    correct = jnp.argmax(logits, axis=-1) == labels
    classes = [metrics.class_counts(h > 0, labels, num_classes) for h in hidden]
    return Evaluation(
        accuracy=jnp.where(jnp.all(jnp.isfinite(logits)), jnp.mean(correct), jnp.nan),
        entropy=jnp.stack([metrics.routing_entropy(h) for h in hidden]),
        specialization=jnp.stack([metrics.specialization_score(c) for c in classes]),
        utilization=jnp.stack([excitation_optax.count_active(h > 0).utilization for h in hidden]),
    )


def train_epoch(graphdef, tx, params, opt_state, order, images, labels):
    """Steps over the training images, in the order `[steps, batch]`."""

    def step(carry, batch):
        params, opt_state = carry
        return train_step(graphdef, tx, params, opt_state, to_unit_range(images[batch]), labels[batch]), None

    return jax.lax.scan(step, (params, opt_state), order)[0]


def to_unit_range(images):
    """Pixels in [0, 1] as floats, of pixels in 0 to 255 as bytes, which is how they stay in memory."""
    return images.astype(jnp.float32) / 255


def make_epoch(graphdef, optimizers, num_classes):
    """An epoch of every strategy and seed, and its evaluation, as one compiled program."""

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(runs, orders, train_images, train_labels, test_images, test_labels):
        evaluations = {}
        for name, tx in optimizers.items():
            params, opt_state = runs[name]
            train_seeds = jax.vmap(functools.partial(train_epoch, graphdef, tx), in_axes=(0, 0, 0, None, None))
            params, opt_state = train_seeds(params, opt_state, orders, train_images, train_labels)
            evaluate_seeds = jax.vmap(functools.partial(evaluate, graphdef, num_classes), in_axes=(0, None, None))
            evaluations[name] = evaluate_seeds(params, to_unit_range(test_images), test_labels)
            runs[name] = params, opt_state
        return runs, evaluations

    return epoch


def train(config: Config, data: datasets.ImageData) -> dict[str, Evaluation]:
    """For each strategy, its evaluations after every epoch, with leading axes `[epochs, seeds]`.

    Every strategy trains from the same initialization on the same batches, seed by seed.
    """
    epochs = config.epochs or EPOCHS[config.dataset]  # none of these can be 0
    batch_size = config.batch_size or BATCH_SIZE[config.dataset]
    learning_rate = config.learning_rate or LEARNING_RATE[config.dataset][config.optimizer]
    examples = len(data.train_labels)
    if batch_size > examples:
        raise ValueError(f"--batch-size must be at most the {examples} training images; got {batch_size}.")

    model_config = topk_mlp.TopKMLPConfig(
        data.input_dim, config.width, config.depth, num_classes=data.num_classes, sparsity=config.sparsity
    )
    make_model = lambda seed: topk_mlp.TopKMLP(model_config, rngs=nnx.Rngs(jax.random.key(seed)))
    params = jax.vmap(lambda seed: nnx.state(make_model(seed)))(jnp.arange(config.seeds))
    optimizer = training.OPTIMIZERS[config.optimizer](learning_rate)
    excite = {"gamma": config.gamma, "expert_axis": topk_mlp.TopKMLP.expert_axis}
    optimizers = {name: training.make_optimizer(optimizer, strategy=name, **excite) for name in config.strategy}
    copy = functools.partial(jax.tree.map, jnp.copy)  # the epoch takes its buffers over
    runs = {name: (copy(params), jax.vmap(tx.init)(params)) for name, tx in optimizers.items()}

    epoch = make_epoch(nnx.graphdef(make_model(0)), optimizers, data.num_classes)
    arrays = [jnp.asarray(a) for a in (data.train_images, data.train_labels, data.test_images, data.test_labels)]

    def order(seed: int, epoch_number: int) -> np.ndarray:  # [steps, batch]
        shuffled = np.random.default_rng((seed, epoch_number)).permutation(examples).astype(np.int32)
        return shuffled[: examples // batch_size * batch_size].reshape(-1, batch_size)

    history = []
    description = f"{len(runs)} x {config.seeds} models"
    # disable=None: no bar where stderr is no terminal.
    progress = tqdm.trange(1, epochs + 1, desc=description, unit="epoch", mininterval=0.5, disable=None)
    for number in progress:
        orders = np.stack([order(seed, number) for seed in range(config.seeds)])
        runs, evaluations = epoch(runs, orders, *arrays)
        history.append(jax.device_get(evaluations))
        shown: Any = {name: f"{100 * evaluations[name].accuracy.mean():.1f} %" for name in optimizers}
        progress.set_postfix(shown, refresh=False)
    return {name: jax.tree.map(lambda *es: np.stack(es), *(e[name] for e in history)) for name in optimizers}


def table(results: dict[str, Evaluation]) -> str:
    """Test accuracy along training, and what the hidden layers do at the end, as text."""
    row, spread = comparison.row, comparison.spread
    last, seeds = next(iter(results.values())).accuracy.shape
    shown = sorted({n for n in (1, 3, 10, 30, 100, 300, 1000, 3000) if n < last} | {last})
    lines = [f"test accuracy (%), {comparison.over_seeds(seeds)}", row("epoch", list(results))]
    lines += [row(str(n), [spread(100 * e.accuracy[n - 1], 1) for e in results.values()]) for n in shown]
    lines += ["", f"after epoch {last}, mean of the hidden layers"]
    lines += [row("routing entropy (nats)", [spread(e.entropy[-1].mean(-1), 3) for e in results.values()])]
    lines += [row("specialization", [spread(e.specialization[-1].mean(-1), 3) for e in results.values()])]
    return "\n".join(lines)


def picture(results: dict[str, Evaluation], path: pathlib.Path, title: str) -> None:
    """Learning curves with bands from the lowest to the highest seed, and the utilization of every neuron."""
    with comparison.figure(path, 12) as figure:
        curves, *layers = figure.subplots(1, 1 + len(results), width_ratios=[2.4] + [1] * len(results))
        for name, evaluation in results.items():
            comparison.curve(curves, np.arange(1, len(evaluation.accuracy) + 1), 100 * evaluation.accuracy, name)
        curves.set(xlabel="epoch", ylabel="test accuracy (%)", title=title)
        curves.legend()
        for axes, (name, evaluation) in zip(layers, results.items(), strict=True):
            busiest_first = -np.sort(-evaluation.utilization[-1, 0], axis=-1)  # of the first seed
            for number, layer in enumerate(busiest_first, 1):
                axes.plot(np.arange(1, len(layer) + 1), layer, label=f"layer {number}")
            axes.set(xlabel="neuron, busiest first", title=name, ylim=(0, 1))
        layers[0].set_ylabel("utilization at the end, seed 0")
        layers[-1].legend(fontsize="small")


def main(config: Config) -> dict[str, Evaluation]:
    """Loads the data, trains, prints the table and draws the picture."""
    comparison.ready(config.output)
    digits = config.dataset == "digits"
    data = datasets.load_digits() if digits else datasets.load_images(config.dataset, config.data_dir)
    print(f"{data.description}: {len(data.train_labels)} training and {len(data.test_labels)} test images")
    results = train(config, data)
    print(table(results))
    picture(results, config.output, f"Top-K MLP on {config.dataset}, {config.optimizer}")
    print(f"picture: {config.output.resolve()}")
    return results


if __name__ == "__main__":
    training.run_program(main, Config, "examples.quickstart")
