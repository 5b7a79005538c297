"""Twenty steps of a small model on a mesh, by the parts of examples.pod; all meshes must give the same numbers.

`python -m tools.mesh_numbers` prints the table of docs/scaling.md. With arguments it is one of two processes of a run.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "4" if sys.argv[1:] else "8"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from examples import texts, training
from examples.pod import data, parallel, train
from excitation_optax import flax as excitation_flax
from models import topk_mlp

STEPS, BATCH = 20, 32
OPTIMIZERS = ("sgd", "adamw")
# Of the parallel kind, and the sizes of the mesh; data takes what they leave of 8 devices.
MODES = {
    "data 8": ("jit", {}),
    "expert 8": ("jit", {"expert": 8}),
    "data 4 x expert 2": ("jit", {"expert": 2}),
    "fsdp 8": ("jit", {"fsdp": 8}),
    "data 2 x fsdp 2 x expert 2": ("jit", {"fsdp": 2, "expert": 2}),
    "pmap 8": ("pmap", {}),
}


def config(optimizer: str, kind: str, auxiliary: bool) -> train.Config:
    """A GPT-MoE of 11,000 parameters."""
    sizes = {"num_experts": 8, "d_ff": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "context": 8}
    rest = {"steps": STEPS, "batch_size": BATCH, "strategy": "positive_sum", "parallel": kind, "optimizer": optimizer}
    losses = {} if auxiliary else {"load_balancing": 0.0, "router_z": 0.0}
    return train.Config(**sizes, **rest, **losses, learning_rate={"sgd": 0.1, "adamw": 1e-3}[optimizer])


def gpt(optimizer: str, kind: str, mesh, auxiliary: bool):
    """What trains a GPT-MoE, and its batches: of the text that comes with Python."""
    flags = config(optimizer, kind, auxiliary)
    tokens = texts.load((), "bytes").train[:20_000]
    batches = data.Batches(data.windows(tokens, flags.context + 1), BATCH, seed=0)
    return train.make_trainer(flags, mesh)[1], batches


def mlp(optimizer: str, kind: str, mesh, auxiliary: bool):
    """What trains a Top-K MLP, and its batches: rows of numbers, of which the last is the class."""
    del auxiliary  # it has no such losses
    model = lambda: topk_mlp.TopKMLP(topk_mlp.TopKMLPConfig(12, width=32, depth=2, num_classes=4), rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(nnx.eval_shape(model))
    optimizers = {"sgd": optax.sgd(0.1), "adamw": optax.adamw(1e-2)}
    tx = training.make_optimizer(optimizers[optimizer], strategy="zero_sum", expert_axis=-1)

    def loss_fn(params, rows):
        logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(rows[:, :-1])
        labels = rows[:, -1].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, ({"loss": loss}, utilization)

    def step(state, rows, axis_name=None):
        return training.train_step(parallel.gradient(loss_fn, axis_name=axis_name), tx, state, rows)[:2]

    def init():
        return training.TrainState.create(nnx.state(model()), tx)

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(256, 13)).astype(np.float32)
    rows[:, -1] = np.argmax(rows[:, :4], axis=1)
    return parallel.Trainer(step, init, mesh, kind), data.Batches(rows, BATCH, seed=0)


MODELS = {"gpt": gpt, "mlp": mlp}


def run(
    model: str, optimizer: str, kind: str, mesh, auxiliary: bool | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses, and the parameters after the last step by path.

    With auxiliary losses under jit only, if nothing else is said: pmap takes them of parts of the batch.
    """
    with jax.set_mesh(mesh):
        trainer, batches = MODELS[model](optimizer, kind, mesh, kind == "jit" if auxiliary is None else auxiliary)
        state, losses = trainer.init(), []
        for number in range(STEPS):
            state, logged = trainer.step(state, trainer.put(batches.shape, functools.partial(batches.rows, number)))
            losses.append(logged["loss"])
    params = multihost_utils.process_allgather(state.params, tiled=True)
    by_path = {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)}
    return np.array(jax.device_get(losses)), by_path


def in_two_processes(model: str, optimizer: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same from a job of JAX's distributed runtime over the loopback: two processes with four devices each."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        out = pathlib.Path(folder) / "out.npz"
        free.close()
        command = [sys.executable, __file__, model, optimizer, coordinator, str(out)]
        environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        jobs = [
            subprocess.Popen(
                [*command, str(i)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        errors = [job.communicate(timeout=240)[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise RuntimeError("\n".join(errors))
        saved = dict(np.load(out))
    return saved.pop("losses"), saved


def one_of_two(model: str, optimizer: str, coordinator: str, out: str, process: str) -> None:
    """Its part of a run on a mesh of 2 x 2 x 2, or for the MLP 4 x 2 x 1."""
    jax.distributed.initialize(coordinator, 2, int(process), initialization_timeout=60)
    losses, params = run(model, optimizer, "jit", parallel.make_mesh(fsdp=2, expert=2 if model == "gpt" else 1))
    if process == "0":
        np.savez(out, losses=losses, **params)


def differences(got, expected) -> tuple[float, float]:
    """Of the losses, relative to each; and of the parameters, relative to the largest entry of their leaf."""
    (losses, params), (expected_losses, expected_params) = got, expected
    assert params.keys() == expected_params.keys()
    largest = 0.0
    for path, leaf in params.items():
        reference = expected_params[path]
        if "qkv" in path and "bias" in path:  # of keys: softmax does not feel them, and their gradient is rounding
            keys = np.r_[reference.shape[-1] // 3 : 2 * reference.shape[-1] // 3]
            leaf, reference = (np.delete(a, keys, axis=-1) for a in (leaf, reference))
        largest = max(largest, float(np.max(np.abs(leaf - reference)) / np.max(np.abs(reference))))
    return float(np.max(np.abs(losses / expected_losses - 1))), largest


def main() -> None:
    """Prints the table."""
    cases = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]
    meshes = {mode: (kind, parallel.make_mesh(**sizes)) for mode, (kind, sizes) in MODES.items()}
    one = parallel.make_mesh(devices=jax.devices()[:1])
    expected = {(*case, kind): run(*case, "jit", one, kind == "jit") for case in cases for kind in ("jit", "pmap")}
    print("| | " + " | ".join(f"{model}, {optimizer}: losses, parameters" for model, optimizer in cases) + " |")
    print("| --- " + "| --: " * len(cases) + "|")
    for mode in [*meshes, "2 processes x 4 devices"]:
        kind = meshes[mode][0] if mode in meshes else "jit"
        got = [run(*case, *meshes[mode]) if mode in meshes else in_two_processes(*case) for case in cases]
        apart = [differences(result, expected[(*case, kind)]) for case, result in zip(cases, got, strict=True)]
        cells = [f"{losses:.0e}, {params:.0e}" for losses, params in apart]
        print(f"| {mode} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        one_of_two(*sys.argv[1:])
    else:
        main()
