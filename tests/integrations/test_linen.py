"""A user's own MoE in Flax Linen, trained by `TrainState`: see docs/integrations/linen.md.

own_moe.py defines the axis letters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import own_moe
import pytest
from flax import linen as nn
from own_moe import D, E, F, K, L

import excitation_optax
from excitation_optax import flax as excitation_flax

pytestmark = pytest.mark.usefixtures("as_users_have_it")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="down")(nn.gelu(nn.Dense(F, name="up")(x)))


class MoE(nn.Module):
    """Experts that nn.vmap stacks, or that are modules or parameters of the layer, and a shared expert."""

    kind: str

    @nn.compact
    def __call__(self, x, where):
        scores = nn.Dense(E, use_bias=False, name="router")(x)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(scores), K)
        counts = excitation_optax.count_routing(chosen, num_experts=E, where=where)
        self.sow("intermediates", "scores", scores)
        if self.kind == "vmapped":
            lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": E}
            experts = nn.vmap(MLP, in_axes=None, out_axes=-2, **lifted)(name="experts")
            excitation_flax.sow_routing(experts, counts)
            outputs = experts(x)
        elif self.kind == "separate":
            excitation_flax.sow_routing(self, counts, "expert_{expert}")
            outputs = jnp.stack([MLP(name=f"expert_{k}")(x) for k in range(E)], axis=-2)
        else:
            excitation_flax.sow_routing(self, counts, "w_up", "w_down")
            w_up = self.param("w_up", nn.initializers.lecun_normal(batch_axis=0), (E, D, F))
            w_down = self.param("w_down", nn.initializers.lecun_normal(batch_axis=0), (E, F, D))
            outputs = jnp.einsum("bsef,efd->bsed", nn.gelu(jnp.einsum("bsd,edf->bsef", x, w_up)), w_down)
        weights = jnp.sum(gates[..., None] * jax.nn.one_hot(chosen, E), axis=-2)
        shared = MLP(name="shared_expert")(x)
        return x + shared + jnp.einsum("bse,bsed->bsd", weights, outputs), None


class Unrolled(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, where):
        for layer in range(L):
            x, _ = nn.remat(MoE)(self.kind, name=f"layer_{layer}")(x, where)
        return x


class Scanned(nn.Module):
    kind: str
    layer_axis: int  # of the parameters; the counts have it first

    @nn.compact
    def __call__(self, x, where):
        axes = {"params": self.layer_axis, "intermediates": 0}
        lifted = {"variable_axes": axes, "split_rngs": {"params": True}, "in_axes": nn.broadcast, "length": L}
        return nn.scan(nn.remat(MoE), **lifted)(self.kind, name="layers")(x, where)[0]


def make_step(model, expert_axis=None):
    x, _, where = own_moe.batch(0)
    params = jax.jit(model.init)(jax.random.key(1), x, where)["params"]
    adamw, tx = own_moe.optimizers(expert_axis)
    state = excitation_flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x, y, where):
        def loss_fn(params):
            output, sown = state.apply_fn({"params": params}, x, where, mutable=["intermediates"])
            return own_moe.loss(output, y, where), sown["intermediates"]

        (loss, sown), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        utilization = excitation_flax.routing_from_intermediates(sown)
        vanilla, _ = adamw.update(grads, state.opt_state[0], state.params)
        excited_updates, _ = tx.update(grads, state.opt_state, state.params, utilization=utilization)
        scores = [layer["scores"][0] for _, layer in sorted(sown.items())]
        scores = list(scores[0]) if isinstance(model, Scanned) else scores
        return state.apply_gradients(grads=grads, utilization=utilization), (loss, scores, vanilla, excited_updates)

    def stateful(*batch):
        nonlocal state
        before = state.params
        state, seen = step(state, *batch)
        expected = jax.tree.map(lambda param, update: np.asarray(param) + np.asarray(update), before, seen[-1])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, expected)
        return seen

    return stateful


WEIGHTS = [("up/kernel", 2), ("up/bias", 1), ("down/kernel", 2), ("down/bias", 1)]  # with their numbers of axes


def test_separate_experts():
    def factors(phis):
        return {
            f"layer_{layer}/expert_{k}/{name}": phis[layer, k] for layer, k in np.ndindex(L, E) for name, _ in WEIGHTS
        }

    own_moe.check_training(make_step(Unrolled("separate")), factors)


def test_scanned_layers_of_vmapped_experts():
    def factors(phis):  # parameters [E, L, ...]
        return {f"layers/experts/{name}": own_moe.along(phis, ndim + 2, 1, 0) for name, ndim in WEIGHTS}

    own_moe.check_training(make_step(Scanned("vmapped", layer_axis=1), expert_axis=(1, 0)), factors, padding=True)


def shapes(model):
    """The shapes of the parameters and the routing."""
    x, _, where = own_moe.batch(0)

    def trees(key):
        _, variables = model.init_with_output(key, x, where, mutable=["params", "intermediates"])
        routing = excitation_flax.routing_from_intermediates(variables.get("intermediates", {}))
        return variables["params"], routing

    return jax.eval_shape(trees, jax.random.key(1))


@pytest.mark.parametrize(
    ("layer_axis", "expert_axis", "axes"), [(0, None, (0, 1)), (1, (1, 0), (1, 0)), (-1, (-1, 0), (3, 0))]
)
def test_experts_that_are_parameters_beside_the_router(layer_axis, expert_axis, axes):
    """No submodule holds experts only, so `sow_routing` names the parameters."""
    described = excitation_optax.describe(*shapes(Scanned("parameters", layer_axis)), expert_axis)
    scaled = {p.path: p.axes for p in described.parameters if p.scaled_by}
    assert scaled == {"layers/w_up": axes, "layers/w_down": axes}


class Forgetful(nn.Module):
    @nn.compact
    def __call__(self, x, where):
        lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        return nn.scan(MoE, length=L, **lifted)("vmapped", name="layers")(x, where)[0]


def test_a_scan_that_does_not_pass_intermediates_on_is_an_error():
    with pytest.raises(ValueError, match="routing of layers/experts would be lost"):
        shapes(Forgetful())
