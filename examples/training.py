"""What the training programs share: flags, the optimizer, the step, the metrics of the routing, and the loop.

Axis letters: E experts, L layers.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import excitation_optax
from examples import logs
from excitation_optax import metrics
from models import moe

Strategy = Literal["baseline", "zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"]

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
}


def from_run(strategy: str) -> Any:
    """The strategy of a run on file, where the baseline is called "vanilla"."""
    return "baseline" if strategy == "vanilla" else strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags of every program that trains a transformer."""

    num_experts: int = 16
    """Experts in every MoE layer."""
    experts_per_token: int = 2
    """Experts that the router sends a token, or a patch, to."""
    d_ff: int = 128
    """The hidden width of an expert."""
    d_model: int = 128
    """The width of the model."""
    num_layers: int = 4
    """Transformer layers, each with attention and an MoE."""
    num_heads: int = 4
    """Attention heads of a layer."""
    gamma: float = 1.0
    """The intensity of Excitation; 0 scales nothing, larger values widen the differences between experts."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer before Excitation; sgd has momentum 0.9."""
    learning_rate: float = 1e-3
    """The peak learning rate."""
    warmup: float = 0.05
    """The fraction of all steps during which the learning rate rises; then it decays as a cosine to a tenth."""
    weight_decay: float = 0.01
    """Weight decay of adamw, on kernels and embeddings only."""
    clip: float = 1.0
    """Gradients with a larger global norm are scaled down to this norm."""
    load_balancing: float = 0.01
    """The weight of the load-balancing loss."""
    router_z: float = 0.001
    """The weight of the router z-loss."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; parameters are float32."""
    seed: int = 0
    """The seed of the initialization, the order of the data and all noise."""
    log_every: int = 10
    """Steps between two lines of the log."""
    tensorboard: pathlib.Path | None = None
    """A folder for TensorBoard: the log, and the load and excitation of every layer and expert."""
    wandb: str | None = None
    """A project of Weights & Biases for the same."""

    def __post_init__(self):
        """Raises ValueError before anything is loaded or trained."""
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} must be positive; got {getattr(self, name)}.")
        for name in ("gamma", "weight_decay", "load_balancing", "router_z", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} must not be negative; got {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is a fraction of the steps, in [0, 1]; got {self.warmup}.")
        check_positive(self, "log_every")
        for flag, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
            if getattr(self, flag) and importlib.util.find_spec(package) is None:
                raise ValueError(f"--{flag} requires {package}: pip install -e '.[telemetry]'")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a flag that is given and is not at least 1."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{_flag(name)} must be at least 1; got {value}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run_program(main: Callable[[Any], Any], config: Any, module: str, description: str | None = None) -> None:
    """Calls `main` with the flags of the command line. Expected errors end the program with one line.

    `config` is the type of the flags, `module` the program, such as "examples.pod.train", and `description` the first
    lines of `--help`, by default the docstring of `config`.
    """
    name = module.removeprefix("examples.")
    try:
        description = inspect.cleandoc(description or config.__doc__)
        main(tyro.cli(config, prog=f"python -m {module}", description=description))
    except (OSError, ValueError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


def layer_config(sizes: Any, dtype: str = "float32") -> moe.MoEConfig:
    """The config of an MoE layer of these sizes, which flags or the config of a run have."""
    return moe.MoEConfig(
        d_model=sizes.d_model,
        d_ff=sizes.d_ff,
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        dtype=jnp.dtype(dtype),
    )


def warmup_cosine(peak: float, warmup: float, steps: int, end: float = 0.0) -> optax.Schedule:
    """A linear rise during the fraction `warmup` of the steps (one at least), then a cosine from `peak` to `end`."""
    rising = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(peak / rising, peak, rising, max(steps, rising + 1), end_value=end)


def base_optimizer(config: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """What the flags ask for, without Excitation: clipping, then AdamW or SGD, with warm-up and cosine decay."""
    schedule = warmup_cosine(config.learning_rate, config.warmup, steps, 0.1 * config.learning_rate)
    optimizer = OPTIMIZERS["momentum"](schedule)
    if config.optimizer == "adamw":
        matrices = lambda params: jax.tree.map_with_path(_is_matrix, params)
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)


def _is_matrix(path, _):
    """Whether a parameter is a kernel or an embedding, by its path: experts' biases are matrices too, `[E, F]`."""
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    return "positions" not in names and any(name.startswith(("kernel", "embedding")) for name in names)


def make_optimizer(
    optimizer: optax.GradientTransformation,
    *,
    strategy: Strategy,
    gamma: float = 1.0,
    expert_axis: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, and Excitation after it unless the strategy is "baseline"."""
    if strategy == "baseline":
        return optax.chain(optimizer)
    function = getattr(excitation_optax, strategy)
    return optax.chain(
        optimizer, excitation_optax.scale_by_excitation(function, gamma, expert_axis=expert_axis, seed=seed)
    )


class TrainState(NamedTuple):
    """What a training run carries from step to step."""

    params: Any
    opt_state: Any
    step: jax.Array  # shape=(), dtype=jnp.int32, steps made

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> "TrainState":
        """The state at the start."""
        return cls(params, tx.init(params), jnp.zeros([], jnp.int32))


def train_step(gradient, tx, state: TrainState, batch):
    """One step: gradient, update. The utilization that the model emits is all that Excitation requires.

    `gradient` is `jax.grad(loss_fn, has_aux=True)`, where `loss_fn(params, batch)` returns what is minimized, and
    `(logged, utilization)`: a dict of scalars to log, and the routing. Returns the state after, `logged` and
    `utilization`.
    """
    grads, (logged, utilization) = gradient(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, utilization=utilization)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), logged, utilization


def add_auxiliary(
    loss: jax.Array, sown: nnx.State, *, load_balancing: float, router_z: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss plus the routers' weighted losses, and all of them to be logged."""
    losses = moe.auxiliary_losses(sown)
    logged = {"loss": loss, "load_balancing_loss": losses.load_balancing}
    logged |= {"router_z_loss": losses.router_z, "routing_entropy": losses.entropy}
    return loss + load_balancing * losses.load_balancing + router_z * losses.router_z, logged


def routing_metrics(
    utilization: Any,
    *,
    strategy: Strategy = "baseline",
    gamma: float = 1.0,
    seed: int = 0,
    step: Any = 0,
    whole: bool = False,
) -> dict[str, Any]:
    """Scalars about the routing: means over the layers, and the extremes of the excitation, if there is any.

    `step` is the number of updates before, as `scale_by_excitation` counts them for the key of a random strategy.
    `whole` adds the utilization and the excitation as `routing`, for TensorBoard and W&B.
    """
    flat = lambda tree: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    dead = flat(metrics.dead_experts(utilization))
    logged: dict[str, Any] = {
        "max_over_mean_load": jnp.mean(flat(metrics.max_over_mean_load(utilization))),
        "dead_experts": jnp.mean(dead),
        "dead_experts_worst_layer": jnp.max(dead),
    }
    excitation = None
    if strategy != "baseline":
        key = jax.random.fold_in(jax.random.key(seed), step)
        excitation = excitation_optax.excitation(utilization, getattr(excitation_optax, strategy), gamma, key=key)
        phi = flat(excitation)
        logged |= {"excitation_min": jnp.min(phi), "excitation_max": jnp.max(phi)}
    return logged | ({"routing": (utilization, excitation)} if whole else {})


class Task(NamedTuple):
    """What a program trains, and on what."""

    model: Callable[[int], nnx.Module]  # of a seed
    expert_axis: Any
    loss_fn: Callable[..., Any]  # (graphdef, params, batch), as `train_step` requires it
    batch: Callable[[int, int], Any]  # of a seed and a step, counted from 0
    evaluate: Callable[[Any], Callable[[Any], dict[str, float]]]  # of the graph definition, then of parameters
    steps: int
    evaluate_every: int  # steps; there is an evaluation at the end in any case
    batch_items: int  # tokens or images of a batch
    items: str  # "tokens" or "images"


def train(config: Any, task: Task, strategy: Strategy, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Trains one model by the flags of `comparison.Config`. Returns it, and what was logged, a dict for every line."""
    graphdef, params = nnx.split(task.model(seed))
    excite = {"strategy": strategy, "gamma": config.gamma, "seed": seed}
    tx = make_optimizer(base_optimizer(config, task.steps), expert_axis=task.expert_axis, **excite)
    gradient = jax.grad(functools.partial(task.loss_fn, graphdef), has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        new_state, logged, utilization = train_step(gradient, tx, state, batch)
        whole = bool(config.tensorboard or config.wandb)
        return new_state, logged | routing_metrics(utilization, step=state.step, whole=whole, **excite)

    evaluate, state = task.evaluate(graphdef), TrainState.create(params, tx)
    name = f"{strategy}-{seed}"
    path = config.output.with_name(f"{config.output.stem}-{name}.jsonl")
    lines = []
    with contextlib.closing(logs.Log(path, task.steps, config, label=name)) as log:
        compiled = step.lower(state, task.batch(seed, 0)).compile()
        log.start(0, 0)
        for number in range(1, task.steps + 1):
            state, logged = compiled(state, task.batch(seed, number - 1))
            log.advance()
            if number % config.log_every == 0 or number == task.steps:
                logged = jax.device_get(logged)  # waits for it
                rate = {f"{task.items}_per_second": log.rate(number * task.batch_items)}
                lines.append(log.write(number, logged | rate, f"loss {logged['loss']:.3f}"))
            if number % task.evaluate_every == 0 or number == task.steps:
                found = evaluate(state.params)
                shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                lines.append(log.write(number, found, shown))
                log.skip(number * task.batch_items)
    return nnx.merge(graphdef, state.params), lines


def runs(config: Any) -> Iterator[tuple[Strategy, int]]:
    """Every strategy with every seed."""
    return ((strategy, config.seed + i) for strategy in config.strategy for i in range(config.seeds))


def size_of(tree: Any) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
