"""Trains a transformer of the paper's section 4.5: a MoE-ViT (figures 6, 10 and 11) or a GPT-MoE (table 2).

The runs of a seed start from the same parameters and see the same batches with the same augmentation, whatever their
strategy, so differences between strategies can be paired by seed. The data stays on the device, and steps are compiled
in chunks. A run of more than ten minutes writes checkpoints, from which it resumes with the same bits.

Axis letters: B batch, S sequence, L layers, E experts, K experts per token.
"""

import functools
import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import datasets, logs, texts, train_gpt_moe, train_moe_vit, training
from examples.reproduction import configs, inputs, store
from excitation_optax import flax as excitation_flax
from excitation_optax import metrics
from models import gpt_moe, moe, moe_vit

CHUNK = 20  # steps of a call of the compiled program
EVALUATE_EVERY = 1000  # steps, and at the end of every epoch
CHECKPOINT_SECONDS = 600
EVALUATION_BATCH = 500  # images


class Task(NamedTuple):
    """What a run trains, and on what."""

    data: Any  # arrays on the device
    examples: int
    unit: str  # what the examples are
    batch: Callable[..., Any]  # (number of the step, data, indices of examples [B]) -> a batch of `loss_fn`
    params: Any  # at the start; `train` donates them
    loss_fn: Callable[..., Any]  # (params, batch, weights of the routers' losses)
    measure: Callable[[Any], dict[str, Any]]  # of params, on held-out data


def vit(run: configs.ViTRun, data: datasets.ImageData) -> Task:
    """A MoE-ViT, measured on the test images. Gray images are repeated in 3 channels.

    Measures are the accuracy, and for each layer `entropy` (nats, of the router's probabilities), `max_load` (of the
    busiest expert, over the mean) and `dead` (the fraction of experts that no patch goes to).
    """
    sizes = {"image_size": data.train_images.shape[1], "num_classes": data.num_classes}
    config = train_moe_vit.model_config(run, **sizes, patch_size=run.patch_size)
    rgb = lambda images: jnp.broadcast_to(images, (*images.shape[:-1], 3))
    train_images, test_images = rgb(data.train_images[: run.subset]), rgb(data.test_images)
    test_labels = jnp.asarray(data.test_labels)
    graphdef, params = nnx.split(moe_vit.MoEViT(config, rngs=nnx.Rngs(run.seed)))

    def batch(number, train, indices):
        images, labels, augmentation_key = train
        return images[indices], labels[indices], jax.random.fold_in(augmentation_key, number)

    @jax.jit
    def evaluate(params, images, labels):
        model = nnx.merge(graphdef, params)
        model.eval()
        run_model = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)
        logits, utilization, sown = run_model(train_moe_vit.to_unit_range(images))
        (entropy,) = [value[...] for path, value in nnx.to_flat_state(sown) if path[-1] == "entropy"]
        return {
            "correct": jnp.sum(jnp.argmax(logits, axis=-1) == labels),
            "broken": ~jnp.all(jnp.isfinite(logits)),
            "entropy": jnp.ravel(entropy) * len(labels),
            "routing": utilization["layers"]["stack"]["moe"]["experts"],
        }

    def measure(params):
        batches = [slice(i, i + EVALUATION_BATCH) for i in range(0, len(test_labels), EVALUATION_BATCH)]
        parts = [jax.device_get(evaluate(params, test_images[batch], test_labels[batch])) for batch in batches]
        total: Any = jax.tree.map(lambda *leaves: np.sum(np.stack(leaves), axis=0), *parts)
        return {
            "accuracy": math.nan if total["broken"] else int(total["correct"]) / len(test_labels),
            "entropy": np.asarray(total["entropy"] / len(test_labels)).tolist(),
            "max_load": np.asarray(metrics.max_over_mean_load(total["routing"])).tolist(),
            "dead": np.asarray(metrics.dead_experts(total["routing"])).tolist(),
        }

    # The key is data, so that all seeds are the same program. It is apart from the keys of random strategies.
    on_device = train_images, jnp.asarray(data.train_labels), jax.random.fold_in(jax.random.key(run.seed), 1)
    loss_fn = functools.partial(train_moe_vit.loss_fn, graphdef, flip=bool(run.flip))
    return Task(on_device, len(train_images), "training images", batch, params, loss_fn, measure)


def gpt(run: configs.GPTRun, text: texts.Text) -> Task:
    """A GPT-MoE, measured on the held-out text by the `perplexity` per token and the `bits_per_byte`."""
    sequences = (len(text.train) - 1) // run.context
    config = train_gpt_moe.model_config(run, text.vocab_size, dtype=run.dtype)
    graphdef, params = nnx.split(gpt_moe.GPTMoE(config, rngs=nnx.Rngs(run.seed)))

    def batch(number, train, indices):
        del number
        return train[indices[:, None] * run.context + jnp.arange(run.context + 1)[None]]  # [B, S + 1]

    def measure(params):
        found = train_gpt_moe.measure(graphdef, params, text, run.context, run.batch_size)
        return {name: found[name] for name in ("perplexity", "bits_per_byte")}

    examples, unit = min(sequences, run.subset or sequences), f"sequences of {run.context} tokens"
    loss_fn = functools.partial(train_gpt_moe.loss_fn, graphdef)
    return Task(jnp.asarray(text.train), examples, unit, batch, params, loss_fn, measure)


