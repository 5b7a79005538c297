"""Utilization of all micro-batches of an update, and utilization that the optimizer state holds.

Axis letters: B batch, k micro-batches, E experts.
"""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import strategy_table
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import moe, topk_mlp

pytestmark = pytest.mark.usefixtures("as_users_have_it")

B, D, CLASSES = 840, 12, 5  # 840 is divisible by 1 to 8
COUNTS = excitation_optax.RoutingCounts


class Classifier(nnx.Module):
    """A dropless MoE layer between two dense ones."""

    expert_axis = None

    def __init__(self, *, rngs):
        self.embed = nnx.Linear(D, 8, rngs=rngs)
        self.moe = moe.MoE(moe.MoEConfig(d_model=8, d_ff=16, num_experts=6, experts_per_token=2), rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x, where=None):
        return self.head(self.moe(self.embed(x), where))


def make_model(name):
    if name == "moe":
        return Classifier(rngs=nnx.Rngs(0))
    return topk_mlp.TopKMLP(topk_mlp.TopKMLPConfig(D, width=16, depth=2, num_classes=CLASSES), rngs=nnx.Rngs(0))


@functools.cache
def problem(name):
    """The model, its parameters, a batch, and a compiled function of parameters and examples: gradients, counts."""
    model = make_model(name)
    graphdef, params = nnx.split(model)
    x = jax.random.normal(jax.random.key(1), (B, D))
    labels = jax.random.randint(jax.random.key(2), (B,), 0, CLASSES)

    @jax.jit
    def gradients(params, x, labels):
        def loss_fn(params):
            logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), utilization

        return jax.grad(loss_fn, has_aux=True)(params)

    return model, params, (x, labels), gradients


