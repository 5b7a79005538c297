"""Batches that are a function of the step alone, whatever the number of processes, and are read ahead.

Grain shuffles by index, so that no process holds an order in memory and the position in the data need not be saved.
"""

import collections
import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from examples import texts

PREFETCHED = 2  # batches that are read while the device is busy


class Windows:
    """A text as consecutive windows of `length` tokens."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[i * self.length : (i + 1) * self.length]


class Batches:
    """Global batches `[B, ...]` of a sequence of examples, in an order that differs in every epoch.

    A process reads only the rows that it asks for. If each process has a source of its own, `own` are the rows of every
    batch that come from this one.
    """

    def __init__(self, source: Any, batch_size: int, seed: int, own: Sequence[int] | None = None):
        self.shape = (batch_size, *np.shape(source[0]))
        self._place = {row: i for i, row in enumerate(range(batch_size) if own is None else own)}
        self._examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def rows(self, step: int, rows: slice) -> np.ndarray:
        """Rows of the batch of a step; steps count from 0."""
        first = step * len(self._place)
        return np.stack([np.asarray(self._examples[first + self._place[i]]) for i in range(self.shape[0])[rows]])


def prefetch(make: Callable[[int], Any], first: int, last: int) -> Iterator[Any]:
    """`make(step)` for the steps in `range(first, last)`; a thread makes the next ones in the meantime."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(make, step) for step in range(first, min(first + PREFETCHED, last)))
        for step in range(first, last):
            if step + PREFETCHED < last:
                waiting.append(thread.submit(make, step + PREFETCHED))
            yield waiting.popleft().result()


def files_of_process(folder: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """The files that process i of P reads, where each host stores its own part: numbers i, i + P, ..."""
    files, processes = sorted(p for p in folder.glob(pattern) if p.is_file()), jax.process_count()
    if len(files) < processes:
        raise ValueError(
            f"{folder} has {len(files)} files named {pattern}; {processes} processes need one each. Split the files, "
            "or let every process read all of them."
        )
    return files[jax.process_index() :: processes]


def read_tokens(files: Sequence[pathlib.Path], tokenizer: texts.Tokenizer) -> np.ndarray:
    """The concatenated tokens of text files, `[N]` int32."""
    return np.concatenate([texts.encode(file.read_bytes(), tokenizer) for file in files])
