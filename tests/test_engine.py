"""The engine against plain NumPy: batches, steps, strategies, optimizers, measures; and how runs are grouped.

Axis letters: S seeds, M members, L hidden layers, E neurons, B batch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples import datasets
from examples.reproduction import configs, engine, stacks, store, studies
from examples.reproduction.stacks import missing, shared_of
from models import topk_mlp

STRATEGIES = ("vanilla", "zero_sum", "positive_sum", "exp_diff", "global_exp", "random_boost", "inverted")
SEEDS = (3, 0)
TINY = {"dataset": "digits", "width": 16, "sparsity": 0.75, "epochs": 2, "batch_size": 32, "subset": 100}  # 3 steps
TINY |= {"augmentation": "crop_flip"}
# All that changes what is compiled, in as few programs.
GROUPS = {
    "sgd": (STRATEGIES, {"depth": 2, "learning_rate": 0.5}),
    "momentum": (("vanilla", "exp_diff"), {"learning_rate": 0.2, "augmentation": "flip", "initialization": "torch"}),
    "adam": (
        ("vanilla", "positive_sum"),
        {"schedule": "constant", "augmentation": "none", "activation": "none"},
    ),
    "adamw": (
        ("vanilla", "zero_sum", "zero_sum:direction", "zero_sum:norm"),
        {"normalization": "unit", "initialization": "he_normal", "epsilon": 1e-4},
    ),
    "rmsprop": (("vanilla", "zero_sum"), {"schedule": "constant", "augmentation": "none"}),
    "adagrad": (("vanilla", "zero_sum"), {"augmentation": "none", "initialization": "he_normal"}),
}
OPTIMIZERS = list(GROUPS)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Optax's Adam needs it, in the threads of `train` too, which no context manager reaches."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@functools.cache
def digits():
    return datasets.load_digits()


def make_runs(optimizer, strategies=None, seeds=SEEDS, **changes):
    fields = TINY | {"depth": 1, "optimizer": optimizer, "learning_rate": 0.01} | GROUPS[optimizer][1] | changes
    names = [name.partition(":") for name in strategies or GROUPS[optimizer][0]]
    variants = [{"strategy": strategy, "component": component or "both"} for strategy, _, component in names]
    return [configs.MLPRun(gamma=2.0, seed=seed, **variant, **fields) for seed in seeds for variant in variants]


def make_group(*args, **kwargs):
    (group,) = engine.Program.plan(make_runs(*args, **kwargs))
    return group


def train_group(group):
    results = engine.Program.train_group(group, digits(), lambda *_: None, lambda: False)
    assert [result.run for result in results] == list(group)
    return results


def make_program(group):
    """The program of a group, as `train_group` makes it, with its members, seeds and data."""
    return engine.Program.prepare(group, digits())


def layers(params, s, m):
    """`[kernel, bias]` of every layer of a model, the head last."""
    plain = nnx.as_pure(jax.tree.map(lambda x: np.asarray(x[s, m], np.float64), params))
    each = [*(plain["layers"][i] for i in range(len(plain["layers"]))), plain["head"]]
    return [[layer["kernel"].T, layer["bias"]] for layer in each]  # the program keeps kernels as [out, in]


@functools.cache
def trained(optimizer):
    """A group, its results, the models before and after training, and the mean losses of its epochs `[S, M]`."""
    group = make_group(optimizer)
    program, members, seeds, data = make_program(group)
    states = program.init(members, seeds)
    before, losses = jax.device_get(states[0]), []
    for epoch in range(1, group.runs[0][0].epochs + 1):
        states, loss = program.train_epoch(states, members, seeds, epoch, data)
        losses.append(np.asarray(loss))
    return group, train_group(group), before, jax.device_get(states[0]), losses


def each(group):
    return [(s, m, run) for s, row in enumerate(group.runs) for m, run in enumerate(row)]


# What a run is, in NumPy.


@functools.cache
def batches(optimizer, seed):
    """Images `[B, D]` and labels `[B]` of every step of every epoch: the same for all runs of a seed."""
    group, steps = make_group(optimizer), []
    run = group.runs[0][0]
    program, *_, data = make_program(group)
    augment = jax.jit(lambda key, indices: program.normalize(program.augment(key, data.train_images, indices), data))
    for epoch in range(1, run.epochs + 1):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        order = np.asarray(jax.random.permutation(key, run.subset))
        keys = jax.random.split(jax.random.fold_in(key, 1), run.subset // run.batch_size)
        for step, step_key in enumerate(keys):
            indices = order[step * run.batch_size : (step + 1) * run.batch_size]
            images = np.asarray(augment(step_key, indices), np.float64)
            steps.append((images.reshape(run.batch_size, -1), digits().train_labels[indices]))
    return steps


def forward(run, model, x):
    """What every layer passes on, and the logits."""
    hidden, kept = [x], round(run.width * (1 - run.sparsity))
    for kernel, bias in model[:-1]:
        h = hidden[-1] @ kernel + bias
        h = np.maximum(h, 0) if run.activation == "relu" else h
        hidden.append(np.where(h < np.sort(h, axis=-1)[:, -kept, None], 0, h))
    return hidden, hidden[-1] @ model[-1][0] + model[-1][1]


def backward(model, hidden, logits, labels):
    """The mean cross-entropy, and its gradient."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    delta, grads = p / len(labels), []
    for h, (kernel, _) in zip(reversed(hidden), reversed(model), strict=True):
        grads.insert(0, [h.T @ delta, delta.sum(0)])
        delta = (delta @ kernel.T) * (h != 0)
    return loss, grads


