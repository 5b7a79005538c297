"""Quickstart: Top-K MLPs trained without and with Excitation, on real images, side by side.

    python -m examples.quickstart                                           # scikit-learn's digits, half a minute
    python -m examples.quickstart --dataset cifar10 --data-dir DIR          # CIFAR-10, prepared by TensorFlow Datasets

Every strategy trains the same models: the same initialization and the same batches for each seed. `train_step` is all
there is to Excitation in a training loop.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx

import excitation_optax
from examples import datasets
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import topk_mlp

Strategy = Literal["zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"]

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
}


class Defaults(NamedTuple):
    """What a data set is trained with, unless flags say otherwise."""

    epochs: int
    batch_size: int
    sgd: float  # learning rate of plain SGD and Adagrad
    momentum: float  # of SGD with momentum
    adaptive: float  # of the Adam family


DEFAULTS = {
    "digits": Defaults(epochs=150, batch_size=128, sgd=0.05, momentum=0.01, adaptive=3e-4),
    "cifar10": Defaults(epochs=30, batch_size=512, sgd=0.01, momentum=0.01, adaptive=1e-4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Top-K MLPs without and with Excitation, and compare their test accuracy, routing entropy and specialization.

    With no flags it takes half a minute on two cores, and downloads nothing.
    """

    dataset: Literal["digits", "cifar10"] = "digits"
    """digits comes with scikit-learn; cifar10 is read from --data-dir."""
    data_dir: pathlib.Path | None = None
    """Where TensorFlow Datasets has its prepared data; else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    strategy: tuple[Strategy, ...] = ("zero_sum", "positive_sum")
    """What to compare with vanilla."""
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
