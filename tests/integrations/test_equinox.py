"""A user's own MoE in Equinox: see docs/integrations/equinox.md.

Axis letters as in own_moe.py.
"""

import equinox as eqx
import excited
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_moe
import pytest
from own_moe import D, E, F, K, L

import excitation_optax

pytestmark = pytest.mark.usefixtures("as_users_have_it")

WEIGHTS = [
    ("layers/0/weight", 2),
    ("layers/0/bias", 1),
    ("layers/1/weight", 2),
    ("layers/1/bias", 1),
]  # with their axes


def mlp(key):
    return eqx.nn.MLP(D, D, F, 1, activation=jax.nn.gelu, key=key)


class MoE(eqx.Module):
    """Experts stacked by filter_vmap, or in a list; and a shared one. Of one token; counting is the model's."""

    router: eqx.nn.Linear
    shared: eqx.nn.MLP
    experts: eqx.nn.MLP | list[eqx.nn.MLP]
    stacked: bool = eqx.field(static=True)

    def __init__(self, stacked, key):
        router_key, shared_key, experts_key = jax.random.split(key, 3)
        self.router = eqx.nn.Linear(D, E, use_bias=False, key=router_key)
        self.shared = mlp(shared_key)
        keys = jax.random.split(experts_key, E)
        self.experts = eqx.filter_vmap(mlp)(keys) if stacked else [mlp(key) for key in keys]
        self.stacked = stacked

    def __call__(self, x):  # [D]
        scores = self.router(x)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(scores), K)
        if self.stacked:
            outputs = eqx.filter_vmap(lambda expert: expert(x))(self.experts)
        else:
            outputs = jnp.stack([expert(x) for expert in self.experts])
        return x + self.shared(x) + jnp.sum(gates[:, None] * outputs[chosen], axis=0), (scores, chosen)


def over_tokens(layer, x, where):
    """x of the next layer `[B, S, D]`, the router's scores `[B, S, E]`, and routing counts."""
    x, (scores, chosen) = jax.vmap(jax.vmap(layer))(x)
    return x, (scores, excitation_optax.count_routing(chosen, num_experts=E, where=where))


class Scanned(eqx.Module):
    """Layers made by filter_vmap, parameters `[L, E, ...]`; run by jax.lax.scan, recomputed in the backward pass."""

    layers: MoE

    def __init__(self, key):
        self.layers = eqx.filter_vmap(lambda key: MoE(stacked=True, key=key))(jax.random.split(key, L))

    def __call__(self, x, where):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        layer = eqx.filter_checkpoint(lambda arrays, x: over_tokens(eqx.combine(arrays, static), x, where))
        x, (scores, counts) = jax.lax.scan(lambda x, arrays: layer(arrays, x), x, arrays)
        return x, list(scores), {"layers": {"experts": counts}}


class Stateful(eqx.Module):
    """Layers in a list that leave their counts in an eqx.nn.State."""

    layers: list[MoE]
    counts: list[eqx.nn.StateIndex]

    def __init__(self, key):
        self.layers = [MoE(stacked=False, key=key) for key in jax.random.split(key, L)]
        zeros = excitation_optax.RoutingCounts(jnp.zeros(E), jnp.zeros(()))
        self.counts = [eqx.nn.StateIndex(zeros) for _ in self.layers]

    def __call__(self, x, where, state):
        scores = []
        for layer, index in zip(self.layers, self.counts, strict=True):
            x, (layer_scores, counts) = over_tokens(layer, x, where)
            scores.append(layer_scores)
            state = state.set(index, counts)
        return x, scores, state

    def utilization(self, state):
        return {f"layers/{number}/experts/{{expert}}": state.get(index) for number, index in enumerate(self.counts)}


def test_scanned_layers_of_stacked_experts():
    model = eqx.filter_jit(Scanned)(jax.random.key(1))
    adamw, tx = own_moe.optimizers()
    opt_state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, opt_state, x, y, where):
        def loss_fn(model):
            output, scores, utilization = model(x, where)
            return own_moe.loss(output, y, where), (scores, utilization)

        (loss, (scores, utilization)), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_array)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
        return eqx.apply_updates(model, updates), opt_state, (loss, scores, vanilla, updates)

    def stateful(*batch):
        nonlocal model, opt_state
        model, opt_state, seen = step(model, opt_state, *batch)
        return seen

    def factors(phis):
        return {f"layers/experts/{name}": own_moe.along(phis, ndim + 2, 0, 1) for name, ndim in WEIGHTS}

    own_moe.check_training(stateful, factors, padding=True)


