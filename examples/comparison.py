"""What the programs that compare strategies share: flags, the training loop, and the final table and picture."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples import logs, training
from excitation_optax import plotting

Runs = dict[str, list[list[dict[str, Any]]]]  # by strategy, for each seed, the lines of its log
Measures = dict[str, tuple[str, int, int]]  # by label, the name in the log, a factor, and digits
LOAD = "max_over_mean_load"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.TrainingConfig):
    """Flags of the programs that compare strategies."""

    strategy: tuple[training.Strategy, ...] = ("baseline", "positive_sum")
    """The strategies to compare; baseline is the optimizer without Excitation."""
    seeds: int = 1
    """Models to train with each strategy, with the seeds --seed, --seed + 1, ..."""
    output: pathlib.Path = pathlib.Path("out/comparison.png")
    """The picture. The logs are written beside it, as NAME-STRATEGY-SEED.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        check(self)


def check(config: Any) -> None:
    """Raises ValueError unless there are strategies to compare."""
    if not config.strategy or len(set(config.strategy)) < len(config.strategy):
        raise ValueError(f"--strategy must name different strategies, at least one; got {list(config.strategy)}.")


class Task(NamedTuple):
    """What a program trains, and on what data."""

    data: str  # a line that describes the data
    model: Callable[[int], Any]  # of a seed
    loss_fn: Callable[..., Any]  # (graphdef, params, batch, *, load_balancing, router_z): see `training.train_step`
    batch: Callable[[int, int], Any]  # of a seed and a step, counted from 0
    evaluate: Callable[[Any, Any], dict[str, float]]  # of the graph definition and parameters
    steps: int
    evaluate_every: int  # steps; there is an evaluation at the end in any case
    batch_items: int  # tokens or images of a batch
    items: str  # "tokens" or "images"
    measures: Measures  # the first is drawn too


