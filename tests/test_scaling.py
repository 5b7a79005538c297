"""The components of Excitation, held against NumPy in float64.

Axis letters: L layers, E experts, D, F widths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax_versions
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import excitation_optax

L, E, D, F = 2, 8, 3, 5


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


def fractions(*shape):
    return np.random.default_rng(7).uniform(0.01, 0.5, shape).astype(np.float32)


class Case(NamedTuple):
    """A layer, or a stack of layers; `parts` has its arrays as `[L, E, ...]`, from the updates."""

    updates: dict[str, Any]
    utilization: dict[str, np.ndarray]
    parts: Any
    expert_axis: Any = None


def one_layer():
    updates = {"w_in": normal(E, D, F), "w_out": normal(E, F, D), "bias": normal(E, D), "router": normal(D, E)}
    parts = lambda tree: [tree[name][None] for name in ("w_in", "w_out", "bias")]
    return Case(updates, {"{w_*,bias}": fractions(E)}, parts)


def stacked_layers():
    updates = {"moe": {"w": normal(L, E, D, F), "b": normal(L, E, F)}}
    return Case(updates, {"moe": fractions(L, E)}, lambda tree: [tree["moe"]["w"], tree["moe"]["b"]])


def layers_behind_experts():
    parts = lambda tree: [np.moveaxis(tree["w"], 2, 0), np.moveaxis(tree["b"], 1, 0)]
    updates = {"w": normal(E, D, L), "b": normal(E, L)}
    return Case(updates, {"*": fractions(L, E)}, parts, {"w": (2, 0), "b": (1, 0)})


def separate_modules():
    updates = {f"expert_{k}": {"w": normal(D, F + k % 2), "b": normal(F)} for k in range(E)}  # of unequal width

    def parts(tree):
        pad = lambda w: np.pad(w, ((0, 0), (0, F + 1 - w.shape[1])))
        experts = [tree[f"expert_{k}"] for k in range(E)]
        return [np.stack([pad(e["w"]) for e in experts])[None], np.stack([e["b"] for e in experts])[None]]

    return Case(updates, {"expert_{expert}": fractions(E)}, parts)


def separate_modules_of_stacked_layers():
    updates = {"moe": [normal(L, D) for _ in range(E)]}
    return Case(updates, {"moe/{expert}": fractions(L, E)}, lambda tree: [np.stack(tree["moe"], axis=1)])


def experts_on_two_axes():
    parts = lambda tree: [tree["w"].reshape(1, E, D), tree["v"].transpose(2, 0, 1).reshape(1, E, 6)]
    updates = {"w": normal(2, 4, D), "v": normal(4, 6, 2)}
    return Case(updates, {"?": fractions(E)}, parts, {"w": ((0, 1),), "v": ((2, 0),)})


def neurons():
    parts = lambda tree: [np.moveaxis(tree["kernel"], 1, 0)[None], tree["bias"][None]]
    return Case({"kernel": normal(D, E), "bias": normal(E)}, {"": fractions(E)}, parts, -1)


CASES = [
    one_layer,
    stacked_layers,
    layers_behind_experts,
    separate_modules,
    separate_modules_of_stacked_layers,
    experts_on_two_axes,
    neurons,
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def zero_sum(utilization):
    """Phi `[L, E]` in float64."""
    u = np.asarray(next(iter(utilization.values())), np.float64)
    phi = u / u.mean(-1, keepdims=True)
    return phi.reshape(-1, phi.shape[-1])


def norms(case, tree):
    """The norm of each layer's update `[L]`, in float64."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    return np.sqrt(sum((part**2).sum(axis=tuple(range(1, part.ndim))) for part in case.parts(tree)))