def test_separate_experts_some_of_them_frozen_with_counts_from_the_state():
    """Frozen: the first layer's shared expert, and the first of its experts, None in the tree of trained parameters."""
    model, state = eqx.filter_jit(eqx.nn.make_with_state(Stateful))(jax.random.key(1))
    frozen = lambda tree: (tree.layers[0].shared, tree.layers[0].experts[0])
    spec = eqx.tree_at(frozen, jax.tree.map(eqx.is_inexact_array, model), replace=(False, False))
    trained, fixed = eqx.partition(model, spec)
    adamw, tx = own_moe.optimizers()
    opt_state = tx.init(trained)

    @eqx.filter_jit
    def step(trained, opt_state, state, x, y, where):
        def loss_fn(trained):
            model = eqx.combine(trained, fixed)
            output, scores, new_state = model(x, where, state)
            return own_moe.loss(output, y, where), (scores, new_state)

        (loss, (scores, state_)), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(trained)
        vanilla, _ = adamw.update(grads, opt_state[0], trained)
        utilization = model.utilization(state_)
        updates, opt_state = tx.update(grads, opt_state, trained, utilization=utilization)
        return eqx.apply_updates(trained, updates), opt_state, state_, (loss, scores, vanilla, updates)

    def stateful(*batch):
        nonlocal trained, opt_state, state
        trained, opt_state, state, seen = step(trained, opt_state, state, *batch)
        return seen

    def factors(phis):
        return {
            f"layers/{layer}/experts/{k}/{name}": phis[layer, k]
            for layer, k in np.ndindex(L, E)
            for name, _ in WEIGHTS
            if (layer, k) != (0, 0)
        }

    own_moe.check_training(stateful, factors)


def gradients(key):
    params = eqx.filter(Stateful(key).layers, eqx.is_inexact_array)
    return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape), params)


UTILIZATION = {
    "0/experts/{expert}": jnp.array([0.4, 0.3, 0.2, 0.1]),
    "1/experts/{expert}": jnp.array([0.1, 0.2, 0.3, 0.4]),
}


def updates_of(tx, grads):
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads, utilization=UTILIZATION)[0])(grads)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_optax_wrappers_that_split_the_tree(wrapper):
    """The experts of the second layer only: the labels, or the mask, are a tree like that of the parameters."""
    grads = jax.jit(gradients)(jax.random.key(0))
    nowhere = jax.tree.map(lambda _: False, grads)
    second = eqx.tree_at(lambda layers: layers[1].experts, nowhere, jax.tree.map(lambda _: True, grads[1].experts))
    excitation = excitation_optax.scale_by_excitation(excitation_optax.zero_sum)
    if wrapper == "masked":
        tx = optax.chain(optax.sgd(0.1), optax.masked(excitation, second))
    else:
        labels = jax.tree.map(lambda leaf: "excited" if leaf else "plain", second)
        tx = optax.partition({"excited": optax.chain(optax.sgd(0.1), excitation), "plain": optax.sgd(0.1)}, labels)
    factors = {f"1/experts/{k}/{name}": [0.4, 0.8, 1.2, 1.6][k] for k in range(E) for name, _ in WEIGHTS}
    excited.assert_scaled(updates_of(optax.sgd(0.1), grads), updates_of(tx, grads), factors)


def test_a_layer_frozen_as_a_whole_has_no_utilization():
    grads = jax.eval_shape(gradients, jax.random.key(0))
    frozen = eqx.tree_at(lambda layers: layers[0], grads, replace_fn=lambda layer: jax.tree.map(lambda _: None, layer))
    with pytest.raises(ValueError, match=r"0/experts/\{expert\} matches no parameter"):
        excitation_optax.describe(frozen, UTILIZATION)
    described = excitation_optax.describe(frozen, UTILIZATION | {"0/experts/{expert}": None})
    assert sum(p.scaled_by is not None for p in described.parameters) == E * len(WEIGHTS)