def train(config: Config, task: Task, strategy: training.Strategy, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Trains one model. Returns it, and the lines of its log but for the first."""
    model = task.model(seed)
    graphdef, params = nnx.split(model)
    excite: Any = {"strategy": strategy, "gamma": config.gamma, "seed": seed}
    base = training.base_optimizer(config, task.steps)
    tx = training.make_optimizer(base, expert_axis=model.expert_axis, **excite)
    losses = {"load_balancing": config.load_balancing, "router_z": config.router_z}
    gradient = jax.grad(functools.partial(task.loss_fn, graphdef, **losses), has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        new_state, logged, utilization = training.train_step(gradient, tx, state, batch)
        whole = bool(config.tensorboard or config.wandb)
        return new_state, logged | training.routing_metrics(utilization, step=state.step, whole=whole, **excite)

    state = training.TrainState.create(params, tx)
    name = f"{strategy}-{seed}"
    path = config.output.with_name(f"{config.output.stem}-{name}.jsonl")
    with contextlib.closing(logs.Log(path, task.steps, config, label=name)) as log:
        compiled = step.lower(state, task.batch(seed, 0)).compile()
        log.start(0)
        for number in range(1, task.steps + 1):
            state, logged = compiled(state, task.batch(seed, number - 1))
            if number % config.log_every == 0 or number == task.steps:
                logged = jax.device_get(logged)  # waits for it
                rate = {f"{task.items}_per_second": log.rate(number * task.batch_items)}
                log.write(number, logged | rate, f"loss {logged['loss']:.3f}")
            if number % task.evaluate_every == 0 or number == task.steps:
                found = task.evaluate(graphdef, state.params)
                log.write(number, found, ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
                log.skip(number * task.batch_items)
            log.advance()
    return nnx.merge(graphdef, state.params), [json.loads(line) for line in path.read_text().splitlines()[1:]]


def compare(config: Config, task: Task) -> tuple[Runs, dict[str, Any]]:
    """Trains every strategy with every seed, prints the table and draws the picture.

    Returns the logs, and the first model of each strategy.
    """
    ready(config.output)
    model = nnx.eval_shape(lambda: task.model(0))
    title = f"{type(model).__name__}, {training.size_of(model):,} parameters"
    print(f"{task.data}; {title}; {task.steps} steps", flush=True)
    runs: Runs = {strategy: [] for strategy in config.strategy}
    models: dict[str, Any] = {}
    for strategy in config.strategy:
        for seed in range(config.seed, config.seed + config.seeds):
            model, written = train(config, task, strategy, seed)
            runs[strategy].append(written)
            models.setdefault(strategy, model)
    print(table(runs, task.measures))
    picture(runs, config.output, task.measures, title)
    print(f"picture: {config.output.resolve()}, with the logs beside it")
    return runs, models


def shuffled(examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The examples of every batch of an epoch, `[steps, batch]`. The last batch is dropped unless it is full."""
    if batch_size > examples:
        raise ValueError(f"--batch-size must be at most the {examples} training images; got {batch_size}.")
    order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
    return order[: examples // batch_size * batch_size].reshape(-1, batch_size)


def spread(values: Any, digits: int) -> str:
    """The mean and the standard deviation over seeds, `[seeds]`. Models that diverged (NaN) are counted separately."""
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    deviation = f" ± {finite.std(ddof=1):.{digits}f}" if len(finite) > 1 else ""
    diverged = f", {len(values) - len(finite)} NaN" if len(finite) < len(values) else ""
    return (f"{finite.mean():.{digits}f}{deviation}" if len(finite) else "-") + diverged


def over_seeds(seeds: int) -> str:
    """A description of the cells of a table."""
    few = "one seed (too few to compare: use --seeds 3)"
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else few


def row(label: str, cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"{label:<24}" + "".join(f"{cell:>22}" for cell in cells)


def table(runs: Runs, measures: Measures) -> str:
    """The measures and the routing at the end of every run."""

    def at_the_end(name: str) -> list[np.ndarray]:  # [seeds] of each strategy; NaN if it is not logged or not finite
        last = lambda lines: next((line[name] for line in reversed(lines) if name in line), None)
        return [np.array([last(lines) for lines in seeds], float) for seeds in runs.values()]

    measures = measures | {"max / mean load": (LOAD, 1, 2), "dead experts, %": ("dead_experts", 100, 1)}
    lines = [f"at the end, {over_seeds(len(next(iter(runs.values()))))}", row("", list(runs))]
    for label, (name, factor, digits) in measures.items():
        lines.append(row(label, [spread(factor * values, digits) for values in at_the_end(name)]))
    extremes = zip(at_the_end("excitation_min"), at_the_end("excitation_max"), strict=True)
    ranges = [f"{low.mean():.2f} to {high.mean():.2f}" for low, high in extremes]
    cells = ["none" if strategy == "baseline" else cell for strategy, cell in zip(runs, ranges, strict=True)]
    return "\n".join([*lines, row("excitation, range", cells)])


def picture(runs: Runs, path: pathlib.Path, measures: Measures, title: str) -> None:
    """Draws the first measure and the load of the busiest expert along training."""
    (label, (name, factor, _)), *_ = measures.items()
    with figure(path, 10) as drawn:
        panels = (name, label, factor), (LOAD, "max / mean load", 1)
        for axes, (metric, ylabel, scale) in zip(drawn.subplots(1, 2), panels, strict=True):
            for strategy, seeds in runs.items():
                steps = [line["step"] for line in seeds[0] if metric in line]
                values = [[line[metric] for line in lines if metric in line] for lines in seeds]  # None is NaN
                curve(axes, steps, scale * np.array(values, float).T, strategy)
            axes.set(xlabel="step", ylabel=ylabel)
        drawn.axes[0].legend()
        drawn.suptitle(title)


def curve(axes: Any, x: Any, values: Any, label: str) -> None:
    """The mean over seeds of `values` `[len(x), seeds]`, with a band from the lowest to the highest seed."""
    (line,) = axes.plot(x, values.mean(1), label=label, color=plotting.COLORS.get(label))
    axes.fill_between(x, values.min(1), values.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


@contextlib.contextmanager
def figure(path: pathlib.Path, width: float, height: float = 4.2) -> Iterator[Any]:
    """A figure, saved at the end."""
    import matplotlib.figure  # imported late: it takes a second

    drawn = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    yield drawn
    with logs.naming(path):
        drawn.savefig(path, dpi=120)


def ready(path: pathlib.Path) -> None:
    """Raises OSError now if the picture cannot be written later."""
    with logs.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
