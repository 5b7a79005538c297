"""A user's own MoE in Flax NNX, trained by `nnx.Optimizer`: see docs/integrations/nnx.md.

own_moe.py defines the axis letters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_moe
import pytest
from flax import nnx
from own_moe import D, E, F, K, L

import excitation_optax
from excitation_optax import flax as excitation_flax

pytestmark = pytest.mark.usefixtures("as_users_have_it")


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Scores(nnx.Intermediate):
    """The routers' scores, for the tests."""


class MoE(nnx.Module):
    """Experts that nnx.vmap stacks or that are separate modules of the layer, and a shared expert."""

    def __init__(self, rngs, stacked):
        self.router = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.shared = MLP(rngs)
        self.stacked = stacked
        if stacked:
            self.experts = nnx.vmap(MLP, in_axes=0)(rngs.split(E))
        else:
            for k in range(E):
                setattr(self, f"expert_{k}", MLP(rngs))

    def __call__(self, x, where):
        scores = self.router(x)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(scores), K)
        counts = excitation_optax.count_routing(chosen, num_experts=E, where=where)
        self.sow(Scores, "scores", scores, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if self.stacked:
            excitation_flax.sow_routing(self, counts, "experts")
            outputs = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=-2)(self.experts, x)
        else:
            excitation_flax.sow_routing(self, counts, "expert_{expert}")
            outputs = jnp.stack([getattr(self, f"expert_{k}")(x) for k in range(E)], axis=-2)
        weights = jnp.sum(gates[..., None] * jax.nn.one_hot(chosen, E), axis=-2)
        return x + self.shared(x) + jnp.einsum("bse,bsed->bsd", weights, outputs)


@nnx.remat
def recomputed(layer, x, where):
    return layer(x, where)


class Listed(nnx.Module):
    def __init__(self, rngs, stacked=False):
        self.layers = nnx.List([MoE(rngs, stacked) for _ in range(L)])

    def __call__(self, x, where):
        for layer in self.layers:
            x = recomputed(layer, x, where)
        return x


class Scanned(nnx.Module):
    """Layers made by nnx.vmap and run by nnx.scan."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: MoE(rngs, stacked=True), in_axes=0)(rngs.split(L))

    def __call__(self, x, where):
        scan = nnx.scan(lambda x, layer: recomputed(layer, x, where), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


WEIGHTS = [("up/kernel", 2), ("up/bias", 1), ("down/kernel", 2), ("down/bias", 1)]  # with their numbers of axes


def loss_fn(model, x, y, where):
    output, utilization, scores = excitation_flax.capture_routing(model, Scores)(x, where)
    return own_moe.loss(output, y, where), (utilization, jax.tree.leaves(scores))


def test_separate_experts_and_nnx_optimizer_under_nnx_jit():
    model = nnx.jit(lambda: Listed(nnx.Rngs(1)))()
    graphdef = nnx.graphdef(model)
    adamw, tx = own_moe.optimizers()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y, where):
        (loss, (utilization, scores)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y, where)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        vanilla, _ = adamw.update(nnx.as_pure(grads), nnx.as_pure(optimizer.opt_state)[0], params)
        updates = optimizer.update(model, grads, utilization=utilization)
        return loss, scores, vanilla, updates

    def factors(phis):
        return {
            f"layers/{layer}/expert_{k}/{name}": phis[layer, k] for layer, k in np.ndindex(L, E) for name, _ in WEIGHTS
        }

    own_moe.check_training(lambda *batch: step(model, optimizer, *batch), factors)
    assert nnx.graphdef(model) == graphdef  # nothing was left behind


def test_scanned_layers_of_stacked_experts_under_nnx_split_and_jax_jit():
    adamw, tx = own_moe.optimizers()
    graphdef, params, rest = nnx.split(nnx.jit(lambda: Scanned(nnx.Rngs(1)))(), nnx.Param, ...)
    params = nnx.as_pure(params)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y, where):
        def merged(params):
            return loss_fn(nnx.merge(graphdef, params, rest), x, y, where)

        (loss, (utilization, (scores,))), grads = jax.value_and_grad(merged, has_aux=True)(params)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return optax.apply_updates(params, updates), opt_state, (loss, list(scores), vanilla, updates)

    def stateful(*batch):
        nonlocal params, opt_state
        params, opt_state, seen = step(params, opt_state, *batch)
        return seen

    def factors(phis):  # parameters [L, E, ...]
        return {f"layers/experts/{name}": own_moe.along(phis, ndim + 2, 0, 1) for name, ndim in WEIGHTS}

    own_moe.check_training(stateful, factors, padding=True)


def test_pop_routing_gives_what_capture_routing_gives():
    x, _, where = own_moe.batch(0, padding=True)

    @nnx.jit
    def both(model):
        _, captured, _ = excitation_flax.capture_routing(model, Scores)(x, where)
        nnx.grad(lambda model: jnp.sum(model(x, where)))(model)  # in which nnx.remat calls the layers twice
        return captured, excitation_flax.pop_routing(model)

    with pytest.warns(DeprecationWarning, match="sow"):  # of the tests' own scores
        captured, popped = both(nnx.jit(lambda: Scanned(nnx.Rngs(1)))())
    jax.tree.map(np.testing.assert_array_equal, captured, popped)
    np.testing.assert_array_equal(captured["layers"]["experts"].tokens, [np.sum(where)] * L)


def test_frozen_experts_have_no_utilization():
    """The tree of updates lacks what `wrt` leaves out, so the layer's entry is an error until it is dropped."""
    trained = nnx.All(nnx.Param, nnx.Not(lambda path, _: path[:2] == ("layers", 0)))
    _, tx = own_moe.optimizers()

    def updates(drop):
        model = Listed(nnx.Rngs(1))
        optimizer = nnx.Optimizer(model, tx, wrt=trained)
        grad = nnx.grad(loss_fn, argnums=nnx.DiffState(0, trained), has_aux=True)
        grads, (utilization, _) = grad(model, *own_moe.batch(0))
        if drop:
            del utilization["layers"][0]
        return optimizer.update(model, grads, utilization=utilization)

    with pytest.raises(ValueError, match=r"layers/0/expert_\{expert\}"):
        nnx.eval_shape(lambda: updates(drop=False))
    assert set(nnx.eval_shape(lambda: updates(drop=True))["layers"]) == {1}
