"""Quickstart: deep Top-K MLPs trained without and with Excitation, on real images, at several learning rates.

    python -m examples.quickstart                                           # scikit-learn's digits, a minute
    python -m examples.quickstart --initialization he_normal                # the baseline trains too
    python -m examples.quickstart --dataset cifar10 --data-dir DIR          # CIFAR-10

Every strategy trains the same models: the same initialization and the same batches for each seed. `loss_fn` and
`training.train_step` show all that Excitation requires: loss, gradient, update.

Axis letters: R learning rates, S seeds, L hidden layers, E neurons, C classes.
"""

import dataclasses
import functools
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

# What fits a data set, unless flags say otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 100, "batch_size": 128, "width": 64, "depth": 16, "initialization": "torch"},
    "cifar10": {"epochs": 30, "batch_size": 512, "width": 128, "depth": 3, "initialization": "lecun_normal"},
}
ADAPTIVE = (3e-4, 1e-3, 3e-3, 1e-2)
LEARNING_RATE = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adagrad": (0.003, 0.01, 0.03, 0.1),
}
LEARNING_RATE |= {"adam": ADAPTIVE, "adamw": ADAPTIVE, "rmsprop": ADAPTIVE}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Top-K MLPs without and with Excitation, at several learning rates, and compare their test accuracy.

    With no flags it takes a minute on two cores, and downloads nothing.
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
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"] = "adam"
    """The optimizer that Excitation is chained after."""
    learning_rate: tuple[float, ...] = ()
    """Constant learning rates; every strategy is trained at each. By default, four that fit the optimizer."""
    initialization: Literal["torch", "lecun_normal", "he_normal"] | None = None
    """torch: the default of PyTorch's linear layers; lecun_normal: Flax's; he_normal: twice Flax's variance. By default
    torch for digits, lecun_normal for cifar10."""
    epochs: int | None = None
    """By default 100 for digits, 30 for cifar10."""
    batch_size: int | None = None
    """By default 128 for digits, 512 for cifar10. The last batch of an epoch is dropped unless it is full."""
    width: int | None = None
    """Neurons in each hidden layer; each is an expert. By default 64 for digits, 128 for cifar10."""
    depth: int | None = None
    """Hidden layers; by default 16 for digits, 3 for cifar10."""
    sparsity: float = 0.9
    """The share of a hidden layer's neurons that a sample does not keep."""
    seeds: int = 3
    """Models per strategy and learning rate, trained side by side."""
    output: pathlib.Path = pathlib.Path("out/quickstart.png")
    """Where the picture goes."""

    def __post_init__(self):
        training.check(self)
        if self.data_dir is not None and self.dataset == "digits":
            raise ValueError("--data-dir goes with --dataset cifar10; digits come with scikit-learn.")
        comparison.check(self)

    def complete(self) -> Any:
        """The config with the defaults of its data set and its optimizer."""
        defaults = DEFAULTS[self.dataset] | {"learning_rate": LEARNING_RATE[self.optimizer]}
        return dataclasses.replace(self, **{name: getattr(self, name) or value for name, value in defaults.items()})


class Evaluation(NamedTuple):
    """Measured on the test images. A training run's arrays have leading axes: epochs, R, S."""

    accuracy: jax.Array  # []; NaN for a model that diverged
    entropy: jax.Array  # [L], nats, of the shares of the kept neurons in what a hidden layer passes on
    specialization: jax.Array  # [L], from 1/C to 1
    utilization: jax.Array  # [L, E]


def loss_fn(graphdef, params, batch):
    """The loss on images and labels, nothing to log, and the routing that the model emits."""
    images, labels = batch
    logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, ({}, utilization)


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


def train_epoch(graphdef, tx, state, order, images, labels):
    """Steps over the training images, in the order `[steps, batch]`."""
    gradient = jax.grad(functools.partial(loss_fn, graphdef), has_aux=True)

    def step(state, rows):
        batch = to_unit_range(images[rows]), labels[rows]
        return training.train_step(gradient, tx, state, batch)[0], None

    return jax.lax.scan(step, state, order)[0]


def to_unit_range(images):
    """Pixels in [0, 1] as floats, of pixels in 0 to 255 as bytes, which is how they stay in memory."""
    return images.astype(jnp.float32) / 255


def make_epoch(graphdef, make_tx, num_classes):
    """An epoch of every strategy, learning rate and seed, and its evaluation, as one compiled program."""

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(states, rates, orders, train_images, train_labels, test_images, test_labels):
        def one(name, rate, state, order):
            state = train_epoch(graphdef, make_tx(name, rate), state, order, train_images, train_labels)
            return state, evaluate(graphdef, num_classes, state.params, to_unit_range(test_images), test_labels)

        found = {}
        for name, state in states.items():
            of_seeds = jax.vmap(functools.partial(one, name), in_axes=(None, 0, 0))
            states[name], found[name] = jax.vmap(of_seeds, in_axes=(0, 0, None))(rates, state, orders)
        return states, found

    return epoch


