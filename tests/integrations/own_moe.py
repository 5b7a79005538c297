"""Shared by the tests of users' own MoEs: sizes, a task that they learn in a few steps, and assertions.

A step is a function of a batch. It returns the loss, a list by layer of the router scores `[..., E]`, the updates of
the optimizer alone, and those with Excitation. NumPy computes from the scores by how much each update must be scaled.

Axis letters: B batch, S sequence, D model width, F expert width, E experts, K experts per token, L layers.
"""

import excited
import jax.numpy as jnp
import numpy as np
import optax

import excitation_optax

# An odd number of tokens, so that no expert can have the mean load B S K / E.
B, S, D, F, E, K, L = 9, 7, 6, 8, 4, 2, 2
STEPS = 24
GAMMA = 0.5


def optimizers(expert_axis=None):
    """AdamW, and the same with Excitation after it."""
    adamw = optax.adamw(1e-2)
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, GAMMA, expert_axis=expert_axis)
    return adamw, optax.chain(adamw, excitation)


def batch(number, padding=False):
    """x and y `[B, S, D]`, and where `[B, S]`: tokens of E kinds, each of which has a linear map to learn."""
    centres, maps = np.random.default_rng(0).standard_normal((2, E, D, D))
    random = np.random.default_rng(number + 1)
    kind = random.integers(E, size=(B, S))
    x = centres[kind, 0] + 1.0 * random.standard_normal((B, S, D))
    y = np.einsum("bsd,bsdf->bsf", x, maps[kind]) / D
    where = np.arange(S) < random.integers(2, S + 1, size=(B, 1)) if padding else np.ones((B, S), bool)
    where[0] = np.arange(S) < S - np.sum(where[1:]) % 2  # odd, as above
    assert np.sum(where) % 2 == 1
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.asarray(where)


def loss(prediction, y, where):
    return jnp.sum(jnp.where(where[..., None], (prediction - y) ** 2, 0)) / jnp.sum(where)


def phi(scores, where):
    """The zero-sum excitation `[E]` of one layer, computed from its router's scores in NumPy."""
    chosen = np.argsort(-np.asarray(scores).reshape(-1, E), axis=-1)[:, :K][np.asarray(where).reshape(-1)]
    u = np.bincount(chosen.reshape(-1), minlength=E) / len(chosen)
    return u**GAMMA / np.mean(u**GAMMA)


def check_training(step, factors, padding=False):
    """Trains and asserts each step's scaling. `factors` turns the layers' phi `[L, E]` into a dict by path."""
    losses = []
    for number in range(STEPS):
        x, y, where = batch(number, padding)
        value, scores, vanilla, excited_updates = step(x, y, where)
        assert len(scores) == L
        phis = np.stack([phi(layer, where) for layer in scores])
        excited.assert_scaled(vanilla, excited_updates, factors(phis))
        losses.append(float(value))
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), losses


def along(phi, ndim, *axes):
    """Broadcasts phi against a parameter of `ndim` axes, of which it has those in `axes`."""
    order = np.argsort(axes)
    return np.expand_dims(np.transpose(phi, order), [axis for axis in range(ndim) if axis not in axes])
