"""Table 8 of the paper: what Excitation adds to a training step with Adam, of four Top-K MLPs and two MoE-ViTs.

    python -m benchmarks.overhead                          # all rows; those that do not fit are compiled only
    python -m benchmarks.overhead --rows mlp-2048-2 vit-512-6-8
    python -m benchmarks.overhead --tiny --rounds 2        # at toy sizes, to see that it runs

uncounted  the model in evaluation mode, which counts no routing
vanilla    routing is counted and returned, as a user would log it
excited    and updates are scaled by it (positive_sum)

The three programs take turns on one training state, call by call, so that noise falls on all alike and one state is all
that memory must hold. The overhead is the median of the ratios within rounds; its interval is a bootstrap's over
rounds, as a few slow calls move a mean and its Student interval, but not these. Bytes, FLOPs and memory are XLA's own
figures for the compiled programs. XLA counts the body of a loop once, so layers are not scanned here; the passes of
Top-K's search are such a loop, which leaves bytes and FLOPs too low in all three programs, and their ratios too high.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import excitation_optax
from benchmarks import timing
from examples import training
from examples.reproduction import overhead, store
from excitation_optax import flax as excitation_flax
from models import moe, moe_vit, topk_mlp

GIB = 2**30
ON_CPU = jax.default_backend() == "cpu"

RowName = Literal["mlp-2048-2", "mlp-4096-2", "mlp-1024-16", "mlp-16384-4", "vit-512-6-8", "vit-1024-12-32"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what Excitation adds to training steps: the paper's Table 8."""

    rows: tuple[RowName, ...] = typing.get_args(RowName)
    """Which rows."""
    rounds: int = 30 if ON_CPU else 100
    """Steps of every program, after one that warms up."""
    batch_size: int | None = None
    """By default 512; on CPU each row's own, as memory and patience ask."""
    memory_gib: float | None = None
    """Rows that need more are compiled, not run; by default nine tenths of what is free."""
    results: pathlib.Path = store.FOLDER
    """The folder to whose table8/overhead.jsonl each row is added as it comes."""
    write: bool = True
    """Or only print."""
    tiny: bool = False
    """Tiny models, whose figures mean nothing and are not written."""

    def __post_init__(self):
        """Errors before anything is compiled."""
        training.check(self)


# ---------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """A model, and a batch that suits a CPU."""

    model: Any
    config: Any
    cpu_batch: int


def mlp(width: int, depth: int, cpu_batch: int) -> Row:
    return Row(topk_mlp.TopKMLP, topk_mlp.TopKMLPConfig(784, width, depth), cpu_batch)


def vit(num_experts: int, d_model: int, num_layers: int, num_heads: int, cpu_batch: int) -> Row:
    layer = moe.MoEConfig(d_model=d_model, d_ff=2 * d_model, num_experts=num_experts, experts_per_token=2)
    config = moe_vit.MoEViTConfig(moe=layer, num_layers=num_layers, num_heads=num_heads, scan_layers=False)
    return Row(moe_vit.MoEViT, config, cpu_batch)


ROWS: dict[str, Row] = {
    "mlp-2048-2": mlp(2048, 2, cpu_batch=512),
    "mlp-4096-2": mlp(4096, 2, cpu_batch=512),
    "mlp-1024-16": mlp(1024, 16, cpu_batch=512),
    "mlp-16384-4": mlp(16384, 4, cpu_batch=128),
    "vit-512-6-8": vit(8, 512, 6, num_heads=8, cpu_batch=32),
    "vit-1024-12-32": vit(32, 1024, 12, num_heads=16, cpu_batch=4),
}


