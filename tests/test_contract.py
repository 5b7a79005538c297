"""The contract with Optax: every optimizer, every wrapper, every transformation of JAX.

One table of optimizers (`optimizer_table.py`), one list of promises.
"""

import functools
import inspect
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_table
import pytest
import small_moe
from jax.sharding import PartitionSpec as P

import excitation_optax


def rows(where):
    return pytest.mark.parametrize("row", where, ids=lambda row: row.id)


def excite(**kwargs):
    return excitation_optax.scale_by_excitation(excitation_optax.zero_sum, **kwargs)


def gradients(params, x, y, per_example=False):
    """Loss, utilization and gradients; of every example, with a leading axis, if asked for."""
    (loss, u), grads = jax.value_and_grad(small_moe.loss_fn, has_aux=True)(params, x, y)
    if per_example:
        one = jax.grad(lambda p, x, y: small_moe.loss_fn(p, x[None], y[None])[0])
        grads = jax.vmap(one, in_axes=(None, 0, 0))(params, x, y)
    return loss, u, grads


def mean_loss(params, x, y):
    return small_moe.loss_fn(params, x, y)[0]


def train(tx, update, dtype, per_example=False, epochs=1):
    """Parameters after 20 steps an epoch, and the mean loss before and after.

    `update` maps (updates of tx, utilization) to the updates that are applied.
    """
    params = small_moe.init(0, dtype)
    x, y = (jnp.tile(a, (epochs, 1, 1)) for a in small_moe.batches(dtype))

    def step(carry, batch):
        params, state = carry
        loss, u, grads = gradients(params, *batch, per_example)
        # Optax's line search hands every extra argument on to value_fn, by name.
        objective = lambda p, utilization=None, obj_fn=None: small_moe.loss_fn(p, *batch)[0]
        extra = {"value": loss, "grad": grads, "value_fn": objective, "obj_fn": objective}
        updates, state = tx.update(grads, state, params, utilization={"experts": u}, **extra)
        return (optax.apply_updates(params, update(updates, u)), state), None

    @jax.jit
    def run():
        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), (x, y))
        losses = [jnp.mean(jax.vmap(functools.partial(mean_loss, p))(x, y)) for p in (params, trained)]
        return trained, losses

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax's own code needs these
        return run()


def by_hand(updates, u):
    return small_moe.scale_experts(updates, small_moe.zero_sum(u))


def as_is(updates, u):
    del u
    return updates


# Optax's own: optimistic_adam gives way to optimistic_adam_v2, dpsgd wants a key in place of its seed.
@pytest.mark.filterwarnings("ignore:.*optimistic_adam|.*dpsgd|.*seed:DeprecationWarning")
@rows(optimizer_table.AFTER)
def test_after(row):
    """Equations 3 and 4, written as a loop: theta + Phi(u) (O(theta, grad) - theta). And it still learns."""
    with jax.enable_x64(True):
        expected, _ = train(optax.chain(row.make()), by_hand, jnp.float64, row.per_example)
        params, (before, after) = train(optax.chain(row.make(), excite()), as_is, jnp.float64, row.per_example)
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-9)
    assert after < before


def inner_by_hand():
    """SGD whose update is scaled by hand, for the inside of a wrapper."""

    def update(updates, state, params=None, *, utilization, **extra_args):
        return by_hand(jax.tree.map(lambda g: -0.1 * g, updates), utilization["experts"]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@rows(optimizer_table.INSIDE)
def test_inside(row):
    with jax.enable_x64(True):
        expected, _ = train(row.make(inner_by_hand()), as_is, jnp.float64)
        params, (before, after) = train(row.make(optax.chain(optax.sgd(0.1), excite())), as_is, jnp.float64)
    chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-9)
    assert after < before


@pytest.mark.parametrize("name", ["mechanize", "schedule_free"])
def test_outside_of_what_keeps_parameters_of_its_own_is_another_thing(name):
    wrap = {"mechanize": optax.contrib.mechanize, "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1)}[
        name
    ]
    with jax.enable_x64(True):
        inside, _ = train(wrap(optax.chain(optax.sgd(0.1), excite())), as_is, jnp.float64, epochs=10)
        outside, _ = train(optax.chain(wrap(optax.sgd(0.1)), excite()), as_is, jnp.float64, epochs=10)
    assert not np.allclose(inside["experts"]["kernel"], outside["experts"]["kernel"], rtol=1e-2)


