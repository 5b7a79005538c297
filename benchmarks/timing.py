"""Interleaved timing: noise that lasts longer than a call falls on all variants alike."""

import statistics
import time
from collections.abc import Callable, Mapping

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


def ratios(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float]:
    """The median of the ratios within a round, and the ratio of the fastest calls."""
    paired = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(paired), min(seconds[name]) / min(seconds[to])
