"""The grouped products: every backend against the loop of `moe_oracle`, capacity, memory, JAX's transformations."""

import functools
import importlib.util

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from hypothesis import strategies as st

from models import grouped, mlp

BACKENDS = [
    pytest.param(backend, marks=[pytest.mark.skipif(skip, reason="tokamax is not installed")])
    for backend in grouped.BACKENDS
    for skip in [backend == "tokamax" and not importlib.util.find_spec("tokamax")]
]
D, F = 6, 7


def make_params(num_experts, expert=mlp.gelu_mlp, use_bias=True, dtype=jnp.float32, seed=0):
    shapes = {"kernel_in": (D, F), "kernel_out": (F, D)}
    shapes |= {"kernel_gate": (D, F)} if expert is mlp.gated_mlp else {}
    shapes |= {name.replace("kernel", "bias"): shape[1:] for name, shape in shapes.items()} if use_bias else {}
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(num_experts, *shape)), dtype) for name, shape in shapes.items()}


def make_inputs(tokens, choices, dtype=jnp.float32, seed=1):
    """Tokens, gates, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.normal(size=(tokens, D)), d) for d in (dtype, jnp.float32))
    return x, jnp.asarray(rng.uniform(0.1, 1, size=(tokens, choices)), jnp.float32), dy


@functools.partial(jax.jit, static_argnames=("expert", "backend", "capacity", "mean_load", "sizes"))
def run(expert, params, x, indices, gates, dy, backend=None, capacity=None, mean_load=None, sizes=None):
    """The output, and the gradients of params, x and gates for the gradient dy of it. sizes: for the cache."""

    def of(params, x, gates):
        return grouped.apply_experts(
            expert, params, x, indices, gates, backend=backend, capacity=capacity, mean_load=mean_load
        )

    y, vjp = jax.vjp(of, params, x, gates)
    return y, *vjp(dy)


def assert_agrees(expert, params, x, indices, gates, dy, tolerance=1e-5, **options):
    y, d_params, dx, d_gates = run(expert, params, x, indices, gates, dy, **options)
    assert y.dtype == d_gates.dtype == jnp.float32
    assert dx.dtype == x.dtype
    assert {name: d.dtype for name, d in d_params.items()} == {name: p.dtype for name, p in params.items()}
    expected, backward = moe_oracle.experts(params, x, indices, gates, options.get("capacity"))
    expected_params, expected_x, expected_gates = backward(dy)
    moe_oracle.assert_close(y, expected, tolerance)
    moe_oracle.assert_close(d_params, expected_params, tolerance)
    moe_oracle.assert_close(dx, expected_x, tolerance)
    moe_oracle.assert_close(d_gates, expected_gates, tolerance)


@pytest.mark.parametrize("routing", moe_oracle.ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_routings(backend, routing):
    x, gates, dy = make_inputs(13, 2)
    assert_agrees(mlp.gelu_mlp, make_params(5), x, moe_oracle.ROUTINGS[routing], gates, dy, backend=backend)


@pytest.mark.parametrize("routing", moe_oracle.ROUTINGS)
@pytest.mark.parametrize(
    ("mean_load", "block_rows", "blocks"),
    [(0.5, 3, 1), (1.0, 2, 4), (2.6, 1, 1), (1.0, 1, 3)],  # buffers of 0, 2, 3 and 2 rows per expert
)
def test_overflow(monkeypatch, routing, mean_load, block_rows, blocks):
    """The padded buffer holds few rows or none; the loop does the rest, in several blocks per expert."""
    buffer = grouped.default_buffer()._replace(block_rows=block_rows, blocks=blocks)
    monkeypatch.setattr(grouped, "default_buffer", lambda: buffer)
    x, gates, dy = make_inputs(13, 2)
    indices = moe_oracle.ROUTINGS[routing]
    options = {"backend": "padded", "mean_load": mean_load, "sizes": buffer}
    assert_agrees(mlp.gelu_mlp, make_params(5), x, indices, gates, dy, **options)


@pytest.mark.parametrize(
    ("tokens", "choices", "num_experts"),
    [(7, 3, 3), (3, 1, 11), (1, 1, 1)],  # every expert; fewer tokens than experts; one of each
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, tokens, choices, num_experts):
    x, gates, dy = make_inputs(tokens, choices)
    params = make_params(num_experts, mlp.gated_mlp, use_bias=False)
    indices = moe_oracle.choose(tokens, choices, num_experts)
    assert_agrees(mlp.gated_mlp, params, x, indices, gates, dy, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    if backend == "tokamax" and jax.default_backend() == "gpu":
        pytest.skip("D and F are no multiples of 8; the benchmarks run the kernels")
    x, gates, dy = make_inputs(13, 2, jnp.bfloat16)
    params = make_params(5, mlp.gated_mlp, dtype=jnp.bfloat16)
    dy = dy.astype(jnp.bfloat16).astype(jnp.float32)
    options = {"backend": backend, "mean_load": 1.0 if backend == "padded" else None}
    # Tokamax's own code, forward and backward, mixes bfloat16 with float32.
    with jax.numpy_dtype_promotion("standard" if backend == "tokamax" else "strict"):
        assert_agrees(mlp.gated_mlp, params, x, moe_oracle.choose(13, 2, 5), gates, dy, tolerance=2e-2, **options)


@pytest.mark.parametrize(("expert", "rows"), [(mlp.gelu_mlp, 1), (mlp.gated_mlp, 3)])
def test_capacity(expert, rows):
    x, gates, dy = make_inputs(13, 2)
    params = make_params(5, expert)
    assert_agrees(expert, params, x, moe_oracle.ROUTINGS["some masked"], gates, dy, capacity=rows)


def multiply(linear, params, rows):
    """An expert of one number."""
    return linear(rows, params, None)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        # Expert 0 is asked by tokens 0, 1, 3 first and 2 second; expert 1 by token 2 first and 0, 1, 3 second.
        (1, [[1, 0], [0, 0], [1, 0], [0, 0]]),
        (2, [[1, 1], [1, 0], [1, 0], [0, 0]]),
        (3, [[1, 1], [1, 1], [1, 0], [1, 0]]),
        (4, [[1, 1], [1, 1], [1, 1], [1, 1]]),
    ],
)
def test_capacity_drops_last_choices_then_last_tokens(rows, kept):
    indices = jnp.array([[0, 1], [0, 1], [1, 0], [0, 1]])
    gates = jnp.array([[1.0, 2.0]] * 4)  # so that a sum tells which of the two were kept
    y, *_ = run(multiply, jnp.ones((2, 1, 1)), jnp.ones((4, 1)), indices, gates, jnp.ones((4, 1)), capacity=rows)
    np.testing.assert_array_equal(y[:, 0], np.array(kept) @ [1, 2])


def test_no_row_is_taken_twice_by_the_masked():
    """What goes nowhere takes no expert's capacity."""
    indices = jnp.array([[2], [2], [0], [1]])  # two tokens to nowhere, before the others
    ones = jnp.ones((4, 1))
    y, *_ = run(multiply, jnp.ones((2, 1, 1)), ones, indices, ones, ones, capacity=1)
    np.testing.assert_array_equal(y[:, 0], [0, 0, 1, 1])


