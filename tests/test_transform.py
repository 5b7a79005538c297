"""scale_by_excitation by itself, and under every transformation of JAX."""

import functools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import jax_versions
import numpy as np
import optax
import pytest
import small_moe
import strategy_table
from jax.sharding import PartitionSpec as P

import excitation_optax

for state_type in (optax.EmptyState, optax.MultiStepsState):
    jax.export.register_namedtuple_serialization(state_type, serialized_name=f"optax.{state_type.__name__}")


def excite(**kwargs):
    return excitation_optax.scale_by_excitation(excitation_optax.zero_sum, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_and_structure_are_kept(dtype):
    with jax_versions.enable_x64(dtype == "float64"):
        params = small_moe.init(0, jnp.dtype(dtype))
        u = {"experts": jnp.array([0.1, 0.2, 0.3, 0.4], jnp.float32)}
        updates, _ = excite().update(params, excite().init(params), utilization=u)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        phi = np.array([0.4, 0.8, 1.2, 1.6])  # u over its mean 0.25
        expected = np.asarray(params["experts"]["bias"], np.float64) * phi[:, None]
        # Scaled in float32 or wider, and rounded once.
        np.testing.assert_allclose(
            np.asarray(updates["experts"]["bias"], np.float64), expected, rtol=max(float(jnp.finfo(dtype).eps), 2e-7)
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
    stepped, _ = jax.jit(jax.vmap(lambda p, x, y: step(p, sgd().init(p), x, y)))(params, x, y)
    alone_step = jax.jit(step)
    for i in range(3):
        take = functools.partial(jax.tree.map, lambda a, i=i: a[i])
        alone, _ = alone_step(take(params), sgd().init(take(params)), x[i], y[i])
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
    with jax_versions.set_mesh(mesh):
        x, y = (jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a in (x, y))
        replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
        stepped, _ = jax.jit(step)(replicated, sgd().init(params), x, y)
    chex.assert_trees_all_close(stepped, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", [P("expert"), P()], ids=["split", "whole"])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])
def test_experts_that_are_split_send_nothing(kind, where):
    """The updates of each device's experts are scaled where they lie; utilization alone is sent, if it is split."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(kind,))
    updates = {"kernel": jax.random.normal(jax.random.key(0), (2, 16, 3, 5)), "bias": jnp.ones((2, 16, 5))}
    utilization = jax.random.uniform(jax.random.key(1), (2, 16)).at[0, 3].set(0)
    for name in strategy_table.NAMES:
        tx = excitation_optax.scale_by_excitation(getattr(excitation_optax, name), 2.0)
        expected, _ = tx.update(updates, tx.init(updates), utilization=utilization)
        with jax_versions.set_mesh(mesh):
            place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
            split = place(updates, P(None, "expert"))
            u = place(utilization, P(None, *where))
            compiled = jax.jit(tx.update).lower(split, tx.init(updates), utilization=u).compile()
            got, _ = compiled(split, tx.init(updates), utilization=u)
        chex.assert_trees_all_close(got, expected, rtol=1e-6)
        assert got["kernel"].sharding.spec[1] == "expert"
        sent = re.findall(
            r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", compiled.as_text()
        )
        assert sent == (["all-gather"] if where else []), name


def data_parallel_step(params, x, y, axis_name="data", sum_counts=False):
    """The body for pmap and shard_map: gradients are averaged by hand, counts are summed by the transform."""
    (_, active), grads = jax.value_and_grad(
        lambda p: (jnp.mean((small_moe.forward(p, x)[0] - y) ** 2), small_moe.forward(p, x)[1]), has_aux=True
    )(params)
    counts = excitation_optax.count_active(active)
    if sum_counts:
        counts = jax.lax.psum(counts, "data")
    tx = optax.chain(optax.sgd(0.1), excite(axis_name=axis_name))
    grads = jax.lax.pmean(grads, "data")
    updates, _ = tx.update(grads, tx.init(params), params, utilization={"experts": counts})
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("sum_counts", [False, True], ids=["once", "twice"])
def test_shard_map(sum_counts):
    params, x, y, expected = one_step()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    body = functools.partial(data_parallel_step, sum_counts=sum_counts)
    specs = (P(), P("data"), P("data"))
    body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    chex.assert_trees_all_close(jax.jit(body)(params, x, y), expected, rtol=1e-5, atol=1e-6)


def test_pmap_and_what_a_forgotten_axis_name_does():
    params, x, y, expected = one_step()
    x, y = (a.reshape(8, -1, *a.shape[1:]) for a in (x, y))
    right = jax.pmap(data_parallel_step, axis_name="data", in_axes=(None, 0, 0))(params, x, y)
    for replica in range(8):
        chex.assert_trees_all_close(jax.tree.map(lambda a, r=replica: a[r], right), expected, rtol=1e-5, atol=1e-6)
    forgot = functools.partial(data_parallel_step, axis_name=None)
    wrong = jax.pmap(forgot, axis_name="data", in_axes=(None, 0, 0))(params, x, y)
    bias = np.asarray(wrong["experts"]["bias"])
    assert not np.allclose(bias, bias[:1])  # the replicas have drifted apart
    np.testing.assert_allclose(wrong["router"], right["router"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sum_counts", [False, True], ids=["once", "twice"])
def test_several_axis_names_and_one_reduction_for_all_layers(sum_counts):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    updates = {f"layer_{n}": jnp.ones((2, 3)) for n in range(3)}
    tx = excite(axis_name=("data", "fsdp"))

    def body(active):
        counts = {name: excitation_optax.count_active(active) for name in updates}
        counts = jax.lax.psum(counts, ("data", "fsdp")) if sum_counts else counts
        return tx.update(updates, tx.init(updates), utilization=counts)[0]

    active = jnp.arange(16)[:, None] % jnp.array([[2, 4]]) == 0  # a half, and a quarter, of the 16 samples
    spec = P(("data", "fsdp"))
    compiled = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=P())).lower(active).compile()
    for update in compiled(active).values():
        np.testing.assert_allclose(update[:, 0], [4 / 3, 2 / 3], rtol=1e-6)
    if not sum_counts and jax_versions.IS_RECENT:  # XLA's older compilers split it
        assert compiled.as_text().count(" all-reduce(") == 1


def test_counts_are_summed_in_float32():
    """300 + 300 tokens of 8 devices do not fit into bfloat16's 8 bits, nor into int8."""
    tx = excite(axis_name="data")

    def update(device):
        counts = jnp.stack([300 + device, 300 - device]).astype(jnp.bfloat16)  # 300 and 302 are bfloat16, 301 is not
        counts = excitation_optax.RoutingCounts(counts, jnp.bfloat16(600))
        return tx.update({"w": jnp.ones(2)}, optax.EmptyState(), utilization={"w": counts})[0]

    scaled = jax.pmap(update, axis_name="data")(jnp.full(8, 2.0))
    np.testing.assert_allclose(scaled["w"][0], [302 / 300, 298 / 300], rtol=1e-6)


def test_fractions_cannot_be_summed_over_devices():
    tx = excite(axis_name="data")
    update = lambda u: tx.update({"experts": u}, tx.init(None), utilization={"experts": u})
    with pytest.raises(ValueError, match=r"experts is float32\[4\]: pass RoutingCounts, .* over axis_name='data'"):
        jax.pmap(update, axis_name="data")(jnp.ones((8, 4)))


@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps needs it
def test_states_and_counts_are_exported():
    """By `jax.export`, to which optax's own states are made known here."""
    params = {"experts": jnp.ones((2, 3))}
    counts = {"experts": excitation_optax.RoutingCounts(jnp.array([3.0, 1.0]), jnp.array(4.0))}
    tx = excite(gamma=optax.constant_schedule(1.0))
    for wrapped in (
        tx,
        excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 1), counts),
        excitation_optax.hold_utilization(tx, counts),
    ):
        state = wrapped.init(params)
        update = jax.jit(lambda params, state, counts, tx=wrapped: tx.update(params, state, params, utilization=counts))
        exported = jax.export.deserialize(jax.export.export(update)(params, state, counts).serialize())
        chex.assert_trees_all_equal(exported.call(params, state, counts), update(params, state, counts))


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


def test_leaves_that_no_optimizer_moves_pass_through():
    """Integers, their float0 gradients, and keys, beside the weights of an expert; a Python float is a parameter."""
    table = np.zeros((4,), jax.dtypes.float0)
    updates = {"experts": {"w": jnp.ones((4, 2)), "ids": jnp.arange(4), "table": table, "key": jax.random.key(0)}}
    scaled, _ = excite().update(updates, excite().init(updates), utilization=UTILIZATION)
    for name in ("ids", "table", "key"):
        assert scaled["experts"][name] is updates["experts"][name]
    np.testing.assert_allclose(scaled["experts"]["w"], expected_bias(1.0), rtol=1e-6)
    experts = {f"expert_{k}": 1.0 for k in range(4)}
    others = {"step": 3, "flag": True, "numpy": np.int64(3), "bool": np.bool_(True)}
    scaled, _ = excite().update(
        experts, excite().init(experts), utilization={"expert_{expert}": UTILIZATION["experts"]}
    )
    with_others = {f"expert_{k}": {"w": 1.0, **others} for k in range(4)}
    utilization = {"expert_{expert}": UTILIZATION["experts"]}
    beside, _ = excite().update(with_others, excite().init(experts), utilization=utilization)
    for k in range(4):
        assert {name: beside[f"expert_{k}"][name] for name in others} == others
        assert beside[f"expert_{k}"]["w"] == scaled[f"expert_{k}"]
    np.testing.assert_allclose(list(scaled.values()), expected_bias(1.0)[:, 0], rtol=1e-6)