def micro_batches(batch, k):
    return jax.tree.map(lambda a: a.reshape(k, B // k, *a.shape[1:]), batch)


def sgd(strategy, model, optimizer=None):
    strategy = getattr(excitation_optax, strategy)
    excite = excitation_optax.scale_by_excitation(strategy, 1.0, expert_axis=model.expert_axis)
    return optax.chain(optimizer or optax.sgd(0.1), excite)


def far(a, b):
    """The largest difference between two trees, each leaf's over its largest entry."""
    apart = jax.tree.map(lambda x, y: np.max(np.abs(np.subtract(x, y))) / np.max(np.abs(y)), a, b)
    return max(jax.tree.leaves(apart), key=lambda x: np.inf if np.isnan(x) else x)


def through_multi_steps(tx, params, parts, **kwargs):
    """The sum of the updates, and the state, after the micro-batches' gradients and counts `[k, ...]` went through."""
    state = tx.init(params)

    def step(carry, part):
        total, state = carry
        grads, counts = part
        updates, state = tx.update(grads, state, params, utilization=counts, **kwargs)
        return (jax.tree.map(jnp.add, total, updates), state), None

    return jax.lax.scan(step, (jax.tree.map(jnp.zeros_like, params), state), parts)[0]


FAST = {("topk_mlp", 3), ("moe", 8)}


@pytest.mark.parametrize(
    ("name", "k"),
    [
        (name, k) if (name, k) in FAST else pytest.param(name, k, marks=pytest.mark.slow)
        for name in ("topk_mlp", "moe")
        for k in range(1, 9)
    ],
)
def test_micro_batches_equal_the_batch(name, k):
    """By the plain scan, and by `accumulate_utilization`; with every strategy, though the MoE with one is enough."""
    model, params, batch, gradients = problem(name)
    grads, counts = gradients(params, *batch)
    parts = jax.lax.map(lambda part: gradients(params, *part), micro_batches(batch, k))
    added = jax.tree.map(lambda leaf: leaf.sum(0), parts[1])
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(counts), strict=True):
        np.testing.assert_array_equal(a, b)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), parts[0])
    like = excitation_flax.routing_like(model, jax.ShapeDtypeStruct((B // k, D), jnp.float32))
    for strategy in strategy_table.NAMES if name == "topk_mlp" else ["zero_sum"]:
        tx = sgd(strategy, model)
        expected, _ = tx.update(grads, tx.init(params), params, utilization=counts)
        scanned, _ = tx.update(mean, tx.init(params), params, utilization=added)
        assert far(scanned, expected) <= 1e-5
        init, update = accumulating(name, strategy)
        state, emitted = init(params, like), []
        for i in range(k):
            updates, state = update(k, state, params, *jax.tree.map(lambda leaf, i=i: leaf[i], parts))
            emitted.append(updates)
        assert far(emitted[-1], expected) <= 1e-5
        assert not any(leaf.any() for updates in emitted[:-1] for leaf in jax.tree.leaves(updates))
        assert int(state.multi_steps.gradient_step) == 1
        assert not any(leaf.any() for leaf in jax.tree.leaves(state.accumulated))


@functools.cache
def accumulating(name, strategy):
    """`init` and `update` of the wrapped optimizer, which are compiled once for any number of micro-batches."""
    tx = sgd(strategy, problem(name)[0])
    wrap = lambda k, like: excitation_optax.accumulate_utilization(optax.MultiSteps(tx, lambda _: k), like)

    @jax.jit
    def update(k, state, params, grads, counts):
        return wrap(k, counts).update(grads, state, params, utilization=counts)

    return lambda params, like: wrap(1, like).init(params), update


@pytest.mark.parametrize("name", ["topk_mlp", "moe"])
def test_multi_steps_alone_is_wrong(name):
    """It excites by the last micro-batch: the trap that `accumulate_utilization` is there for."""
    model, params, batch, gradients = problem(name)
    grads, counts = gradients(params, *batch)
    tx = sgd("zero_sum", model)
    updates, _ = tx.update(grads, tx.init(params), params, utilization=counts)
    parts = jax.lax.map(lambda part: gradients(params, *part), micro_batches(batch, 8))
    bare = optax.MultiSteps(tx, 8)
    moved, _ = through_multi_steps(optax.GradientTransformationExtraArgs(bare.init, bare.update), params, parts)
    assert far(moved, updates) > 0.05


@pytest.mark.slow
def test_unequal_padding():
    """Counts are exact; gradients too, where the loss divides by a fixed constant and not by the tokens that it saw."""
    model, params, (x, labels), _ = problem("moe")
    graphdef = nnx.graphdef(model)
    where = jax.random.bernoulli(jax.random.key(3), jnp.linspace(0.1, 0.9, B))

    @functools.partial(jax.jit, static_argnames="divisor")
    def gradients(params, x, labels, where, divisor=None):
        def loss_fn(params):
            logits, utilization = excitation_flax.capture_routing(nnx.merge(graphdef, params))(x, where)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.sum(losses, where=where) / (divisor or jnp.sum(where)), utilization

        return jax.grad(loss_fn, has_aux=True)(params)

    tx = sgd("positive_sum", model)
    halves = micro_batches((x, labels, where), 2)

    def update(divisor):
        """Of the batch and of its halves, whose gradients are averaged."""
        both = []
        grads, counts = gradients(params, x, labels, where, divisor=divisor and divisor * 2)
        both.append((grads, counts))
        parts = jax.lax.map(lambda part: gradients(params, *part, divisor=divisor), halves)
        both.append((jax.tree.map(lambda a: a.mean(0), parts[0]), jax.tree.map(lambda a: a.sum(0), parts[1])))
        return [tx.update(grads, tx.init(params), params, utilization=counts)[0] for grads, counts in both], both

    (whole, halved), (a, b) = update(divisor=B // 2)
    assert far(halved, whole) <= 1e-5
    for x_, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_array_equal(x_, y)
    (whole, halved), _ = update(divisor=None)
    assert far(halved, whole) > 0.01  # the padded half weighs as much as the full one


def test_skipped_micro_batches_do_not_count():
    """The middle one of three has a NaN: as with the other two alone."""
    params = {"experts": jnp.ones((2, 3))}
    grads = {"experts": jnp.array([[1.0], [2.0], [3.0]])[:, None] * jnp.ones((3, 2, 3))}
    grads["experts"] = grads["experts"].at[1, 0, 0].set(jnp.nan)
    counts = {"experts": COUNTS(jnp.array([[3.0, 1.0], [8.0, 0.0], [0.0, 2.0]]), jnp.array([4.0, 8.0, 2.0]))}
    inner = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    multi_steps = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.transforms.skip_not_finite)
    tx = excitation_optax.accumulate_utilization(multi_steps, jax.tree.map(lambda leaf: leaf[0], counts))
    moved, state = through_multi_steps(tx, params, (grads, counts))
    # Mean gradient 2, utilization 3/6 and 3/6.
    np.testing.assert_allclose(moved["experts"], jnp.full((2, 3), -2.0))
    assert multi_steps.has_updated(state.multi_steps)
    # One that is skipped after another was accepted changes nothing.
    first = jax.tree.map(lambda leaf: leaf[0], (grads, counts))
    second = jax.tree.map(lambda leaf: leaf[1], (grads, counts))
    state = tx.init(params)
    _, state = tx.update(first[0], state, params, utilization=first[1])
    _, again = tx.update(second[0], state, params, utilization=second[1])
    np.testing.assert_array_equal(again.accumulated["experts"].counts, [3.0, 1.0])
    assert not multi_steps.has_updated(again.multi_steps)


def test_counts_of_half_precision_are_added_in_float32():
    """And the state keeps its types, as a scan asks."""
    half = {"experts": COUNTS(jnp.array([250.0, 6.0], jnp.bfloat16), jnp.array(256.0, jnp.bfloat16))}
    tx = excitation_optax.accumulate_utilization(optax.MultiSteps(optax.sgd(1.0), 3), half)
    state = tx.init({"experts": jnp.ones(2)})
    for _ in range(2):
        _, after = tx.update({"experts": jnp.ones(2)}, state, utilization=half)
        assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
        state = after
    np.testing.assert_array_equal(state.accumulated["experts"].counts, [500.0, 12.0])


def test_routing_like_of_a_call_with_flags():
    """Those that the model branches on are not traced."""

    class Flagged(topk_mlp.TopKMLP):
        def __call__(self, x, times, *, repeat=False):
            for _ in range(times if repeat else 1):
                logits = super().__call__(x)
            return logits

    model = Flagged(topk_mlp.TopKMLPConfig(D, width=16, depth=2), rngs=nnx.Rngs(0))
    like = excitation_flax.routing_like(model, jax.ShapeDtypeStruct((3, D), jnp.float32), 2, repeat=True)
    assert jax.tree.leaves(like)[0] == jax.ShapeDtypeStruct((16,), jnp.float32)


def test_a_schedule_of_micro_batches():
    """One, then two, then three: every update has the utilization of its own."""
    params = {"experts": jnp.zeros((2, 1))}
    inner = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    tx = excitation_optax.accumulate_utilization(
        optax.MultiSteps(inner, lambda step: step + 1), {"experts": COUNTS(jnp.zeros(2), jnp.zeros(()))}
    )
    state, moved = tx.init(params), []
    for n in range(6):
        counts = {"experts": COUNTS(jnp.array([float(n), 10.0 - n]), jnp.array(10.0))}
        updates, state = tx.update({"experts": jnp.ones((2, 1))}, state, params, utilization=counts)
        moved.append(updates["experts"][:, 0].tolist())
    zero = [0.0, 0.0]
    # Means of n: 0 of 10; (1 + 2) / 2 = 1.5; (3 + 4 + 5) / 3 = 4. Zero-sum doubles them: u / mean, with a mean of 5.
    assert moved == [[0.0, -2.0], zero, pytest.approx([-0.3, -1.7]), zero, zero, pytest.approx([-0.8, -1.2])]


def test_within_nnx_optimizer():
    """As users of Flax have it, whose state names the positions of a list otherwise than the routing does."""
    model = make_model("topk_mlp")
    x, labels = problem("topk_mlp")[2]
    tx = sgd("zero_sum", model)
    like = excitation_flax.routing_like(model, x[:4])
    optimizer = nnx.Optimizer(
        model, excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 2), like), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x, labels):
        def loss_fn(model):
            logits, utilization = excitation_flax.capture_routing(model)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), utilization

        grads, utilization = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, utilization=utilization)

    expected = make_model("topk_mlp")
    plain = nnx.Optimizer(expected, tx, wrt=nnx.Param)
    step(expected, plain, x, labels)
    for part in range(2):
        step(model, optimizer, *jax.tree.map(lambda a, part=part: a[part], micro_batches((x, labels), 2)))
    assert far(nnx.state(model, nnx.Param), nnx.state(expected, nnx.Param)) <= 1e-5


