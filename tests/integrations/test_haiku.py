"""A user's own MoE in Haiku: see docs/integrations/haiku.md.

Axis letters as in own_moe.py.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_moe
import pytest
from own_moe import D, E, F, K, L

import excitation_optax

pytestmark = pytest.mark.usefixtures("as_users_have_it")


class Experts(hk.Module):
    """Stacked; keeps the counts in Haiku's state, beside its parameters."""

    def __call__(self, x, counts):
        normal = hk.initializers.VarianceScaling(fan_in_axes=[1])
        w_up = hk.get_parameter("w_up", [E, D, F], init=normal)
        w_down = hk.get_parameter("w_down", [E, F, D], init=normal)
        hk.set_state("routing", counts)
        return jnp.einsum("bsef,efd->bsed", jax.nn.gelu(jnp.einsum("bsd,edf->bsef", x, w_up)), w_down)


class MoE(hk.Module):
    """Stacked experts, or separate ones; and a shared one. Returns also the router's scores, and counts."""

    def __init__(self, stacked, name):
        super().__init__(name)
        self.stacked = stacked
        self.shared = hk.nets.MLP([F, D], activation=jax.nn.gelu, name="shared_expert")

    def __call__(self, x, where):
        scores = hk.Linear(E, with_bias=False, name="router")(x)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(scores), K)
        counts = excitation_optax.count_routing(chosen, num_experts=E, where=where)
        if self.stacked:
            outputs = Experts(name="experts")(x, counts)
        else:
            experts = [hk.nets.MLP([F, D], activation=jax.nn.gelu, name=f"expert_{k}") for k in range(E)]
            outputs = jnp.stack([expert(x) for expert in experts], axis=-2)
        weights = jnp.sum(gates[..., None] * jax.nn.one_hot(chosen, E), axis=-2)
        return x + self.shared(x) + jnp.einsum("bse,bsed->bsd", weights, outputs), (scores, counts)


def make_step(network, utilization_of):
    """`network` returns the output and a tuple of scores and more; `utilization_of` takes that tuple and the state."""
    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    x, _, where = own_moe.batch(0)
    params, state = jax.jit(transformed.init)(jax.random.key(1), x, where)
    adamw, tx = own_moe.optimizers()
    opt_state = tx.init(params)

    @jax.jit
    def step(params, state, opt_state, x, y, where):
        def loss_fn(params):
            (output, seen), new_state = transformed.apply(params, state, x, where)
            return own_moe.loss(output, y, where), (seen, new_state)

        (loss, (seen, state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        vanilla, _ = adamw.update(grads, opt_state[0], params)
        updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization_of(seen, state))
        params = optax.apply_updates(params, updates)
        return params, state, opt_state, (loss, list(seen[0]), vanilla, updates)

    def stateful(*batch):
        nonlocal params, state, opt_state
        params, state, opt_state, seen = step(params, state, opt_state, *batch)
        return seen

    return stateful


def test_separate_experts_in_several_layers_return_their_counts():
    def network(x, where):
        seen = []
        for number in range(L):
            x, of_layer = hk.remat(MoE(stacked=False, name=f"layer_{number}"))(x, where)
            seen.append(of_layer)
        return x, tuple(zip(*seen, strict=True))

    def utilization_of(seen, state):
        assert not state
        return {f"layer_{number}/expert_{{expert}}": counts for number, counts in enumerate(seen[1])}

    def factors(phis):
        return {
            f"layer_{layer}/expert_{k}/~/linear_{n}/{name}": phis[layer, k]
            for layer, k, n in np.ndindex(L, E, 2)
            for name in "wb"
        }

    own_moe.check_training(make_step(network, utilization_of), factors)


def test_stacked_layers_of_stacked_experts_keep_their_counts_in_the_state():
    def network(x, where):
        layers = hk.experimental.layer_stack(L, with_per_layer_inputs=True, name="layers")
        return layers(lambda x: MoE(stacked=True, name="moe")(x, where))(x)

    def utilization_of(seen, state):
        return {module: values["routing"] for module, values in state.items()}

    def factors(phis):  # parameters [L, E, ...]
        return {f"layers/moe/experts/{name}": own_moe.along(phis, 4, 0, 1) for name in ("w_up", "w_down")}

    own_moe.check_training(make_step(network, utilization_of), factors, padding=True)


def test_partitioned_parameters():
    """Haiku's own way of freezing leaves modules out of the dict: one expert too few is an error."""
    params = {f"moe/expert_{k}": {"w": jnp.ones(3)} for k in range(3)} | {"moe/router": {"w": jnp.ones((3, 3))}}
    u = jnp.array([0.2, 0.3, 0.5])
    frozen, trained = hk.data_structures.partition(lambda module, name, value: module == "moe/expert_0", params)
    assert list(frozen) == ["moe/expert_0"]
    with pytest.raises(ValueError, match="finds 2 experts, with the numbers 1, 2; its utilization"):
        excitation_optax.describe(trained, {"moe/expert_{expert}": u})
    described = excitation_optax.describe(params, {"moe/expert_{expert}": u})
    assert [p.expert for p in described.parameters] == [0, 1, 2, None]
