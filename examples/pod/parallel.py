"""One training step on many devices: by `jax.jit` with shardings, or by `jax.pmap`.

The mesh has three axes. A batch is split over all of them. Experts are split over `expert`; parameters and the
optimizer's state are split over `fsdp` and repeated over `data`. XLA chooses the collectives, except in the MoE layers
(`models.expert_parallel`). Excitation adds none: the sum of counts over the batch is global already, and each device
scales its own part of the update.

Axis letters: B batch, E experts.
"""

import functools
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples.training import TrainState

AXES = ("data", "fsdp", "expert")
MIN_SIZE_TO_SPLIT = 2**10  # smaller parameters, such as biases and norms, stay whole


def start_distributed(config: Any) -> None:
    """Connects to the other processes that the flags of `train` name. Raises ValueError if one is not there in time."""
    bounds: Any = {"heartbeat_timeout_seconds": config.timeout, "shutdown_timeout_seconds": config.timeout}
    if config.coordinator is not None:
        if config.process != 0:
            _wait_for(config.coordinator, config.timeout)
        bounds |= {"initialization_timeout": config.timeout}
        bounds |= {"cluster_detection_method": "deactivate"}  # under Slurm, it would take one of the devices only
        jax.distributed.initialize(config.coordinator, config.processes, config.process, **bounds)
    elif config.cluster:
        try:
            jax.distributed.initialize(**bounds)
        except ValueError as error:
            raise ValueError(
                f"--cluster found no other processes ({error}). Start them by srun, by mpirun or on a TPU slice, or "
                "give --coordinator, --processes and --process."
            ) from error


def _wait_for(coordinator: str, timeout: float) -> None:
    """Waits until HOST:PORT accepts a connection. JAX would abort the program instead of raising an error."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=timeout).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"No process answers at --coordinator {coordinator} for {timeout} seconds ({error}). Is process 0 "
                    "running there, and its port open to this machine?"
                ) from error
        time.sleep(0.5)


def make_mesh(
    data: int | None = None, fsdp: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices; by default `data` takes those that the other axes leave.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or do not fit the topology of a TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (max(1, len(devices) // (fsdp * expert)) if data is None else data, fsdp, expert)
    text = f"A mesh of data {sizes[0]} x fsdp {fsdp} x expert {expert}"
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(
            f"{text} has {math.prod(sizes)} devices; there are {len(devices)}. --fsdp times --expert must divide their "
            "number; --data, if given, is the quotient."
        )
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:
        raise ValueError(
            f"{text} does not fit this slice: each size must be that of an axis of the slice, or a product of such. "
            f"{error}"
        ) from error


def check_sizes(mesh: Mesh, batch_size: int, num_experts: int) -> None:
    """Raises ValueError if a batch, or micro-batch, or the experts cannot be split evenly."""
    if batch_size % mesh.size:
        text = f"A batch of {batch_size} (--batch-size over --micro-batches)"
        raise ValueError(f"{text} cannot be split evenly over {mesh.size} devices.")
    if num_experts % mesh.shape["expert"]:
        raise ValueError(f"{num_experts} experts cannot be split evenly over an expert axis of {mesh.shape['expert']}.")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How parameters or an optimizer's state are split over the mesh, leaf by leaf, as `spec` says."""
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf.shape, mesh)), tree)


def spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Experts along `expert`; then the largest axis that `fsdp` divides, along `fsdp`.

    Experts are the first axis of parameters below a node named `experts`, or the second if they are also below `stack`,
    whose first axis is the scanned layers. The paths of the optimizer's moments end as those of their parameters, and
    so the moments are split alike.
    """
    names = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    axes: list[str | None] = [None] * len(shape)
    first = 1 if "stack" in names and len(shape) else 0  # the axis of scanned layers stays whole
    if "experts" in names and len(shape) > first:
        axes[first] = "expert"
    free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % mesh.shape["fsdp"] == 0]
    if free and math.prod(shape) >= MIN_SIZE_TO_SPLIT and mesh.shape["fsdp"] > 1:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch `[B, ...]` split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def gradient(
    loss_fn: Callable[..., Any], *, axis_name: str | None = None, micro_batches: int = 1
) -> Callable[..., Any]:
    """The gradient that `training.train_step` requires, over all devices and in parts.

    `loss_fn` is as `training.train_step` describes it; it gives means over a part of the batch `[B, ...]`, and
    `RoutingCounts`. `axis_name` is that of `jax.pmap`. `micro_batches` are processed one after the other, to save
    memory.
    """
    grad = jax.grad(loss_fn, has_aux=True)
    mean, total = optax.microbatching.AccumulationType.MEAN, optax.microbatching.AccumulationType.SUM

    def over_all(params, batch):
        # Each device splits its own part of the batch: rows i, i + micro_batches, ... make up a micro-batch.
        size = None if micro_batches == 1 else len(batch) // micro_batches  # None: the whole batch
        in_parts = optax.microbatching.microbatch(grad, 1, size, accumulator=(mean, (mean, total)))
        grads, (logged, utilization) = in_parts(params, batch)
        if axis_name is not None:  # under jit, all of this is global already
            grads, logged = lax.pmean((grads, logged), axis_name)
            utilization = lax.psum(utilization, axis_name)  # otherwise the replicas differ without an error
        return grads, (logged, utilization)

    return over_all


class Trainer:
    """A training step on a mesh, and the state and the batches that it takes. The state is global arrays.

    Make it and call it under `jax.set_mesh(mesh)`, from which the MoE layers take their axis.

    Args:
      step: `(state, batch, axis_name=None) -> (state, logged)`.
      init: `() -> state`.
      mesh: see `make_mesh`.
      kind: "jit" is the main way: the state is split by `shardings`, and XLA splits `step`. "pmap" is for comparison
        with older code: each device has all parameters and its part of the batch, and `step` sums over `axis_name`.

    Attributes:
      init: `init`, compiled, so that no device holds more than its part.
      step: `step` without `axis_name`, compiled. It donates the old state, and the new one is split alike.
      like: the state as `jax.ShapeDtypeStruct`s with their shardings.
    """

    def __init__(
        self, step: Callable, init: Callable[[], TrainState], mesh: Mesh, kind: Literal["jit", "pmap"] = "jit"
    ):
        if kind == "pmap" and mesh.shape["data"] != mesh.size:
            text = "--parallel pmap repeats the model on every device"
            raise ValueError(f"{text}: --fsdp and --expert must be 1; got {dict(mesh.shape)}.")
        self.mesh, self.kind = mesh, kind
        like = jax.eval_shape(init)
        split = shardings(like, mesh)
        self.like: Any = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), like, split)
        self.init: Any = jax.jit(init, out_shardings=split)
        self.step: Any = (
            _pmap(step, mesh)
            if kind == "pmap"
            else jax.jit(
                step,
                in_shardings=(split, batch_sharding(mesh)),
                out_shardings=(split, NamedSharding(mesh, PartitionSpec())),
                donate_argnums=0,
            )
        )

    def put(self, shape: Sequence[int], rows: Callable[[slice], Any]) -> jax.Array:
        """A batch for `step`; `rows` makes some of its rows. pmap takes the rows of this process, by its devices."""
        if self.kind == "pmap":
            each, process = shape[0] // jax.process_count(), jax.process_index()
            own = rows(slice(process * each, (process + 1) * each))
            return own.reshape(jax.local_device_count(), -1, *shape[1:])
        part: Callable[[Any], Any] = lambda index: rows(index[0])
        return jax.make_array_from_callback(tuple(shape), batch_sharding(self.mesh), part)


def _pmap(step: Callable, mesh: Mesh) -> Callable:
    """The step by `jax.pmap`. The replicas of the state are one global array, as those of `jax.jit` are."""
    step = functools.partial(step, axis_name="data")
    replicas: Any = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0)
    of_pmap = Mesh(mesh.devices.ravel(), ("data",))  # it works under no mesh but its own

    def call(state, batch):
        with jax.set_mesh(of_pmap):
            results = replicas(state, batch)
        # With several processes, these are arrays of the devices of this process alone.
        return multihost_utils.host_local_array_to_global_array(results, of_pmap, PartitionSpec())

    return call
