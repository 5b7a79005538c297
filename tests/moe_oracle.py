"""A slow MoE layer to compare with, and routings: float64 NumPy, a loop over tokens and experts, gradients by hand.

Each function returns its results and its `backward`, which turns gradients of the results into gradients of the
arguments.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

import types

import numpy as np


def choose(tokens, choices, num_experts, seed=2):
    """K different experts for each token."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_experts)[:choices] for _ in range(tokens)]).astype(np.int32)


def some_masked():
    indices = choose(13, 2, 5)
    indices[[0, 3, 7, 12]] = 5
    return indices


# 13 tokens, 5 experts, 2 choices; 5 is no expert.
ROUTINGS = {
    "random": choose(13, 2, 5),
    "two experts alone": np.tile(np.int32([[3, 1]]), (13, 1)),
    "one expert takes all": np.tile(np.int32([[4, 5]]), (13, 1)),
    "the first expert takes all": np.tile(np.int32([[0, 5]]), (13, 1)),
    "all masked": np.full((13, 2), 5, np.int32),
    "some masked": some_masked(),
    "one token left": np.where(np.arange(13)[:, None] == 6, np.int32([[2, 0]]), np.int32(5)),
}


def float64(tree):
    """Converts arrays of any dtype, in nested dicts, to float64."""
    if isinstance(tree, dict):
        return {name: float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree).astype(np.float64)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    sigmoid = 1 / (1 + np.exp(-x))
    return sigmoid * (1 + x * (1 - sigmoid))


def mlp(params, x):
    """One expert on one token `[D]`; gated if it has a `kernel_gate`."""
    w_in, w_gate, w_out = (params.get(f"kernel_{name}") for name in ("in", "gate", "out"))
    b_in, b_gate, b_out = (params.get(f"bias_{name}", 0.0) for name in ("in", "gate", "out"))
    a = x @ w_in + b_in
    if w_gate is None:
        h = gelu(a)
    else:
        s = x @ w_gate + b_gate
        h = silu(s) * a
    y = h @ w_out + b_out

    def backward(dy):
        dh = w_out @ dy
        if w_gate is None:
            da = gelu_slope(a) * dh
            dx = w_in @ da
            d = {}
        else:
            da = silu(s) * dh
            ds = silu_slope(s) * a * dh
            dx = w_in @ da + w_gate @ ds
            d = {"kernel_gate": np.outer(x, ds), "bias_gate": ds}
        d |= {"kernel_in": np.outer(x, da), "bias_in": da, "kernel_out": np.outer(h, dy), "bias_out": dy}
        return {name: d[name] for name in params}, dx

    return y, backward


def experts(params, x, indices, gates, capacity=None):
    """y_t = sum over k of g_tk f_e(x_t), e = e_tk; an expert takes `capacity` rows, first choices and tokens first."""
    params, x, gates = float64(params), float64(x), float64(gates)
    num_experts, (tokens, choices) = len(params["kernel_in"]), np.shape(indices)
    y, taken, tape = np.zeros_like(x), np.zeros(num_experts, int), []
    for k in range(choices):
        for t in range(tokens):
            e = int(indices[t, k])
            if e < num_experts and (capacity is None or taken[e] < capacity):
                taken[e] += 1
                f, backward_of_expert = mlp({name: p[e] for name, p in params.items()}, x[t])
                y[t] += gates[t, k] * f
                tape.append((t, k, e, f, backward_of_expert))

    def backward(dy):
        dy = float64(dy)
        d_params = {name: np.zeros_like(p) for name, p in params.items()}
        dx, d_gates = np.zeros_like(x), np.zeros_like(gates)
        for t, k, e, f, backward_of_expert in tape:
            d_gates[t, k] = f @ dy[t]
            d_expert, d_row = backward_of_expert(gates[t, k] * dy[t])
            dx[t] += d_row
            for name, d in d_expert.items():
                d_params[name][e] += d
        return d_params, dx, d_gates

    return y, backward


def select(scores, choices, num_groups, groups_per_token):
    """The experts of one token `[E]`: those with the highest scores, in the groups whose best two sum to the most."""
    groups = np.reshape(scores, (num_groups, -1))
    of_group = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    kept = np.argsort(-of_group, kind="stable")[:groups_per_token]
    allowed = np.full(groups.shape, -np.inf)
    allowed[kept] = groups[kept]
    return np.argsort(-allowed.ravel(), kind="stable")[:choices]