def make_optimizer(run: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """SGD or Adam with warm-up and cosine decay to zero, and Excitation after it. Experts are the leading axes."""
    schedule = training.warmup_cosine(run.learning_rate, run.warmup, steps)
    optimizer = training.OPTIMIZERS[getattr(run, "optimizer", "adam")](schedule)
    strategy = training.from_run(run.strategy)
    return training.make_optimizer(optimizer, strategy=strategy, gamma=run.gamma, seed=run.seed)


def train(run: Any, data: Any, progress: Any = None, folder: pathlib.Path | None = None) -> store.Result:
    """Trains a run in epochs over shuffled examples, measures along the way, and writes checkpoints.

    The result has the last measures, and curves of the training loss and all measures, means over the layers. Call
    `forget` once it is on file.

    Args:
      run: a `ViTRun` or a `GPTRun`.
      data: the data set `run.dataset`, from `inputs.load`.
      progress: is called after every chunk of steps with the epochs so far, such as 0.5, and a line about the run.
      folder: for the checkpoint of a long run. None writes none.

    Raises:
      ValueError: if there is not a single full batch, or a size does not fit.
    """
    start = saved = time.monotonic()
    task = vit(run, data) if isinstance(run, configs.ViTRun) else gpt(run, data)
    steps_per_epoch = task.examples // run.batch_size
    if not steps_per_epoch:
        raise ValueError(f"batch_size must be at most the {task.examples} {task.unit}; got {run.batch_size}.")
    tx = make_optimizer(run, run.epochs * steps_per_epoch)
    losses = {"load_balancing": run.load_balancing, "router_z": 0.0}
    gradient = jax.grad(functools.partial(task.loss_fn, **losses), has_aux=True)
    parameters = training.size_of(task.params)
    state = training.TrainState.create(task.params, tx)
    checkpoint = None if folder is None else folder / f"{run.key}.npz"
    reached, curve, seconds = 0, {"epoch": [], "train_loss": []}, 0.0  # what a checkpoint holds, beside the state
    if checkpoint is not None and (restored := _restore(checkpoint, state)):
        state, (reached, curve, seconds) = restored
    within = [*range(EVALUATE_EVERY, steps_per_epoch, EVALUATE_EVERY), steps_per_epoch]
    stops = [epoch * steps_per_epoch + number for epoch in range(run.epochs) for number in within]

    # Any number of steps is the same program.
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, data, order, row, count):
        def body(i, carry):
            state, losses = carry
            batch = task.batch(state.step, data, order[row + i])
            state, logged, _ = training.train_step(gradient, tx, state, batch)
            return state, losses.at[i].set(logged["loss"])

        return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(CHUNK)))

    measures = {}
    for stop in (stop for stop in stops if stop > reached):
        epoch = reached // steps_per_epoch
        order = np.random.default_rng((run.seed, epoch + 1)).permutation(task.examples).astype(np.int32)
        order = jnp.asarray(order[: steps_per_epoch * run.batch_size].reshape(steps_per_epoch, -1))
        losses = []
        while reached < stop:
            count = min(CHUNK, stop - reached)
            state, chunk = advance(state, task.data, order, reached - epoch * steps_per_epoch, count)
            losses += np.asarray(chunk)[:count].tolist()  # waits for it
            reached += count
            if progress is not None:
                progress(reached / steps_per_epoch, f"loss {losses[-1]:.3f}")
        measures = task.measure(state.params)
        curve["epoch"].append(reached / steps_per_epoch)
        curve["train_loss"].append(float(np.mean(losses)))
        for name, value in measures.items():
            curve.setdefault(name, []).append(float(np.mean(value)))
        if checkpoint is not None and reached < stops[-1] and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            _save(checkpoint, state, (reached, curve, seconds + time.monotonic() - start))
            saved = time.monotonic()
    about = store.environment() | {"date": store.now()} | inputs.about(run, data) | {"parameters": parameters}
    return store.Result(run, measures, curve, round(seconds + time.monotonic() - start, 2), about)


def forget(run: configs.Run, folder: pathlib.Path) -> None:
    """Removes the checkpoint of a run. Only do so when its result is on file."""
    (folder / f"{run.key}.npz").unlink(missing_ok=True)


def _save(path: pathlib.Path, state: Any, reached: tuple) -> None:
    """Replaces the checkpoint, so that there always is a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with logs.naming(temporary):
        with temporary.open("wb") as file:
            np.savez(file, *jax.device_get(jax.tree.leaves(state)), reached=json.dumps(reached))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _restore(path: pathlib.Path, like: Any) -> tuple[Any, list] | None:
    """What was saved; None if there is nothing, or it is damaged and was set aside."""
    if not path.exists():
        return None
    leaves, structure = jax.tree.flatten(like)
    try:
        with path.open("rb") as file, np.load(file) as saved:
            arrays = [saved[f"arr_{i}"] for i in range(len(saved.files) - 1)]
            reached = json.loads(str(saved["reached"]))
        if [(a.shape, a.dtype) for a in arrays] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            raise ValueError("its arrays are not those of this model and optimizer")
    except PermissionError:
        raise
    except datasets.DAMAGED_NPZ as error:
        warnings.warn(
            f"The checkpoint {path} is damaged ({error!r:.200}). It is kept as {logs.set_aside(path).name}, and the "
            "run starts anew.",
            stacklevel=2,
        )
        return None
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays]), reached
