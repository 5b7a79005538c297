"""What the tests of users' own MoEs share: sizes, a task that they learn in a few steps, and what is asserted of them.

A step is a function of a batch, and returns the loss; the router scores `[..., E]`, a list by layer; the updates of the
optimizer alone; and those with Excitation. From the scores, NumPy says what must have been scaled, and by how much.

Axis letters: B batch, S sequence, D model width, F expert width, E experts, K experts per token, L layers.
"""

import excited
import jax.numpy as jnp
import numpy as np
import optax

import excitation_optax

B, S, D, F, E, K, L = (
    9,
    7,
    6,
    8,
    4,
    2,
    2,
)  # an odd number of tokens, so that no expert has just the mean load, B S K / E
STEPS = 24
GAMMA = 0.5


def optimizers(expert_axis=None):
    """AdamW, and the same with Excitation after it."""
    adamw = optax.adamw(1e-2)
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, GAMMA, expert_axis=expert_axis)
    return adamw, optax.chain(adamw, excitation)


def batch(number, padding=False):
    """x and y `[B, S, D]` and where `[B, S]`: tokens of E kinds, each kind with a linear map of its own to learn."""
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
    """Zero-sum of one layer, `[E]`, from its router's scores, as NumPy has it."""
    chosen = np.argsort(-np.asarray(scores).reshape(-1, E), axis=-1)[:, :K][np.asarray(where).reshape(-1)]
    u = np.bincount(chosen.reshape(-1), minlength=E) / len(chosen)
    return u**GAMMA / np.mean(u**GAMMA)


def check_training(step, factors, padding=False):
    """Trains, and asserts at every step what was scaled: `factors` makes a dict by path of the layers' `[L, E]` phi."""
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
    """The phi of a layer, or of layers, with axes of size 1 where a parameter of `ndim` axes has others than `axes`."""
    order = np.argsort(axes)
    return np.expand_dims(np.transpose(phi, order), [axis for axis in range(ndim) if axis not in axes])