def test_a_moving_average_of_counts_is_optax_s():
    """It has no bias towards the zeros that it starts from, and weighs a batch by its tokens."""
    average = {"experts": COUNTS(jnp.zeros(2), jnp.zeros(()))}
    for counts, tokens in (([8.0, 0.0], 8.0), ([0.0, 2.0], 2.0)):
        batch = {"experts": COUNTS(jnp.array(counts), jnp.array(tokens))}
        average = optax.incremental_update(batch, average, step_size=0.1)
    # 0.09 * 8 = 0.72 and 0.1 * 2 = 0.2 of 0.92
    np.testing.assert_allclose(average["experts"].utilization, [0.72 / 0.92, 0.2 / 0.92], rtol=1e-6)


def test_counts_are_summed_over_devices_before_they_are_stored():
    params = {"experts": jnp.ones((2, 1))}
    inner = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    like = {"experts": COUNTS(jnp.zeros(2), jnp.zeros(()))}
    tx = excitation_optax.accumulate_utilization(optax.MultiSteps(inner, 2), like, axis_name="data")

    @functools.partial(jax.pmap, axis_name="data")
    def step(state, counts):
        return tx.update(params, state, params, utilization=counts)

    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), tx.init(params))
    device = jnp.arange(8.0)
    counts = {"experts": COUNTS(jnp.stack([device, 8 - device], -1), jnp.full(8, 8.0))}
    _, state = step(state, counts)
    np.testing.assert_array_equal(state.accumulated["experts"].counts, [[28.0, 36.0]] * 8)
    updates, state = step(state, counts)
    np.testing.assert_allclose(updates["experts"][..., 0], [[-28 / 32, -36 / 32]] * 8)


