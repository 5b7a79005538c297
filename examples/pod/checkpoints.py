"""Checkpoints by Orbax: saved while training goes on, and restored onto whatever mesh there is.

A checkpoint holds parameters, optimizer state and step, and the config that they were made with. All noise and the
order of the data are functions of seed and step, so that a run that was stopped goes on as if it had not been.
"""

import pathlib
import signal
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

ITEMS = ("state", "config")


class Checkpoints:
    """The checkpoints of a run, in a folder that all processes see.

    Args:
      folder: where they are, and go: a path, or `gs://BUCKET/PATH` where the package gcsfs is installed.
      config: what must be the same for a run to go on, as JSON: architecture, optimizer, strategy, data.
      save_every: steps between checkpoints.
      keep: how many of the newest are kept.

    Raises:
      OSError: if the folder cannot be made.
    """

    def __init__(self, folder: str | pathlib.Path, config: dict[str, Any], save_every: int, keep: int):
        self.folder = epath.Path(folder) if "://" in str(folder) else epath.Path(folder).absolute()
        self.config = config
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        self._preemption = Preemption()

    def restore(self, like: Any, shardings: Any) -> tuple[Any, int] | None:
        """The newest state that can be read, and its step; None if there is none at all.

        Args:
          like: the shapes of the state.
          shardings: where its arrays are to lie, which need not be where they lay when they were saved.

        Raises:
          ValueError: if the newest was made with another config, or if there are checkpoints, and none can be read.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
        )
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            config = self._read(step, config=ocp.args.JsonRestore())
            if config is not None:
                self._check(config, step)
                state = self._read(step, state=ocp.args.StandardRestore(target))
                if state is not None and fingerprint(state) == config["fingerprint"]:
                    self._set_aside([damaged for damaged in steps if damaged > step])
                    return state, step
            warnings.warn(
                f"The checkpoint of step {step} in {self.folder} cannot be read; trying the one before.", stacklevel=2
            )
        if steps:
            raise ValueError(
                f"None of the checkpoints in {self.folder} can be read, of steps {steps}. Nothing was changed there."
            )
        return None

    def save(self, step: int, state: Any, *, now: bool = False) -> None:
        """Starts to save, if it is time to, or at once if told so. What is on disk counts when `wait` returns.

        Raises:
          OSError, ValueError: if this save, or the one before, went wrong, as on a full disk; those before it remain.
        """
        if now and self._manager.latest_step() == step:
            return
        if not (now or self._manager.should_save(step)):
            return
        config = self.config | {"fingerprint": fingerprint(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config))
        self._manager.save(step, args=args, force=now)

    def preempted(self, step: int) -> bool:
        """Whether any process was told to end (SIGTERM); all processes learn of it at the same step."""
        return self._preemption.reached(step)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._preemption.close()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint; None if any process cannot read it."""
        try:
            value = next(iter(self._manager.restore(step, args=ocp.args.Composite(**item)).values()))
        except Exception as error:  # whatever a damaged file brings about
            print(f"checkpoint of step {step}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            value = None
        everywhere = multihost_utils.process_allgather(np.array(value is not None))
        return value if np.all(everywhere) else None

    def _check(self, config: dict[str, Any], step: int) -> None:
        """Raises ValueError if a checkpoint is of another run."""
        names = sorted((config.keys() | self.config.keys()) - {"fingerprint"})
        other = [name for name in names if config.get(name) != self.config.get(name)]
        if other:
            both = [f"{name}: {config.get(name)!r} there, {self.config.get(name)!r} here" for name in other]
            raise ValueError(
                f"The checkpoint of step {step} in {self.folder} is of another run ({'; '.join(both)}). Nothing was "
                "changed there: give the same flags, or another folder."
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames checkpoints that cannot be read, so that their steps can be saved again."""
        if jax.process_index() == 0:
            for step in steps:
                path = self.folder / str(step)
                path.rename(path.with_name(f"{step}.damaged"))
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()


@jax.jit
def _sum_of_bits(state: Any) -> jax.Array:
    """The sum of all arrays' bits, taken as integers modulo 2^32, each times its place in the tree."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    total = jnp.zeros([], jnp.uint32)
    for place, leaf in enumerate(jax.tree.leaves(state), start=1):
        bits = jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize]).astype(jnp.uint32)
        total += jnp.uint32(place) * jnp.sum(bits, dtype=jnp.uint32)
    return total


def fingerprint(state: Any) -> int:
    """A number that changes if a bit of a state does, whatever mesh it lies on; storage does not check all it reads."""
    return int(_sum_of_bits(state))


class Preemption:
    """SIGTERM, as a machine that is about to be taken away gets it; the second one ends the program at once."""

    def __init__(self):
        self._told = threading.Event()
        self._distributed = jax.process_count() > 1  # JAX's own service listens then, and agrees on a step
        if not self._distributed:
            self._before = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_: Any) -> None:
        self._told.set()
        signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._distributed else self._told.is_set()

    def close(self) -> None:
        """Gives the signal back."""
        if not self._distributed:
            signal.signal(signal.SIGTERM, self._before)
