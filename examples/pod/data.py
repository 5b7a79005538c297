"""Batches that are a function of the step alone, for any number of processes, and are read ahead.

Grain shuffles by index, so no process holds an order in memory, and checkpoints need no position in the data.
"""

from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """A text `[N]` as consecutive windows `[N // length, length]`."""
    return tokens[: len(tokens) // length * length].reshape(-1, length)


class Batches:
    """Global batches `[B, ...]` of a sequence of examples, in a different order in every epoch."""

    def __init__(self, source: Any, batch_size: int, seed: int):
        self.shape = (batch_size, *np.shape(source[0]))
        self._examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def rows(self, step: int, rows: slice) -> np.ndarray:
        """Rows of the batch of a step; steps count from 0. A process reads only the rows that it asks for."""
        batch = range(step * self.shape[0], (step + 1) * self.shape[0])
        return np.stack([np.asarray(self._examples[i]) for i in batch[rows]])


def prefetch(make: Callable[[int], Any], first: int, last: int) -> Iterable[Any]:
    """`make(step)` for the steps in `range(first, last)`; a thread makes the next two while the device is busy."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return grain.MapDataset.range(first, last).map(make).to_iter_dataset(options)