@functools.partial(jax.jit, static_argnames=("backend", "mean_load"))
def sums(indices, backend, mean_load=None):
    """For each token the sum of 4^e over its experts e: integers that tell which experts it went to, and how often."""
    params = jnp.array([1.0, 4.0, 16.0, 64.0])[:, None, None]
    gates, x = jnp.ones(indices.shape), jnp.ones((indices.shape[0], 1))
    return grouped.apply_experts(multiply, params, x, indices, gates, backend=backend, mean_load=mean_load)[:, 0]


@hypothesis.given(hypothesis.extra.numpy.arrays(np.int32, (9, 3), elements=st.integers(0, 4)))
@hypothesis.settings(max_examples=100, deadline=None)
def test_dropless_drops_nothing_whatever_the_routing(indices):
    """Even where a token names an expert twice; 4 is no expert."""
    expected = np.sum(np.where(indices < 4, 4.0**indices, 0), axis=1)
    # Buffers of 0, 2 and, by default, 8 rows
    for backend, mean_load in [("padded", 0.0), ("padded", 1.0), ("padded", None), ("dense", None)]:
        np.testing.assert_array_equal(sums(indices, backend, mean_load), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_past_the_last_expert_go_nowhere(backend):
    """Of an 8-bit type too, in which K T cannot be counted."""
    indices = jnp.tile(jnp.array([[4, 200], [6, 4], [1, 7]], jnp.uint8), (100, 1))
    np.testing.assert_array_equal(sums(indices, backend), [0, 0, 4] * 100)


PATHS = [("padded", 1.0), ("dense", None)]


@pytest.mark.parametrize(("backend", "mean_load"), PATHS)
def test_vmap(backend, mean_load):
    """Over layers with parameters and tokens of their own, whose loops are of different lengths."""
    layers = [make_params(5, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, gates, dy = (a.reshape(3, 13, -1) for a in make_inputs(3 * 13, 2))
    indices = jnp.stack([moe_oracle.ROUTINGS[name] for name in ("random", "one expert takes all", "all masked")])
    of = functools.partial(run, mlp.gelu_mlp, backend=backend, mean_load=mean_load)
    y, *gradients = jax.vmap(of)(stacked, x, indices, gates, dy)
    for i in range(3):
        expected, backward = moe_oracle.experts(layers[i], x[i], indices[i], gates[i])
        moe_oracle.assert_close(y[i], expected, 1e-5)
        for got, expected in zip(gradients, backward(dy[i]), strict=True):
            moe_oracle.assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), expected, 1e-5)


@pytest.mark.parametrize(("backend", "mean_load"), PATHS)
def test_scan_and_remat(backend, mean_load):
    """Three layers in a scan, each with a residual and recomputed in the backward pass."""
    x, gates, dy = make_inputs(13, 2)
    indices = moe_oracle.ROUTINGS["random"]
    layers = [make_params(5, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def layer(x, params):
        y = grouped.apply_experts(mlp.gelu_mlp, params, x, indices, gates, backend=backend, mean_load=mean_load)
        return x + 0.1 * y, None

    y, vjp = jax.vjp(lambda stacked, x: jax.lax.scan(jax.checkpoint(layer), x, stacked)[0], stacked, x)
    d_stacked, dx = jax.jit(vjp)(dy)

    h, d, tape = moe_oracle.float64(x), moe_oracle.float64(dy), []
    for params in layers:
        f, backward = moe_oracle.experts(params, h, indices, gates)
        h = h + 0.1 * f
        tape.append(backward)
    moe_oracle.assert_close(y, h, 1e-5)
    for i in (2, 1, 0):
        d_params, d_rows, _ = tape[i](0.1 * d)
        d = d + d_rows
        moe_oracle.assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], d_stacked), d_params, 1e-5)
    moe_oracle.assert_close(dx, d, 1e-5)


