"""by_pattern: what it addresses, and what it refuses."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import excitation_optax


def moe():
    return {
        "router": {"kernel": jnp.ones((2, 3))},
        "wi": jnp.ones((3, 2, 4)),
        "wo": jnp.ones((3, 4, 2)),
        "shared_expert": {"wi": jnp.ones((2, 4))},
    }


@pytest.fixture
def params():
    return {
        "embed": jnp.ones((5, 2)),
        "layers": [moe(), moe(), {"mlp": jnp.ones(2)}],
        "expert_layers": {"w": jnp.ones(3)},
    }


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"layers/1/wi": 1}, {"layers": {"1": {"wi": 1}}}),
        ({"layers/*/w?": 1}, {"layers": {"0": {"{wi,wo}": 1}, "1": {"{wi,wo}": 1}}}),
        ({"layers/0/w*": 1, "layers/1/w*": 2}, {"layers": {"0": {"{wi,wo}": 1}, "1": {"{wi,wo}": 2}}}),
        ({"layers/0/wi": 1, "layers/0/wo": 2}, {"layers": {"0": {"wi": 1, "wo": 2}}}),
        ({"**/[01]/wo": 1}, {"layers": {"0": {"wo": 1}, "1": {"wo": 1}}}),
        ({"**/expert_layers": 1}, {"expert_layers": 1}),  # ** is also no name at all
        ({"expert_layers/**": 1}, {"expert_layers": 1}),  # the highest of nodes above one another
        ({"/expert_layers/": 1}, {"expert_layers": 1}),
        ({"layers/**/mlp": 1}, {"layers": {"2": {"mlp": 1}}}),
    ],
)
def test_holds_the_value_at_every_match(params, patterns, expected):
    assert excitation_optax.by_pattern(params, patterns) == expected


def test_slashes_in_names_separate_names_as_in_haiku():
    params = {"layer_0/moe/experts/up": {"w": jnp.ones(2)}, "layer_0/moe/router": {"w": jnp.ones(2)}}
    assert excitation_optax.by_pattern(params, {"**/experts": 1}) == {"layer_0": {"moe": {"experts": 1}}}
    with pytest.raises(ValueError, match="covers layer_0/moe/router/w, whose name 'router' is one to avoid"):
        excitation_optax.by_pattern(params, {"layer_0/moe": 1})


def test_the_root_is_the_bare_value():
    assert excitation_optax.by_pattern(jnp.ones(3), {"**": 1}) == 1
    assert excitation_optax.by_pattern({"a": jnp.ones(3)}, {"": 1}) == 1


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"layers/0/w1": 1}, "The pattern 'layers/0/w1' matches no parameter. Nearest: layers/0/wo, layers/0/wi"),
        ({"layer/*/wi": 1}, "At the top level are: embed, expert_layers, layers."),
        ({"wi": 1}, "Nearest: layers/0/wi, layers/1/wi, layers/0/shared_expert/wi"),
        ({"layers/*": 1}, "covers layers/0/router/kernel, whose name 'router' is one to avoid ('*router*')"),
        ({"**/wi": 1}, "covers layers/0/shared_expert/wi, whose name 'shared_expert' is one to avoid ('*shared*')"),
        ({"layers/0/wi": 1, "layers/*/w?": 2}, "'layers/0/wi' and 'layers/*/w?' both cover layers/0/wi"),
        ({"layers/*/w?": 2, "layers/1": 1}, "both cover layers/1/wi"),
        ({"layers/2": 1, "**/mlp": 2}, "both cover layers/2/mlp"),
    ],
)
def test_refuses(params, patterns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        excitation_optax.by_pattern(params, patterns)


@pytest.mark.parametrize(
    "name", ["router", "MoERouter", "router_logits", "gate", "Shared_Experts", "moe_shared", "self_attn"]
)
def test_avoids_routers_shared_experts_and_attention_under_any_of_their_names(name):
    tree = {"moe": {name: {"w": jnp.ones(2)}, "experts": jnp.ones(2)}}
    with pytest.raises(ValueError, match=f"whose name '{name}' is one to avoid"):
        excitation_optax.by_pattern(tree, {"moe": 1})
    assert excitation_optax.by_pattern(tree, {"moe": 1}, avoid=()) == {"moe": 1}


@pytest.mark.parametrize("name", ["gate_proj", "gating_einsum", "routed_experts", "w_gate"])
def test_experts_whose_names_only_look_like_a_gate_are_not_avoided(name):
    assert excitation_optax.by_pattern({"moe": {name: jnp.ones(2)}}, {"**/moe": 1}) == {"moe": 1}


def test_what_is_to_be_avoided_can_be_said():
    tree = {"moe": {"my_switch": jnp.ones(2), "gate": jnp.ones(2)}}
    with pytest.raises(ValueError, match="'my_switch' is one to avoid"):
        excitation_optax.by_pattern(tree, {"moe/*": 1}, avoid=("*switch",))


def test_integers_and_functions_are_no_parameters():
    tree = {"moe": {"steps": jnp.zeros((), jnp.int32), "router": jax.nn.relu, "w": jnp.ones(2)}}
    assert excitation_optax.by_pattern(tree, {"moe": 1}) == {"moe": 1}
    with pytest.raises(ValueError, match="matches no parameter"):
        excitation_optax.by_pattern(tree, {"moe/steps": 1})


class Experts(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(k)) for k in range(2)])


class EquinoxExperts(eqx.Module):
    layers: list[jax.Array]


@pytest.mark.parametrize(
    ("tree", "pattern"),
    [(nnx.state(Experts()), "layers/*/kernel"), (EquinoxExperts([jnp.ones((2, 3))] * 2), "layers/*")],
)
def test_updates_what_it_addresses_and_nothing_else(tree, pattern):
    u = jnp.array([0.75, 0.25])
    tx = excitation_optax.scale_by_excitation(excitation_optax.zero_sum)
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(ones, tx.init(tree), utilization=excitation_optax.by_pattern(tree, {pattern: u}))
    for update in jax.tree.leaves(updates):
        expected = np.ones(update.shape) * ([[1.5], [0.5]] if update.ndim == 2 else 1)
        np.testing.assert_array_equal(update, expected)


def test_under_jit_with_traced_counts_and_for_axes(params):
    tx = excitation_optax.scale_by_excitation(
        excitation_optax.zero_sum, expert_axis=excitation_optax.by_pattern(params, {"layers/*/wo": 0, "layers/*/wi": 0})
    )

    @jax.jit
    def update(params, u):
        utilization = excitation_optax.by_pattern(params, {"layers/*/w?": u})
        return tx.update(params, optax.EmptyState(), utilization=utilization)[0]

    updates = update(params, jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(updates["layers"][1]["wo"][:, 0, 0], [1.5, 0.75, 0.75], rtol=1e-6)
    np.testing.assert_array_equal(updates["layers"][1]["router"]["kernel"], 1)
