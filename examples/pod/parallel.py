"""One training step on many devices: by `jax.jit` with shardings, or by `jax.pmap`.

The mesh has three axes. A batch is split over all of them. Experts are split over `expert`, all parameters and the
optimizer's state over `fsdp`; over `data` they are repeated. What crosses devices is left to XLA, but in the MoE
layers, which say it themselves (`models.expert_parallel`). Excitation adds nothing to it: utilization is global already
where the counts are summed over the batch, and the update is scaled where it lies.

Axis letters: B batch, E experts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert")
# Smaller parameters are not worth splitting: biases, norms.
MIN_SIZE_TO_SPLIT = 2**10

# (params, batch) -> (what is minimized, ({name: to be logged}, utilization)): means over B, and sums.
LossFn = Callable[[Any, Any], tuple[jax.Array, tuple[dict[str, Any], Any]]]


class TrainState(NamedTuple):
    """What a training run carries from step to step, and a checkpoint holds."""

    params: Any
    opt_state: Any
    step: jax.Array  # shape=(), dtype=jnp.int32, steps made


def make_mesh(
    data: int | None = None, fsdp: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices; `data` takes what the other axes leave.

    Raises:
      ValueError: if the sizes do not make up the number of devices, or do not fit how a TPU slice is wired.
    """
    devices = jax.devices() if devices is None else devices
    if data is None:
        data = max(1, len(devices) // (fsdp * expert))
    sizes = (data, fsdp, expert)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(
            f"A mesh of data {data} x fsdp {fsdp} x expert {expert} has {math.prod(sizes)} devices; there are "
            f"{len(devices)}. --fsdp times --expert must divide their number; --data, if given, is the quotient."
        )
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:
        raise ValueError(
            f"A mesh of data {data} x fsdp {fsdp} x expert {expert} does not fit this slice: each size must be that of "
            f"an axis of the slice, or a product of such. {error}"
        ) from error


def check_sizes(mesh: Mesh, batch_size: int, num_experts: int) -> None:
    """Raises ValueError if a batch, or micro-batch, or the experts cannot be split evenly."""
    if batch_size % mesh.size:
        raise ValueError(
            f"A batch of {batch_size} (--batch-size over --micro-batches) cannot be split evenly over {mesh.size} "
            "devices."
        )
    if num_experts % mesh.shape["expert"]:
        raise ValueError(f"{num_experts} experts cannot be split evenly over an expert axis of {mesh.shape['expert']}.")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How a tree of parameters, or of an optimizer's state, lies on the mesh: by path and shape, as `spec` says."""
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf.shape, mesh)), tree)


def spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Experts along `expert`; then the largest axis that can be, along `fsdp`.

    Experts are the parameters under a node named `experts`, their first axis; under one named `stack`, whose layers are
    scanned over, the second.

    The optimizer's moments have paths that end as those of their parameters do, and so lie where these lie.
    """
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    axes: list[str | None] = [None] * len(shape)
    first = 1 if "stack" in names and len(shape) else 0  # layers that are scanned over stay whole
    if "experts" in names and len(shape) > first:
        axes[first] = "expert"
    free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % mesh.shape["fsdp"] == 0]
    if free and math.prod(shape) >= MIN_SIZE_TO_SPLIT and mesh.shape["fsdp"] > 1:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch `[B, ...]`, over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Any,
    *,
    axis_name: str | None = None,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Any], Any]:
    """Gradient and update. Returns the state, what is to be logged, and the utilization of the batch.

    Args:
      loss_fn: gives the loss of a part of the batch, and its routing.
      tx: the optimizer, Excitation in it; is given `utilization` and the loss as `value`.
      state: parameters, state of the optimizer, step.
      batch: a tree of arrays `[B, ...]`.
      axis_name: under `jax.pmap`, that of its axis.
      micro_batches: parts of the batch that are gone through one after the other, to save memory.
    """
    gradients = jax.grad(lambda params, part: _with_value(loss_fn(params, part)), has_aux=True)
    if micro_batches == 1:
        grads, ((value, logged), utilization) = gradients(state.params, batch)
    else:
        grads, ((value, logged), utilization) = _accumulated(gradients, state.params, batch, micro_batches)
    if axis_name is not None:  # under jit, all of this is global already
        grads, value, logged = lax.pmean((grads, value, logged), axis_name)
        utilization = lax.psum(utilization, axis_name)  # or the replicas drift apart in silence
    updates, opt_state = tx.update(grads, state.opt_state, state.params, utilization=utilization, value=value)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), logged, utilization


def _with_value(result):
    value, (logged, utilization) = result
    return value, ((value, logged), utilization)


def _accumulated(gradients, params, batch, parts):
    """Means of gradients and of what is logged, and sums of `RoutingCounts`, over parts of the batch."""

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradients(params, part)), None

    # Every device splits its own part of the batch: rows i, i + parts, ... make up a micro-batch.
    split = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(gradients, params, jax.tree.map(lambda a: a[0], split)),
    )
    (grads, (scalars, utilization)), _ = lax.scan(add, zeros, split)
    mean = functools.partial(jax.tree.map, lambda a: a / parts)
    return mean(grads), (mean(scalars), utilization)


class Jit:
    """The main road: the state lies on the mesh by `shardings` and stays so, and `step` works on global arrays.

    Args:
      step: `(state, batch, axis_name=None) -> (state, ...)`, as `train_step`.
      init: makes the state; is compiled, so that no device ever holds more than its part.
      mesh: from `make_mesh`.
    """

    def __init__(self, step: Callable, init: Callable[[], TrainState], mesh: Mesh):
        self.mesh = mesh
        with jax.set_mesh(mesh):
            self.like = jax.eval_shape(init)
        self.shardings = shardings(self.like, mesh)
        self._init = jax.jit(init, out_shardings=self.shardings)
        self._step = jax.jit(
            step,
            in_shardings=(self.shardings, batch_sharding(mesh)),
            out_shardings=(self.shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )

    def init(self) -> TrainState:
        """The state at the start."""
        with jax.set_mesh(self.mesh):
            return self._init()

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """A step on a global batch, as `put` makes it. The old state is given up."""
        with jax.set_mesh(self.mesh):
            return self._step(state, batch)

    def trace(self, batch: Any) -> jax.stages.Traced:
        """The step before it is lowered and compiled, for arrays like `batch`."""
        with jax.set_mesh(self.mesh):
            return self._step.trace(self.like, batch)

    def put(self, shape: Sequence[int], rows: Callable[[slice], Any]) -> jax.Array:
        """A global batch, of which every device is given its rows."""
        part: Callable[[Any], Any] = lambda index: rows(index[0])
        return jax.make_array_from_callback(tuple(shape), batch_sharding(self.mesh), part)

    def own_rows(self, batch_size: int) -> list[int]:
        """The rows of a global batch that go to the devices of this process."""
        parts: Any = batch_sharding(self.mesh).addressable_devices_indices_map((batch_size,)).values()
        return sorted(row for (part,) in parts for row in range(batch_size)[part])

    def to_checkpoint(self, state: Any) -> Any:
        """The state, or a part of it, as a checkpoint holds it."""
        return state

    def from_checkpoint(self, state: TrainState) -> TrainState:
        """The state as `step` takes it."""
        return state


class Pmap(Jit):
    """The older road, for code that is written so: every device has its replica and its part of the batch.

    The mesh must be of data alone. A checkpoint holds one replica, and is the same as that of `Jit`.
    """

    def __init__(self, step: Callable, init: Callable[[], TrainState], mesh: Mesh):
        if mesh.shape["data"] != mesh.size:
            raise ValueError(
                "--parallel pmap repeats the model on every device: --fsdp and --expert must be 1; got "
                f"{dict(mesh.shape)}."
            )
        super().__init__(step, init, mesh)
        self._replicas = jax.pmap(functools.partial(step, axis_name="data"), axis_name="data", donate_argnums=0)
        self._repeat = jax.pmap(lambda _, state: state, in_axes=(0, None))

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """A step on a batch `[devices, B / devices, ...]`. What is logged comes from the first replica here."""
        state, logged = self._replicas(state, batch)
        return state, jax.tree.map(lambda a: a.addressable_data(0)[0], logged)

    def put(self, shape: Sequence[int], rows: Callable[[slice], Any]) -> jax.Array:
        """The rows of this process's devices, which are in order."""
        mine, local = self.own_rows(shape[0]), jax.local_device_count()
        return rows(slice(mine[0], mine[-1] + 1)).reshape(local, len(mine) // local, *shape[1:])

    def own_rows(self, batch_size: int) -> list[int]:
        """The rows of a global batch that go to the devices of this process, which are in order."""
        each = batch_size // jax.process_count()
        return list(range(jax.process_index() * each, (jax.process_index() + 1) * each))

    def init(self) -> TrainState:
        """Replicas of the state at the start."""
        return self.from_checkpoint(super().init())

    def to_checkpoint(self, state: Any) -> Any:
        """One replica, as a global array that every device has."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        one = jax.tree.map(lambda a: a.addressable_data(0)[0], state)
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(whole, jax.device_get(a)), one)

    def from_checkpoint(self, state: TrainState) -> TrainState:
        """A replica for every device of this process."""
        one = jax.tree.map(lambda a: jax.device_get(a.addressable_data(0)), state)
        return self._repeat(jnp.arange(jax.local_device_count()), one)