@rows(optimizer_table.NO)
def test_no(row):
    """What is not supported fails loudly; it never trains without Excitation."""
    params = small_moe.init(0)
    tx = row.make(optax.chain(optax.sgd(0.1), excite()))
    state = tx.init(optax.LookaheadParams(params, params) if row.name == "optax.lookahead" else params)
    with pytest.raises((TypeError, ValueError), match="utilization"):
        tx.update(params, state, params, utilization={"experts": jnp.ones(4) / 4})


def test_the_table_lists_every_optimizer_of_optax():
    listed = {row.name.split(" ")[0] for row in optimizer_table.AFTER + optimizer_table.INSIDE + optimizer_table.NO}
    exported = {
        f"optax.{name}" for name, f in vars(optax).items() if getattr(f, "__module__", "") == "optax._src.alias"
    }
    exported |= {
        f"optax.contrib.{name}"
        for name, f in vars(optax.contrib).items()
        if inspect.isfunction(f) and not name.startswith(("scale_by", "hutchinson", "normalize", "schedule_free_eval"))
    }
    parts = {"optax.contrib.differentially_private_aggregate"}  # of dpsgd
    exported = {name for name in exported if name != "optax.MaskOrFn"} - parts
    assert exported - listed == set()


def test_the_page_of_the_table_is_up_to_date():
    page = pathlib.Path(__file__).parents[1] / "docs" / "compatibility.md"
    assert page.read_text() == optimizer_table.markdown()


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_and_structure_are_kept(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = small_moe.init(0, jnp.dtype(dtype))
        u = {"experts": jnp.array([0.1, 0.2, 0.3, 0.4], jnp.float32)}
        updates, _ = excite().update(params, excite().init(params), utilization=u)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        phi = np.array([0.4, 0.8, 1.2, 1.6])  # u over its mean 0.25
        expected = np.asarray(params["experts"]["bias"], np.float64) * phi[:, None]
        # Scaled in float32 or wider, and rounded once.
        np.testing.assert_allclose(
            np.asarray(updates["experts"]["bias"], np.float64), expected, rtol=max(jnp.finfo(dtype).eps, 2e-7)
        )


def test_untouched_leaves_are_identical_bit_for_bit():
    params = small_moe.init(0) | {"odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45])}
    updates, _ = jax.jit(excite().update)(params, excite().init(params), utilization={"experts": jnp.ones(4) / 4})
    for name in ("router", "odd"):
        assert updates[name].tobytes() == params[name].tobytes()


def test_state_holds_nothing_of_a_parameters_size():
    params = small_moe.init(0)
    assert excite().init(params) == optax.EmptyState()
    random = excitation_optax.scale_by_excitation(excitation_optax.random_boost)
    scheduled = excitation_optax.scale_by_excitation(gamma=optax.linear_schedule(0.0, 1.0, 10))
    for tx in (random, scheduled):
        (count,) = jax.tree.leaves(tx.init(params))
        assert (count.shape, count.dtype) == ((), jnp.int32)


UTILIZATION = {"experts": jnp.array([0.1, 0.2, 0.3, 0.4])}


def scheduled_gamma():
    return optax.linear_schedule(0.0, 2.0, 2)  # 0, 1, 2 at steps 0, 1, 2


def expected_bias(gamma):
    u = np.array([0.1, 0.2, 0.3, 0.4]) ** gamma
    return (u / u.mean())[:, None] * np.ones((4, 2))


@pytest.mark.parametrize("injected", [False, True])
def test_gamma_follows_a_schedule(injected):
    if injected:
        factory = optax.inject_hyperparams(
            excitation_optax.scale_by_excitation, static_args=("strategy", "expert_axis")
        )
        tx = factory(excitation_optax.zero_sum, gamma=scheduled_gamma())
    else:
        tx = excite(gamma=scheduled_gamma())
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))
    state, update = tx.init(ones), jax.jit(tx.update)
    for gamma in (0.0, 1.0, 2.0, 2.0):
        updates, state = update(ones, state, ones, utilization=UTILIZATION)
        np.testing.assert_allclose(updates["experts"]["bias"], expected_bias(gamma), rtol=1e-6)


