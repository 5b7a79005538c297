"""The contract with Optax: every optimizer and every wrapper of `optimizer_table.py`, held to what the table says."""

import functools
import inspect
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_moe

import excitation_optax
from tools import optimizer_table

PER_EXAMPLE = "optax.contrib.dpsgd"  # takes the gradient of every example


def rows(where):
    return pytest.mark.parametrize("row", where, ids=lambda row: row.name.removeprefix("optax."))


def excite(**kwargs):
    return excitation_optax.scale_by_excitation(excitation_optax.zero_sum, **kwargs)


def gradients(params, x, y, per_example=False):
    """Loss, utilization and gradients; of every example, with a leading axis, if asked for."""
    (loss, u), grads = jax.value_and_grad(small_moe.loss_fn, has_aux=True)(params, x, y)
    if per_example:
        one = jax.grad(lambda p, x, y: small_moe.loss_fn(p, x[None], y[None])[0])
        grads = jax.vmap(one, in_axes=(None, 0, 0))(params, x, y)
    return loss, u, grads


@jax.jit
def mean_losses(models, x, y):
    """The mean loss of each of several models over all batches; compiled once for all rows of a table."""
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    losses = jax.vmap(jax.vmap(small_moe.loss_fn, in_axes=(None, 0, 0)), in_axes=(0, None, None))(models, x, y)[0]
    return losses.mean(axis=1)


def train(*runs, dtype=jnp.float64, per_example=False, epochs=1):
    """For each (tx, update): the parameters after 20 steps an epoch, the mean loss before and after, and the history.

    `update` maps (updates of tx, utilization) to the updates that are applied. The history has both, with a leading
    axis of steps. All runs are one compiled program, since most of their code is the same.
    """
    params = small_moe.init(0, dtype)
    batches = tuple(jnp.tile(a, (epochs, 1, 1)) for a in small_moe.batches(dtype))

    def step(tx, update, carry, batch):
        params, state = carry
        loss, u, grads = gradients(params, *batch, per_example)
        # Optax's line search hands every extra argument on to value_fn, by name.
        objective = lambda p, utilization=None, obj_fn=None: small_moe.loss_fn(p, *batch)[0]
        extra = {"value": loss, "grad": grads, "value_fn": objective, "obj_fn": objective}
        updates, state = tx.update(grads, state, params, utilization={"experts": u}, **extra)
        return (optax.apply_updates(params, update(updates, u)), state), (updates, u)

    @jax.jit
    def train_all():
        ends = [
            jax.lax.scan(functools.partial(step, tx, update), (params, tx.init(params)), batches) for tx, update in runs
        ]
        return [(trained, history) for (trained, _), history in ends]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax's own code needs these
        return [(trained, mean_losses([params, trained], *batches), history) for trained, history in train_all()]


def by_hand(updates, u):
    return small_moe.scale_experts(updates, small_moe.zero_sum(u))


def as_is(updates, u):
    del u
    return updates


# Optax says that optimistic_adam gives way to optimistic_adam_v2, and that dpsgd uses a deprecated argument of its own.
@pytest.mark.filterwarnings('ignore:.*(optimistic_adam|"seed" is deprecated):DeprecationWarning')
@rows(optimizer_table.AFTER)
def test_after(row):
    """Equations 3 and 4, written as a loop: theta + Phi(u) (O(theta, grad) - theta). And it still learns."""
    with jax.enable_x64(True):
        (expected, _, (updates, u)), (params, (before, after), _) = train(
            (optax.chain(row.make()), by_hand),
            (optax.chain(row.make(), excite()), as_is),
            per_example=row.name == PER_EXAMPLE,
        )
        check_components(updates, u)
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-9)
    assert after < before


@functools.cache
def apply_component(component):
    """A compiled function of the updates of many steps, and their utilization."""
    tx = excite(component=component)
    return jax.jit(jax.vmap(lambda updates, u: tx.update(updates, optax.EmptyState(), utilization={"experts": u})[0]))


def check_components(updates, u):
    """direction keeps the norm of the experts' update, norm its direction; their product is Phi."""
    phi = np.asarray(u / u.mean(-1, keepdims=True))  # [steps, E]
    before = jax.tree.map(np.asarray, updates["experts"])
    squares = sum((leaf**2).reshape(*phi.shape, -1).sum(-1) for leaf in before.values())
    total = squares.sum(-1, keepdims=True)
    ratio = np.sqrt((phi**2 * squares).sum(-1, keepdims=True) / np.where(total == 0, 1, total))
    ratio = np.where(total == 0, 1, ratio)
    factors = {"direction": phi / np.where(ratio == 0, 1, ratio), "norm": np.broadcast_to(ratio, phi.shape)}
    for component, factor in factors.items():
        after = apply_component(component)(updates, u)
        expected = {name: leaf * factor.reshape(*phi.shape, *[1] * (leaf.ndim - 2)) for name, leaf in before.items()}
        chex.assert_trees_all_close(after["experts"], expected, rtol=1e-6)
        chex.assert_trees_all_equal(after["router"], updates["router"])


def inner_by_hand():
    """SGD whose update is scaled by hand, for the inside of a wrapper."""

    def update(updates, state, params=None, *, utilization, **extra_args):
        return by_hand(jax.tree.map(lambda g: -0.1 * g, updates), utilization["experts"]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@rows(optimizer_table.INSIDE)
def test_inside(row):
    with jax.enable_x64(True):
        (expected, _, _), (params, (before, after), _) = train(
            (row.make(inner_by_hand()), as_is), (row.make(optax.chain(optax.sgd(0.1), excite())), as_is)
        )
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-9)
    assert after < before


