"""What every integration has to show: exactly which parameters Excitation scaled, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def paths(tree):
    """Leaves by path, as names with slashes between: `layers/0/experts/w`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def assert_scaled(vanilla, excited, factors, rtol=1e-6):
    """Asserts that the excited updates are the vanilla ones times `factors`, and bit for bit the same elsewhere.

    Args:
      vanilla: the updates of the optimizer alone.
      excited: the updates of the same optimizer, state and gradients, with Excitation chained after it.
      factors: by path, an array that broadcasts against the update, worked out apart from the library.
      rtol: relative tolerance of the product.
    """
    vanilla, excited = paths(vanilla), paths(excited)
    assert vanilla.keys() == excited.keys()
    assert factors.keys() <= vanilla.keys(), sorted(factors.keys() - vanilla.keys())
    for path, update in vanilla.items():
        update, got = np.asarray(update), np.asarray(excited[path])
        assert np.any(update), f"the update of {path} is zero: nothing is shown by it"
        if path in factors:
            np.testing.assert_allclose(got, update * np.asarray(factors[path]), rtol=rtol, err_msg=path)
            assert not np.array_equal(got, update), f"{path} was not scaled"
        else:
            np.testing.assert_array_equal(got, update, err_msg=path)


def recorded(tx):
    """The transformation, with what went into it and what came out of it in its state: for loops that hide updates."""

    def init_fn(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # twice, as some loops donate the state
        return {"tx": tx.init(params), "before": zeros(), "after": zeros()}

    def update_fn(updates, state, params=None, **extra_args):
        after, tx_state = tx.update(updates, state["tx"], params, **extra_args)
        return after, {"tx": tx_state, "before": updates, "after": after}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
