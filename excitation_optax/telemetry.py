"""Routing in TensorBoard and W&B: few scalars whatever the size of the model, heat maps of the load, histograms of Phi.

Nothing here is imported by `excitation_optax` itself. The writer and the run are yours, and are passed in; wandb and
matplotlib are imported when there is something for them to do.

Axis letters: E experts, L layers, T entries of the history.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from excitation_optax import _experts, _routing, _strategies, metrics

__all__ = ["RoutingLog", "layer_names", "load_by_layer", "routing_metrics"]


def routing_metrics(
    utilization: Any, excitation: Any = None, *, max_layers: int = 16, prefix: str = "routing"
) -> dict[str, jax.Array]:
    """Scalars that tell how a model routes: at most 12, and 3 for each layer where there are few layers.

    Pure, so that it can be part of a compiled training step. A layer is one `[E]` of the utilization; layers are
    numbered in the natural order of their paths, and within a stack `[L, E]` in its order (`layer_names` lists them).

    ================================================  ==============================================================
    `routing/max_over_mean_load/mean`, `/worst`       the busiest expert's load over the mean: 1 is balance, E collapse
    `routing/max_over_mean_load/worst_layer`          the number of the layer where it is worst
    `routing/load_entropy/mean`, `/worst`             1 is balance, 0 collapse
    `routing/dead_experts/mean`, `/worst`             the share of a layer's experts that got no token
    `routing/layers_without_load`                     layers that got no token; left out of the load and the entropy
    `routing/layers_not_finite`                       layers with a NaN or an infinity, which the rows above then show
    `routing/excitation/min`, `/mean`, `/max`         of Phi over all experts; the mean is one of layers' means
    ================================================  ==============================================================

    Args:
      utilization: a tree whose leaves are fractions `[..., E]` or `RoutingCounts`; E may differ from leaf to leaf.
      excitation: the tree of Phi, as `excitation_optax.excitation(utilization, strategy, gamma)` returns it; None
        leaves its three scalars out.
      max_layers: up to so many layers, each has its own `routing/max_over_mean_load/layer_00` and so on, for the first
        three; a model of more layers has none of these.
      prefix: what names begin with, in place of `routing`.

    Returns:
      A flat dict of float32 scalars, whose names depend on the arguments' structure alone.

    Raises:
      ValueError: if there is no utilization, or a leaf of it is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import telemetry
      >>> utilization = {"layer_0": jnp.array([0.5, 0.5, 0.0, 0.0]), "layer_1": jnp.array([0.25, 0.25, 0.25, 0.25])}
      >>> for name, value in telemetry.routing_metrics(utilization, max_layers=0).items():
      ...     print(f"{name} {value:g}")
      routing/max_over_mean_load/mean 1.5
      routing/max_over_mean_load/worst 2
      routing/max_over_mean_load/worst_layer 0
      routing/load_entropy/mean 0.75
      routing/load_entropy/worst 0.5
      routing/dead_experts/mean 0.25
      routing/dead_experts/worst 0.5
      routing/layers_without_load 0
      routing/layers_not_finite 0
    """
    layers = [u.reshape(-1, u.shape[-1]) for u in _fractions(utilization).values()]  # of [L, E] each
    per_layer = lambda function: jnp.concatenate([function(u).astype(jnp.float32) for u in layers])  # [L]
    loaded = per_layer(lambda u: jnp.sum(u, axis=-1) != 0) > 0
    load = per_layer(metrics.max_over_mean_load)
    entropy = per_layer(metrics.load_entropy)
    dead = per_layer(metrics.dead_experts)
    choice = loaded & (per_layer(lambda u: jnp.full(len(u), u.shape[-1])) > 1)  # one expert has no entropy
    scalars = {
        "max_over_mean_load/mean": _mean(load, loaded),
        "max_over_mean_load/worst": _largest(load, loaded),
        "max_over_mean_load/worst_layer": jnp.argmax(jnp.where(loaded, load, -jnp.inf)),
        "load_entropy/mean": _mean(entropy, choice),
        "load_entropy/worst": -_largest(-entropy, choice),
        "dead_experts/mean": jnp.mean(dead),
        "dead_experts/worst": jnp.max(dead),
        "layers_without_load": jnp.sum(~loaded),
        "layers_not_finite": jnp.sum(per_layer(lambda u: jnp.any(~jnp.isfinite(u), axis=-1))),
    }
    if excitation is not None:
        phis = [phi.reshape(-1, phi.shape[-1]) for phi in _fractions(excitation).values()]
        scalars |= {
            "excitation/min": jnp.min(jnp.stack([jnp.min(phi) for phi in phis])),
            "excitation/mean": jnp.mean(jnp.concatenate([jnp.mean(phi, axis=-1) for phi in phis])),
            "excitation/max": jnp.max(jnp.stack([jnp.max(phi) for phi in phis])),
        }
    if len(load) <= max_layers:
        for name, values in {"max_over_mean_load": load, "load_entropy": entropy, "dead_experts": dead}.items():
            scalars |= {f"{name}/layer_{number:02}": value for number, value in enumerate(values)}
    return {f"{prefix}/{name}": value.astype(jnp.float32) for name, value in scalars.items()}


def layer_names(utilization: Any) -> list[str]:
    """The paths of the layers in the order in which they are numbered; of a stack `[L, E]`, with the position in it.

    Args:
      utilization: a tree whose leaves are fractions `[..., E]` or `RoutingCounts`, or the shapes of such.

    Returns:
      One name for each layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import telemetry
      >>> telemetry.layer_names({"layer_10": jnp.ones(4), "layer_2": jnp.ones(4), "stack": {"moe": jnp.ones((2, 8))}})
      ['layer_2', 'layer_10', 'stack/moe[0]', 'stack/moe[1]']
    """
    names = []
    for path, leaf in _by_path(utilization).items():
        positions = np.ndindex(_experts.utilization_shape(leaf)[:-1])
        names += [_experts.show(path) + (str(list(position)) if position else "") for position in positions]
    return names


def load_by_layer(utilization: Any) -> np.ma.MaskedArray:
    """Utilization as one array on the host, as the functions of `excitation_optax.plotting` take it.

    Args:
      utilization: a tree whose leaves are fractions `[..., E]` or `RoutingCounts`; E may differ from leaf to leaf.

    Returns:
      `[L, E]` float32, in the order of `layer_names`; of layers with fewer experts than others the rest is masked.

    Example:
      >>> import jax.numpy as jnp
      >>> from excitation_optax import telemetry
      >>> print(telemetry.load_by_layer({"wide": jnp.array([0.25, 0.5, 0.25]), "narrow": jnp.array([0.75, 0.25])}))
      [[0.75 0.25 --]
       [0.25 0.5 0.25]]
    """
    return _stack([np.asarray(u) for u in jax.device_get(list(_fractions(utilization).values()))])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names", "utilization", "excitation"]
)
@dataclasses.dataclass(frozen=True)
class _Packed:
    """All that a call of `write` needs from the device, in one array, since every array costs a transfer."""

    values: Any  # float32: the scalars, utilization and excitation, one after the other
    names: tuple[str, ...]  # of the scalars
    utilization: tuple[tuple[int, ...], ...]  # shapes
    excitation: tuple[tuple[int, ...], ...]

    def unpack(self) -> tuple[dict[str, float], list[np.ndarray], list[np.ndarray]]:
        values = jax.device_get(self.values)
        scalars = dict(zip(self.names, values[: len(self.names)].tolist(), strict=True))
        shapes = [*self.utilization, *self.excitation]
        ends = len(self.names) + np.cumsum([0, *map(np.prod, shapes)]).astype(int)
        arrays = [values[a:b].reshape(shape) for a, b, shape in zip(ends, ends[1:], shapes, strict=False)]
        return scalars, arrays[: len(self.utilization)], arrays[len(self.utilization) :]


@functools.partial(jax.jit, static_argnames=("max_layers", "prefix"))
def _pack(utilization: Any, excitation: Any, max_layers: int, prefix: str) -> _Packed:
    scalars = routing_metrics(utilization, excitation, max_layers=max_layers, prefix=prefix)
    u = list(_fractions(utilization).values())
    phi = [] if excitation is None else list(_fractions(excitation).values())
    flat = [x.astype(jnp.float32).ravel() for x in (*u, *phi)]
    values = jnp.concatenate([jnp.stack(list(scalars.values())), *flat])
    return _Packed(values, tuple(scalars), tuple(x.shape for x in u), tuple(x.shape for x in phi))


class RoutingLog:
    """Writes routing to TensorBoard and W&B, and keeps the load of the whole run in bounded memory.

    Each call of `write` computes `routing_metrics` on the device, brings them, the utilization and the excitation to
    the host in one transfer, and writes the scalars and a histogram of the excitation, `routing/excitation`. Every
    `image_every` calls it writes two pictures too: `routing/load`, the load of every layer and expert, averaged over
    the calls since the last picture, and `routing/load_over_time`, the same from the beginning of the run.

    The history has at most `history` entries: where it is full, every two neighbours become their mean. So it takes
    `4 * history * L * E` bytes at most, and always covers the run from its first call.

    Under many processes, call it on one of them only; utilization must then be the same on all devices, as it is where
    the step's outputs are replicated.

    Attributes:
      steps: `[T]` integers, the step of the last call in each entry of the history.
      load: `[T, L, E]` masked float32, the mean utilization of the calls in each entry; in layers with fewer experts
        than others the rest is masked. `excitation_optax.plotting` draws it.
      names: the layers' names, as `layer_names` gives them.

    Args:
      tensorboard: a `tensorboardX.SummaryWriter`, or `torch.utils.tensorboard`'s, which has the same methods.
      wandb_run: what `wandb.init` returned. It is given `step=`, so give it in your own calls of `run.log` too: W&B
        drops what comes with a smaller step than what came before.
      image_every: calls of `write` from one picture to the next; None writes none, and does without matplotlib.
      history: how many entries the history has at most; an even number.
      max_layers: up to so many layers, each has scalars of its own.
      prefix: what the names begin with.

    Raises:
      ValueError: if a number is out of range.
      ImportError: if pictures are wanted and matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> from excitation_optax import telemetry
      >>> log = telemetry.RoutingLog()  # tensorboard=tensorboardX.SummaryWriter("out/run"), wandb_run=wandb.init()
      >>> counts = {"experts": excitation_optax.RoutingCounts(jnp.array([6.0, 2.0, 0.0, 0.0]), jnp.array(8.0))}
      >>> phi = excitation_optax.excitation(counts, excitation_optax.zero_sum)
      >>> scalars = log.write(100, counts, phi)
      >>> scalars["routing/dead_experts/worst"], scalars["routing/excitation/max"]
      (0.5, 3.0)
      >>> log.steps, log.load.shape
      (array([100]), (1, 1, 4))
    """

    def __init__(
        self,
        tensorboard: Any = None,
        wandb_run: Any = None,
        *,
        image_every: int | None = 10,
        history: int = 128,
        max_layers: int = 16,
        prefix: str = "routing",
    ):
        if image_every is not None and image_every < 1:
            raise ValueError(f"RoutingLog: image_every must be at least 1, or None for no pictures; got {image_every}.")
        if history < 2 or history % 2:
            raise ValueError(f"RoutingLog: history must be an even number of entries, 2 or more; got {history}.")
        self.names: list[str] = []
        self._leaves: list[str] = []
        self._tensorboard = tensorboard
        self._wandb_run = wandb_run
        self._image_every = None if tensorboard is None and wandb_run is None else image_every
        self._max_layers = max_layers
        self._prefix = prefix
        self._history = _History(history)
        self._since_image: _Entry | None = None
        self._calls = 0
        self._absent: Any = None  # [L, E], True where a layer has no such expert
        if self._image_every is not None:
            _plotting()  # so that it fails here, if it does

    @property
    def steps(self) -> np.ndarray:  # noqa: D102  (the class documents it)
        return np.array([entry.step for entry in self._history.entries], int)

    @property
    def load(self) -> np.ma.MaskedArray:  # noqa: D102
        # Masked arrays are made at the end only: in arithmetic, they would take a NaN for masked, and hide it.
        means = np.stack([entry.mean for entry in self._history.entries])
        return np.ma.array(means, mask=np.broadcast_to(self._absent, means.shape))

    def write(self, step: int, utilization: Any, excitation: Any = None) -> dict[str, float]:
        """Writes the routing of a step.

        Args:
          step: its number, larger than that of the call before.
          utilization: of the step's batch, as `tx.update` was given it.
          excitation: the tree of Phi, as `excitation_optax.excitation(utilization, strategy, gamma)` returns it; of a
            schedule, with gamma's value at the step. None where there is no Excitation.

        Returns:
          The scalars that were written, by name.

        Raises:
          ValueError: if there is no utilization, or it has other layers than at the call before, or it is spread over
            the devices of several processes.
        """
        by_path = _by_path(utilization)
        leaves = [f"{_experts.show(path)} {list(_experts.utilization_shape(u))}" for path, u in by_path.items()]
        if self._leaves and leaves != self._leaves:
            missing = [leaf for leaf in self._leaves if leaf not in leaves]
            new = [leaf for leaf in leaves if leaf not in self._leaves]
            raise ValueError(
                f"RoutingLog: the layers at step {step} are not those of the calls before. Missing: "
                f"{', '.join(missing) or 'none'}. New: {', '.join(new) or 'none'}. A log follows one model: give each "
                "model a log, and a prefix, of its own."
            )
        packed = _pack(*jax.tree.map(_local, (utilization, excitation)), self._max_layers, self._prefix)
        scalars, u, phi = packed.unpack()
        self._leaves, self.names = leaves, layer_names(utilization)
        load = _stack(u)
        self._absent = np.ma.getmaskarray(load)
        self._history.add(step, load.data)
        self._calls += 1
        images = {}
        if self._image_every is not None:
            entry = _Entry(step, load.data, 1)
            self._since_image = entry if self._since_image is None else self._since_image.merge(entry)
            if self._calls % self._image_every == 0:
                images = self._draw(np.ma.array(self._since_image.mean, mask=self._absent))
                self._since_image = None
        self._send(step, scalars, np.concatenate([x.ravel() for x in phi]) if phi else None, images)
        return scalars

    def _draw(self, load: np.ma.MaskedArray) -> dict[str, np.ndarray]:
        """The pictures, as `[height, width, 3]` bytes, by name."""
        plotting = _plotting()
        return {
            f"{self._prefix}/load": plotting.to_image(plotting.load_heat_map, load),
            f"{self._prefix}/load_over_time": plotting.to_image(
                plotting.load_over_time, self.steps, self.load, height=4.4
            ),
        }

    def _send(self, step: int, scalars: dict[str, float], phi: np.ndarray | None, images: dict[str, np.ndarray]):
        # A histogram has no place for a NaN; excitation/min, /mean and /max show it.
        finite = np.array([]) if phi is None else phi[np.isfinite(phi)]
        if (writer := self._tensorboard) is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            if finite.size:
                writer.add_histogram(f"{self._prefix}/excitation", finite, step)
            for name, image in images.items():
                writer.add_image(name, image, step, dataformats="HWC")
        if self._wandb_run is not None:
            import wandb

            row: dict[str, Any] = dict(scalars)
            if finite.size:
                row[f"{self._prefix}/excitation"] = wandb.Histogram(np_histogram=np.histogram(finite, bins=64))
            row |= {name: wandb.Image(image) for name, image in images.items()}
            self._wandb_run.log(row, step=step)


class _Entry(NamedTuple):
    """Calls that follow each other."""

    step: int  # of the last
    total: np.ndarray  # [L, E], the sum of their loads
    calls: int

    @property
    def mean(self) -> np.ndarray:
        return self.total / np.float32(self.calls)

    def merge(self, later: "_Entry") -> "_Entry":
        return _Entry(later.step, self.total + later.total, self.calls + later.calls)


class _History:
    """All calls so far in at most `capacity` entries, each of as many calls as the others; only the last may lack some.

    What is full is halved: two neighbours become one entry.
    """

    def __init__(self, capacity: int):
        self.entries: list[_Entry] = []
        self._capacity = capacity
        self._calls = 1  # of a whole entry

    def add(self, step: int, load: np.ndarray) -> None:
        entry = _Entry(step, load, 1)
        if self.entries and self.entries[-1].calls < self._calls:
            self.entries[-1] = self.entries[-1].merge(entry)
            return
        if len(self.entries) == self._capacity:
            pairs = zip(self.entries[::2], self.entries[1::2], strict=True)
            self.entries = [first.merge(second) for first, second in pairs]
            self._calls *= 2
        self.entries.append(entry)


def _by_path(tree: Any) -> dict[_experts.Path, Any]:
    """The leaves of utilization by path, in the natural order of the paths: layer_2 before layer_10."""
    natural = lambda item: [_experts.natural_order(name) for name in item[0]]
    return dict(sorted(_experts.utilization_by_path(tree).items(), key=natural))


def _fractions(tree: Any) -> dict[_experts.Path, jax.Array]:
    """The same, as arrays `[..., E]`, float32 or wider."""
    array = lambda leaf: leaf.utilization if isinstance(leaf, _routing.RoutingCounts) else leaf
    return {path: _strategies.float32_or_wider(array(leaf)) for path, leaf in _by_path(tree).items()}


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where).astype(values.dtype)


def _largest(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(where), jnp.max(jnp.where(where, values, -jnp.inf)), jnp.nan)


def _local(leaf: Any) -> Any:
    """An array that only this process computes with; so that one process may log alone."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if not leaf.is_fully_replicated:
        raise ValueError(
            f"RoutingLog: {leaf.dtype}{list(leaf.shape)} is split over devices of several processes ({leaf.sharding}). "
            "Let the step return utilization whole on every device: out_shardings=NamedSharding(mesh, PartitionSpec())."
        )
    return leaf.addressable_data(0)


def _stack(arrays: list[np.ndarray]) -> np.ma.MaskedArray:
    """Layers `[..., E]` of several E as one `[L, E]`, masked where a layer has no such expert."""
    layers = [layer for array in arrays for layer in array.reshape(-1, array.shape[-1])]
    width = max(map(len, layers))
    stacked = np.ma.array(np.zeros((len(layers), width), np.float32), mask=True)
    for number, layer in enumerate(layers):
        stacked[number, : len(layer)] = layer
    return stacked


def _plotting() -> Any:
    try:
        from excitation_optax import plotting
    except ImportError as error:
        raise ImportError(
            "RoutingLog draws with matplotlib: pip install '.[telemetry]' in a checkout, or pass image_every=None."
        ) from error
    return plotting