@pytest.mark.parametrize("name", ["mechanize", "schedule_free"])
def test_outside_of_what_keeps_parameters_of_its_own_is_another_thing(name):
    wrap = {"mechanize": optax.contrib.mechanize, "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1)}[
        name
    ]
    with jax.enable_x64(True):
        (inside, _, _), (outside, _, _) = train(
            (wrap(optax.chain(optax.sgd(0.1), excite())), as_is),
            (optax.chain(wrap(optax.sgd(0.1)), excite()), as_is),
            epochs=10,
        )
    assert not np.allclose(inside["experts"]["kernel"], outside["experts"]["kernel"], rtol=1e-2)


@rows(optimizer_table.NO)
def test_no(row):
    """What is not supported fails loudly; it never trains without Excitation."""
    params = small_moe.init(0)
    tx = row.make(optax.chain(optax.sgd(0.1), excite()))
    state = tx.init(optax.LookaheadParams(params, params) if row.name == "optax.lookahead" else params)
    with pytest.raises((TypeError, ValueError), match="utilization"):
        tx.update(params, state, params, utilization={"experts": jnp.ones(4) / 4})


def by_hand_sgd():
    """SGD whose update is scaled by hand, of a tree of utilization or of counts."""

    def update(updates, state, params=None, *, utilization, **extra_args):
        u = utilization["experts"]
        u = u.counts / u.tokens if isinstance(u, excitation_optax.RoutingCounts) else u
        return by_hand(jax.tree.map(lambda g: -0.1 * g, updates), u), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("row", [row for row in optimizer_table.FLAX if row.works], ids=lambda row: row.name)
def test_flax(row):
    """Flax's loop against an Optax loop around an update that is scaled by hand."""
    params = small_moe.init(0)
    update = row.start(row.wrap(optax.chain(optax.sgd(0.1), excite())), params)
    plain = row.wrap(by_hand_sgd())
    state = plain.init(params)
    expected, trained = params, params
    xs, ys = small_moe.batches()
    for x, y in zip(xs[:6], ys[:6], strict=True):
        _, u, grads = gradients(expected, x, y)
        utilization = {"experts": excitation_optax.RoutingCounts(u * small_moe.B, jnp.asarray(float(small_moe.B)))}
        updates, state = plain.update(grads, state, expected, utilization=utilization)
        expected = optax.apply_updates(expected, updates)
        _, _, grads = gradients(trained, x, y)
        trained = update(grads, utilization)
        chex.assert_trees_all_close(trained, expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(expected["experts"]["kernel"], params["experts"]["kernel"], rtol=1e-2)


@pytest.mark.parametrize("row", [row for row in optimizer_table.FLAX if not row.works], ids=lambda row: row.name)
def test_flax_no(row):
    params = small_moe.init(0)
    update = row.start(optax.chain(optax.sgd(0.1), excite()), params)
    with pytest.raises((TypeError, ValueError), match="utilization"):
        update(params, {"experts": jnp.ones(4) / 4})


def test_the_table_lists_every_optimizer_and_wrapper_of_optax():
    listed = {row.name.split(" ")[0] for row in optimizer_table.AFTER + optimizer_table.INSIDE + optimizer_table.NO}
    exported = {
        f"optax.{name}" for name, f in vars(optax).items() if getattr(f, "__module__", "") == "optax._src.alias"
    }
    exported |= {
        f"optax.contrib.{name}"
        for name, f in vars(optax.contrib).items()
        if inspect.isfunction(f) and not name.startswith(("scale_by", "hutchinson", "normalize", "schedule_free_eval"))
    }
    exported |= {f"optax.{name}" for name, f in vars(optax).items() if takes_an_optimizer(f)}
    parts = {"optax.contrib.differentially_private_aggregate", "optax.monitor"}  # of dpsgd; of a chain, to record
    old_names = {"optax.multi_transform", "optax.inject_stateful_hyperparams"}
    exported = {name for name in exported if name != "optax.MaskOrFn"} - parts - old_names
    assert exported - listed == set()


def takes_an_optimizer(f):
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # no callable, or one without a signature
        return False
    return any("GradientTransformation" in str(parameter.annotation) for parameter in parameters)


def test_the_page_of_the_table_is_up_to_date():
    page = pathlib.Path(__file__).parents[1] / "docs" / "compatibility.md"
    assert page.read_text() == optimizer_table.markdown()


@jax.numpy_dtype_promotion("standard")  # Optax's Adam needs it
def test_before_adam_excitation_cancels_out():
    params = small_moe.init(0)
    u = {"experts": jnp.array([0.4, 0.3, 0.2, 0.1])}
    adam, before = optax.adam(0.03), optax.chain(excite(), optax.adam(0.03))
    expected, _ = adam.update(params, adam.init(params), params)
    updates, _ = before.update(params, before.init(params), params, utilization=u)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4)


@jax.numpy_dtype_promotion("standard")  # Optax's Adam needs it
def test_decay_can_be_left_unexcited():
    """chain(scale_by_adam, excitation, add_decayed_weights, scale_by_learning_rate): decay is the same for all."""
    recipe = optax.chain(
        optax.scale_by_adam(), excite(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.03)
    )
    params = small_moe.init(0)
    u = jnp.array([0.5, 0.5, 0.0, 0.0])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = recipe.update(zeros, recipe.init(params), params, utilization={"experts": u})
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: -0.03 * 0.1 * p, params))
    # adamw, then excitation: the idle experts are not decayed at all, the busy ones twice.
    after = optax.chain(optax.adamw(0.03, weight_decay=0.1), excite())
    updates, _ = after.update(zeros, after.init(params), params, utilization={"experts": u})
    chex.assert_trees_all_close(
        updates["experts"]["bias"], -0.003 * jnp.array([[2.0], [2.0], [0.0], [0.0]]) * params["experts"]["bias"]
    )
