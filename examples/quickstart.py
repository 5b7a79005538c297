"""Quickstart: deep Top-K MLPs trained without and with Excitation, on real images, at several learning rates.

    python -m examples.quickstart                                # scikit-learn's digits, a minute
    python -m examples.quickstart --initialization he_normal     # the baseline trains too

Every strategy trains the same models: the same initialization and the same batches for each seed. `loss_fn` and
`training.train_step` show all that Excitation requires: loss, gradient, update.

Axis letters: R learning rates, S seeds, L hidden layers, E neurons, C classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
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

LEARNING_RATE = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adagrad": (0.003, 0.01, 0.03, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Top-K MLPs without and with Excitation, at several learning rates, and compare their test accuracy.

    With no flags it takes a minute on two cores, and downloads nothing.
    """

    strategy: tuple[training.Strategy, ...] = ("baseline", "zero_sum", "positive_sum")
    """The strategies to compare; baseline is the optimizer without Excitation."""
    gamma: float = 1.0
    """The intensity of Excitation."""
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"] = "adam"
    """The optimizer that Excitation is chained after."""
    learning_rate: tuple[float, ...] = ()
    """Constant learning rates; every strategy is trained at each. By default, four that fit the optimizer."""
    initialization: Literal["torch", "lecun_normal", "he_normal"] = "torch"
    """torch: the default of PyTorch's linear layers; lecun_normal: Flax's; he_normal: twice Flax's variance."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images of a step. The last batch of an epoch is dropped unless it is full."""
    width: int = 64
    """Neurons in each hidden layer; each is an expert."""
    depth: int = 16
    """Hidden layers."""
    sparsity: float = 0.9
    """The share of a hidden layer's neurons that a sample does not keep."""
    seeds: int = 3
    """Models per strategy and learning rate, trained side by side."""
    output: pathlib.Path = pathlib.Path("out/quickstart.png")
    """Where the picture goes."""

    def __post_init__(self):
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", LEARNING_RATE.get(self.optimizer, (3e-4, 1e-3, 3e-3, 1e-2)))
        training.check(self)
        comparison.check(self)


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


def train(config: Config, data: datasets.ImageData) -> dict[str, Evaluation]:
    """For each strategy, its evaluations after every epoch, with leading axes `[epochs, R, S]`.

    Every strategy trains from the same initialization on the same batches, seed by seed.
    """
    model_config = topk_mlp.TopKMLPConfig(
        data.input_dim, config.width, config.depth, num_classes=data.num_classes, sparsity=config.sparsity
    )

    def make_model(seed):
        key = jax.random.key(seed)
        model = topk_mlp.TopKMLP(model_config, rngs=nnx.Rngs(key))
        topk_mlp.initialize(model, config.initialization, jax.random.fold_in(key, 1))
        return model

    def make_tx(strategy, rate):
        optimizer, excite = training.OPTIMIZERS[config.optimizer](rate), {"strategy": strategy, "gamma": config.gamma}
        return training.make_optimizer(optimizer, expert_axis=topk_mlp.TopKMLP.expert_axis, **excite)

    def init(strategy, rate, seed):
        return training.TrainState.create(nnx.state(make_model(seed)), make_tx(strategy, rate))

    def train_one(strategy, rate, state, order):
        state = train_epoch(graphdef, make_tx(strategy, rate), state, order, *train_set)
        return state, evaluate(graphdef, data.num_classes, state.params, *test_set)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_all(states, orders):  # one program for all strategies
        found = {}
        for strategy, state in states.items():
            of_seeds = jax.vmap(functools.partial(train_one, strategy), in_axes=(None, 0, 0))
            states[strategy], found[strategy] = jax.vmap(of_seeds, in_axes=(0, 0, None))(rates, state, orders)
        return states, found

    rates, seeds = jnp.array(config.learning_rate), jnp.arange(config.seeds)
    graphdef = nnx.graphdef(make_model(0))
    train_set = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    test_set = to_unit_range(jnp.asarray(data.test_images)), jnp.asarray(data.test_labels)
    over_rates_and_seeds = lambda f: jax.vmap(jax.vmap(f, in_axes=(None, 0)), in_axes=(0, None))
    states = {name: over_rates_and_seeds(functools.partial(init, name))(rates, seeds) for name in config.strategy}
    shuffled = functools.partial(comparison.shuffled, len(data.train_labels), config.batch_size)
    history = []
    description = f"{len(states) * len(rates) * len(seeds)} models"
    # disable=None: no bar where stderr is no terminal.
    progress = tqdm.trange(1, config.epochs + 1, desc=description, unit="epoch", mininterval=0.5, disable=None)
    for number in progress:
        states, evaluations = train_all(states, np.stack([shuffled(seed, number) for seed in range(config.seeds)]))
        history.append(jax.device_get(evaluations))
        best: Any = {name: f"{100 * found.accuracy.mean(-1).max():.1f} %" for name, found in evaluations.items()}
        progress.set_postfix(best, refresh=False)
    results = jax.tree.map(lambda *epochs: np.stack(epochs), *history)
    return {name: results[name] for name in config.strategy}  # JAX sorts them


def table(config: Config, results: dict[str, Evaluation]) -> str:
    """Test accuracy, and neurons that no test image activates, at the end of training, as text."""
    lines = [
        f"after epoch {config.epochs}, {comparison.over_seeds(config.seeds)}",
        comparison.row("learning rate", list(results)),
    ]
    dead = "neurons that no test image activates (%), mean of the hidden layers"
    measures: dict[str, Callable[[Evaluation], Any]] = {  # [R, S] of each strategy
        "test accuracy (%)": lambda found: found.accuracy[-1],
        dead: lambda found: metrics.dead_experts(found.utilization[-1]).mean(-1),
    }
    for heading, measure in measures.items():
        columns = [100 * measure(found) for found in results.values()]
        lines.append(heading)
        for number, rate in enumerate(config.learning_rate):
            cells = [comparison.spread(column[number], 1) for column in columns]
            lines.append(comparison.row(f"{rate:g}", cells))
    return "\n".join(lines)


def draw(config: Config, results: dict[str, Evaluation], figure: Any) -> None:
    """Learning curves at every learning rate, with bands from the lowest to the highest seed."""
    panels = figure.subplots(1, len(config.learning_rate), sharey=True, squeeze=False)[0]
    for number, (axes, rate) in enumerate(zip(panels, config.learning_rate, strict=True)):
        for name, found in results.items():
            accuracy = 100 * found.accuracy[:, number]
            comparison.curve(axes, np.arange(1, len(accuracy) + 1), accuracy, name)
        axes.set(xlabel="epoch", title=f"learning rate {rate:g}", ylim=(0, 100))
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(loc="upper left")
    layers = f"{config.depth} hidden layers of {config.width} neurons"
    figure.suptitle(f"Top-K MLP on digits, {layers}, {config.optimizer}")


def main(config: Config) -> dict[str, Evaluation]:
    """Loads the data, trains, prints the table and draws the picture."""
    comparison.ready(config.output)
    data = datasets.load_digits()
    print(f"{data.description}: {len(data.train_labels)} training and {len(data.test_labels)} test images")
    results = train(config, data)
    print(table(config, results))
    with comparison.figure(config.output, 12, 3.4) as figure:
        draw(config, results, figure)
    print(f"picture: {config.output.resolve()}")
    if config.initialization == "torch":
        print("next: --initialization he_normal")
    return results


if __name__ == "__main__":
    training.run_program(main, Config, "examples.quickstart")