def excite(run, step, u):
    """Phi, equations 6 to 10."""
    power = u**run.gamma / np.mean(u**run.gamma)
    if run.strategy == "random_boost":
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        return np.asarray(jax.random.permutation(key, power.astype(np.float32), independent=True))
    if run.strategy == "inverted":
        inverse = 1 / u**run.gamma if u.all() else (u == 0) * 1.0
        return inverse / inverse.mean()
    return {
        "vanilla": np.ones_like(u),
        "zero_sum": power,
        "positive_sum": np.maximum(1, power),
        "exp_diff": np.exp(run.gamma * u) / np.mean(np.exp(run.gamma * u)),
        "global_exp": np.mean(np.exp(run.gamma * np.maximum(u - u.mean(), 0))) * np.ones_like(u),
    }[run.strategy]


def update(optimizer, rate, step, param, grad, state, epsilon=1e-8):
    """The equations of PyTorch's documentation, at its defaults. `state` is a dict of the parameter's own."""
    if optimizer == "sgd":
        return -rate * grad
    if optimizer == "momentum":
        state["b"] = 0.9 * state.get("b", 0) + grad
        return -rate * state["b"]
    if optimizer == "rmsprop":
        state["v"] = 0.99 * state.get("v", 0) + 0.01 * grad**2
        return -rate * grad / (np.sqrt(state["v"]) + 1e-8)
    if optimizer == "adagrad":
        state["sum"] = state.get("sum", 0) + grad**2
        return -rate * grad / (np.sqrt(state["sum"]) + 1e-10)
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    m, v = state["m"] / (1 - 0.9 ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
    decay = 0.01 * param if optimizer == "adamw" else 0
    return -rate * (m / (np.sqrt(v) + epsilon) + decay)


def component(run, phi, deltas):
    """The factor of the component, from the lengths of the layer's step with and without Excitation."""
    if run.component == "both":
        return phi
    length = lambda arrays: math.sqrt(sum(np.sum(a**2) for a in arrays))
    r = length([phi * delta for delta in deltas]) / length(deltas)
    return r if run.component == "norm" else phi / r


def plain_loop(run, model):
    """The model after training, and the mean loss of every epoch."""
    model, states, losses = [list(layer) for layer in model], {}, []
    steps = run.epochs * (run.subset // run.batch_size)
    for step, (x, labels) in enumerate(batches(run.optimizer, run.seed)):
        hidden, logits = forward(run, model, x)
        loss, grads = backward(model, hidden, logits, labels)
        losses.append(loss)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) if run.schedule == "cosine" else 1
        for i, layer in enumerate(model):
            phi = 1 if i == run.depth else excite(run, step, np.mean(hidden[i + 1] != 0, axis=0))
            deltas = []
            for j in (0, 1):
                state = states.setdefault((i, j), {})
                rate = cosine * run.learning_rate
                deltas.append(update(run.optimizer, rate, step, layer[j], grads[i][j], state, run.epsilon))
            factor = component(run, phi, deltas)
            layer[:] = [value + factor * delta for value, delta in zip(layer, deltas, strict=True)]
    return model, np.reshape(losses, (run.epochs, -1)).mean(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_run_is_that_of_a_plain_loop(optimizer):
    group, _, before, after, losses = trained(optimizer)
    for s, m, run in each(group):
        start = layers(before, s, m)
        model, expected_losses = plain_loop(run, start)
        moved = np.abs(model[0][0] - start[0][0]).max()
        assert moved > 0.01  # or the tolerance would say nothing
        np.testing.assert_allclose([loss[s, m] for loss in losses], expected_losses, rtol=1e-5, err_msg=str(run))
        for got, expected in zip(layers(after, s, m), model, strict=True):
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-4 * moved, err_msg=str(run))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_measures_are_those_of_the_trained_model(optimizer):
    group, results, _, after, losses = trained(optimizer)
    shared = group.runs[0][0]
    program, *_, data = make_program(group)
    images = np.asarray(program.normalize(data.test_images, data), np.float64).reshape(360, -1)
    by_class = np.eye(10)[digits().test_labels]
    for (s, m, run), result in zip(each(group), results, strict=True):
        hidden, logits = forward(run, layers(after, s, m), images)
        right = np.mean(logits.argmax(-1) == digits().test_labels)
        assert result.measures["accuracy"] == pytest.approx(right, abs=1.5 / 360)
        left_out = np.asarray(program.normalize(digits().train_images[100:], data), np.float64).reshape(1337, -1)
        right = np.mean(forward(run, layers(after, s, m), left_out)[1].argmax(-1) == digits().train_labels[100:])
        assert result.measures["validation"] == pytest.approx(right, abs=1.5 / 1337)
        for i, h in enumerate(hidden[1:]):
            kept = np.abs(h[h.any(-1)])
            p = kept / kept.sum(-1, keepdims=True)
            entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1).mean()
            assert result.measures["entropy"][i] == pytest.approx(entropy, rel=1e-3)
            counts = (h != 0).T @ by_class
            shares = counts[counts.any(-1)] / counts[counts.any(-1)].sum(-1, keepdims=True)
            assert result.measures["specialization"][i] == pytest.approx((shares**2).sum(-1).mean(), rel=1e-3)
            load = np.mean(h != 0, axis=0)
            assert result.measures["max_load"][i] == pytest.approx(load.max() / load.mean(), rel=1e-2)
            assert result.measures["dead"][i] == pytest.approx(np.mean(load == 0))
        assert result.curve["epoch"] == [1, 2]
        np.testing.assert_allclose(result.curve["train_loss"], [loss[s, m] for loss in losses], rtol=1e-3)
        assert result.curve["accuracy"][-1] == pytest.approx(result.measures["accuracy"], rel=1e-3)
        for name in ("entropy", "specialization"):
            assert len(result.measures[name]) == shared.depth
            assert result.curve[name][-1] == pytest.approx(np.mean(result.measures[name]), rel=1e-3)


