"""A small problem with experts, for the contract suite: a linear MoE, top-1, fitted to data made by another one.

Axis letters: B batch, D inputs, F outputs, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

B, D, F, E, STEPS = 32, 3, 2, 4, 20


def init(seed: int, dtype=jnp.float32):
    """`{"router": [D, E], "experts": {"kernel": [E, D, F], "bias": [E, F]}}`."""
    router, kernel, bias = jax.random.split(jax.random.key(seed), 3)
    return {
        "router": jax.random.normal(router, (D, E), dtype),
        "experts": {
            "kernel": jax.random.normal(kernel, (E, D, F), dtype),
            "bias": jax.random.normal(bias, (E, F), dtype),
        },
    }


def forward(params, x):
    """Outputs `[B, F]`, and which expert each sample chose, `[B, E]` boolean."""
    probabilities = jax.nn.softmax(x @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), E, dtype=x.dtype)
    outputs = jnp.einsum("bd,edf->bef", x, params["experts"]["kernel"]) + params["experts"]["bias"][None]
    return jnp.einsum("bef,be->bf", outputs, probabilities * chosen), chosen == 1


def batches(dtype=jnp.float32):
    """Inputs `[STEPS, B, D]` and targets `[STEPS, B, F]`."""
    x = jax.random.normal(jax.random.key(2), (STEPS, B, D), dtype)
    y, _ = jax.vmap(lambda batch: forward(init(1, dtype), batch))(x)
    return x, y


def loss_fn(params, x, y):
    """Mean squared error, and the utilization `[E]` of the batch."""
    outputs, active = forward(params, x)
    return jnp.mean((outputs - y) ** 2), jnp.mean(active, axis=0, dtype=x.dtype)


def zero_sum(u) -> np.ndarray:
    """Equation 6 at gamma = 1, written once more by hand."""
    return u / jnp.mean(u)


def scale_experts(tree, phi):
    """Phi times the experts' leaves, written out by hand; the router's as it is, and what is masked too."""
    if isinstance(tree["experts"], optax.MaskedNode):
        return tree
    return {
        "router": tree["router"],
        "experts": {
            "kernel": tree["experts"]["kernel"] * phi[:, None, None],
            "bias": tree["experts"]["bias"] * phi[:, None],
        },
    }