def test_memory_does_not_grow_with_the_number_of_experts():
    """Bytes beside inputs and outputs, the parameters' gradients being outputs."""

    def temporary(num_experts, tokens=16384, d_model=128, d_ff=256, choices=2):
        shapes = {"kernel_in": (num_experts, d_model, d_ff), "kernel_out": (num_experts, d_ff, d_model)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((tokens, d_model), jnp.float32)
        gates = jax.ShapeDtypeStruct((tokens, choices), jnp.float32)
        indices = jax.ShapeDtypeStruct((tokens, choices), jnp.int32)

        def loss(params, x, gates, indices):
            return jnp.sum(grouped.apply_experts(mlp.gelu_mlp, params, x, indices, gates, backend="padded") ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(params, x, gates, indices).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(128) <= 1.5 * temporary(8)


@pytest.mark.parametrize(
    ("platform", "installed", "dtype", "width", "tokens", "expected"),
    [
        ("cpu", True, jnp.bfloat16, 8, 16, "padded"),
        ("gpu", False, jnp.bfloat16, 8, 16, "padded"),
        ("gpu", True, jnp.bfloat16, 8, 16, "tokamax"),
        ("gpu", True, jnp.float32, 8, 16, "padded"),  # tokamax would compute every expert on every row
        ("gpu", True, jnp.bfloat16, 12, 16, "padded"),  # its kernel copies multiples of 16 bytes
        ("gpu", True, jnp.bfloat16, 8, 7, "padded"),  # so does that of the gradient, from the transposed rows
        ("tpu", True, jnp.float32, 12, 7, "tokamax"),
    ],
)
def test_the_default_backend(monkeypatch, platform, installed, dtype, width, tokens, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    params = {"kernel": jnp.ones((4, 8, width), dtype)}
    assert grouped.default_backend(params, jnp.ones((tokens, 8), dtype), tokens * 2) == expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default of a CPU")
def test_the_default_on_cpu_is_padded():
    x, gates, dy = make_inputs(13, 2)
    arguments = (mlp.gelu_mlp, make_params(5), x, moe_oracle.ROUTINGS["random"], gates, dy)
    for default, padded in zip(run(*arguments), run(*arguments, backend="padded"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, default, padded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "ragged_dot"}, "backend must be one of padded, tokamax, dense, or None .*got 'ragged_dot'"),
        ({"backend": "dense", "capacity": 3}, "a capacity requires backend=\"padded\" or None; got 'dense'"),
    ],
)
def test_bad_backends(options, message):
    x, gates, _ = make_inputs(3, 2)
    with pytest.raises(ValueError, match=message):
        grouped.apply_experts(mlp.gelu_mlp, make_params(5), x, moe_oracle.choose(3, 2, 5), gates, **options)


def test_tokamax_has_to_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="requires tokamax: pip install tokamax"):
        grouped.check_backend("tokamax", has_capacity=False)


def test_rows_of_other_experts_do_not_leak_into_a_block():
    """The last block of an expert runs on into the next expert's rows, which may be too large for this one, or NaN."""
    kernels = jnp.array([[[6e4]], [[1.0]]], jnp.float16)
    indices = jnp.array([[0]] * 70 + [[1]] * 2)
    x = jnp.array([[1e-4]] * 70 + [[2.0]] * 2, jnp.float16)  # 2 * 6e4 is more than float16 can hold
    linear_expert = lambda linear, params, rows: linear(rows, params, None)
    apply = lambda kernels, x: grouped.apply_experts(
        linear_expert, kernels, x, indices, jnp.ones((72, 1)), backend="padded", mean_load=0.0
    )
    np.testing.assert_array_equal(apply(kernels, x)[70:, 0], [2, 2])
    x = x.at[70:].set(jnp.nan).astype(jnp.float32)
    gradient = jax.grad(lambda kernels: jnp.sum(apply(kernels, x)))(kernels.astype(jnp.float32))
    assert np.isfinite(gradient[0, 0, 0])
    assert np.isnan(gradient[1, 0, 0])