def router(
    kernel,
    x,
    choices,
    normalize,
    where=None,
    *,
    scores="softmax",
    bias=0.0,
    num_groups=1,
    groups_per_token=1,
    gate_scale=1.0,
):
    """Gates and experts; and the two losses and the entropy, over the tokens of `where` only."""
    kernel, x = float64(kernel), float64(x)
    is_token = np.ones(len(x), bool) if where is None else np.asarray(where)
    tokens, num_experts = max(is_token.sum(), 1), kernel.shape[1]
    z = x @ kernel
    top = z.max(axis=1, keepdims=True)
    log_sum = (top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))[:, 0]
    s = np.exp(z - log_sum[:, None]) if scores == "softmax" else 1 / (1 + np.exp(-z))
    total = s.sum(axis=1, keepdims=True)
    p = s / total
    indices = np.stack([select(row + float64(bias), choices, num_groups, groups_per_token) for row in s])
    chosen = np.take_along_axis(s, indices, axis=1)
    divisor = chosen.sum(axis=1, keepdims=True) if normalize else 1.0
    gates = gate_scale * chosen / divisor
    counts = np.array([np.sum(indices[is_token] == e) for e in range(num_experts)])
    share = num_experts / choices * counts / tokens  # E / K u_e, a constant to the gradient
    load_balancing = np.sum(share * p[is_token].sum(axis=0) / tokens)
    router_z = np.sum(log_sum[is_token] ** 2) / tokens
    entropy = -np.sum(p[is_token] * np.log(p[is_token])) / tokens  # for the log, so it has no gradient here

    def backward(d_gates, d_load_balancing=0.0, d_router_z=0.0):
        d_chosen = gate_scale * d_gates
        if normalize:
            d_chosen = (d_chosen - np.sum(d_gates * gates, axis=1, keepdims=True)) / divisor
        dp = d_load_balancing * np.outer(is_token, share) / tokens
        ds = (dp - np.sum(dp * p, axis=1, keepdims=True)) / total
        np.put_along_axis(ds, indices, np.take_along_axis(ds, indices, axis=1) + d_chosen, axis=1)
        dz = s * (ds - np.sum(ds * s, axis=1, keepdims=True)) if scores == "softmax" else s * (1 - s) * ds
        dz += d_router_z * (2 * log_sum * is_token / tokens)[:, None] * np.exp(z - log_sum[:, None])
        return x.T @ dz, dz @ kernel.T

    return types.SimpleNamespace(
        gates=gates,
        indices=indices,
        counts=counts,
        load_balancing=load_balancing,
        router_z=router_z,
        entropy=entropy,
        backward=backward,
    )


def moe(params, x, choices, normalize, where=None, capacity=None, **of_router):
    """The layer for params `{"router": {"kernel"}, "experts": {...}}`, with `"shared"` if it has shared experts."""
    params, x = float64(params), float64(x)
    is_token = np.ones(len(x), bool) if where is None else np.asarray(where)
    route = router(params["router"]["kernel"], x, choices, normalize, is_token, **of_router)
    nowhere = params["router"]["kernel"].shape[1]
    indices = np.where(is_token[:, None], route.indices, nowhere)
    y, backward_of_experts = experts(params["experts"], x, indices, route.gates, capacity)
    shared = {t: mlp(params["shared"], x[t]) for t in np.flatnonzero(is_token)} if "shared" in params else {}
    for t, (f, _) in shared.items():
        y[t] += f

    def backward(dy, d_load_balancing=0.0, d_router_z=0.0):
        dy = float64(dy)
        d_experts, dx, d_gates = backward_of_experts(dy)
        d_kernel, dx_of_router = route.backward(d_gates, d_load_balancing, d_router_z)
        dx += dx_of_router
        d_params = {"router": {"kernel": d_kernel}, "experts": d_experts}
        if "shared" in params:
            d_params["shared"] = {name: np.zeros_like(p) for name, p in params["shared"].items()}
        for t, (_, backward_of_shared) in shared.items():
            d_shared, d_row = backward_of_shared(dy[t])
            dx[t] += d_row
            for name, d in d_shared.items():
                d_params["shared"][name] += d
        return d_params, dx

    return types.SimpleNamespace(y=y, route=route, backward=backward)


def assert_close(actual, expected, tolerance):
    """Asserts of every leaf that the largest error is at most `tolerance` times the largest expected value."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected)
        for name in expected:
            assert_close(actual[name], expected[name], tolerance)
        return
    actual = float64(actual)
    assert actual.shape == np.shape(expected)
    scale = np.max(np.abs(expected), initial=0)
    # Where all zeros are expected, as when every token is masked, nothing else may come.
    np.testing.assert_array_less(np.abs(actual - expected), tolerance * scale + (scale == 0) * 1e-30)
