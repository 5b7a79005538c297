"""What an MoE layer costs, forward and backward, and what its time and memory follow.

    python -m benchmarks.moe_layer                          # A to E, float32; on an accelerator C and F
    python -m benchmarks.moe_layer --sections A C           # some of them
    python -m benchmarks.moe_layer --sections F --tiny      # at toy sizes, anywhere, to see that it runs
    python -c "from benchmarks import moe_layer as m; m.main(m.Config())"  # with tokamax, which rules tyro out

A  speed, beside PyTorch's grouped product (`pip install torch`) and XLA's bare products on rows that are in place
B  time against the number of tokens, and against the number of experts
C  time against the imbalance of the routing; on an accelerator with several buffers and backends
D  temporary memory, by XLA's own figures, without weights and their gradients
E  time against the padded buffer's headroom and the loop's block of rows, on a CPU
F  an accelerator, in bfloat16: tokens per second, and the share of the rate of a plain matrix product

A call gives the gradients of all parameters and of x; the loss is the sum of the output times a fixed array. Experts
have biases, weights are float32 and cast in the call, and tokens and weights are random, and so is the routing. The
calls of a table are interleaved. Ratios are taken within a round, and of the fastest calls.
"""

import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from models import grouped, mlp, moe

Section = Literal["A", "B", "C", "D", "E", "F"]


class Sizes(NamedTuple):
    """Of a layer and its input."""

    tokens: int  # T
    width: int  # D
    hidden: int  # F
    experts: int  # E
    choices: int = 2  # K

    def __str__(self):
        return "T={}, D={}, F={}, E={}, K={}".format(*self)


