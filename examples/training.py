"""What the training programs share: flags, the optimizer, what is logged about routing, and the log.

Axis letters: E experts, L layers.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tqdm

import excitation_optax
from excitation_optax import metrics, plotting, telemetry
from models import moe

Strategy = Literal["none", "zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags of every training program."""

    strategy: Strategy = "none"
    """Excitation, chained after the optimizer; none leaves it out."""
    gamma: float = 1.0
    """The intensity of Excitation."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9."""
    learning_rate: float = 1e-3
    """At its peak."""
    warmup: float = 0.05
    """The share of all steps in which the learning rate rises; then it falls as a cosine, to a tenth."""
    weight_decay: float = 0.01
    """Of adamw, on kernels and embeddings: not on biases, norms and positions."""
    clip: float = 1.0
    """The largest norm that a gradient keeps."""
    load_balancing: float = 0.01
    """The weight of the load-balancing loss."""
    router_z: float = 0.001
    """The weight of the router z-loss."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; its parameters stay float32."""
    seed: int = 0
    """Of the initialization, the order of the data and all noise."""
    log_every: int = 10
    """Steps between lines of the log."""
    log: pathlib.Path | None = None
    """A file for the log, as JSON lines, which replaces an earlier one; by default out/PROGRAM-STRATEGY-SEED.jsonl."""
    tensorboard: pathlib.Path | None = None
    """A folder for TensorBoard: what is in the log, and of every layer and expert load and excitation."""
    wandb: str | None = None
    """A project of Weights & Biases, for the same."""

    def __post_init__(self):
        """Errors before anything is loaded or trained."""
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}.")
        for name in ("gamma", "weight_decay", "load_balancing", "router_z", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative; got {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is a share of the steps, in [0, 1]; got {self.warmup}.")
        check_positive(self, "log_every")
        for flag, wanted, package in (
            ("tensorboard", self.tensorboard, "tensorboardX"),
            ("wandb", self.wandb, "wandb"),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"--{flag} needs {package}: pip install -e '.[telemetry]'")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a flag that is not at least 1."""
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")


def make_optimizer(config: TrainingConfig, steps: int, expert_axis: Any) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW or SGD with warm-up and cosine decay, and Excitation after it all."""
    warmup = max(1, round(config.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        config.learning_rate / warmup,
        config.learning_rate,
        warmup,
        max(steps, warmup + 1),
        end_value=0.1 * config.learning_rate,
    )
    if config.optimizer == "adamw":
        matrices = lambda params: jax.tree.map_with_path(_is_matrix, params)
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=matrices)
    else:
        optimizer = optax.sgd(schedule, momentum=0.9)
    transforms = [optax.clip_by_global_norm(config.clip), optimizer]
    if config.strategy != "none":
        strategy = getattr(excitation_optax, config.strategy)
        transforms.append(
            excitation_optax.scale_by_excitation(strategy, config.gamma, expert_axis=expert_axis, seed=config.seed)
        )
    return optax.chain(*transforms)


def _is_matrix(path, _):
    """Whether a parameter is a kernel or an embedding, by its path: experts' biases are matrices too, `[E, F]`."""
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    return "positions" not in names and any(name.startswith(("kernel", "embedding")) for name in names)


def add_auxiliary(config: TrainingConfig, loss: jax.Array, losses: moe.AuxiliaryLosses) -> jax.Array:
    """The loss that is trained on."""
    return loss + config.load_balancing * losses.load_balancing + config.router_z * losses.router_z


def routing_metrics(
    config: TrainingConfig, utilization: Any, losses: moe.AuxiliaryLosses, step: jax.Array
) -> dict[str, Any]:
    """What is logged about routing, as scalars: means over the layers, and the extremes of the excitation.

    For TensorBoard and W&B, where the flags ask for them, there is the whole of it too, under the name `routing`.

    `step` counts the updates that were made before, as `scale_by_excitation` does for the key of a random strategy.
    """
    layers = jax.tree.leaves(utilization, is_leaf=lambda leaf: isinstance(leaf, excitation_optax.RoutingCounts))
    mean = lambda f: jnp.mean(jnp.stack([jnp.mean(f(layer)) for layer in layers]))
    logged: dict[str, Any] = {
        "load_balancing_loss": losses.load_balancing,
        "router_z_loss": losses.router_z,
        "routing_entropy": losses.entropy,
        "max_over_mean_load": mean(metrics.max_over_mean_load),
        "dead_experts": mean(metrics.dead_experts),
        "dead_experts_worst_layer": jnp.max(jnp.stack([jnp.max(metrics.dead_experts(layer)) for layer in layers])),
    }
    excitation = None
    if config.strategy != "none":
        strategy = getattr(excitation_optax, config.strategy)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        excitation = excitation_optax.excitation(utilization, strategy, config.gamma, key=key)
        phi = jax.tree.leaves(excitation)
        logged["excitation_min"] = jnp.min(jnp.stack([jnp.min(p) for p in phi]))
        logged["excitation_max"] = jnp.max(jnp.stack([jnp.max(p) for p in phi]))
    if config.tensorboard or config.wandb:
        logged["routing"] = (utilization, excitation)  # for Log.write
    return logged


class Log:
    """JSON lines in a file, and a progress bar with what a reader wants to see move; TensorBoard and W&B by flags."""

    def __init__(self, config: TrainingConfig, program: str, steps: int, done: int = 0, silent: bool = False):
        """A new file; or, if some steps are done already, the one that is there, without what came after them.

        Silent, it writes and shows nothing, as of all processes but one.
        """
        self.path = config.log or pathlib.Path("out") / f"{program}-{config.strategy}-{config.seed}.jsonl"
        self.path = pathlib.Path(os.devnull) if silent else self.path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _length_until(self.path, done) if done else 0
        self._file = self.path.open("a", encoding="utf-8")
        if self.path.is_file():
            self._file.truncate(kept)  # and nothing is written again that could get lost
        self._bar = tqdm.tqdm(
            total=steps, initial=done, unit="step", mininterval=0.5, desc=config.strategy, disable=silent
        )
        self._last_write = (time.perf_counter(), 0)
        self._tensorboard = self._wandb = None
        if config.tensorboard and not silent:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(config.tensorboard), purge_step=done + 1)
        if config.wandb and not silent:
            import wandb

            settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
            self._wandb = wandb.init(project=config.wandb, config=settings)
        self._routing = telemetry.RoutingLog(self._tensorboard, self._wandb)
        self.write(done, {"config": dataclasses.asdict(config)})

    def write(self, step: int, values: dict[str, Any], shown: str = "") -> None:
        """A line `{"step": ..., ...}`; arrays become numbers, NaN and infinities null. `routing` goes elsewhere."""
        values = dict(values)
        routing = values.pop("routing", None)
        numbers = {
            name: value for name, value in values.items() if hasattr(value, "dtype") or type(value) in (int, float)
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if routing is not None and (self._tensorboard or self._wandb):
            self._routing.write(step, *routing)
        self._file.write(json.dumps({"step": step} | jax.tree.map(_to_json, values)) + "\n")
        self._file.flush()
        if shown:
            self._bar.set_postfix_str(shown, refresh=False)

    def warn(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def advance(self) -> None:
        """One more step on the bar."""
        self._bar.update()

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call, given the tokens so far. The first call counts from the start."""
        now = time.perf_counter()
        (then, before), self._last_write = self._last_write, (now, tokens)
        return (tokens - before) / (now - then)

    def skip(self, tokens: int) -> None:
        """Leaves the time since the last call out of the next rate, as that of an evaluation."""
        self._last_write = (time.perf_counter(), tokens)

    def close(self) -> None:
        """Ends the bar, the file, and what the flags asked for."""
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            if steps := self._routing.steps:
                figure = plotting.load_over_time(steps, self._routing.load).figure
                self._tensorboard.add_figure("routing/load_over_time", figure, steps[-1])
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _length_until(path: pathlib.Path, step: int) -> int:
    """The bytes of a log, if there is one, before the first line that is of a later step, or is no whole line."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        length += len(line)
    return length


def _to_json(value):
    if isinstance(value, str | int | bool | None):
        return value
    if isinstance(value, pathlib.Path):
        return str(value)
    return value if math.isfinite(value := float(value)) else None