def test_what_a_result_says_about_itself():
    group, results, *_ = trained("adam")
    for result in results:
        assert result.seconds > 0
        assert result.about["stacked"] == [2, 2]
        assert result.about["data"].startswith("digits (")
        assert result.about["fingerprint"] == digits().fingerprint
        assert {"date", "versions", "device", "revision"} <= set(result.about)
        assert store.Result.to_json(result)["key"] == result.run.key
    assert len(results) == len(list(group))


# Pairing.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_runs_of_a_seed_start_alike_and_seeds_do_not(optimizer):
    group, results, before, after, losses = trained(optimizer)
    for leaf in jax.tree.leaves(before):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape))
    assert not np.array_equal(layers(before, 0, 0)[0][0], layers(before, 1, 0)[0][0])
    ends = [layers(after, s, m)[0][0].tobytes() for s, m, _ in each(group)]
    assert len(set(ends)) == len(ends)
    assert len({tuple(result.measures["entropy"]) for result in results}) == len(results)
    assert not np.allclose(losses[0][0], losses[0][1], rtol=1e-4)


def test_gamma_0_is_vanilla_for_every_strategy():
    group = make_group("sgd", epochs=1)
    rows = [[dataclasses.replace(run, gamma=0.0) for run in row] for row in group.runs]
    program, members, seeds, data = make_program(make_group("sgd"))
    members = members._replace(gamma=jnp.array([run.gamma for run in rows[0]]))
    assert members.gamma[1:].tolist() == [0.0] * 6
    _, losses = program.train_epoch(program.init(members, seeds), members, seeds, 1, data)
    np.testing.assert_allclose(losses, np.broadcast_to(losses[:, :1], losses.shape), rtol=1e-6)