# Utilization that is held in the state.


HELD = {"experts": jnp.array([0.75, 0.25])}


def held(wrap=lambda tx: tx, like=HELD):
    inner = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
    return wrap(excitation_optax.hold_utilization(inner, like))


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(100.0), tx),
    "masked": lambda tx: optax.masked(tx, {"experts": True, "other": False}),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "inject": lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(optax.scale(scale), tx))(scale=1.0),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_trainer_that_never_passes_utilization(wrap):
    """It calls `tx.update(grads, state, params)`; what was set stays until it is set again."""
    tx = held(wrap)
    params = {"experts": jnp.ones((2, 1)), "other": jnp.ones(3)}

    @jax.jit
    def trainer(state, counts=None):
        if counts is not None:
            state = optax.tree.set(state, utilization=counts)
        return tx.update(params, state, params)

    moved, state = [], tx.init(params)
    for counts in (None, HELD, None, {"experts": jnp.array([0.1, 0.3])}, None):
        updates, state = trainer(state, counts)
        moved.append(np.abs(updates["experts"][:, 0]).tolist())
    expected = [[1, 1], [1.5, 0.5], [1.5, 0.5], [0.5, 1.5], [0.5, 1.5]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_utilization_that_is_passed_is_used_and_not_held():
    tx = held()
    params = {"experts": jnp.ones((2, 1))}
    state = optax.tree.set(tx.init(params), utilization=HELD)
    updates, state = tx.update(params, state, params, utilization={"experts": jnp.array([0.1, 0.3])})
    np.testing.assert_allclose(updates["experts"][:, 0], [-0.5, -1.5], rtol=1e-6)
    np.testing.assert_array_equal(state.utilization["experts"], HELD["experts"])


def test_held_counts_in_a_scan_whatever_the_kind_of_their_tree():
    like = {"layers": {"0": {"experts": COUNTS(jnp.zeros(2), jnp.zeros(()))}}}
    tx = held(like=jax.eval_shape(lambda: like))
    params = {"layers": [{"experts": jnp.ones((2, 1))}]}

    def step(state, counts):
        set_counts = {"layers/0/experts": COUNTS(counts, jnp.sum(counts))}
        updates, state = tx.update(params, optax.tree.set(state, utilization=set_counts), params)
        return state, updates["layers"][0]["experts"][:, 0]

    _, moved = jax.lax.scan(step, tx.init(params), jnp.array([[1.0, 1.0], [3.0, 1.0]]))
    np.testing.assert_allclose(moved, [[-1.0, -1.0], [-1.5, -0.5]])


def test_states_come_back_from_flax_serialization():
    like = {"experts": COUNTS(jnp.array([3.0, 1.0]), jnp.array(4.0))}
    excite = excitation_optax.scale_by_excitation(gamma=lambda step: 1.0)
    for tx in (
        excite,
        held(like=like),
        excitation_optax.accumulate_utilization(optax.MultiSteps(excite, 2), like),
    ):
        state = tx.init({"experts": jnp.ones((2, 1))})
        restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_held_utilization_comes_back_from_a_checkpoint(tmp_path):
    like = {"experts": COUNTS(jnp.array([3.0, 1.0]), jnp.array(4.0))}
    tx = held(like=like)
    params = {"experts": jnp.ones((2, 1))}
    state = optax.tree.set(tx.init(params), utilization=like)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    updates, _ = tx.update(params, restored, params)
    np.testing.assert_allclose(updates["experts"][:, 0], [-1.5, -0.5])


LIKE = {"a": COUNTS(jnp.zeros(2), jnp.zeros(()))}
TX = optax.chain(optax.sgd(1.0), excitation_optax.scale_by_excitation())


def update(utilization, like=LIKE):
    params = {"a": jnp.ones((2, 1))}
    tx = excitation_optax.accumulate_utilization(optax.MultiSteps(TX, 2), like)
    return tx.update(params, tx.init(params), params, utilization=utilization)


def hold(counts, **passed):
    params = {"a": jnp.ones((2, 1))}
    tx = excitation_optax.hold_utilization(TX, {"a": jnp.zeros(2)})
    return tx.update(params, optax.tree.set(tx.init(params), utilization=counts), params, **passed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: excitation_optax.accumulate_utilization(TX, LIKE), "optax.MultiSteps itself"),
        (
            lambda: excitation_optax.accumulate_utilization(optax.MultiSteps(TX, 2).gradient_transformation(), LIKE),
            "got GradientTransformation",
        ),
        (lambda: update(LIKE, like={"a": jnp.zeros(2)}), "like at a is float32[2]: pass RoutingCounts"),
        (
            lambda: update(LIKE, like={}),
            "like must be a tree of RoutingCounts or fractions, of at least one layer; got {}",
        ),
        (lambda: update(None), "utilization of at least one layer"),
        (lambda: update({"a": jnp.zeros(2)}), "utilization at a is float32[2]: pass RoutingCounts"),
        (lambda: update({"b": LIKE["a"]}), "the layers of `like`: a is missing from the utilization"),
        (lambda: update(LIKE | {"b": LIKE["a"]}), "the layers of `like`: b is not in `like`"),
        (
            lambda: update({"a": COUNTS(jnp.zeros(3), jnp.zeros(()))}),
            "utilization at a is float32[3], float32[]; in `like`",
        ),
        (
            lambda: excitation_optax.hold_utilization(optax.MultiSteps(TX, 2).gradient_transformation(), LIKE),
            "takes none",
        ),
        (lambda: excitation_optax.hold_utilization(optax.sgd(0.1).update, LIKE), "takes none"),
        (lambda: excitation_optax.hold_utilization(TX, {}), "like must be a tree of RoutingCounts or fractions"),
        (lambda: excitation_optax.hold_utilization(TX, {"a": 0.5}), "at a must be an array with an axis of experts"),
        (lambda: hold({"b": jnp.ones(2)}), "the layers of `like`: a is missing from the utilization"),
        (lambda: hold({"a": jnp.ones(3)}), "utilization at a is float32[3]; in `like` it is float32[2]"),
        (lambda: hold({"a": jnp.ones(2, jnp.bfloat16)}), "utilization at a is bfloat16[2]; in `like` it is float32[2]"),
        (lambda: hold(LIKE), "utilization at a is float32[2], float32[]; in `like` it is float32[2]"),
        (lambda: hold({"a": jnp.ones(2)}, utilization={"c": jnp.ones(2)}), "a is missing from the utilization"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert message in str(error.value)
