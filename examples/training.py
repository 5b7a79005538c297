"""What the training programs share: flags, the optimizer, the step, and metrics of the routing.

Axis letters: E experts, L layers.
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
import tyro

import excitation_optax
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import moe

Model = TypeVar("Model")
Strategy = Literal["baseline", "zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted"]

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
}

PICTURES = (".png", ".pdf", ".svg")

# What flags of these names, or fields of a run, must be, in every program.
RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("must be at least 1", lambda x: x >= 1, "batch_size depth epochs eval_every expert fsdp keep log_every max_skips"),
    ("must be at least 1", lambda x: x >= 1, "micro_batches rounds save_every seeds steps subset timeout width"),
    ("must be at least 2, for a prompt and what follows", lambda x: x >= 2, "context"),
    ("must be positive", lambda x: 0 < x < math.inf, "clip epsilon expert_rate learning_rate"),
    ("must not be negative", lambda x: 0 <= x < math.inf, "gamma load_balancing router_bias router_z"),
    ("must not be negative", lambda x: 0 <= x < math.inf, "seed temperature weight_decay"),
    ("is a fraction of the steps, in [0, 1]", lambda x: 0 <= x <= 1, "warmup"),
    ("is a share, in [0, 1]", lambda x: 0 <= x <= 1, "sparsity"),
    ("is in (0, 1]", lambda x: 0 < x <= 1, "top_p"),
    ("must name a .png, .pdf or .svg file", lambda x: x.suffix in PICTURES and not x.is_dir(), "output"),
]


def check(config: Any, named: Callable[[str], str] = lambda name: f"--{name.replace('_', '-')}") -> None:
    """Raises ValueError for the first flag, as it is `named`, that breaks its rule. One that is None is not given."""
    for text, is_valid, names in RULES:
        for name in names.split():
            value = getattr(config, name, None)
            values = value if isinstance(value, tuple) else (value,)
            if not all(value is None or is_valid(value) for value in values):
                raise ValueError(f"{named(name)} {text}; got {' '.join(map(str, values))}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags of every program that trains a transformer."""

    num_experts: int = 16
    """Experts in every MoE layer."""
    experts_per_token: int = 2
    """Experts that each token, or patch, is routed to."""
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
    """The dtype of the computation; parameters are float32."""
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
        check(self)
        for flag, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
            if getattr(self, flag) and importlib.util.find_spec(package) is None:
                raise ValueError(f"--{flag} requires {package}: pip install -e '.[telemetry]'")


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


def model_config(kind: Callable[..., Model], sizes: Any, **options: Any) -> Model:
    """The config of a GPT-MoE or a MoE-ViT of these sizes, which flags or the config of a run have."""
    layer = moe.MoEConfig(
        d_model=sizes.d_model,
        d_ff=sizes.d_ff,
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        dtype=jnp.dtype(getattr(sizes, "dtype", "float32")),
    )
    return kind(moe=layer, num_layers=sizes.num_layers, num_heads=sizes.num_heads, **options)


def warmup_cosine(peak: float, warmup: float, steps: int, end: float = 0.0) -> optax.Schedule:
    """A linear rise during the fraction `warmup` of the steps (one at least), then a cosine from `peak` to `end`."""
    rising = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(peak / rising, peak, rising, max(steps, rising + 1), end_value=end)


def base_optimizer(config: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of the flags, without Excitation: clipping, then AdamW or SGD, with warm-up and cosine decay."""
    schedule = warmup_cosine(config.learning_rate, config.warmup, steps, 0.1 * config.learning_rate)
    optimizer = OPTIMIZERS["momentum"](schedule)
    if config.optimizer == "adamw":
        matrices = lambda params: jax.tree.map_with_path(_is_matrix, params)
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)


def _is_matrix(path, _):
    """Whether a parameter is a kernel or an embedding, by its path: experts' biases are matrices too, `[E, F]`."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "positions" not in names and any(name.startswith(("kernel", "embedding")) for name in names)


def make_optimizer(
    optimizer: Any, *, strategy: Strategy, gamma: float = 1.0, expert_axis: Any = None, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, and Excitation after it unless the strategy is "baseline"."""
    if strategy == "baseline":
        return optax.chain(optimizer)
    function = getattr(excitation_optax, strategy)
    scale = excitation_optax.scale_by_excitation(function, gamma, expert_axis=expert_axis, seed=seed)
    return optax.chain(optimizer, scale)


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


def routed_loss(model: Any, inputs: Any, labels: Any, *, load_balancing: float, router_z: float) -> tuple[Any, ...]:
    """Cross-entropy plus the routers' weighted losses: what is minimized, what is logged, the routing, the logits."""
    logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    losses = moe.auxiliary_losses(sown)
    logged = {"loss": loss, "load_balancing_loss": losses.load_balancing}
    logged |= {"router_z_loss": losses.router_z, "routing_entropy": losses.entropy}
    minimized = loss + load_balancing * losses.load_balancing + router_z * losses.router_z
    return minimized, logged, utilization, logits


def routing_metrics(
    utilization: Any, *, strategy: Strategy = "baseline", gamma: float = 1.0, seed: int = 0, step: Any = 0, whole=False
) -> dict[str, Any]:
    """Scalars about the routing: means over the layers, and the extremes of the excitation, if there is any.

    `step` is the number of earlier updates, from which `scale_by_excitation` makes the key of a random strategy.
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


def size_of(tree: Any) -> int:
    """The number of parameters, of arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