def test_vanilla_is_the_optimizer_alone():
    """In a program that knows of no Excitation, and in other company. XLA may fuse, and so round, it in its own way."""

    class Bare(engine.Program):
        def make_optimizer(self, member, seed):
            del seed
            steps = self.shared.epochs * self.steps_per_epoch
            decay = lambda count: 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
            return optax.with_extra_args_support(optax.sgd(lambda count: member.learning_rate * decay(count)))

    group, _, before, after, _ = trained("sgd")
    _, members, seeds, data = make_program(group)
    members = jax.tree.map(lambda x: x[:2], members)
    bare = Bare(shared_of(group.runs[0][0]), ("vanilla",), 64, 10, 3)
    states = bare.init(members, seeds)
    for epoch in (1, 2):
        states, _ = bare.train_epoch(states, members, seeds, epoch, data)
    for s in range(len(SEEDS)):
        got, expected, start = layers(states[0], s, 0), layers(after, s, 0), layers(before, s, 0)
        for i in range(3):
            np.testing.assert_allclose(got[i][0], expected[i][0], atol=1e-6)
            np.testing.assert_allclose(got[i][1], expected[i][1], atol=1e-6)
            assert np.abs(expected[i][0] - start[i][0]).max() > 0.01


def test_repeated_to_the_bit_and_the_same_in_other_company():
    group, results, *_ = trained("adam")
    again = train_group(group)
    for first, second in zip(results, again, strict=True):
        assert (first.measures, first.curve) == (second.measures, second.curve)
    (only,) = train_group(make_group("adam", ("positive_sum",), seeds=(0,)))
    (expected,) = [result for result in results if result.run == only.run]
    assert only.measures["accuracy"] == pytest.approx(expected.measures["accuracy"], abs=1.5 / 360)
    np.testing.assert_allclose(only.measures["entropy"], expected.measures["entropy"], rtol=1e-4)
    np.testing.assert_allclose(only.curve["train_loss"], expected.curve["train_loss"], rtol=2e-3)


# Where it starts.


def stacked_kernels(initialization):
    shared = configs.MLPRun(width=64, depth=2, initialization=initialization)
    program = engine.program_of(shared, ("vanilla",), 300, 10, 1)
    model = program.make_model(0)
    return [(layer.kernel[...], layer.bias[...]) for layer in [*model.layers, model.head]]