def test_gamma_can_be_traced():
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))

    @jax.jit
    def bias(gamma):
        tx = excite(gamma=gamma)
        return tx.update(ones, tx.init(ones), utilization=UTILIZATION)[0]["experts"]["bias"]

    np.testing.assert_allclose(bias(2.0), expected_bias(2.0), rtol=1e-6)
    slope = jax.jacfwd(bias)(1.0)  # and differentiated, for those who learn it
    np.testing.assert_allclose(slope, (expected_bias(1 + 1e-4) - expected_bias(1 - 1e-4)) / 2e-4, rtol=1e-3, atol=1e-4)


def test_random_boost_is_what_the_documented_key_gives():
    tx = excitation_optax.scale_by_excitation(excitation_optax.random_boost, seed=7)
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))
    state, seen = tx.init(ones), []
    for step in range(3):
        updates, state = tx.update(ones, state, utilization=UTILIZATION)
        key = jax.random.fold_in(jax.random.key(7), step)
        phi = excitation_optax.random_boost(UTILIZATION["experts"], 1.0, key=key)
        np.testing.assert_array_equal(updates["experts"]["bias"][:, 0], phi)
        np.testing.assert_array_equal(updates["experts"]["kernel"][:, 0, 0], phi)  # the same for every leaf
        logged = excitation_optax.excitation(UTILIZATION, excitation_optax.random_boost, key=key)
        np.testing.assert_array_equal(logged["experts"], phi)
        seen.append(tuple(np.asarray(phi)))
    assert len(set(seen)) > 1


def test_excitation_is_what_the_transform_applies():
    counts = excitation_optax.RoutingCounts(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array(10.0))
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))
    for strategy in (excitation_optax.exp_diff, excitation_optax.clipped(excitation_optax.zero_sum, 1.5)):
        tx = excitation_optax.scale_by_excitation(strategy, 2.0)
        updates, _ = tx.update(ones, tx.init(ones), utilization={"experts": counts})
        phi = excitation_optax.excitation({"experts": counts}, strategy, 2.0)
        np.testing.assert_array_equal(updates["experts"]["bias"][:, 0], phi["experts"])


def test_a_strategy_of_ones_own():
    tx = excitation_optax.scale_by_excitation(lambda u, gamma: 1 + gamma * u)
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))
    updates, _ = tx.update(ones, tx.init(ones), utilization=UTILIZATION)
    np.testing.assert_allclose(updates["experts"]["bias"][:, 0], [1.1, 1.2, 1.3, 1.4], rtol=1e-6)


# Transformations of JAX.


def sgd():
    return optax.chain(optax.sgd(0.1), excite())


def step(params, state, x, y):
    """One step of SGD with Excitation, counts as they come from a model."""
    (_, active), grads = jax.value_and_grad(
        lambda p: (jnp.mean((small_moe.forward(p, x)[0] - y) ** 2), small_moe.forward(p, x)[1]), has_aux=True
    )(params)
    counts = excitation_optax.count_active(active)
    updates, state = sgd().update(grads, state, params, utilization={"experts": counts})
    return optax.apply_updates(params, updates), state


@functools.cache
def one_step():
    """Parameters, a batch, and the parameters after a step on one device."""
    params = small_moe.init(0)
    x, y = (a[0] for a in small_moe.batches())
    with jax.numpy_rank_promotion("allow"):
        return params, x, y, jax.jit(step)(params, sgd().init(params), x, y)[0]


def test_vmap():
    params = jax.vmap(small_moe.init)(jnp.arange(3))
    x, y = (a[:3] for a in small_moe.batches())
    stepped, _ = jax.vmap(lambda p, x, y: step(p, sgd().init(p), x, y))(params, x, y)
    for i in range(3):
        take = functools.partial(jax.tree.map, lambda a, i=i: a[i])
        alone, _ = step(take(params), sgd().init(take(params)), x[i], y[i])
        chex.assert_trees_all_close(take(stepped), alone, rtol=1e-5, atol=1e-6)


