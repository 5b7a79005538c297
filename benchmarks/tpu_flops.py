"""Operations and memory of the MoE layer's gradient in a program compiled for a TPU, on a machine that has none.

    pip install 'jax[tpu]'
    python -m benchmarks.tpu_flops

The figures are from XLA's compiler for TPU v5e, for one chip and for eight (2 x 4, experts split over four), in
bfloat16. "of the least" is the ratio to the six matrix products that K experts per token require, without the router.
XLA counts the body of a loop once, so the figure of `padded` leaves out all blocks after the first.
"""

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU's metadata server

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from excitation_optax import flax as excitation_flax
from models import moe

TOKENS, WIDTH, HIDDEN, CHOICES = 16384, 512, 512, 2


def compiled(config: moe.MoEConfig, mesh: jax.sharding.Mesh):
    """The gradients of all parameters and of x, for this mesh."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: moe.MoE(config, rngs=nnx.Rngs(0))))

    def loss_fn(params, x):
        layer = nnx.merge(graphdef, params)
        y, utilization, sown = excitation_flax.capture_routing(layer, moe.AuxiliaryLoss)(x)
        return jnp.sum(y.astype(jnp.float32)) + moe.auxiliary_losses(sown).load_balancing, utilization

    def placed(leaf, *spec, dtype=None):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    axis = config.expert_parallel_axis
    spec = lambda path: (axis,) if axis and "experts" in jax.tree_util.keystr(path) else ()
    params = jax.tree.map_with_path(lambda path, leaf: placed(leaf, *spec(path)), params)
    x = placed(jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16), mesh.axis_names)
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=True)).trace(params, x)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def main() -> None:
    """Prints a line for every way."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    one = jax.sharding.Mesh(devices[:1].reshape(1, 1), ("data", "expert"))
    eight = jax.sharding.Mesh(devices.reshape(2, 4), ("data", "expert"))
    split = {"expert_parallel_axis": "expert"}
    ways: list[tuple[str, jax.sharding.Mesh, dict[str, Any]]] = [
        ("padded", one, {"backend": "padded"}),
        ("capacity 1.25", one, {"capacity_factor": 1.25}),
        ("padded, 8 chips", eight, split | {"backend": "padded"}),
        ("capacity 1.25, 8 chips", eight, split | {"capacity_factor": 1.25}),
    ]
    print(f"jax {jax.__version__}; T={TOKENS}, D={WIDTH}, F={HIDDEN}, K={CHOICES}, bfloat16, TPU v5e; figures per chip")
    print(f"{'':<32}{'GFLOP':>10}{'of the least':>14}{'temporary MiB':>15}")
    for experts in (16, 64):
        for name, mesh, options in ways:
            sizes = {"d_model": WIDTH, "d_ff": HIDDEN, "num_experts": experts, "experts_per_token": CHOICES}
            config = moe.MoEConfig(**sizes, dtype=jnp.bfloat16, **options)
            program: Any = compiled(config, mesh)
            flops = program.cost_analysis()["flops"]
            least = 12 * CHOICES * TOKENS * WIDTH * HIDDEN / mesh.size
            mib = program.memory_analysis().temp_size_in_bytes / 2**20
            print(f"{f'E={experts}, {name}':<32}{flops / 1e9:>10.1f}{flops / least:>14.2f}{mib:>15.1f}", flush=True)


if __name__ == "__main__":
    main()