def test_torchs_initialization():
    for kernel, bias in stacked_kernels("torch"):
        bound = kernel.shape[0] ** -0.5
        for x in (kernel, bias):
            assert np.abs(x).max() <= bound
            assert np.abs(x).max() > 0.75 * bound
            assert np.mean(x) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * x.size))
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    first, second, _ = stacked_kernels("torch")
    assert not np.allclose(first[0][:64], second[0] * (64 / 300) ** 0.5)


@pytest.mark.parametrize(("initialization", "variance"), [("lecun_normal", 1), ("he_normal", 2)])
def test_normal_initializations(initialization, variance):
    for kernel, bias in stacked_kernels(initialization):
        assert np.std(kernel) == pytest.approx(math.sqrt(variance / kernel.shape[0]), rel=0.1)
        assert not np.any(bias)


def test_the_default_initialization_is_that_of_the_model():
    _, _, before, *_ = trained("sgd")
    for s, seed in enumerate(SEEDS):
        config = topk_mlp.TopKMLPConfig(64, 16, 2, 10, 0.75)
        model = topk_mlp.TopKMLP(config, rngs=nnx.Rngs(jax.random.key(seed)))
        np.testing.assert_allclose(layers(before, s, 0)[1][0], model.layers[1].kernel[...], atol=1e-6)


# Batches.


def augmented(augmentation, count=400):
    """An image `[12, 9, 1]` of distinct bytes, augmented so many times."""
    image = np.arange(1, 109, dtype=np.uint8).reshape(1, 12, 9, 1)
    one = datasets.ImageData(image, np.zeros(1, np.int32), image, np.zeros(1, np.int32), 10, "")
    shared = configs.MLPRun(augmentation=augmentation, normalization="unit")
    program = engine.program_of(shared, ("vanilla",), 108, 10, 1)
    data = engine.put(one, shared)
    out = program.augment(jax.random.key(0), data.train_images, jnp.zeros(count, jnp.int32))
    return image[0, ..., 0], np.asarray(out)[..., 0]


def test_no_augmentation_leaves_images_as_they_are():
    image, out = augmented("none", 3)
    np.testing.assert_array_equal(out, [image] * 3)