def test_scan_with_donated_buffers_compiles_once():
    params = small_moe.init(0)
    x, y = small_moe.batches()
    looped, state = params, sgd().init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    looped = jax.tree.map(jnp.copy, looped)
    for i in range(small_moe.STEPS):
        looped, state = jitted(looped, state, x[i], y[i])
    assert jitted._cache_size() == 1
    (scanned, _), _ = jax.lax.scan(
        lambda carry, batch: (step(*carry, *batch), None), (params, sgd().init(params)), (x, y)
    )
    chex.assert_trees_all_close(scanned, looped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tx", [excite(), excite(gamma=scheduled_gamma())], ids=["stateless", "scheduled"])
def test_stable_under_cond(tx):
    ones = jax.tree.map(jnp.ones_like, small_moe.init(0))
    state = tx.init(ones)
    updates, new_state = jax.jit(
        lambda skip: jax.lax.cond(
            skip, lambda: (ones, state), lambda: tx.update(ones, state, ones, utilization=UTILIZATION)
        )
    )(False)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, new_state), (ones, state))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])
def test_jit_with_a_sharded_batch(kind):
    params, x, y, expected = one_step()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x, y = (jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a in (x, y))
        replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
        stepped, _ = jax.jit(step)(replicated, sgd().init(params), x, y)
    chex.assert_trees_all_close(stepped, expected, rtol=1e-5, atol=1e-6)


def data_parallel_step(params, x, y, sum_counts=True):
    """The body for pmap and shard_map: gradients are averaged, and counts are summed, by hand."""
    (_, active), grads = jax.value_and_grad(
        lambda p: (jnp.mean((small_moe.forward(p, x)[0] - y) ** 2), small_moe.forward(p, x)[1]), has_aux=True
    )(params)
    counts = excitation_optax.count_active(active)
    if sum_counts:
        counts = jax.lax.psum(counts, "data")
    updates, _ = sgd().update(jax.lax.pmean(grads, "data"), sgd().init(params), params, utilization={"experts": counts})
    return optax.apply_updates(params, updates)


def test_shard_map():
    params, x, y, expected = one_step()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    body = jax.shard_map(
        data_parallel_step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False
    )
    chex.assert_trees_all_close(jax.jit(body)(params, x, y), expected, rtol=1e-5, atol=1e-6)


def test_pmap_and_what_a_forgotten_psum_does():
    params, x, y, expected = one_step()
    x, y = (a.reshape(8, -1, *a.shape[1:]) for a in (x, y))
    right = jax.pmap(data_parallel_step, axis_name="data", in_axes=(None, 0, 0))(params, x, y)
    for replica in range(8):
        chex.assert_trees_all_close(jax.tree.map(lambda a, r=replica: a[r], right), expected, rtol=1e-5, atol=1e-6)
    forgot = functools.partial(data_parallel_step, sum_counts=False)
    wrong = jax.pmap(forgot, axis_name="data", in_axes=(None, 0, 0))(params, x, y)
    bias = np.asarray(wrong["experts"]["bias"])
    assert not np.allclose(bias, bias[:1])  # the replicas have drifted apart
    np.testing.assert_allclose(wrong["router"], right["router"], rtol=1e-5, atol=1e-6)


def test_experts_sharded_under_jit_stay_sharded():
    params, x, y, expected = one_step()
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    specs = {"router": P(), "experts": {"kernel": P("expert"), "bias": P("expert")}}
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, P))
    sharded = jax.device_put(params, shardings)
    jitted = jax.jit(lambda p, x, y: step(p, sgd().init(p), x, y)[0], out_shardings=shardings)
    stepped = jitted(sharded, x, y)
    assert stepped["experts"]["kernel"].sharding.spec == P("expert")
    chex.assert_trees_all_close(stepped, expected, rtol=1e-5, atol=1e-6)
