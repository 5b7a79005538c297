"""Runs of the paper's transformers: against plain loops, paired, repeatable; measures, checkpoints, texts, errors."""

import dataclasses
import io
import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax
from examples import datasets, reproduce, texts, train_moe_vit
from examples.reproduction import configs, inputs, stacks, store, transformers
from excitation_optax import flax as excitation_flax
from models import gpt_moe, moe, moe_vit

LAYER = moe.MoEConfig(d_model=8, d_ff=8, num_experts=4, experts_per_token=2)
SIZES = {"num_experts": 4, "experts_per_token": 2, "d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2}
VIT = SIZES | {"dataset": "digits", "batch_size": 16, "epochs": 2, "subset": 60, "learning_rate": 0.03}
GPT = SIZES | {"dataset": "abc", "batch_size": 4, "epochs": 2, "subset": 14, "learning_rate": 0.03, "context": 8}


@pytest.fixture(scope="module")
def digits():
    """Fewer test images, so that these tests are fast."""
    data = datasets.load_digits()
    return dataclasses.replace(data, test_images=data.test_images[:50], test_labels=data.test_labels[:50])


@pytest.fixture(scope="module")
def text():
    parts = [b"abcab" * n for n in (40, 13)]
    return texts.Text(*(texts.encode(part, "bytes") for part in parts), parts[1], 256, "abc")


def train(run, data, advance=lambda epochs, seen: None, stopped=lambda: False, checkpoint=None):
    program = reproduce.PROGRAMS[run.kind]
    (group,) = program.plan([run])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        results = program.train_group(group, data, advance, stopped, checkpoint)
    return results[0] if results else None


def train_vit(digits, *args, **kwargs):
    return train(configs.ViTRun(**VIT | kwargs), digits, *args)


def train_gpt(text, *args, **kwargs):
    return train(configs.GPTRun(**GPT | kwargs), text, *args)


@pytest.fixture(scope="module")
def vit(digits):
    return train_vit(digits)


@pytest.fixture(scope="module")
def gpt(text):
    return train_gpt(text)


# Against plain loops.


def plain_loop(run, model, data, examples, batches):
    """Step by step, with excitation multiplied in by hand; `batches(key, indices)` gives inputs and labels."""
    graphdef, params = nnx.split(model)
    program, _, seeds, on_device = reproduce.PROGRAMS[run.kind].prepare(stacks.Group(((run,),)), data)
    per_epoch = examples // run.batch_size
    steps = run.epochs * per_epoch
    warmup = max(1, round(0.05 * steps))
    tx = optax.identity() if getattr(run, "optimizer", "adam") == "sgd" else optax.scale_by_adam()

    @jax.jit
    def step(params, state, inputs, labels, rate):
        def loss_fn(params):
            capture = excitation_flax.capture_routing(nnx.merge(graphdef, params), moe.AuxiliaryLoss)
            logits, utilization, sown = capture(inputs)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss + 0.01 * moe.auxiliary_losses(sown).load_balancing, (loss, utilization)

        grads, (loss, utilization) = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        phi = jnp.ones((2, 4))  # layers and experts
        if run.strategy != "vanilla":
            counts = utilization["layers"]["stack"]["moe"]["experts"]
            phi = getattr(excitation_optax, run.strategy)(counts.utilization, run.gamma)

        def move(path, param, update):
            if "experts" in jax.tree_util.keystr(path):
                update *= phi.reshape(phi.shape + (1,) * (update.ndim - 2))
            return param - rate * update

        return jax.tree.map_with_path(move, params, updates), state, loss

    state, losses = tx.init(params), []
    for number in range(steps):
        falling = (1 + math.cos(math.pi * (number - warmup) / (steps - warmup))) / 2
        rate = run.learning_rate * ((number + 1) / warmup if number < warmup else falling)
        if number % per_epoch == 0:  # the first of an epoch, in which no example is there twice
            order, keys = program.rows_of_epoch(seeds, number // per_epoch + 1, on_device)
            assert len(set(np.ravel(order).tolist()) & set(range(examples))) == per_epoch * run.batch_size
        row = number % per_epoch
        params, state, loss = step(params, state, *batches(keys[0, row], np.asarray(order[0, row])), rate)
        losses.append(float(loss))
    return np.reshape(losses, (run.epochs, per_epoch)).mean(1), nnx.merge(graphdef, params)


CASES = [
    {"optimizer": "sgd", "strategy": "zero_sum", "learning_rate": 0.3, "seed": 1},
    {"optimizer": "adam", "strategy": "positive_sum", "gamma": 2.0, "flip": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", CASES)
def test_a_vit_is_trained_as_by_a_plain_loop(digits, kwargs):
    result = train_vit(digits, **kwargs)
    run = result.run
    config = moe_vit.MoEViTConfig(moe=LAYER, num_layers=2, num_heads=2, image_size=8, patch_size=4, num_classes=10)
    rgb = lambda images: jnp.asarray(np.tile(images, (1, 1, 1, 3)))

    def batches(key, indices):
        images = train_moe_vit.to_unit_range(rgb(digits.train_images[indices]))
        images = train_moe_vit.augment(key, images, flip=run.flip)
        return images, jnp.asarray(digits.train_labels[indices])

    with jax.numpy_dtype_promotion("standard"):
        losses, model = plain_loop(run, moe_vit.MoEViT(config, rngs=nnx.Rngs(run.seed)), digits, 60, batches)
    assert result.curve["epoch"] == [1, 2]
    np.testing.assert_allclose(result.curve["train_loss"], losses, rtol=1e-3)  # of four digits
    inputs = train_moe_vit.to_unit_range(rgb(digits.test_images))
    logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(inputs)
    accuracy = np.mean(np.argmax(np.asarray(logits), axis=-1) == digits.test_labels)
    assert result.measures["accuracy"] == pytest.approx(accuracy, abs=0.021)  # rounding may turn an image over
    u = utilization["layers"]["stack"]["moe"]["experts"].utilization
    np.testing.assert_allclose(result.measures["max_load"], u.max(1) / u.mean(1), atol=0.05)
    np.testing.assert_allclose(np.mean(result.measures["entropy"]), moe.auxiliary_losses(sown).entropy, rtol=1e-2)


def test_a_gpt_is_trained_as_by_a_plain_loop(text, gpt):
    run, result = gpt.run, gpt
    config = gpt_moe.GPTMoEConfig(moe=LAYER, num_layers=2, num_heads=2, context=8, vocab_size=256)

    def batches(key, indices):
        windows = jnp.stack([jnp.asarray(text.train[8 * i : 8 * i + 9]) for i in indices])
        return windows[:, :-1], windows[:, 1:]

    with jax.numpy_dtype_promotion("standard"):
        losses, model = plain_loop(run, gpt_moe.GPTMoE(config, rngs=nnx.Rngs(run.seed)), text, 14, batches)
    np.testing.assert_allclose(result.curve["train_loss"], losses, rtol=1e-3)  # of four digits
    targets = []  # 65 tokens: eight windows
    model.eval()
    call = jax.jit(lambda tokens: model(tokens))
    for i in range(8):
        window = text.evaluation[8 * i : 8 * i + 9]
        logits = np.asarray(call(window[None, :-1]), np.float64)[0]
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        shares = shifted / shifted.sum(-1, keepdims=True)
        targets += [shares[t, window[t + 1]] for t in range(8)]
    loss = -np.mean(np.log(targets))
    assert result.measures["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
    assert result.measures["bits_per_byte"] == pytest.approx(loss / np.log(2), rel=1e-3)


# Paired and repeatable.


def numbers(result):
    return result.measures, result.curve


@pytest.mark.slow
def test_a_run_repeats_bit_by_bit(digits, text, vit, gpt):
    assert numbers(train_vit(digits)) == numbers(vit)
    assert numbers(train_gpt(text)) == numbers(gpt)
    assert train_vit(digits, seed=1).curve["train_loss"] != vit.curve["train_loss"]
    assert train_gpt(text, seed=1).curve["train_loss"] != gpt.curve["train_loss"]


@pytest.mark.slow
def test_the_strategies_of_a_seed_start_alike(digits):
    """One step is an epoch here: what it reports is the loss of the first parameters on the first batch."""
    curves = [
        train_vit(digits, subset=16, strategy=strategy, gamma=3.0).curve["train_loss"]
        for strategy in ("vanilla", "zero_sum")
    ]
    assert np.all(np.isfinite(curves))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-6)
    assert abs(curves[0][1] - curves[1][1]) > 1e-5


# Results.


@pytest.mark.slow
def test_what_is_measured_of_a_vit(vit, digits, monkeypatch):
    assert set(vit.measures) == {"accuracy", "entropy", "max_load", "dead"}
    assert 50 * vit.measures["accuracy"] == pytest.approx(round(50 * vit.measures["accuracy"]))
    assert all(0 < entropy <= math.log(4) for entropy in vit.measures["entropy"])
    assert all(1 <= load <= 2 for load in vit.measures["max_load"])  # E / K
    assert all(4 * dead in (0, 1, 2) for dead in vit.measures["dead"])
    assert {len(vit.measures[name]) for name in ("entropy", "max_load", "dead")} == {2}  # layers
    assert vit.curve["epoch"] == [1, 2]
    assert vit.curve["accuracy"][-1] == pytest.approx(vit.measures["accuracy"], rel=1e-3)
    assert vit.curve["entropy"][-1] == pytest.approx(np.mean(vit.measures["entropy"]), rel=1e-3)
    assert vit.about["fingerprint"] == digits.fingerprint
    assert vit.about["data"] == "digits (as TensorFlow Datasets has it)"
    monkeypatch.setattr(transformers.ViTProgram, "evaluation_batch", 13)  # of 50 images: five batches of 10
    stacks.program_of.cache_clear()
    in_batches = train_vit(digits).measures
    stacks.program_of.cache_clear()
    for name in vit.measures:
        np.testing.assert_allclose(in_batches[name], vit.measures[name], rtol=1e-5)


@pytest.mark.slow
def test_results_can_be_stored(tmp_path, vit, gpt):
    store.Results(tmp_path).append([vit, gpt])
    results = store.Results(tmp_path)
    assert not results.damaged
    assert [numbers(results[r.run]) for r in (vit, gpt)] == [numbers(vit), numbers(gpt)]


@pytest.mark.slow
def test_a_gpt_learns_its_text(text, gpt):
    result = train_gpt(text, epochs=30)
    assert result.curve["epoch"] == list(range(2, 31, 2))
    assert set(result.curve) == {"epoch", "train_loss", "perplexity", "bits_per_byte"}
    assert result.measures["perplexity"] < 3 < gpt.measures["perplexity"]


@pytest.mark.slow
def test_a_model_that_diverges_has_no_accuracy(digits):
    result = train_vit(digits, optimizer="sgd", learning_rate=1e30)
    assert math.isnan(result.measures["accuracy"])


# Along the way.


@pytest.mark.slow
def test_epochs_in_parts_change_nothing(text, gpt, monkeypatch):
    monkeypatch.setattr(transformers.Paper, "most_steps", 2)  # of the three steps of an epoch
    seen = []
    again = train_gpt(text, lambda epochs, line: seen.append((epochs, line)))
    np.testing.assert_allclose([epochs for epochs, _ in seen], [2 / 3, 1 / 3] * 2)
    assert all(line.startswith("loss ") for _, line in seen)
    assert again.measures == gpt.measures
    np.testing.assert_allclose(again.curve["train_loss"], gpt.curve["train_loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(digits, tmp_path, monkeypatch):
    strategy, path = "random_boost", tmp_path / "checkpoints" / "key.npz"  # it has a state
    monkeypatch.setattr(stacks, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(transformers.Paper, "most_steps", 1)
    whole = train_vit(digits, epochs=3, strategy=strategy)
    seen = []
    count = lambda epochs, _: seen.append(epochs)
    assert train_vit(digits, count, lambda: len(seen) == 8, path, epochs=3, strategy=strategy) is None
    assert [kept.name for kept in path.parent.iterdir()] == ["key.npz"]
    seen.clear()
    result = train_vit(digits, count, lambda: False, path, epochs=3, strategy=strategy)
    np.testing.assert_allclose(seen, [8 / 3, 1 / 3])  # the last checkpoint was before the eighth step
    assert numbers(result) == numbers(whole)
    assert path.exists()  # until the result is on file


# What a checkpoint may look like after a bad sector, a full disk or another version of this program.
DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "its end": lambda content: content[:-30] + bytes([content[-30] ^ 1]) + content[-29:],
    "of other arrays": lambda content: saved(arr_0=np.zeros(3), notes="[1, {}, 0]"),
    "without the notes": lambda content: saved(arr_0=np.zeros(3), arr_1=np.zeros(3)),
    "notes that are no JSON": lambda content: saved(arr_0=np.zeros(3), notes="[1"),
}


def saved(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(damage, tmp_path):
    state = {"a": jnp.arange(500.0), "b": jnp.ones((3, 4), jnp.int32)}
    path = tmp_path / "key.npz"
    store.save_checkpoint(path, state, (3, {"epoch": [1]}, 2.5))
    restored, reached = store.restore_checkpoint(path, state)
    assert reached == [3, {"epoch": [1]}, 2.5]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    for kept in ("key.npz.damaged", "key.npz.damaged-2"):
        store.save_checkpoint(path, state, (3, {}, 2.5))
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
        with pytest.warns(UserWarning, match=rf"{path} is damaged .*is kept as {kept}, and the runs start anew"):
            assert store.restore_checkpoint(path, state) is None
        assert not path.exists()
        assert (tmp_path / kept).exists()


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    """Or changes nothing, as in the date of a file in the archive."""
    state = {"a": jnp.arange(50.0), "b": jnp.ones((3, 4), jnp.int32)}
    path = tmp_path / "key.npz"
    store.save_checkpoint(path, state, (3, {"epoch": [1]}, 2.5))
    content = path.read_bytes()
    found = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if restored := store.restore_checkpoint(path, state):
                jax.tree.map(np.testing.assert_array_equal, restored[0], state)
                assert restored[1] == [3, {"epoch": [1]}, 2.5]
            else:
                found += 1
    assert found > 100


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "key.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*key\.tmp'"):
        store.save_checkpoint(tmp_path / "key.npz", {"a": jnp.arange(5000.0)}, (3, {}, 2.5))


def test_a_short_run_leaves_no_checkpoint(digits, tmp_path, vit):
    path = tmp_path / "key.npz"
    assert numbers(train_vit(digits, lambda *_: None, lambda: False, path)) == numbers(vit)
    assert not list(tmp_path.iterdir())


# The optimizer.


def test_the_rate_rises_and_falls_as_a_cosine():
    run = configs.ViTRun(optimizer="sgd", learning_rate=2.0, warmup=0.2, batch_size=16, epochs=2)
    program = transformers.ViTProgram(run, ("vanilla",), 160, 32, 10)  # 20 steps
    tx = program.make_optimizer(stacks.Member(0, 1.0, jnp.float32(2.0)), 0)
    params = {"w": jnp.ones(1)}
    state, rates = tx.init(params), []
    for _ in range(21):
        with jax.numpy_dtype_promotion("standard"):  # Optax's schedule needs it
            updates, state = tx.update({"w": jnp.ones(1)}, state, params, utilization={"w": jnp.ones(1)})
        rates.append(-float(updates["w"][0]))
    np.testing.assert_allclose(rates[:5], [0.5, 0.875, 1.25, 1.625, 2], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], 1 + np.cos(np.pi * np.arange(17) / 16), atol=1e-6)


# Texts.


def test_texts_are_read_by_name(tmp_path):
    (tmp_path / "wikitext-valid.txt").write_bytes(b"hello world hello")
    (tmp_path / "wikitext-test.txt").write_bytes("né".encode())
    text = inputs.load(configs.GPTRun(dataset="wikitext-valid"), tmp_path)
    np.testing.assert_array_equal(text.train, texts.encode(b"hello world hello", "gpt2"))
    assert (text.evaluation_bytes.decode(), text.vocab_size) == ("né", 50257)


def test_missing_texts_are_named(tmp_path):
    (tmp_path / "wiki.test.tokens").touch()
    with pytest.raises(FileNotFoundError, match=r"read from wiki.train.tokens and wiki.test.tokens; .* lacks wiki.tr"):
        inputs.load(configs.GPTRun(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"read from tinyshakespeare.txt; .* lacks tiny.*--data-dir"):
        inputs.load(configs.MiniGPTRun(dataset="tinyshakespeare"), tmp_path)


# Configs and errors.


def test_a_batch_larger_than_the_data(digits, text):
    with pytest.raises(ValueError, match="batch_size must be at most the 60 training images; got 61"):
        train_vit(digits, batch_size=61)
    with pytest.raises(ValueError, match="batch_size must be at most the 24 sequences of 8 tokens; got 25"):
        train_gpt(text, batch_size=25, subset=None)


# Estimates.


def test_the_hours_of_a_gpt():
    run = configs.GPTRun(num_experts=16, experts_per_token=4, d_ff=256)
    layer = 4 * 512**2 + 4 * 512 + 2 * 2 * 512 + 16 * 512  # attention, norms, router
    layer += 4 * (2 * 512 * 256 + 256 + 512)  # the experts of a token
    active = 12 * layer + 2 * 512 + 512 * 50257  # with the last norm and the head
    tokens = 5 * 103_400_000
    expected = 6 * active * tokens / configs.FLOPS_PER_SECOND / 3600
    assert configs.hours(run) == pytest.approx(expected, rel=5e-3)  # biases and norms aside
    half = dataclasses.replace(run, subset=103_400_000 // 128 // 2)
    assert configs.hours(half) == pytest.approx(expected / 2, rel=5e-3)


def test_the_hours_of_a_vit():
    run = configs.ViTRun(epochs=1)
    most = 6 * 17.2e6 * 64 * 50_000 / configs.FLOPS_PER_SECOND / 3600
    assert 0.02 * most < configs.hours(run) < 0.1 * most  # 2 of 64 experts
    assert configs.hours(dataclasses.replace(run, epochs=7)) == pytest.approx(7 * configs.hours(run))