def shrink(row: Row) -> Row:
    """The same model, tiny."""
    if row.model is topk_mlp.TopKMLP:
        return row._replace(config=dataclasses.replace(row.config, width=row.config.width // 64, depth=2), cpu_batch=4)
    layer = moe.MoEConfig(d_model=16, d_ff=32, num_experts=4, experts_per_token=2)
    config = dataclasses.replace(row.config, moe=layer, num_layers=2, num_heads=2, image_size=8)
    return row._replace(config=config, cpu_batch=4)


def input_shape(config: Any) -> tuple[int, ...]:
    """Of one example."""
    return (config.input_dim,) if hasattr(config, "input_dim") else (config.image_size, config.image_size, 3)


# ------------------------------------------------------------------------------------------------------------ programs

PROGRAMS = {
    "uncounted": {"excited": False, "counting": False},
    "vanilla": {"excited": False, "counting": True},
    "excited": {"excited": True, "counting": True},
}


def make_optimizer(row: Row, excited: bool) -> optax.GradientTransformationExtraArgs:
    """With a state alike for all programs. At so low a rate, which costs the same, routing stays as it is at first."""
    excitation = excitation_optax.scale_by_excitation(expert_axis=row.model.expert_axis)
    return optax.chain(optax.adam(1e-6), excitation if excited else optax.identity())


def abstract_model(row: Row) -> tuple[Any, Any]:
    """Its graph, and the shapes of its parameters."""
    return nnx.eval_shape(lambda: nnx.split(row.model(row.config, rngs=nnx.Rngs(0))))


def make_step(row: Row, tx: optax.GradientTransformationExtraArgs, counting: bool = True) -> Callable[..., Any]:
    """A training step: from parameters, optimizer state, inputs and labels to the next state, loss and utilization."""
    graphdef, _ = abstract_model(row)

    def step(params, opt_state, x, y):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            if counting:
                logits, utilization = excitation_flax.capture_routing(model)(x)
            else:
                model.eval()
                logits, utilization = model(x), None
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), utilization

        (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return optax.apply_updates(params, updates), opt_state, loss, utilization

    return step


def compile_step(row: Row, batch: int, excited: bool, counting: bool) -> Any:
    """The step, compiled ahead of time from shapes alone."""
    tx = make_optimizer(row, excited)
    _, params = abstract_model(row)
    x = jax.ShapeDtypeStruct((batch, *input_shape(row.config)), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(make_step(row, tx, counting), donate_argnums=(0, 1))
    return step.lower(params, jax.eval_shape(tx.init, params), x, y).compile()


def make_params(row: Row) -> Any:
    """Random parameters, made one by one: the model's own initialization would hold almost as much again."""
    keys = map(functools.partial(jax.random.fold_in, jax.random.key(0, impl="rbg")), itertools.count())

    def make(path, leaf):
        if len(leaf.shape) < 2 or "bias" in jax.tree_util.keystr(path):
            return jnp.full(leaf.shape, "scale" in jax.tree_util.keystr(path), leaf.dtype)
        return random_kernel(next(keys), leaf.shape)

    return jax.tree.map_with_path(make, abstract_model(row)[1])


@functools.partial(jax.jit, static_argnums=1)
def random_kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape) / shape[-2] ** 0.5


def take_turns(row: Row, batch: int, programs: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """For each program, a call that takes one step from where the last one ended, whichever program took it."""
    params = make_params(row)
    state = params, jax.jit(make_optimizer(row, excited=False).init)(params)
    del params  # it is donated
    x = jax.random.normal(jax.random.key(1), (batch, *input_shape(row.config)))
    y = jnp.arange(batch, dtype=jnp.int32) % row.config.num_classes

    def step(program):
        nonlocal state
        *state, loss, _ = program(*state, x, y)
        return state, loss

    return {name: functools.partial(step, program) for name, program in programs.items()}


# ------------------------------------------------------------------------------------------------------------- figures


def peak_bytes(program: Any) -> int:
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def free_memory() -> float:
    """Bytes, of the accelerator or of the machine."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        kib = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"].split()[0]
        return 1024.0 * int(kib)
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def percent(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, list[float]]:
    """The median of the ratios within rounds, as a percentage above 1, and its 95 % interval by bootstrap."""
    ratios = np.array(seconds[name]) / np.array(seconds[to])
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    return 100 * (timing.ratios(seconds, name, to)[0] - 1), (100 * (np.quantile(medians, [0.025, 0.975]) - 1)).tolist()


def compare(programs: dict[str, Any], seconds: dict[str, list[float]] | None, name: str, to: str) -> dict[str, Any]:
    """Of two programs, one over the other."""
    costs, base = programs[name].cost_analysis(), programs[to].cost_analysis()
    overhead_percent, interval = (None, None) if seconds is None else percent(seconds, name, to)
    return {
        "overhead_percent": overhead_percent,
        "interval": interval,
        "bytes_ratio": costs["bytes accessed"] / base["bytes accessed"],
        "flops_ratio": costs["flops"] / base["flops"],
        "temp_ratio": programs[name].memory_analysis().temp_size_in_bytes
        / programs[to].memory_analysis().temp_size_in_bytes,
    }


def measure(name: str, config: Config) -> dict[str, Any]:
    """A line of the results."""
    row = shrink(ROWS[name]) if config.tiny else ROWS[name]
    batch = config.batch_size or (row.cpu_batch if ON_CPU else 512)
    programs = {program: compile_step(row, batch, **kwargs) for program, kwargs in PROGRAMS.items()}
    peak = {program: peak_bytes(compiled) for program, compiled in programs.items()}
    limit = 0.9 * free_memory() if config.memory_gib is None else config.memory_gib * GIB
    seconds = None
    if max(peak.values()) <= limit:
        seconds = timing.interleave(take_turns(row, batch, programs), config.rounds)
    return {
        "row": name,
        "paper_percent": overhead.PAPER[name].percent,
        "paper_spread": overhead.PAPER[name].spread,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract_model(row)[1])),
        "batch_size": batch,
        "rounds": config.rounds if seconds else None,
        "seconds_per_step": {p: float(np.median(seconds[p])) if seconds else None for p in programs},
        **compare(programs, seconds, "excited", to="vanilla"),
        "counting": compare(programs, seconds, "vanilla", to="uncounted"),
        "peak_bytes": peak,
        "about": store.environment() | {"date": store.now()},
    }


def tell(entry: dict[str, Any]) -> str:
    if entry["rounds"] is None:
        return f"{entry['row']}: not run: needs {max(entry['peak_bytes'].values()) / GIB:.1f} GiB"
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in entry["seconds_per_step"].items())

    def added(part):
        bytes_percent = 100 * (part["bytes_ratio"] - 1)
        low, high = part["interval"]
        return f"{part['overhead_percent']:+.2f} % [{low:+.2f}, {high:+.2f}], of bytes {bytes_percent:+.2f} %"

    return f"{entry['row']}: {times}; excitation adds {added(entry)}; counting {added(entry['counting'])}"


def main(config: Config) -> list[dict[str, Any]]:
    """Measures, tells and writes row by row; a table at the end."""
    print(f"jax {jax.__version__} on {store.environment()['device']}, {config.rounds} rounds", flush=True)
    entries = []
    for name in config.rows:
        entries.append(measure(name, config))
        print(tell(entries[-1]), flush=True)
        if config.write and not config.tiny:
            overhead.append(config.results, entries[-1])
    print(f"\n{overhead.table(entries)}")
    return entries


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