def factors(case, component):
    """What each expert's update is multiplied by, `[L, E]`, in float64."""
    phi = zero_sum(case.utilization)
    parts = case.parts(jax.tree.map(lambda x: np.asarray(x, np.float64), case.updates))
    squares = sum((part**2).sum(axis=tuple(range(2, part.ndim))) for part in parts)
    ratio = np.sqrt((phi**2 * squares).sum(-1, keepdims=True) / squares.sum(-1, keepdims=True))
    return {"both": phi, "direction": phi / ratio, "norm": np.broadcast_to(ratio, phi.shape)}[component]


def scale(case, component, updates=None, through=lambda f: f):
    tx = excitation_optax.scale_by_excitation(
        excitation_optax.zero_sum, component=component, expert_axis=case.expert_axis
    )
    updates = case.updates if updates is None else updates
    return through(functools.partial(tx.update, state=tx.init(updates)))(updates, utilization=case.utilization)[0]


def in_dtype(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("component", ["both", "direction", "norm"])
@each_case
def test_against_float64(case, component, dtype):
    case = case()
    updates = in_dtype(case.updates, dtype)
    case = case._replace(updates=updates)
    scaled = scale(case, component, through=jax.jit)
    expected = factors(case, component)
    as_float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-8
    for before, after in zip(case.parts(as_float64(updates)), case.parts(as_float64(scaled)), strict=True):
        factor = expected.reshape(*expected.shape, *[1] * (before.ndim - 2))
        np.testing.assert_allclose(after, factor * before, rtol=tolerance)
    assert jax.tree.map(lambda x: x.dtype, scaled) == jax.tree.map(lambda x: x.dtype, updates)


@each_case
def test_direction_keeps_the_norm_and_norm_the_direction(case):
    case = case()._replace(updates=in_dtype(case().updates, jnp.float32))
    before = norms(case, case.updates)
    np.testing.assert_allclose(norms(case, scale(case, "direction")), before, rtol=1e-6)
    both = norms(case, scale(case, "both"))
    np.testing.assert_allclose(norms(case, scale(case, "norm")), both, rtol=1e-6)
    assert np.all(np.abs(both / before - 1) > 0.01)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@each_case
def test_updates_whose_squares_do_not_fit_into_float32(case, size):
    case = case()._replace(updates=in_dtype(jax.tree.map(lambda x: size * x, case().updates), jnp.float32))
    before = norms(case, case.updates)
    np.testing.assert_allclose(norms(case, scale(case, "direction")) / before, 1, rtol=1e-6)
    np.testing.assert_allclose(norms(case, scale(case, "norm")), norms(case, scale(case, "both")), rtol=1e-6)


def test_experts_of_very_different_size():
    updates = {"w": jnp.array([[1e-25, 0.0], [1.0, 0.0], [3.0, 4.0], [1e-38, 0.0]])}
    u = jnp.array([0.1, 0.2, 0.3, 0.4])  # zero-sum: 0.4, 0.8, 1.2, 1.6
    ratio = np.sqrt((0.8**2 * 1 + 1.2**2 * 25) / 26)
    scaled = scale(Case(updates, {"w": u}, None), "norm")
    np.testing.assert_allclose(scaled["w"][:3, 0], ratio * np.array([1e-25, 1.0, 3.0]), rtol=1e-6)


U = np.array([0.5, 0.25, 0.25, 0.0], np.float32)  # zero-sum: 2, 1, 1, 0


@pytest.mark.parametrize("component", ["both", "direction", "norm"])
def test_zero_updates(component):
    updates = {"w": jnp.stack([jnp.zeros((4, 2)), jnp.ones((4, 2))])}
    scaled = scale(Case(updates, {"w": np.stack([U, U])}, None), component)["w"]
    np.testing.assert_array_equal(scaled[0], 0)  # the other layer is scaled as ever
    ratio = np.sqrt((4 + 1 + 1) / 4)
    expected = {"both": [2, 1, 1, 0], "direction": [2 / ratio, 1 / ratio, 1 / ratio, 0], "norm": [ratio] * 4}
    np.testing.assert_allclose(scaled[1][:, 0], expected[component], rtol=1e-6)


@pytest.mark.parametrize("component", ["both", "direction", "norm"])
def test_all_that_moves_is_an_idle_expert(component):
    updates = {"w": jnp.zeros((4, 2)).at[3].set(1.0)}
    np.testing.assert_array_equal(scale(Case(updates, {"w": U}, None), component)["w"], 0)


@pytest.mark.parametrize("component", ["direction", "norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_makes_its_layer_nan_and_no_other(component, bad):
    updates = {"w": jnp.ones((2, 4, 3)).at[0, 1, 2].set(bad), "v": jnp.ones((2, 4))}
    scaled = scale(Case(updates, {"{w,v}": np.stack([U, U])}, None), component)
    for name in ("w", "v"):
        assert np.isnan(scaled[name][0]).all()
        assert np.isfinite(scaled[name][1]).all()


def test_masked_arrays_are_not_in_the_norm():
    updates = {"w": jnp.ones((4, 2)), "v": optax.MaskedNode()}
    scaled = scale(Case(updates, {"{w,v}": U}, None), "direction")
    np.testing.assert_allclose(scaled["w"][0], 2 / np.sqrt(6 / 4), rtol=1e-6)


def test_float64_is_kept():
    with jax_versions.enable_x64(True):
        case = one_layer()
        case = case._replace(updates=in_dtype(case.updates, jnp.float64))
        before, after = norms(case, case.updates), norms(case, scale(case, "direction"))
        np.testing.assert_allclose(after, before, rtol=1e-13)


@pytest.mark.parametrize("component", ["both", "direction", "norm"])
def test_equal_layers_are_traced_once(component):
    updates = {f"layer_{n}": {"w": jnp.ones((4, 2)), "b": jnp.ones(4)} for n in range(6)}
    utilization = {f"layer_{n}": U for n in range(6)}
    tx = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, component=component)
    text = str(jax.make_jaxpr(lambda g: tx.update(g, tx.init(g), utilization=utilization)[0])(updates))
    assert text.count("name=scale_layer") == 6
    assert text.count("scale_layer = {") == 1


# On several devices.

SPECS = {"w_in": P("expert"), "w_out": P("expert"), "bias": P("expert"), "router": P()}


@pytest.mark.parametrize("component", ["direction", "norm"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_experts_send_their_norms_once(component, kind):
    case = one_layer()
    case = case._replace(updates=in_dtype(case.updates, jnp.float32))
    expected = scale(case, component)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(kind,))
    with jax_versions.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        updates = {name: place(x, SPECS[name]) for name, x in case.updates.items()}
        tx = excitation_optax.scale_by_excitation(excitation_optax.zero_sum, component=component)
        u = jax.tree.map(lambda x: place(x, P()), case.utilization)
        compiled = jax.jit(tx.update).lower(updates, tx.init(updates), utilization=u).compile()
        scaled, _ = compiled(updates, tx.init(updates), utilization=u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, expected)
    assert scaled["w_in"].sharding.spec[0] == "expert"
    text = compiled.as_text()
    sent = [name for name in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(") if name in text]
    assert sent == ["all-gather("]
    most = 1 if jax_versions.IS_RECENT else 2  # XLA's older compilers split it
    assert 1 <= text.count(" all-gather(") <= most


@pytest.mark.parametrize("component", ["direction", "norm"])
def test_arrays_sharded_along_other_axes(component):
    case = stacked_layers()
    case = case._replace(updates={"moe": {"w": normal(L, E, 8, 4), "b": normal(L, E, 8)}})
    case = case._replace(updates=in_dtype(case.updates, jnp.float32))
    mesh = jax.make_mesh((2, 4), ("expert", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax_versions.set_mesh(mesh):
        specs = {"moe": {"w": P(None, "expert", "model"), "b": P(None, "expert", "model")}}
        place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        updates = jax.tree.map(place, case.updates, specs)
        scaled = scale(case, component, updates=updates, through=jax.jit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, scale(case, component))
