"""Checkpoints by Orbax: saved while training goes on, and restored onto any mesh.

A checkpoint holds parameters, optimizer state and step, and the config of the run. All noise and the order of the data
are functions of seed and step, so a run that was stopped continues as if it had not been.
"""

import contextlib
import hashlib
import json
import pathlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from examples import logs

ITEMS = ("state", "config")
SUMS = {"checksum", "config_checksum"}  # of the state, and of all else in the config
# Errors that do not mean that a checkpoint is damaged.
TRANSIENT = (PermissionError, TimeoutError, ConnectionError, MemoryError, jax.errors.JaxRuntimeError)
READ, DAMAGED, UNREADABLE = range(3)  # outcomes of reading; the largest of all processes counts


class Checkpoints:
    """The checkpoints of a run, in a folder that all processes see: a path, or `gs://BUCKET/PATH` with gcsfs.

    A run resumes if its `config` is the same, except for the names in `may_change`; it prints a change of these. The
    newest `keep` checkpoints are kept. Raises OSError or ValueError if the folder cannot be opened.
    """

    def __init__(
        self, folder: str | pathlib.Path, config: dict[str, Any], save_every: int, keep: int, may_change: Any = ()
    ):
        self.config, self.may_change = config, set(may_change)
        try:
            self.folder = epath.Path(folder) if "://" in str(folder) else epath.Path(folder).absolute()
            self.folder.mkdir(parents=True, exist_ok=True)
        except (ImportError, KeyError) as error:
            raise ValueError(
                f"--checkpoints {folder} cannot be opened ({error}). gs:// requires a package: pip install gcsfs. "
                "Otherwise name a folder."
            ) from error
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=save_every, max_to_keep=keep, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        self._saving: int | None = None  # a step that `written` has not returned yet

    def restore(self, like: Any) -> tuple[Any, int] | None:
        """Returns the newest sound state, shaped and split `like` another, and its step; otherwise None.

        Raises:
          ValueError: if the newest was made with another config, or if there are checkpoints and all are damaged.
          OSError: if a checkpoint could not be read for a transient reason, such as a lost connection.
        """
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        me = jax.process_index()
        # Each process reads by itself: in Orbax's collective restore, one that cannot read leaves the others waiting.
        alone = ocp.options.MultiprocessingOptions(me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}")
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
        damaged: list[int] = []
        with ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS) as reader:
            steps = set(reader.all_steps())
            newest = lambda: np.int32(max(steps - set(damaged), default=-1))
            # Processes may see a shared folder at different times: process 0 decides.
            while (step := int(multihost_utils.broadcast_one_to_all(newest()))) >= 0:
                state = self._restore(reader, step, target)
                if state is not None:
                    self._set_aside(damaged)
                    return state, step
                text = f"The checkpoint of step {step} in {self.folder} is damaged; trying the one before."
                warnings.warn(text, stacklevel=2)
                damaged.append(step)
        if damaged:
            raise ValueError(
                f"All checkpoints in {self.folder} are damaged, or of an earlier version of this program: steps "
                f"{damaged}. Nothing was changed there."
            )
        return None

    def _restore(self, reader: ocp.CheckpointManager, step: int, target: Any) -> Any:
        """The state of one checkpoint, or None if it is damaged."""
        config = _read(reader, step, config=ocp.args.JsonRestore())
        if config is None or config.get("config_checksum") != config_checksum(config):
            return None
        self._check(config, step)
        state = _read(reader, step, state=ocp.args.StandardRestore(target))
        return None if state is None or checksum(state) != config["checksum"] else state

    def _check(self, config: dict[str, Any], step: int) -> None:
        """Raises ValueError if a checkpoint is of another run."""
        there, here = config, self.config
        names = sorted(name for name in (there.keys() | here.keys()) - SUMS if there.get(name) != here.get(name))
        changed = {name: f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names}
        if other := [text for name, text in changed.items() if name not in self.may_change]:
            raise ValueError(
                f"The checkpoint of step {step} in {self.folder} is of another run ({'; '.join(other)}). Nothing was "
                "changed there: give the same flags, or another folder."
            )
        if changed:
            print(f"resuming with other flags ({'; '.join(changed.values())})", flush=True)

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, if there are any, so that their steps can be saved again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                kept = logs.set_aside(self.folder / str(step))
                print(f"the damaged checkpoint of step {step} is kept as {kept.name}", flush=True)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.manager.reload()

    def save(self, step: int, state: Any) -> None:
        """Starts to save, unless this step is there. It is on disk when `manager.wait_until_finished` returns.

        Raises OSError or ValueError if this save, or the one before, failed, as on a full disk; older ones remain.
        """
        if self.manager.latest_step() == step:
            return
        config = self.config | {"checksum": checksum(state)}
        config |= {"config_checksum": config_checksum(config)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config))
        self.manager.save(step, args=args, force=True)
        self._saving = step

    def written(self) -> int | None:
        """The step of a checkpoint that reached the disk since the last call; otherwise None."""
        if self._saving is None or self.manager.is_saving_in_progress():
            return None
        step, self._saving = self._saving, None
        return step if (self.folder / str(step)).exists() else None


def config_checksum(config: dict[str, Any]) -> str:
    """8 hexadecimal digits made of a config without this checksum."""
    rest = {name: value for name, value in config.items() if name != "config_checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]


def _read(reader: ocp.CheckpointManager, step: int, **item: Any) -> Any:
    """One item of a checkpoint; None if it is damaged for any process."""
    value, outcome, cause = None, READ, None
    try:
        value = next(iter(reader.restore(step, args=ocp.args.Composite(**item)).values()))
    except Exception as error:  # a damaged file can cause any
        print(f"checkpoint of step {step}: {error!r:.300}", flush=True)
        outcome, cause = UNREADABLE if isinstance(error, TRANSIENT) else DAMAGED, error
    worst = np.max(multihost_utils.process_allgather(np.array(outcome)))
    if worst == UNREADABLE:
        raise OSError(
            f"The checkpoint of step {step} could not be read, for a reason that may pass "
            f"({repr(cause)[:300] if cause else 'see the other processes'}). Nothing was changed: try again."
        ) from cause
    return value if worst == READ else None


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """The sum of all numbers' bits, mixed with their place in array and tree, modulo 2^32."""
    total = jnp.zeros([], jnp.uint32)
    for leaf in jax.tree.leaves(state):
        place = jnp.zeros([], jnp.uint32)
        bits = _as_uint32(leaf)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        total = _mix(total) + jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)
    return total


def _as_uint32(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return leaf.astype(jnp.uint32)  # small integers, and booleans


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, one-to-one on 32 bits (https://github.com/aappleby/smhasher, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def checksum(state: Any) -> int:
    """32 bits that change if any bit of a state changes or two trade places, independent of the mesh.

    Storage does not check all that it reads. Damage within one number of at most 32 bits is always found; one in 2^32
    other cases is not.
    """
    return int(_checksum(state))


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function of the step: whether to save and end after it, since the machine will be taken away (SIGTERM).

    In a run of one process, the second signal ends the program at once.
    """
    if jax.process_count() > 1:  # JAX's own service listens, and all processes agree on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()

    def tell(*_: Any) -> None:
        told.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
