"""Interleaved timing: noise that lasts longer than a call falls on all variants alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import jax


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call of every variant, one call of each per round, after one round that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_ratios(seconds: dict[str, list[float]], to: str) -> None:
    """Prints a line for each variant: its fastest call, and its ratios to another variant."""
    width = max(map(len, seconds)) + 2
    print(f"{'':<{width}}{'fastest (s)':>12}{'median ratio':>14}{'ratio of fastest':>18}")
    for name in seconds:
        median, fastest = ratios(seconds, name, to)
        print(f"{name:<{width}}{min(seconds[name]):>12.3f}{median:>14.3f}{fastest:>18.3f}")


def fastest_of(seconds: dict[str, list[float]], names: Iterable[str]) -> str:
    """The variant with the fastest call."""
    return min(names, key=lambda name: min(seconds[name]))


def ratios(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float]:
    """The median of the ratios within a round, and the ratio of the fastest calls."""
    paired = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(paired), min(seconds[name]) / min(seconds[to])
