"""Twenty steps of a small model on a mesh, by the parts of examples.pod; all meshes must give the same numbers.

As a program, it is one of two processes: `python tests/pod_job.py MODEL OPTIMIZER COORDINATOR PROCESS OUT`.
"""

import functools
import os
import sys

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "4"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

import excitation_optax
from examples import texts
from examples.pod import data, parallel, train
from excitation_optax import flax as excitation_flax
from models import topk_mlp

STEPS, BATCH = 20, 32
# Of the parallel kind, and the sizes of the mesh.
MODES = {
    "one": ("jit", {"data": 1}),
    "data": ("jit", {}),
    "expert": ("jit", {"expert": 8}),
    "mixed": ("jit", {"expert": 2}),
    "fsdp": ("jit", {"fsdp": 8}),
    "all": ("jit", {"fsdp": 2, "expert": 2}),
    "pmap": ("pmap", {}),
}


def config(optimizer: str, kind: str = "jit", **changes) -> train.Config:
    """A GPT-MoE of 11,000 parameters. No auxiliary losses: they are no means over the batch, which pmap splits."""
    sizes = {"num_experts": 8, "d_ff": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "context": 8}
    rest = {"steps": STEPS, "batch_size": BATCH, "load_balancing": 0.0, "router_z": 0.0, "strategy": "positive_sum"}
    rate = {"sgd": 0.1, "adamw": 1e-3}[optimizer]
    return train.Config(**sizes, **rest, optimizer=optimizer, learning_rate=rate, parallel=kind, **changes)


def gpt(optimizer: str, kind: str, mesh):
    """What trains a GPT-MoE, and its batches: the README's text."""
    flags = config(optimizer, kind)
    tokens = texts.load((), "bytes").train[:20_000]
    batches = data.Batches(data.Windows(tokens, flags.context + 1), BATCH, seed=0)
    return train.make_trainer(flags, mesh)[1], batches


def mlp(optimizer: str, kind: str, mesh):
    """What trains a Top-K MLP, and its batches: rows of numbers, of which the last is the class."""
    model = lambda: topk_mlp.TopKMLP(topk_mlp.TopKMLPConfig(12, width=32, depth=2, num_classes=4), rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(nnx.eval_shape(model))
    excite = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=-1)
    tx = optax.chain({"sgd": optax.sgd(0.1), "adamw": optax.adamw(1e-3)}[optimizer], excite)

    def loss_fn(params, rows):
        logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(rows[:, :-1])
        labels = rows[:, -1].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, ({"loss": loss}, utilization)

    def step(state, rows, axis_name=None):
        return parallel.train_step(loss_fn, tx, state, rows, axis_name=axis_name)[:2]

    def init():
        params = nnx.state(model())
        return parallel.TrainState(params, tx.init(params), jnp.zeros([], jnp.int32))

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(256, 13)).astype(np.float32)
    rows[:, -1] = np.argmax(rows[:, :4], axis=1)
    return {"jit": parallel.Jit, "pmap": parallel.Pmap}[kind](step, init, mesh), data.Batches(rows, BATCH, seed=0)


MODELS = {"gpt": gpt, "mlp": mlp}


def run(model: str, optimizer: str, kind: str, mesh) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses, and the parameters after the last step by path."""
    trainer, batches = MODELS[model](optimizer, kind, mesh)
    state, losses = trainer.init(), []
    for number in range(STEPS):
        state, logged = trainer.step(state, trainer.put(batches.shape, functools.partial(batches.rows, number)))
        losses.append(logged["loss"])
    params = multihost_utils.process_allgather(trainer.save(state).params, tiled=True)
    by_path = {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)}
    return np.array(jax.device_get(losses)), by_path


def main(model: str, optimizer: str, coordinator: str, process: str, out: str) -> None:
    """One of two processes with four devices each, of a mesh of 2 x 2 x 2."""
    jax.distributed.initialize(coordinator, 2, int(process), initialization_timeout=60)
    losses, params = run(model, optimizer, "jit", parallel.make_mesh(fsdp=2, expert=2 if model == "gpt" else 1))
    if process == "0":
        np.savez(out, losses=losses, **params)


if __name__ == "__main__":
    main(*sys.argv[1:])
