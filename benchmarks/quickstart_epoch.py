"""An epoch of a group of three Top-K MLPs on CIFAR-10, against its bare matrix products.

    python -m benchmarks.quickstart_epoch

The products are the forward, weight-gradient and input-gradient einsums of three vmapped Top-K MLPs (3072-128-128-128-
128-10, batch 512, each model with batches of its own), without the input gradient of the first layer, in the faster of
two layouts of the weights. Everything else is what the ratio shows: gathering and scaling the batch, ReLU and Top-K and
their gradients, the loss, the routing counts, Excitation, and SGD. Images are random bytes of CIFAR-10's size.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import excitation_optax
from benchmarks import timing
from examples import quickstart, training
from models import topk_mlp

MODELS, BATCH, IMAGES, ROUNDS = 3, 512, 50_000, 7
STEPS = IMAGES // BATCH
CONFIG = topk_mlp.TopKMLPConfig(input_dim=3072)


def make_epoch(tx):
    """One epoch of three models, as the quickstart trains them."""
    make_model = lambda seed: topk_mlp.TopKMLP(CONFIG, rngs=nnx.Rngs(jax.random.key(seed)))
    params = jax.vmap(lambda seed: nnx.state(make_model(seed)))(jnp.arange(MODELS))
    random = np.random.default_rng(0)
    images = jnp.asarray(random.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8))
    labels = jnp.asarray(random.integers(0, 10, IMAGES, np.int32))
    orders = [random.permutation(IMAGES)[: STEPS * BATCH].reshape(STEPS, BATCH) for _ in range(MODELS)]
    train = functools.partial(quickstart.train_epoch, nnx.graphdef(make_model(0)), tx)
    epoch = jax.jit(jax.vmap(train, in_axes=(0, 0, None, None)))
    states = jax.vmap(lambda params: training.TrainState.create(params, tx))(params)
    return functools.partial(epoch, states, np.stack(orders), images, labels)


def make_products(weights: str, models: int = MODELS, steps: int = STEPS, config=CONFIG, batch=BATCH, shared=False):
    """The matrix products of an epoch. G models, B batch, I inputs, O outputs; weights are "gio" or "goi".

    If the models share their batches, the first layer's rows have no axis of models.
    """
    widths = [config.input_dim, *[config.width] * config.depth, config.num_classes]
    sizes = {"g": models, "b": batch}
    products = []
    for number, (i, o) in enumerate(itertools.pairwise(widths)):
        rows = "bi" if shared and number == 0 else "gbi"
        equations = [f"{rows},{weights}->gbo", f"{rows},gbo->{weights}"] + [f"gbo,{weights}->gbi"] * (number > 0)
        for equation in equations:
            shapes = [[{**sizes, "i": i, "o": o}[axis] for axis in term] for term in equation.split("->")[0].split(",")]
            products.append((equation, [jnp.ones(shape) / 100 for shape in shapes]))

    @jax.jit
    def step(operands):
        return [jnp.einsum(equation, *terms) for (equation, _), terms in zip(products, operands, strict=True)]

    def epoch():
        return [step([terms for _, terms in products]) for _ in range(steps)][-1]

    return epoch


def main():
    excitation = excitation_optax.scale_by_excitation(expert_axis=topk_mlp.TopKMLP.expert_axis)
    variants = {
        "bare products, weights [in, out]": make_products("gio"),
        "bare products, weights [out, in]": make_products("goi"),
        "epoch, vanilla SGD": make_epoch(optax.chain(optax.sgd(0.01))),
        "epoch, SGD with Excitation": make_epoch(optax.chain(optax.sgd(0.01), excitation)),
    }
    seconds = timing.interleave(variants, ROUNDS)
    timing.print_ratios(seconds, to=timing.fastest_of(seconds, list(variants)[:2]))


if __name__ == "__main__":
    main()