def train(config: Config, data: datasets.ImageData) -> dict[str, Evaluation]:
    """For each strategy, its evaluations after every epoch, with leading axes `[epochs, R, S]`.

    Every strategy trains from the same initialization on the same batches, seed by seed.
    """
    settings = config.complete()
    examples, batch_size = len(data.train_labels), settings.batch_size
    if batch_size > examples:
        raise ValueError(f"--batch-size must be at most the {examples} training images; got {batch_size}.")
    model_config = topk_mlp.TopKMLPConfig(
        data.input_dim, settings.width, settings.depth, num_classes=data.num_classes, sparsity=config.sparsity
    )

    def make_model(seed):
        key = jax.random.key(seed)
        model = topk_mlp.TopKMLP(model_config, rngs=nnx.Rngs(key))
        topk_mlp.initialize(model, settings.initialization, jax.random.fold_in(key, 1))
        return model

    def make_tx(name, rate):
        optimizer, excite = training.OPTIMIZERS[config.optimizer](rate), {"strategy": name, "gamma": config.gamma}
        return training.make_optimizer(optimizer, expert_axis=topk_mlp.TopKMLP.expert_axis, **excite)

    def init(name, rate, seed):
        return training.TrainState.create(nnx.state(make_model(seed)), make_tx(name, rate))

    rates, seeds = jnp.array(settings.learning_rate), jnp.arange(config.seeds)
    over_rates_and_seeds = lambda f: jax.vmap(jax.vmap(f, in_axes=(None, 0)), in_axes=(0, None))
    states = {name: over_rates_and_seeds(functools.partial(init, name))(rates, seeds) for name in config.strategy}
    epoch = make_epoch(nnx.graphdef(make_model(0)), make_tx, data.num_classes)
    arrays = [jnp.asarray(a) for a in (data.train_images, data.train_labels, data.test_images, data.test_labels)]

    def order(seed: int, epoch_number: int) -> np.ndarray:  # [steps, batch]
        shuffled = np.random.default_rng((seed, epoch_number)).permutation(examples).astype(np.int32)
        return shuffled[: examples // batch_size * batch_size].reshape(-1, batch_size)

    history = []
    description = f"{len(states) * len(rates) * len(seeds)} models"
    # disable=None: no bar where stderr is no terminal.
    progress = tqdm.trange(1, settings.epochs + 1, desc=description, unit="epoch", mininterval=0.5, disable=None)
    for number in progress:
        orders = np.stack([order(seed, number) for seed in range(config.seeds)])
        states, evaluations = epoch(states, rates, orders, *arrays)
        history.append(jax.device_get(evaluations))
        best: Any = {name: f"{100 * found.accuracy.mean(-1).max():.1f} %" for name, found in evaluations.items()}
        progress.set_postfix(best, refresh=False)
    return {name: jax.tree.map(lambda *es: np.stack(es), *(e[name] for e in history)) for name in config.strategy}


def table(config: Config, results: dict[str, Evaluation]) -> str:
    """Test accuracy, and neurons that no test image activates, at the end of training, as text."""

    def rows(measured: list[Any]) -> list[str]:  # [R, S] of each strategy
        cells = lambda number: [comparison.spread(100 * values[number], 1) for values in measured]
        rates = config.complete().learning_rate
        return [comparison.row(f"{rate:g}", cells(number)) for number, rate in enumerate(rates)]

    found = list(results.values())
    lines = [f"after epoch {len(found[0].accuracy)}, {comparison.over_seeds(config.seeds)}"]
    lines += [comparison.row("learning rate", list(results)), "test accuracy (%)"]
    lines += rows([evaluation.accuracy[-1] for evaluation in found])
    lines += ["neurons that no test image activates (%), mean of the hidden layers"]
    lines += rows([metrics.dead_experts(evaluation.utilization[-1]).mean(-1) for evaluation in found])
    return "\n".join(lines)


def draw(config: Config, results: dict[str, Evaluation], figure: Any) -> None:
    """Learning curves at every learning rate, with bands from the lowest to the highest seed."""
    settings = config.complete()
    panels = figure.subplots(1, len(settings.learning_rate), sharey=True, squeeze=False)[0]
    for number, (axes, rate) in enumerate(zip(panels, settings.learning_rate, strict=True)):
        for name, found in results.items():
            accuracy = 100 * found.accuracy[:, number]
            comparison.curve(axes, np.arange(1, len(accuracy) + 1), accuracy, name)
        axes.set(xlabel="epoch", title=f"learning rate {rate:g}", ylim=(0, 100))
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(loc="upper left")
    layers = f"{settings.depth} hidden layers of {settings.width} neurons"
    figure.suptitle(f"Top-K MLP on {config.dataset}, {layers}, {config.optimizer}")


def main(config: Config) -> dict[str, Evaluation]:
    """Loads the data, trains, prints the table and draws the picture."""
    comparison.ready(config.output)
    digits = config.dataset == "digits"
    data = datasets.load_digits() if digits else datasets.load_images(config.dataset, config.data_dir)
    print(f"{data.description}: {len(data.train_labels)} training and {len(data.test_labels)} test images")
    results = train(config, data)
    print(table(config, results))
    with comparison.figure(config.output, 12, 3.4) as figure:
        draw(config, results, figure)
    print(f"picture: {config.output.resolve()}")
    if config.complete().initialization == "torch":
        print("next: --initialization he_normal, with which the baseline trains too")
    return results


if __name__ == "__main__":
    training.run_program(main, Config, "examples.quickstart")