def test_half_of_the_images_are_mirrored():
    image, out = augmented("flip")
    mirrored = (out == image[:, ::-1]).all((1, 2))
    assert ((out == image).all((1, 2)) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_crops_lie_within_the_border_everywhere_alike():
    image, out = augmented("crop_flip", 2000)
    padded = np.pad(image, 4)
    crops = {
        (top, left, flip): padded[top : top + 12, left : left + 9][:, :: -1 if flip else 1].tobytes()
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
    }
    names = {crop: name for name, crop in crops.items()}
    seen = np.array([names[crop.tobytes()] for crop in out])  # KeyError: not a crop
    for axis in (0, 1):
        assert np.bincount(seen[:, axis], minlength=9).min() > 2000 / 9 * 0.7
    assert 900 < seen[:, 2].sum() < 1100
    assert len(set(map(tuple, seen))) > 160  # of 162: rows, columns and mirroring are independent


def test_standard_normalization():
    """Mean 0 and deviation 1 of each channel of the training images that are used."""
    random = np.random.default_rng(0)
    images = random.integers([0, 100, 7], [256, 130, 9], (50, 4, 4, 3)).astype(np.uint8)
    data = datasets.ImageData(images, np.zeros(50, np.int32), images, np.zeros(50, np.int32), 10, "")
    shared = configs.MLPRun(subset=30, augmentation="crop_flip")
    program, on_device = engine.program_of(shared, ("vanilla",), 48, 10, 1), engine.put(data, shared)
    assert on_device.train_images.shape == (30, 12, 12, 3)
    values = np.asarray(program.normalize(images[:30], on_device))
    np.testing.assert_allclose(values.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(values.std((0, 1, 2)), 1, atol=1e-5)
    unit = engine.put(data, dataclasses.replace(shared, normalization="unit"))
    np.testing.assert_allclose(program.normalize(images, unit), images / 255, rtol=1e-6)


# Rates.


def test_the_cosine_is_optaxs():
    group = make_group("momentum", epochs=7)
    program, *_ = make_program(group)
    rates = []

    def optimizer(schedule):
        rates.extend(float(schedule(jnp.int32(count))) for count in range(21))
        return optax.sgd(schedule)

    member = engine.Member(jnp.int32(0), jnp.float32(1), jnp.float32(0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.OPTIMIZERS, "momentum", optimizer)
        program.make_optimizer(member, 0)
    np.testing.assert_allclose(rates, [optax.cosine_decay_schedule(0.1, 21)(i) for i in range(21)], atol=1e-7)
    assert (rates[0], rates[-1] < 0.1 * 0.006) == (pytest.approx(0.1), True)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_are_pytorchs(optimizer, size):
    """Also where gradients are as small as those of a mean over a batch often are."""
    random = np.random.default_rng(0)
    param, state, tx = random.normal(size=5), {}, engine.OPTIMIZERS[optimizer](0.1)
    params = jnp.asarray(param, jnp.float32)
    opt_state = tx.init(params)
    for step in range(4):
        grad = size * random.normal(size=5) * [1, 1, 1, 1, 0]  # the last never moves, but for its decay
        expected = update(optimizer, 0.1, step, param, grad, state)
        updates, opt_state = tx.update(jnp.asarray(grad, jnp.float32), opt_state, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-12)
        param, params = param + expected, params + updates


# Keys.


def test_fields_that_came_later_are_left_out_of_the_key_at_their_defaults():
    run = configs.MLPRun(strategy="zero_sum")
    assert run.key == "b0c1c5082bf18f67"  # as on file
    assert configs.from_json(run.to_json()) == run
    assert configs.MLPRun(strategy="vanilla", component="norm") == configs.MLPRun()
    changes = ({"component": "norm"}, {"residual": True}, {"layer_norm": True}, {"epsilon": 1e-16})
    others = [dataclasses.replace(run, **change) for change in changes]
    assert len({run.key, *(other.key for other in others)}) == 5
    for change, other in zip(changes, others, strict=True):
        assert other.to_json() == run.to_json() | change
        assert configs.from_json(other.to_json()) == other


# Groups.


def sweep():
    """Of every experiment with Top-K MLPs; some runs are there more than once."""
    return [run for section in studies.SECTIONS.values() if section.kind == "mlp" for run in section.runs()]


@pytest.mark.parametrize("limits", [{}, {"max_runs": 1}, {"max_runs": 5}, {"max_epochs": 100}, {"max_epochs": 1}])
def test_every_run_is_planned_once_within_the_limits(limits):
    runs = sweep()
    groups = engine.Program.plan(runs, **limits)
    planned = [run for group in groups for run in group]
    assert len(planned) == len(set(planned))
    assert set(planned) == set(runs)
    limits = {"max_runs": 18, "max_epochs": 300} | limits
    for group in groups:
        assert len({shared_of(run) for run in group}) == 1
        assert len(list(group)) <= limits["max_runs"]
        first = group.runs[0][0]
        images = min(1_437 if first.dataset == "digits" else 50_000, first.subset or 50_000)
        assert group.epochs * images <= limits["max_epochs"] * 50_000 or len(list(group)) == 1
        for row in group.runs:
            assert len({run.seed for run in row}) == 1
            assert [dataclasses.replace(run, seed=0) for run in row] == [
                dataclasses.replace(run, seed=0) for run in group.runs[0]
            ]
        assert len({row[0].seed for row in group.runs}) == len(group.runs)


def test_groups_come_in_the_order_of_the_runs_and_fill_up():
    runs = make_runs("adam", seeds=(0, 1, 2)) + make_runs("sgd", ("vanilla", "zero_sum"), seeds=(0, 1, 2))
    groups = engine.Program.plan(runs + runs[:3], max_runs=4)
    assert [run for group in groups for run in group] == runs
    assert [[len(row) for row in group.runs] for group in groups] == [[2, 2], [2], [2, 2], [2]]
    assert groups[0].epochs == 8
    assert engine.Program.plan(runs, max_runs=4) == groups
    assert engine.Program.plan([]) == []


def test_seeds_with_other_members_are_groups_of_their_own():
    runs = make_runs("adam", seeds=(0, 1, 2))[:-1]  # one that is missing
    assert [len(list(group)) for group in engine.Program.plan(runs)] == [4, 1]


@pytest.mark.parametrize(
    ("changes", "stacked"),
    [
        ({"width": 17}, False),
        ({"depth": 2}, False),
        ({"batch_size": 16}, False),
        ({"sparsity": 0.5}, False),
        ({"optimizer": "sgd"}, False),
        ({"epochs": 3}, False),
        ({"subset": 90}, False),
        ({"schedule": "cosine"}, False),
        ({"augmentation": "flip"}, False),
        ({"dataset": "other"}, False),
        ({"learning_rate": 0.02}, True),
        ({"strategy": "inverted"}, True),
    ],
)
def test_what_differs_in_shape_is_not_stacked(changes, stacked):
    (run,) = make_runs("adam", ("vanilla",), seeds=(0,))
    groups = engine.Program.plan([run, dataclasses.replace(run, **changes)])
    assert len(groups) == (1 if stacked else 2)


def test_evaluated_epochs_by_hand():
    assert list(stacks.evaluated_epochs(30)) == list(range(2, 31, 2))
    assert list(stacks.evaluated_epochs(31)) == list(range(1, 32, 2))
    assert list(stacks.evaluated_epochs(300)) == list(range(20, 301, 20))


# Variants of the network.


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_variants_of_the_network(residual, layer_norm):
    """Against NumPy: residuals around all hidden layers but the first, LayerNorm before them and before the head."""
    (run,) = make_runs("sgd", ("vanilla",), (0,), depth=3, residual=residual, layer_norm=layer_norm)
    program = engine.program_of(run, ("vanilla",), 64, 10, 1)
    model, x = program.make_model(0), np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)

    def normalized(h):
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6) if layer_norm else h

    h, stream = x, None
    for number, layer in enumerate(model.layers):
        h = (normalized(stream) if number else h) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        h = np.maximum(h, 0)
        h = np.where(h < np.sort(h, axis=-1)[:, -4, None], 0, h)
        stream = h + stream if residual and number else h
    expected = normalized(stream) @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    model.eval()
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.hidden(x)[-1], h, rtol=1e-4, atol=1e-5)


