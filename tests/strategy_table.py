"""Every strategy that the library exports, with its properties: one row each.

`test_strategies.py` tests every row, and fails if a strategy has none. Other tests that cover all strategies use these
rows too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import excitation_optax


class Row(NamedTuple):
    """One strategy.

    Attributes:
      strategy: the function.
      by_hand: utilization, gamma and the excitation, worked by hand; for a random strategy in ascending order.
      equation: `(u [..., E], gamma) -> [..., E]` in float64, as the paper prints it; None for a random strategy, which
        uses another strategy's equation.
      highest: the largest possible factor, a function of (E, gamma).
      lowest: the smallest possible factor.
      order: 1 if a busier expert gets no less, -1 if it gets no more, 0 if neither.
      mean_one: whether the mean excitation of a layer is 1.
      scale_free: whether utilization times a constant gives the same excitation.
      shift_free: whether utilization plus a constant gives the same excitation.
      at_zero: whether the equation holds where u = 0; otherwise its limit holds there.
    """

    strategy: excitation_optax.Strategy
    by_hand: list[tuple[list[float], float, list[float]]]
    equation: Callable[[np.ndarray, float], Any] | None
    highest: Callable[[int, float], float] = lambda num_experts, gamma: num_experts
    lowest: float = 0.0
    order: int = 1
    mean_one: bool = False
    scale_free: bool = False
    shift_free: bool = False
    at_zero: bool = True


def mean(x):
    return np.mean(x, axis=-1, keepdims=True)


ROWS = [
    Row(
        excitation_optax.zero_sum,
        [
            ([0.1, 0.2, 0.3], 1.0, [0.5, 1.0, 1.5]),  # mean 0.2
            ([0.1, 0.2, 0.3], 2.0, [3 / 14, 12 / 14, 27 / 14]),  # squares 1, 4, 9 hundredths, mean 14/3
            ([0.25, 1.0], 0.5, [2 / 3, 4 / 3]),  # roots 1/2, 1, mean 3/4
            ([0.5, 1.0], 3.0, [2 / 9, 16 / 9]),  # cubes 1/8, 8/8, mean 9/16
            ([0.5, 1.0], 10.0, [2 / 1025, 2048 / 1025]),  # 1/1024, 1, mean 1025/2048
            ([0.0, 0.5, 0.5, 1.0], 1.0, [0.0, 1.0, 1.0, 2.0]),  # mean 1/2
            ([0.0, 0.0, 0.0, 1.0], 2.0, [0.0, 0.0, 0.0, 4.0]),  # mean 1/4
            ([0.7], 3.0, [1.0]),  # one expert is its own mean
        ],
        lambda u, g: u**g / mean(u**g),
        mean_one=True,
        scale_free=True,
    ),
    Row(
        excitation_optax.positive_sum,
        [
            ([0.1, 0.2, 0.3], 1.0, [1.0, 1.0, 1.5]),  # zero-sum 0.5, 1, 1.5
            ([0.1, 0.2, 0.3], 2.0, [1.0, 1.0, 27 / 14]),  # zero-sum 3/14, 12/14, 27/14
            ([0.25, 1.0], 0.5, [1.0, 4 / 3]),  # zero-sum 2/3, 4/3
            ([0.0, 0.0, 0.0, 1.0], 5.0, [1.0, 1.0, 1.0, 4.0]),  # zero-sum 0, 0, 0, 4
        ],
        lambda u, g: np.maximum(1.0, u**g / mean(u**g)),
        lowest=1.0,
        scale_free=True,
    ),
    Row(
        excitation_optax.exp_diff,
        [
            ([0.0, 1.0], 1.0, [2 / (1 + math.e), 2 * math.e / (1 + math.e)]),  # exp 1, e, mean (1 + e)/2
            ([0.0, 0.5, 0.5], 2 * math.log(2), [0.6, 1.2, 1.2]),  # exp 1, 2, 2, mean 5/3
            ([0.5, 1.0], 2 * math.log(3), [0.5, 1.5]),  # exp 3, 9, mean 6
            ([0.2, 0.2, 0.2], 10.0, [1.0, 1.0, 1.0]),  # all equal
        ],
        lambda u, g: np.exp(g * u) / mean(np.exp(g * u)),
        mean_one=True,
        shift_free=True,
    ),
    Row(
        excitation_optax.global_exp,
        [
            ([0.0, 1.0], 2 * math.log(3), [2.0, 2.0]),  # above the mean: 0, 1/2; exp 1, 3; mean 2
            ([0.1, 0.2, 0.3], 10.0, 3 * [(2 + math.e) / 3]),  # above the mean: 0, 0, 0.1; exp 1, 1, e
            ([0.2, 0.2, 0.2, 1.0], math.log(5) / 0.6, 4 * [2.0]),  # above the mean 0.4: 0, 0, 0, 0.6; exp 1, 1, 1, 5
            ([0.3, 0.3], 7.0, [1.0, 1.0]),  # no expert is above the mean
        ],
        lambda u, g: mean(np.exp(g * np.maximum(u - mean(u), 0.0))) * np.ones_like(u),
        highest=lambda num_experts, gamma: math.exp(gamma),
        lowest=1.0,
        shift_free=True,
    ),
    Row(
        excitation_optax.random_boost,
        [
            ([0.3, 0.1, 0.2], 1.0, [0.5, 1.0, 1.5]),  # zero-sum, in ascending order
            ([1.0, 0.25], 0.5, [2 / 3, 4 / 3]),
        ],
        None,
        order=0,
        mean_one=True,
    ),
    Row(
        excitation_optax.inverted,
        [
            ([0.1, 0.3], 1.0, [1.5, 0.5]),  # 1/u: 10, 10/3, mean 20/3
            ([0.5, 1.0], 2.0, [1.6, 0.4]),  # 4, 1, mean 5/2
            ([0.25, 1.0], 0.5, [4 / 3, 2 / 3]),  # 2, 1, mean 3/2
            ([0.2, 0.4, 0.4], 1.0, [1.5, 0.75, 0.75]),  # 5, 5/2, 5/2, mean 10/3
            ([0.0, 0.5, 0.5], 1.0, [3.0, 0.0, 0.0]),  # the idle expert takes all
            ([0.0, 0.0, 0.4, 0.6], 2.0, [2.0, 2.0, 0.0, 0.0]),  # the idle two share all
        ],
        lambda u, g: u**-g / mean(u**-g),
        order=-1,
        mean_one=True,
        scale_free=True,
        at_zero=False,
    ),
]
NAMES = [row.strategy.__name__ for row in ROWS]
