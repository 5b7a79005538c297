"""Ways to find the K-th largest activation of each sample, forward and backward of the layer that keeps the top K.

python -m benchmarks.top_k
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from models import topk_mlp

ROUNDS = 15
SHAPES = {
    "[512, 128], K = 13": ((512, 128), 13),
    "[3, 512, 128], K = 13": ((3, 512, 128), 13),
    "[512, 2048], K = 205": ((512, 2048), 205),
}


def by_bits(h, k):
    return jnp.where(h < topk_mlp.kth_largest(h, k), 0, 1)


def by_top_k_values(h, k):
    return jnp.where(h < jax.lax.top_k(h, k)[0][..., -1:], 0, 1)


def by_top_k_indices(h, k):
    return jnp.put_along_axis(jnp.zeros(h.shape, jnp.int32), jax.lax.top_k(h, k)[1], 1, axis=-1, inplace=False)


def by_sorting(h, k):
    return jnp.where(h < jnp.sort(h, axis=-1)[..., -k, None], 0, 1)


WAYS = {
    "bits (ours)": by_bits,
    "top_k, values": by_top_k_values,
    "top_k, indices": by_top_k_indices,
    "sort": by_sorting,
}


def main():
    for label, (shape, k) in SHAPES.items():
        x = jax.random.normal(jax.random.key(0), shape)

        def layer(way, x, k=k):
            def loss(x):
                h = jax.nn.relu(x)
                return jnp.sum((h * way(jax.lax.stop_gradient(h), k)) ** 2)

            return jax.grad(loss)(x)

        variants = {name: functools.partial(jax.jit(functools.partial(layer, way)), x) for name, way in WAYS.items()}
        seconds = timing.interleave(variants, ROUNDS)
        print(f"{label:<24}{'fastest (ms)':>14}{'median ratio':>14}")
        for name in variants:
            print(
                f"  {name:<22}{1e3 * min(seconds[name]):>14.2f}{timing.ratios(seconds, name, 'bits (ours)')[0]:>14.1f}"
            )


if __name__ == "__main__":
    main()