# `train`.


class Bar:
    """What `train` needs of a progress bar."""

    def __init__(self):
        self.total = 0

    def update(self, epochs):
        self.total += epochs

    def set_postfix_str(self, seen, refresh):
        assert seen.startswith("loss ")


def test_stops_when_asked_and_counts_epochs():
    done = []
    advance, stopped = lambda epochs, _: done.append(epochs), lambda: len(done) == 1
    assert engine.Program.train_group(make_group("adam"), digits(), advance, stopped) is None
    assert done == [4]


def test_a_batch_larger_than_the_data():
    group = make_group("adam", subset=20)
    with pytest.raises(ValueError, match="batch_size must be at most the 20 training images; got 32"):
        train_group(group)


def test_train_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    group, expected, *_ = trained("adam")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    results, bar, loaded = store.Results(tmp_path), Bar(), []
    results.append([dataclasses.replace(expected[1], seconds=0.125)])
    load = lambda run: loaded.append(run.dataset) or digits()
    engine.Program.train(list(group), load, results, bar)
    assert loaded == ["digits"]
    assert bar.total == 8
    lines = (tmp_path / "mlp-digits.jsonl").read_text().splitlines()
    assert len(lines) == 4
    again = store.Results(tmp_path)
    assert again[expected[1].run].seconds == 0.125
    for result in expected:  # the digits that it has in any other sweep with the same company
        assert (again[result.run].measures, again[result.run].curve) == (result.measures, result.curve)
    monkeypatch.setattr(engine.Program, "train_group", lambda *args: pytest.fail("trained again"))
    engine.Program.train(list(group), load, again, bar)
    assert bar.total == 16
    assert len((tmp_path / "mlp-digits.jsonl").read_text().splitlines()) == 4


