"""Looks inside deep Top-K MLPs on digits while they train: why the baseline stays behind, and what Excitation changes.

    python -m examples.reproduction.inside       # minutes; writes results/inside/deep_digits.json

Axis letters: S seeds, M members, L hidden layers, E neurons, B images.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import excitation_optax
from examples import datasets
from examples.reproduction import configs, engine, store, studies
from examples.reproduction.sections import COMPONENTS, Row, words
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics, plotting

FILE = pathlib.Path("inside/deep_digits.json")  # in the folder of results
SEEDS = 3
EVERY = 10  # epochs
ROWS: tuple[Row, ...] = (
    *({"strategy": "vanilla", "learning_rate": rate} for rate in (1e-3, 3e-3)),
    *({"strategy": "zero_sum", "component": c, "learning_rate": 1e-3} for c in COMPONENTS),
    {"strategy": "zero_sum", "component": "direction", "learning_rate": 3e-3},
)


def look(program: engine.Program, params: Any, data: engine.Data) -> dict[str, jax.Array]:
    """Measures of one model on the training images, by layer `[L]`.

    `dead` is the share of neurons that no image activates; `shared` the share of an image's active neurons that are
    active for another image too, on average; `signal` the share of the mean square of what a layer passes on that
    differs between images; `gradient` the norm of the loss's gradient in the layer's kernel.
    """
    images = program.normalize(data.train_images, data)

    def loss_fn(params):
        model = program.model_of(params)
        hidden, _ = excitation_flax.capture_routing(model.hidden)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), data.train_labels)
        return jnp.mean(losses), hidden

    grads, hidden = jax.grad(loss_fn, has_aux=True)(params)
    loads = jnp.stack([excitation_optax.count_active(h != 0).utilization for h in hidden])
    signal = [jnp.mean(jnp.var(h, axis=0)) / jnp.maximum(jnp.mean(h**2), 1e-30) for h in hidden]
    return {
        "dead": metrics.dead_experts(loads),
        "shared": jnp.sum(loads**2, axis=-1) / jnp.maximum(jnp.sum(loads, axis=-1), 1e-30),
        "signal": jnp.stack(signal),
        "gradient": jnp.stack([jnp.linalg.norm(kernel) for kernel in kernels(grads)]),
    }


def kernels(params: Any) -> list[jax.Array]:
    """The kernels of the hidden layers."""
    return [params["layers"][i]["kernel"][...] for i in range(len(params["layers"]))]


def run(data: datasets.ImageData, epochs: int = 100, **changes: Any) -> dict[str, Any]:
    """Trains the rows and looks at them at the start and every ten epochs.

    Returns:
      `epoch`, and for each row, by its label and learning rate: `accuracy` by epoch and seed; the measures of `look`
      by epoch, seed and layer; and `step`, the length of the change of each layer's kernel in the epoch before.
    """
    settings: dict[str, Any] = studies.SECTIONS["deep_digits"].settings | {"epochs": epochs} | changes
    make = lambda row, seed: configs.MLPRun(**{**settings, **row, "seed": seed})
    group = engine.Group(tuple(tuple(make(row, seed) for row in ROWS) for seed in range(SEEDS)))
    program, members, seeds, on_device = engine.Program.prepare(group, data)
    measure = jax.jit(lambda params: jax.vmap(jax.vmap(functools.partial(look, program, data=on_device)))(params))
    states = program.init(members, seeds)
    seen: list[dict[str, np.ndarray]] = []
    for epoch in range(epochs + 1):
        before = jax.device_get(kernels(states[0]))
        if epoch:
            states, _ = program.train_epoch(states, members, seeds, epoch, on_device)
        if epoch % EVERY == 0:
            after = jax.device_get(kernels(states[0]))
            step = [np.sqrt(np.sum((a - b) ** 2, axis=(-1, -2))) for a, b in zip(after, before, strict=True)]
            accuracy = program.evaluate(states[0], on_device)["accuracy"]
            seen.append({"accuracy": accuracy, "step": np.stack(step, axis=-1), **measure(states[0])})
    rounded = lambda x: np.vectorize(lambda v: float(f"{v:.3g}"))(np.asarray(x, float)).tolist()
    rows = {
        f"{words(row)}, {row['learning_rate']:g}": {name: [rounded(at[name][:, m]) for at in seen] for name in seen[0]}
        for m, row in enumerate(ROWS)
    }
    return {"epoch": list(range(0, epochs + 1, EVERY)), "rows": rows}


def load(folder: pathlib.Path) -> dict[str, Any] | None:
    """What is on file in the folder of results, if anything."""
    return store.load_json(folder / FILE, "examples.reproduction.inside")


def draw(outcome: dict[str, Any], figure: Any) -> None:
    """Accuracy along training; by layer, the signal after ten epochs, and shared and dead neurons at the end."""
    figure.set_size_inches(7.5, 6)
    first, signal, shared, dead = figure.subplots(2, 2).ravel()
    for row, (label, found) in zip(ROWS, outcome["rows"].items(), strict=True):
        style = {"label": label, "color": plotting.COLORS[row.get("component", "baseline")], "marker": "."}
        style["linestyle"] = "-" if row["learning_rate"] == 1e-3 else ":"
        first.plot(outcome["epoch"], 100 * np.mean(found["accuracy"], axis=-1), **style)
        for axes, name, at in ((signal, "signal", 1), (shared, "shared", -1), (dead, "dead", -1)):
            values = np.mean(found[name][at], axis=0)
            axes.plot(np.arange(1, len(values) + 1), values, **style)
    first.set(xlabel="epoch", title="test accuracy (%)")
    signal.set(title="share of the signal that differs\nby image, epoch 10", yscale="log")
    shared.set(title="share of an image's active neurons that\nanother image activates too, at the end")
    dead.set(title="share of dead neurons,\nat the end")
    for axes in (signal, shared, dead):
        axes.set(xlabel="hidden layer")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


if __name__ == "__main__":
    store.save_json(store.FOLDER / FILE, run(datasets.load_digits()))
    print(store.FOLDER / FILE)
