"""Transformers in miniature against a loop that is written for one run."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import optax
import pytest
import tqdm
from flax import nnx

import excitation_optax
from examples import datasets
from examples.reproduction import configs, inputs, stacks, store, transformers
from excitation_optax import flax as excitation_flax
from models import moe

pytestmark = pytest.mark.usefixtures("as_users_have_it")

TINY = {
    "num_experts": 4,
    "d_ff": 8,
    "d_model": 8,
    "num_heads": 2,
    "batch_size": 4,
    "epochs": 2,
    "learning_rate": 0.01,
    "seed": 3,
}
VARIANTS = (
    {},
    {"strategy": "zero_sum"},
    {"strategy": "zero_sum", "component": "direction", "gamma": 0.5},
    {"strategy": "positive_sum", "component": "norm"},
    {"expert_rate": 0.5},
    {"load_balancing": 0.0},
    {"learning_rate": 0.02},
)
BIASED = {"router_bias": 0.01, "load_balancing": 0.0, "strategy": "zero_sum"}
RUNS = [configs.MiniGPTRun(**TINY | {"context": 8} | variant) for variant in VARIANTS]


@pytest.fixture
def short(monkeypatch):
    """Epochs of three steps, and 64 windows to evaluate."""
    monkeypatch.setattr(transformers, "STEPS", 3)
    monkeypatch.setattr(transformers, "WINDOWS", 64)
    stacks.program_of.cache_clear()
    yield
    stacks.program_of.cache_clear()


def plain_loop(run, data, program):
    """The measure on the test data after training, and the mean loss of every epoch."""
    graphdef, params, rest = nnx.split(program.make_model(run.seed), nnx.Param, ...)

    def loss_fn(params, rest, inputs, labels):
        rest = jax.tree.map(lambda leaf: leaf, rest)  # new Variables, of the trace level of this call
        model = excitation_flax.capture_routing(nnx.merge(graphdef, params, rest), moe.AuxiliaryLoss)
        logits, utilization, sown = model(inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        minimized = loss + run.load_balancing * moe.auxiliary_losses(sown).load_balancing
        return minimized, (loss, utilization, (logits.argmax(-1) == labels).mean())

    steps = run.epochs * transformers.STEPS
    schedule = optax.warmup_cosine_decay_schedule(0.0, run.learning_rate, 1, steps)
    transforms = [optax.adamw(schedule, weight_decay=0.01)]
    if run.strategy != "vanilla":
        strategy = getattr(excitation_optax, run.strategy)
        transforms.append(excitation_optax.scale_by_excitation(strategy, run.gamma, component=run.component))
    tx = optax.chain(*transforms)
    opt_state, losses = tx.init(params), []
    step = jax.jit(jax.grad(loss_fn, has_aux=True))
    for epoch in range(1, run.epochs + 1):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 1), epoch)
        for numbers in np.asarray(program.rows(key, data)):
            inputs, labels = by_hand(run, data.train, numbers)
            grads, (loss, utilization, _) = step(params, rest, inputs, labels)
            extra = {} if run.strategy == "vanilla" else {"utilization": utilization}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            experts = updates["layers"]["stack"]["moe"]["experts"]
            updates["layers"]["stack"]["moe"]["experts"] = jax.tree.map(lambda u: run.expert_rate * u, experts)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
            if run.router_bias:
                counts = np.asarray(utilization["layers"]["stack"]["moe"]["experts"].counts)
                bias = rest["layers"]["stack"]["moe"]["router"]["bias"]
                moved = bias[...] + run.router_bias * np.sign(counts.mean(-1, keepdims=True) - counts)
                bias[...] = moved - moved.mean(-1, keepdims=True)
    _, (loss, _, accuracy) = loss_fn(params, rest, *data.test)
    return float(loss if run.kind == "mini_gpt" else accuracy), np.reshape(losses, (run.epochs, -1)).mean(1)


def by_hand(run, train, numbers):
    """Inputs and labels of a batch."""
    if run.kind == "mini_gpt":
        tokens = np.stack([train[start : start + run.context + 1] for start in numbers])
        return tokens[:, :-1], tokens[:, 1:]
    images, labels = train
    flipped = [images[n] if n < len(labels) else images[n - len(labels)][:, ::-1] for n in numbers]
    return np.stack(flipped).astype(np.float32) / 127.5 - 1, labels[numbers % len(labels)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mini_gpt", "mini_vit"])
def test_every_run_is_that_of_a_plain_loop(kind, short):
    """Its loss, its measure and its load; images are mirrored, and a router has a bias if the run has a rate for it."""
    if kind == "mini_gpt":
        runs, data = [*RUNS, dataclasses.replace(RUNS[0], **BIASED)], inputs.load(RUNS[0], None)
    else:
        tiny = TINY | {"dataset": "cifar10", "patch_size": 4, "subset": 500}
        runs = [configs.MiniViTRun(**tiny | variant) for variant in (*VARIANTS[:2], BIASED)]
        digits = datasets.load_digits()
        colored = {f"{part}_images": getattr(digits, f"{part}_images").repeat(3, -1) for part in ("train", "test")}
        data = dataclasses.replace(digits, **colored)
    program_of = transformers.MiniGPTProgram if kind == "mini_gpt" else transformers.MiniViTProgram
    for group in program_of.plan(runs):
        done = []
        count = lambda epochs, _, done=done: done.append(epochs)
        results = program_of.train_group(group, data, count, lambda: False)
        assert done == [len(group.runs[0])] * 2
        program, *_, on_device = program_of.prepare(group, data)
        for result in results:
            found, losses = plain_loop(result.run, on_device, program)
            assert result.measures[program.measure] == pytest.approx(found, rel=1e-4), result.run
            np.testing.assert_allclose(result.curve["train_loss"], losses, rtol=1e-3)
            assert np.shape(result.measures["max_load"]) == np.shape(result.measures["dead"]) == (2,)
            assert all(1 <= load <= 4 for load in result.measures["max_load"])
            assert result.curve["epoch"] == [1, 2]
        if kind == "mini_gpt":
            assert len({result.measures["loss"] for result in results}) == len(results)


def test_the_text_is_cut_in_three():
    text = inputs.load(RUNS[0], None)
    parts = transformers.MiniGPTProgram.put(text, configs.MiniGPTRun(context=8))
    cut = len(text.train) * 9 // 10
    np.testing.assert_array_equal(parts.train, text.train[:cut])
    for (tokens, labels), first in ((parts.validation, text.train[cut:]), (parts.test, text.evaluation)):
        assert tokens.shape == labels.shape == (transformers.WINDOWS, 8)
        np.testing.assert_array_equal(tokens[0], first[:8])
        np.testing.assert_array_equal(labels[-1], first[-8:] if first is text.evaluation else text.train[-8:])
    assert len(transformers.MiniGPTProgram.put(text, configs.MiniGPTRun(subset=100)).train) == 100


def test_images_are_cut_in_three():
    digits = datasets.load_digits()
    parts = transformers.MiniViTProgram.put(digits, configs.MiniViTRun(dataset="digits"))
    cut = len(digits.train_labels) * 9 // 10
    np.testing.assert_array_equal(parts.train[0], digits.train_images[:cut].repeat(3, -1))
    for (images, labels), whole in ((parts.validation, digits.train_labels[cut:]), (parts.test, digits.test_labels)):
        assert images.shape == (len(labels), 8, 8, 3)
        assert 0 <= len(whole) - len(labels) < 256
        np.testing.assert_array_equal(labels, whole[: len(labels)])


def test_groups_have_one_model_and_seed():
    runs = [dataclasses.replace(run, seed=seed, num_experts=e) for e in (4, 8) for seed in (0, 1) for run in RUNS]
    groups = transformers.MiniGPTProgram.plan(runs + runs, max_runs=4)
    assert sorted(run.key for group in groups for run in group) == sorted(run.key for run in runs)
    assert [len(list(group)) for group in groups] == [4, 4, 3, 3] * 2
    assert all(len({(run.seed, run.num_experts) for run in group}) == 1 for group in groups)


def test_train_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    trained = []

    def train_group(group, text, advance, stopped, checkpoint):
        trained.append(group)
        return [store.Result(run, {"loss": 1.0}, {}, 1.0, {}) for run in group]

    monkeypatch.setattr(transformers.MiniGPTProgram, "train_group", train_group)
    results, bar = store.Results(tmp_path), tqdm.tqdm(disable=True, total=14)
    monkeypatch.setattr(bar, "update", lambda epochs: epochs and seen.append(epochs))
    seen, load = [], lambda run: inputs.load(run, None)
    transformers.MiniGPTProgram.train(RUNS, load, results, bar)
    assert (len(results), len(trained)) == (len(RUNS), 1)
    transformers.MiniGPTProgram.train(RUNS, load, store.Results(tmp_path), bar)
    assert len(trained) == 1
    assert seen == [14]


def test_few_programs_are_kept():
    """Sixty sizes of a model, as in Table 2, would fill a process's memory maps."""

    class Kind:
        def __init__(self, number):
            self.number = number

    made = [weakref.ref(stacks.program_of(Kind, number)) for number in range(20)]
    gc.collect()
    kept = [program().number for program in made if program() is not None]
    assert kept == list(range(20 - len(kept), 20))
    assert 1 < len(kept) <= 8
    stacks.program_of.cache_clear()