def test_seeds_and_members_that_are_on_file_are_left_out_of_a_group(tmp_path):
    group, results = make_group("sgd", ("vanilla", "zero_sum", "inverted"), seeds=(0, 1, 2)), store.Results(tmp_path)
    assert missing(group, results) == group
    row, column = group.runs[1], [row[2] for row in group.runs]
    results.append([store.Result(run, {}, {}, 1.0, {}) for run in dict.fromkeys([*row, *column])])
    assert missing(group, results) == engine.Group((group.runs[0][:2], group.runs[2][:2]))
    results.append([store.Result(group.runs[0][0], {}, {}, 1.0, {})])
    assert missing(group, results) == engine.Group((group.runs[0][:2], group.runs[2][:2]))
    results.append([store.Result(run, {}, {}, 1.0, {}) for run in group if run not in results])
    assert list(missing(group, results)) == []


@pytest.mark.parametrize("where", ["load", "train", "append"])
def test_what_goes_wrong_in_a_thread_is_raised(tmp_path, monkeypatch, where):
    def fail(*args):
        raise OSError(f"no {where}")

    results, load = store.Results(tmp_path), lambda run: digits()
    if where == "load":
        load = fail
    else:
        monkeypatch.setattr(engine.Program, "train_group", fail if where == "train" else lambda *args: [])
        monkeypatch.setattr(results, "append", fail)
    with pytest.raises(OSError, match=f"no {where}"):
        engine.Program.train(make_runs("adam"), load, results, Bar(), max_runs=2)


def test_every_device_takes_groups_until_none_are_left(tmp_path, monkeypatch):
    seen = []

    def made_up(group, data, advance, stopped, checkpoint):
        seen.append((jax.config.jax_default_device, group))
        return [store.Result(run, {}, {}, 1.0, {}) for run in group]

    monkeypatch.setattr(engine.Program, "train_group", made_up)
    runs = make_runs("adam", seeds=range(30))
    results = store.Results(tmp_path)
    engine.Program.train(runs, lambda run: digits(), results, Bar(), max_runs=2)
    assert len(results) == len(runs) == 60
    assert {device for device, _ in seen} <= set(jax.local_devices())
    assert {group for _, group in seen} == set(engine.Program.plan(runs, max_runs=2))
    assert len(seen) == 30


def test_a_run_that_diverges_is_nan_and_leaves_the_others_alone():
    group, results, *_ = trained("sgd")
    program, members, seeds, data = make_program(group)
    wild = members._replace(learning_rate=members.learning_rate.at[0].set(1e30))
    states = program.init(wild, seeds)
    for epoch in (1, 2):
        states, losses = program.train_epoch(states, wild, seeds, epoch, data)
    measures = program.evaluate(states[0], data)
    assert np.isnan(measures["accuracy"][:, 0]).all()
    assert np.isnan(losses[:, 0]).all()
    expected = np.array([result.measures["entropy"] for result in results]).reshape(2, 7, 2)
    np.testing.assert_array_equal(np.asarray(measures["entropy"])[:, 1:], expected[:, 1:].astype(np.float32))