@dataclasses.dataclass(frozen=True)
class Config:
    """Time an MoE layer. With no flags it takes about a quarter of an hour on two cores."""

    sections: tuple[Section, ...] = ("C", "F") if jax.default_backend() in ("gpu", "tpu") else ("A", "B", "C", "D", "E")
    """What to measure."""
    rounds: int = 15
    """Calls of every variant."""
    tiny: bool = False
    """Divide tokens, widths and numbers of experts by 16."""

    def sizes(self, tokens: int, width: int = 128, hidden: int = 256, experts: int = 64) -> Sizes:
        """Sizes in full, or tiny."""
        shrink = 16 if self.tiny else 1
        return Sizes(tokens // shrink, width // shrink, hidden // shrink, max(4, experts // shrink))

    def small_and_large(self) -> tuple[Sizes, Sizes]:
        """The two of A and E."""
        return self.sizes(4096), self.sizes(4096, width=512, hidden=1024, experts=32)


# ----------------------------------------------------------------------------------------------------------- variants


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make_layer(sizes: Sizes, **options) -> moe.MoE:
    experts = {"num_experts": sizes.experts, "experts_per_token": sizes.choices}
    config = moe.MoEConfig(d_model=sizes.width, d_ff=sizes.hidden, **experts, **options)
    layer = moe.MoE(config, rngs=nnx.Rngs(0))
    layer.eval()
    return layer


def gradients(function, params, x) -> functools.partial:
    """A call of the compiled gradients of function(params, x) with respect to both."""
    jax.clear_caches()  # what was traced with other constants (E) is not used again
    loss = lambda params, x, cotangent: jnp.sum(function(params, x) * cotangent)
    arguments = params, x, normal(2, *x.shape, dtype=x.dtype)
    return functools.partial(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile(), *arguments)


def ours(sizes: Sizes, dtype=jnp.float32, **options) -> functools.partial:
    """The layer, with options such as its backend."""
    graphdef, params = nnx.split(make_layer(sizes, dtype=dtype, **options))
    x = normal(1, sizes.tokens, sizes.width, dtype=dtype)
    return gradients(lambda params, x: nnx.merge(graphdef, params)(x), params, x)


def bare_einsums(sizes: Sizes) -> functools.partial:
    """The experts on rows `[E, K T / E, D]` that are in place: no routing, no padding."""
    expert = jax.vmap(functools.partial(mlp.gelu_mlp, grouped.linear))
    x = normal(1, sizes.experts, sizes.choices * sizes.tokens // sizes.experts, sizes.width)
    return gradients(expert, make_layer(sizes).experts.params(), x)


def bare_products(sizes: Sizes, dtype, module: str) -> functools.partial:
    """The module's `ragged_dot` on rows that are in place, as many for each expert, without biases."""
    ragged_dot = importlib.import_module(module).ragged_dot
    rows = sizes.choices * sizes.tokens
    group_sizes = jnp.full(sizes.experts, rows // sizes.experts, jnp.int32)
    linear = lambda rows, kernel, bias: ragged_dot(rows, kernel, group_sizes)
    params = make_layer(sizes, dtype=dtype, use_bias=False).experts.params()
    params = jax.tree.map(lambda kernel: kernel.astype(dtype), params)
    return gradients(functools.partial(mlp.gelu_mlp, linear), params, normal(1, rows, sizes.width, dtype=dtype))


def pytorch(sizes: Sizes, dtype: str = "float32") -> Callable[[], object] | None:
    """The same layer, weights and tokens in PyTorch; biases are spread by the fastest of three ways."""
    if not importlib.util.find_spec("torch"):
        return None
    import torch  # pyrefly: ignore
    from torch.nn import functional  # pyrefly: ignore

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    layer = make_layer(sizes)
    arrays = [layer.router.kernel[...], *layer.experts.params().values(), normal(1, sizes.tokens, sizes.width)]
    router, *experts, x = (torch.tensor(np.asarray(a), device=device, requires_grad=True) for a in arrays)
    cotangent = torch.tensor(np.asarray(normal(2, *x.shape)), device=device)

    def forward():
        kernel_in, kernel_out, bias_in, bias_out, rows = (a.to(getattr(torch, dtype)) for a in (*experts, x))
        gates, indices = torch.topk(torch.softmax(x @ router, -1), sizes.choices, -1)
        gates = (gates / gates.sum(-1, keepdim=True)).reshape(-1, 1)
        expert, order = torch.sort(indices.reshape(-1), stable=True)
        ends = torch.cumsum(torch.bincount(expert, minlength=sizes.experts), 0).to(torch.int32)
        token = order // sizes.choices
        h = torch._grouped_mm(functional.embedding(token, rows), kernel_in, offs=ends)
        h = functional.gelu(h + functional.embedding(expert, bias_in), approximate="tanh")
        y = torch._grouped_mm(h, kernel_out, offs=ends) + functional.embedding(expert, bias_out)
        return torch.zeros_like(x).index_add(0, token, y * functional.embedding(order, gates))

    def call():
        torch.autograd.grad((forward() * cotangent).sum(), [router, *experts, x])
        if device == "cuda":
            torch.cuda.synchronize()

    return call


# ------------------------------------------------------------------------------------------------------------- tables


def table(
    title: str,
    variants: Mapping[str, Callable[[], object] | None],
    rounds: int,
    to: str,
    columns: Mapping[str, Callable[[str, Mapping[str, float]], str]] = {},
) -> None:
    """Times the variants that there are. A column of one's own takes a name and the fastest seconds of every name."""
    seconds = timing.interleave({name: call for name, call in variants.items() if call}, rounds)
    fastest = {name: min(times) for name, times in seconds.items()}
    width = max(map(len, variants)) + 2
    print(f"\n{title}\n{'':<{width}}{'fastest (ms)':>14}{'median ratio':>14}{'of fastest':>12}", end="")
    print("".join(f"{header:>20}" for header in columns))
    for name in variants:
        if name not in seconds:
            print(f"{name:<{width}}{'-':>14}")
            continue
        median, ratio = timing.ratios(seconds, name, to)
        print(f"{name:<{width}}{1e3 * fastest[name]:>14.1f}{median:>14.2f}{ratio:>12.2f}", end="")
        print("".join(f"{column(name, fastest):>20}" for column in columns.values()), flush=True)


def speed(config: Config) -> None:
    for sizes in config.small_and_large():
        variants = {
            "capacity 1.25": ours(sizes, capacity_factor=1.25),
            "padded, dropless": ours(sizes, backend="padded"),
            "bare einsums": bare_einsums(sizes),
            "PyTorch _grouped_mm": pytorch(sizes),
        }
        table(f"A  {sizes}", variants, config.rounds, to="capacity 1.25")


def scaling(config: Config) -> None:
    tokens = {f"T={1024 * 2**n}": config.sizes(1024 * 2**n) for n in range(6)}
    per_token = lambda name, fastest: f"{1e6 * fastest[name] / tokens[name].tokens:.2f}"
    table(
        "B  tokens, at D=128, F=256, E=64, K=2",
        {name: ours(sizes, backend="padded") for name, sizes in tokens.items()},
        config.rounds,
        to="T=1024",
        columns={"ms per 1000 tokens": per_token},
    )
    experts = {f"E={e}": ours(config.sizes(16384, experts=e), backend="padded") for e in (8, 16, 32, 64)}
    table("B  experts, at T=16384, D=128, F=256, K=2: the same products", experts, config.rounds, to="E=8")


def skewed_routing(sizes: Sizes, max_over_mean: float) -> np.ndarray:
    """Indices `[T, K]`: the experts with the highest sums of noise and a bias that makes the busiest one so busy."""
    random = np.random.default_rng(0)
    if max_over_mean == 1:  # exactly even
        places = random.permutation(sizes.tokens)[:, None] * sizes.choices + np.arange(sizes.choices)
        return places % sizes.experts
    bias, noise = random.normal(size=sizes.experts), random.gumbel(size=(sizes.tokens, sizes.experts))
    choose = lambda scale: np.argpartition(-noise - scale * bias, sizes.choices, axis=-1)[:, : sizes.choices]
    low, high = 0.0, 1e3
    while high - low > 1e-2:
        middle = (low + high) / 2
        low, high = (middle, high) if loads(sizes, choose(middle)).max() < max_over_mean else (low, middle)
    return choose(high)


def loads(sizes: Sizes, indices: np.ndarray) -> np.ndarray:
    """Assignments to each expert, over their mean."""
    return np.bincount(indices.reshape(-1), minlength=sizes.experts) / indices.size * sizes.experts


def imbalance(config: Config) -> None:
    usual = grouped.default_buffer()
    if jax.default_backend() == "cpu":
        sizes = config.sizes(4096)
        options = {"padded": ("padded", usual)}
        imbalance_of(config, sizes, jnp.float32, (1, 2, 4, 8, sizes.experts / sizes.choices), options)
        return
    one, lean = usual._replace(blocks=1), usual._replace(headroom=1.125)
    options = {"padded": ("padded", usual), "padded, lean": ("padded", lean), "padded, one block": ("padded", one)}
    imbalance_of(config, config.sizes(32768), jnp.float32, (3,), options | {"dense": ("dense", usual)})
    sizes = config.sizes(16384, 1024, 2048, experts=128)
    imbalance_of(config, sizes, jnp.bfloat16, (1.5, 4), options | {"tokamax": ("tokamax", usual)})


def imbalance_of(config: Config, sizes: Sizes, dtype, max_over_mean: Sequence[float], options: Mapping) -> None:
    """A table of `(backend, buffer)` by name, with the share of rows that each buffer sends through the loop."""
    variants = {}
    params = {"experts": make_layer(sizes).experts.params(), "gates": jnp.full((sizes.tokens, sizes.choices), 0.5)}
    for busiest in max_over_mean:
        indices = skewed_routing(sizes, busiest)
        load = loads(sizes, indices)
        for name, (backend, buffer) in options.items():
            in_loop = np.maximum(load - buffer.headroom, 0).mean() if backend == "padded" else 0

            def layer(params, x, indices=indices, backend=backend):
                experts = jax.tree.map(lambda leaf: leaf.astype(dtype), params["experts"])
                arguments = experts, x, jnp.asarray(indices), params["gates"]
                return grouped.apply_experts(mlp.gelu_mlp, *arguments, backend=backend)

            with mock.patch.object(grouped, "default_buffer", return_value=buffer):
                call = gradients(layer, params, normal(1, sizes.tokens, sizes.width, dtype=dtype))
            variants[f"max / mean load {load.max():.1f}: {name}, {in_loop:.0%} of rows in the loop"] = call
    table(f"C  {sizes}, {jnp.dtype(dtype)}, without the router", variants, config.rounds, to=next(iter(variants)))


def memory(config: Config) -> None:
    options = {"padded": {"backend": "padded"}, "capacity 1.25": {"capacity_factor": 1.25}}
    print(f"\nD  temporary MiB at T=16384, D=128, F=256, K=2\n{'':<8}" + "".join(f"{name:>16}" for name in options))
    for experts in (8, 32, 128):
        programs: list[Any] = [ours(config.sizes(16384, experts=experts), **option).func for option in options.values()]
        mib = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs]
        print(f"{f'E={experts}':<8}" + "".join(f"{m:>16.1f}" for m in mib), flush=True)


def constants(config: Config) -> None:
    tried = [(headroom, 64) for headroom in (0.0, 0.5, 1.0, 1.125, 1.25)]
    tried += [(headroom, rows) for headroom in (0.0, 1.125) for rows in (32, 128)]
    for sizes in config.small_and_large():
        variants = {}
        for headroom, block_rows in tried:
            buffer = grouped.default_buffer()._replace(headroom=headroom, block_rows=block_rows)
            with mock.patch.object(grouped, "default_buffer", return_value=buffer):
                variants[f"headroom {headroom}, blocks of {block_rows}"] = ours(sizes, backend="padded")
        table(f"E  {sizes}", variants, config.rounds, to="headroom 1.125, blocks of 64")


def accelerator(config: Config) -> None:
    side = 512 if config.tiny else 8192
    peak = f"product of {side} x {side}"
    has_tokamax = importlib.util.find_spec("tokamax") is not None
    for experts in (32, 128):
        sizes, dtype = config.sizes(16384, 1024, 2048, experts), jnp.bfloat16
        product = functools.partial(jax.jit(jnp.matmul), *normal(0, 2, side, side, dtype=dtype))
        variants: dict[str, Any] = {"padded": ours(sizes, dtype, backend="padded")}
        variants["capacity 1.25"] = ours(sizes, dtype, capacity_factor=1.25)
        variants["tokamax"] = ours(sizes, dtype, backend="tokamax") if has_tokamax else None
        variants["dense"] = ours(sizes, dtype, backend="dense") if experts <= 32 else None
        variants["bare tokamax"] = bare_products(sizes, dtype, "tokamax") if has_tokamax else None
        variants["bare jax.lax.ragged_dot"] = bare_products(sizes, dtype, "jax.lax") if experts <= 32 else None
        variants["PyTorch _grouped_mm"] = pytorch(sizes, "bfloat16")
        # Two products per row; a forward and two backward products; two operations for each term.
        operations = 12 * sizes.choices * sizes.tokens * sizes.width * sizes.hidden
        flops = dict.fromkeys(variants, operations) | {peak: 2 * side**3}
        rate = lambda name, fastest, flops=flops: flops[name] / fastest[name]
        columns = {
            "M tokens / s": lambda name, fastest, t=sizes.tokens: (
                f"{t / fastest[name] / 1e6:.2f}" if name != peak else ""
            ),
            "TFLOP / s": lambda name, fastest, rate=rate: f"{rate(name, fastest) / 1e12:.2f}",
            "of the product's": lambda name, fastest, rate=rate: f"{rate(name, fastest) / rate(peak, fastest):.0%}",
            "temporary MiB": lambda name, fastest, variants=variants: temporary_mib(variants.get(name)),
        }
        table(f"F  {sizes}, {jnp.dtype(dtype)}", variants | {peak: product}, config.rounds, "padded", columns)


def temporary_mib(call: Any) -> str:
    """XLA's figure for a compiled call; PyTorch's calls have none."""
    program = getattr(call, "func", None)
    return f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}" if program else ""


SECTIONS = {"A": speed, "B": scaling, "C": imbalance, "D": memory, "E": constants, "F": accelerator}


def main(config: Config) -> None:
    logging.getLogger("absl").setLevel("ERROR")  # tokamax warns that it was not tuned for these sizes
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    for name in config.sections:
        SECTIONS[name](config)


if __name__ == "__main__":
    import tyro  # here, as tokamax cannot be installed beside it

    main(tyro.cli(Config, description=Config.__doc__))
