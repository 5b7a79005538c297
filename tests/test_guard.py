"""Steps that are not finite are skipped, counted, and leave no trace."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import excitation_optax

PARAMS = {"experts": jnp.arange(6.0).reshape(2, 3), "dense": jnp.ones(2)}
GOOD = {
    "grads": jax.tree.map(lambda p: 0.5 * p + 1, PARAMS),
    "utilization": {"experts": excitation_optax.RoutingCounts(jnp.array([3.0, 1.0]), jnp.array(4.0))},
    "value": jnp.array(1.5),
}


def spoiled(value, *path):
    """`GOOD` with one number replaced."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(GOOD)
    names = ["/".join(map(str, (getattr(k, "key", getattr(k, "name", "")) for k in key))) for key, _ in leaves]
    assert names.count("/".join(path)) == 1
    return treedef.unflatten(
        [
            leaf if name != "/".join(path) else leaf.ravel().at[0].set(value).reshape(leaf.shape)
            for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
    )


BAD = [
    spoiled(jnp.nan, "grads", "experts"),
    spoiled(jnp.inf, "grads", "dense"),
    spoiled(jnp.nan, "utilization", "experts", "counts"),
    spoiled(jnp.nan, "utilization", "experts", "tokens"),
    spoiled(-jnp.inf, "value"),
]


def make(optimizer=None):
    strategy = excitation_optax.random_boost  # it has a state, and a chance of its own to notice a skipped step
    tx = optax.chain(optimizer or optax.adam(0.1), excitation_optax.scale_by_excitation(strategy))
    return tx, excitation_optax.apply_if_all_finite(tx)


def run(tx, steps):
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state, given):
        extra = {"utilization": given["utilization"], "value": given["value"]}
        updates, state = tx.update(given["grads"], state, params, **extra)
        return optax.apply_updates(params, updates), state

    for given in steps:
        params, state = step(params, state, given)
    return params, state


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("bad", range(len(BAD)))
def test_a_skipped_step_leaves_no_trace(bad):
    bare, guarded = make()
    expected, inner_state = run(bare, [GOOD, GOOD])
    params, state = run(guarded, [GOOD, BAD[bad], BAD[bad], GOOD])
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(state.inner_state, inner_state)
    assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 2)


@pytest.mark.usefixtures("as_users_have_it")
def test_counts_of_skips():
    _, guarded = make()
    steps = [BAD[0], GOOD, BAD[2], BAD[4], BAD[3]]
    params, state = run(guarded, steps)
    assert (int(state.notfinite_count), int(state.total_notfinite)) == (3, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.usefixtures("as_users_have_it")
def test_apply_if_finite_lets_utilization_pass():
    """Why there is one of ours: if Optax's learns to look at extra arguments, this fails."""
    bare, _ = make()
    params, _ = run(optax.apply_if_finite(bare, max_consecutive_errors=5), [BAD[2]])
    assert np.isnan(params["experts"]).any()


@pytest.mark.usefixtures("as_users_have_it")
def test_inside_accumulation_and_around_it():
    """Around MultiSteps, a bad micro-batch is as if it never was; the others make up the update."""
    tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation())
    like = GOOD["utilization"]
    tx = excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 2), like)
    expected, _ = run(tx, [GOOD, GOOD])
    params, state = run(excitation_optax.apply_if_all_finite(tx), [GOOD, BAD[2], GOOD])
    chex.assert_trees_all_equal(params, expected)
    assert int(state.inner_state.multi_steps.gradient_step) == 1


def test_other_extra_arguments_pass_through():
    """Functions and integers are no numbers to look at, and the inner transformation gets them all."""
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        del params
        seen.update(extra_args)
        return updates, state

    tx = excitation_optax.apply_if_all_finite(optax.GradientTransformationExtraArgs(lambda _: (), update_fn))
    given = {"value_fn": jnp.sum, "number": 3, "value": 2.5, "name": "x", "nothing": None}
    _, state = tx.update(PARAMS, tx.init(PARAMS), **given)
    assert seen == given
    assert int(state.total_notfinite) == 0
    _, state = tx.update(PARAMS, tx.init(PARAMS), value=float("nan"))
    assert int(state.total_notfinite) == 1


@pytest.mark.parametrize("inner", [None, optax.adam])
def test_what_is_no_optimizer(inner):
    with pytest.raises(ValueError, match=r"takes an optimizer, with init and update; got "):
        excitation_optax.apply_if_all_finite(inner)
