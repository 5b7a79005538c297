"""The MoE layer once more, slowly: float64 NumPy, a loop over tokens and experts, and a backward pass by hand.

Each function returns what it computes and its `backward`, which takes the gradients of the results and returns those of
the arguments.

Axis letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

import types

import numpy as np


def float64(tree):
    """Arrays of any dtype, in nested dicts, as float64."""
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


def router(kernel, x, choices, normalize, where=None):
    """Gates, experts, and the two losses and the entropy over the tokens of `where` alone."""
    kernel, x = float64(kernel), float64(x)
    is_token = np.ones(len(x), bool) if where is None else np.asarray(where)
    tokens, num_experts = max(is_token.sum(), 1), kernel.shape[1]
    z = x @ kernel
    top = z.max(axis=1, keepdims=True)
    log_sum = (top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))[:, 0]
    p = np.exp(z - log_sum[:, None])
    indices = np.argsort(-p, axis=1, kind="stable")[:, :choices]
    chosen = np.take_along_axis(p, indices, axis=1)
    total = chosen.sum(axis=1, keepdims=True) if normalize else 1.0
    gates = chosen / total
    counts = np.array([np.sum(indices[is_token] == e) for e in range(num_experts)])
    share = num_experts / choices * counts / tokens  # E / K u_e, a constant to the gradient
    load_balancing = np.sum(share * p[is_token].sum(axis=0) / tokens)
    router_z = np.sum(log_sum[is_token] ** 2) / tokens
    entropy = -np.sum(p[is_token] * np.log(p[is_token])) / tokens  # to be logged: it has no gradient here

    def backward(d_gates, d_load_balancing=0.0, d_router_z=0.0):
        d_chosen = (d_gates - np.sum(d_gates * gates, axis=1, keepdims=True)) / total if normalize else d_gates
        dp = d_load_balancing * np.outer(is_token, share) / tokens
        np.put_along_axis(dp, indices, np.take_along_axis(dp, indices, axis=1) + d_chosen, axis=1)
        dz = p * (dp - np.sum(dp * p, axis=1, keepdims=True))
        dz += d_router_z * (2 * log_sum * is_token / tokens)[:, None] * p
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


def moe(params, x, choices, normalize, where=None, capacity=None):
    """The layer, of params `{"router": {"kernel"}, "experts": {...}}`, with `"shared"` if it has shared experts."""
    params, x = float64(params), float64(x)
    is_token = np.ones(len(x), bool) if where is None else np.asarray(where)
    route = router(params["router"]["kernel"], x, choices, normalize, is_token)
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
    """Leaf by leaf, the largest error is at most `tolerance` times the largest value expected."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected)
        for name in expected:
            assert_close(actual[name], expected[name], tolerance)
        return
    actual = float64(actual)
    assert actual.shape == np.shape(expected)
    scale = np.max(np.abs(expected), initial=0)
    # Where nothing is expected, as when every token is masked, nothing may come.
    np.testing.assert_array_less(np.abs(actual - expected), tolerance * scale + (scale == 0) * 1e-30)
