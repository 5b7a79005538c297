"""GPT-MoEs in miniature against a loop that is written for one run."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tqdm
from flax import nnx

import excitation_optax
from examples.reproduction import configs, minis, store
from excitation_optax import flax as excitation_flax
from models import moe

pytestmark = pytest.mark.usefixtures("as_users_have_it")

TINY = {
    "num_experts": 4,
    "d_ff": 8,
    "d_model": 8,
    "num_heads": 2,
    "context": 8,
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
RUNS = [configs.MiniGPTRun(**TINY | variant) for variant in VARIANTS]


@pytest.fixture
def short(monkeypatch):
    """Epochs of three steps, and 64 windows to evaluate."""
    monkeypatch.setattr(minis, "STEPS", 3)
    monkeypatch.setattr(minis, "WINDOWS", 64)
    minis.program_of.cache_clear()
    yield
    minis.program_of.cache_clear()


def plain_loop(run, text):
    """The loss on the test windows after training, and the mean loss of every epoch."""
    graphdef, params = nnx.split(minis.make_model(run, run.seed))

    def loss_fn(params, tokens):
        logits, utilization, sown = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)(
            tokens[:, :-1]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return loss + run.load_balancing * moe.auxiliary_losses(sown).load_balancing, (loss, utilization)

    steps = run.epochs * minis.STEPS
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
        shape = (minis.STEPS, run.batch_size)
        for starts in np.asarray(jax.random.randint(key, shape, 0, len(text.train) - run.context - 1)):
            tokens = np.stack([text.train[start : start + run.context + 1] for start in starts])
            grads, (loss, utilization) = step(params, tokens)
            extra = {} if run.strategy == "vanilla" else {"utilization": utilization}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            experts = updates["layers"]["stack"]["moe"]["experts"]
            updates["layers"]["stack"]["moe"]["experts"] = jax.tree.map(lambda u: run.expert_rate * u, experts)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
    return float(loss_fn(params, text.test)[1][0]), np.reshape(losses, (run.epochs, -1)).mean(1)


@pytest.mark.slow
def test_every_run_is_that_of_a_plain_loop(short):
    text = minis.load_text("python-reference", None)
    done = []
    (group,) = minis.plan(RUNS)
    results = minis.train_group(group, text, done.append, lambda: False)
    assert done == [len(RUNS)] * 2
    on_device = minis.put(text, TINY["context"])
    assert len({result.measures["loss"] for result in results}) == len(RUNS)
    for result in results:
        loss, losses = plain_loop(result.run, on_device)
        assert result.measures["loss"] == pytest.approx(loss, rel=1e-4), result.run
        np.testing.assert_allclose(result.curve["train_loss"], losses, rtol=1e-3)
        assert np.shape(result.measures["max_load"]) == np.shape(result.measures["dead"]) == (2,)
        assert all(1 <= load <= 4 for load in result.measures["max_load"])
        assert result.measures["validation"] != result.measures["loss"]
        assert result.curve["epoch"] == [1, 2]


def test_the_text_is_cut_in_three():
    text = minis.load_text("python-reference", None)
    parts = minis.put(text, 8)
    cut = len(text.train) * 9 // 10
    np.testing.assert_array_equal(parts.train, text.train[:cut])
    assert parts.validation.shape == parts.test.shape == (minis.WINDOWS, 9)
    np.testing.assert_array_equal(parts.validation[0], text.train[cut : cut + 9])
    np.testing.assert_array_equal(parts.test[-1], text.evaluation[-9:])


def test_groups_have_one_model_and_seed():
    runs = [dataclasses.replace(run, seed=seed, num_experts=e) for e in (4, 8) for seed in (0, 1) for run in RUNS]
    groups = minis.plan(runs + runs, max_runs=4)
    assert sorted(run.key for group in groups for run in group) == sorted(run.key for run in runs)
    assert [len(list(group)) for group in groups] == [4, 4, 3, 3] * 2
    assert all(len({(run.seed, run.num_experts) for run in group}) == 1 for group in groups)


def test_train_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    trained = []

    def train_group(group, text, advance, stopped):
        trained.append(group)
        return [store.Result(run, {"loss": 1.0}, {}, 1.0, {}) for run in group]

    monkeypatch.setattr(minis, "train_group", train_group)
    results, bar = store.Results(tmp_path), tqdm.tqdm(disable=True, total=14)
    monkeypatch.setattr(bar, "update", lambda epochs: epochs and seen.append(epochs))
    seen, load = [], lambda run: minis.load_text(run.dataset, None)
    minis.train(RUNS, load, results, bar)
    assert (len(results), len(trained)) == (len(RUNS), 1)
    minis.train(RUNS, load, store.Results(tmp_path), bar)
    assert len(trained) == 1
    assert seen == [14]


def test_a_text_that_is_missing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"tinyshakespeare is read from .*tinyshakespeare.txt, which is missing"
    ):
        minis.load_text("tinyshakespeare", tmp_path)
