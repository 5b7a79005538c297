"""Paths and axes: which parameters of which tree are scaled, along which axis, and that `describe` says the same.

A case is a tree of updates, a utilization and an `expert_axis`, with the factor of every leaf that is to be scaled,
written out in NumPy and float64; the leaves without a factor are to come back as they were.

Axis letters: E experts, L layers, D model width, F expert width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import excitation_optax

E, L, D, F = 3, 2, 4, 5
U = jnp.array([0.1, 0.2, 0.3], jnp.float32)  # zero-sum: 1/2, 1, 3/2
V = jnp.array([0.8, 0.1, 0.3], jnp.float32)  # 2, 1/4, 3/4
UV = np.stack([U, V])  # [L, E], a NumPy array, which is as good
PHI_U, PHI_V = np.array([0.5, 1.0, 1.5]), np.array([2.0, 0.25, 0.75])
PHI = np.stack([PHI_U, PHI_V])


def fill(*shape):
    """An update of that shape, all of whose entries differ."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def along(phi, shape, *axes):
    """A factor of that shape which varies with phi along the axes and is constant along the others."""
    flat = [axis for group in axes for axis in (group if isinstance(group, tuple) else (group,))]
    phi = np.asarray(phi).reshape([shape[axis] for axis in flat])
    letters = "".join(chr(ord("a") + axis) for axis in flat)
    every = "".join(chr(ord("a") + axis) for axis in range(len(shape)))
    others = "".join(letter for letter in every if letter not in letters)
    ones = np.ones([shape[ord(letter) - ord("a")] for letter in others])
    return np.einsum(f"{letters},{others}->{every}", phi, ones)


def leaves_by_path(tree):
    is_leaf = lambda x: isinstance(x, optax.MaskedNode)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Case(NamedTuple):
    updates: Any
    utilization: Any
    factors: dict[str, np.ndarray]  # by path, of the leaf's own shape
    expert_axis: Any = None


CASES: dict[str, Callable[[], Case]] = {}


def case(make):
    CASES[make.__name__.removeprefix("_")] = make
    return make


# One layer in every kind of tree, addressed by a nested dict and by a tree of the same kind.


class Moe(NamedTuple):
    router: Any
    experts: Any


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MoeDataclass:
    router: Any
    experts: Any


class MoeModule(eqx.Module):
    router: Any
    experts: Any
    activation: Callable | None = None  # None once eqx.filter has been there


class Kind(NamedTuple):
    moe: Callable[[Any, Any], Any]  # (router, experts) -> tree
    pair: Callable[[Any, Any], Any]  # (kernel, bias) -> experts
    path: tuple[Any, ...]  # to the experts
    names: tuple[Any, Any] = ("kernel", "bias")

    def dict_to(self, entry):
        for name in reversed(self.path):
            entry = {name: entry}
        return entry


def filtered(router, experts):
    return eqx.filter(MoeModule(router, experts, jax.nn.gelu), eqx.is_array)


def pair(kernel, bias):
    return {"kernel": kernel, "bias": bias}


KINDS = {
    "dict": Kind(lambda r, e: {"moe": {"router": r, "experts": e}}, pair, ("moe", "experts")),
    "list": Kind(lambda r, e: [[r, e]], lambda k, b: [k, b], (0, 1), (0, 1)),
    "tuple": Kind(lambda r, e: ((r, e),), lambda k, b: (k, b), ("0", "1"), ("0", "1")),
    "named_tuple": Kind(Moe, Pair, ("experts",)),
    "dataclass": Kind(lambda r, e: {"moe": MoeDataclass(r, e)}, Pair, ("moe", "experts")),
    "nnx_state": Kind(lambda r, e: nnx.State({"moe": {0: r, 1: e}}), pair, ("moe", 1)),
    "frozen_dict": Kind(lambda r, e: FrozenDict({"moe": {"router": r, "experts": e}}), pair, ("moe", "experts")),
    "equinox": Kind(lambda r, e: [filtered(r, e)], Pair, ("0", "experts")),
    "haiku_names": Kind(
        lambda r, e: {"net/~/router": {"w": r}, "net/~/experts": e},
        lambda k, b: {"w": k, "b": b},
        ("net/~/experts",),
        "wb",
    ),
}


def one_layer(kind, to_layer, same_kind):
    updates = kind.moe(fill(D, E), kind.pair(fill(E, D, F), fill(E, F)))
    base = "/".join(map(str, kind.path))
    phi_bias = PHI_U if to_layer else PHI_V
    factors = {
        f"{base}/{kind.names[0]}": along(PHI_U, (E, D, F), 0),
        f"{base}/{kind.names[1]}": along(phi_bias, (E, F), 0),
    }
    if same_kind:
        return Case(updates, kind.moe(None, U if to_layer else kind.pair(U, V)), factors)
    return Case(updates, kind.dict_to(U if to_layer else dict(zip(kind.names, (U, V), strict=True))), factors)


for (_name, _kind), _to, _by in itertools.product(KINDS.items(), ("layer", "leaves"), ("dict", "its_own_kind")):
    CASES[f"{_name}-{_to}-by_{_by}"] = functools.partial(one_layer, _kind, _to == "layer", _by == "its_own_kind")


class Experts(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(fill(E, D, F))
        self.bias = nnx.Param(fill(E, F))


class NnxModel(nnx.Module):
    def __init__(self):
        self.router = nnx.Linear(D, E, rngs=nnx.Rngs(0))
        self.layers = nnx.List([Experts(), Experts()])


@case
def _nnx_state_of_a_module():
    updates = nnx.state(NnxModel(), nnx.Param)
    factors = {
        "layers/1/kernel/value": along(PHI_U, (E, D, F), 0),
        "layers/1/bias/value": along(PHI_U, (E, F), 0),
    }
    return Case(updates, {"layers": {1: U}}, factors)


@case
def _nnx_state_of_a_module_to_its_leaves_by_state():
    updates = nnx.state(NnxModel(), nnx.Param)
    utilization = nnx.State({"layers": {0: {"kernel": U}, 1: {"bias": V}}})
    factors = {
        "layers/0/kernel/value": along(PHI_U, (E, D, F), 0),
        "layers/1/bias/value": along(PHI_V, (E, F), 0),
    }
    return Case(updates, utilization, factors)


@case
def _nnx_as_pure():
    updates = nnx.as_pure(nnx.state(NnxModel(), nnx.Param))
    factors = {"layers/0/kernel": along(PHI_U, (E, D, F), 0), "layers/0/bias": along(PHI_U, (E, F), 0)}
    return Case(updates, nnx.as_pure(nnx.State({"layers": {"0": U}})), factors)


class HaikuMoe(hk.Module):
    def __call__(self, x):
        gates = jax.nn.softmax(hk.Linear(E, name="router")(x))
        w = hk.get_parameter("w", [E, D, F], init=hk.initializers.RandomNormal())
        b = hk.get_parameter("b", [E, F], init=hk.initializers.RandomNormal())
        return jnp.einsum("te,tef->tf", gates, jnp.einsum("td,edf->tef", x, w) + b[None])


class HaikuBlock(hk.Module):
    def __call__(self, x):
        return hk.Linear(2, name="head")(HaikuMoe(name="moe")(x))


@case
def _haiku_module():
    transformed = hk.transform(lambda x: HaikuBlock(name="block")(x))
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), jnp.ones((6, D)))
    updates = jax.tree.map(lambda leaf: fill(*leaf.shape), shapes)
    assert set(updates) == {"block/moe", "block/moe/router", "block/head"}
    factors = {"block/moe/w": along(PHI_U, (E, D, F), 0), "block/moe/b": along(PHI_U, (E, F), 0)}
    return Case(updates, {"block/moe": {"w": U, "b": U}}, factors)  # of the router, block/moe/router, not a word


def haiku_layers():
    """Two layers of separate experts, each an MLP of two modules, beside a router and the layer's own scale."""
    names = [f"{layer}/moe/~/expert_{k}/linear_{n}" for layer in ("a", "b") for k in range(E) for n in range(2)]
    experts = {name: {"w": fill(D, F), "b": fill(F)} for name in names}
    return experts | {f"{layer}/moe/router": {"w": fill(D, E)} for layer in "ab"} | {"a/moe": {"scale": fill(E)}}


def haiku_factors(phi_of_layers):
    return {
        f"{layer}/moe/~/expert_{k}/linear_{n}/{name}": np.full((D, F) if name == "w" else F, phi[k])
        for layer, phi in phi_of_layers.items()
        for k in range(E)
        for n in range(2)
        for name in "wb"
    }


@case
def _haiku_experts_in_two_layers():
    utilization = {"a/moe/~/expert_{expert}": U, "b": {"moe/~": {"expert_{expert}": V}}}
    return Case(haiku_layers(), utilization, haiku_factors({"a": PHI_U, "b": PHI_V}))


@case
def _haiku_experts_of_one_module_and_those_below_it():
    updates = {"moe/experts": {"scale": fill(E)}, "moe/experts/up": {"w": fill(E, D)}, "moe/router": {"w": fill(D, E)}}
    factors = {"moe/experts/scale": PHI_U, "moe/experts/up/w": along(PHI_U, (E, D), 0)}
    return Case(updates, {"moe/experts": U}, factors)


@case
def _haiku_modules_of_which_the_first_has_no_number():
    names = ["moe/~/linear", "moe/~/linear_1", "moe/~/linear_2"]
    updates = {name: {"w": fill(D)} for name in names} | {"moe/~/linear_norm": {"w": fill(D)}}
    return Case(
        updates,
        {"moe/~/linear_{expert}": U},
        {f"{name}/w": np.full(D, PHI_U[k]) for k, name in enumerate(names)},
    )


@case
def _slashes_address_any_tree():
    updates = {"blocks": [{"moe": Moe(fill(D, E), {"w": fill(E, D)})}, {"moe": Moe(fill(D, E), {"w": fill(D, E)})}]}
    factors = {"blocks/0/moe/experts/w": along(PHI_U, (E, D), 0), "blocks/1/moe/experts/w": along(PHI_V, (D, E), 1)}
    utilization = {"blocks/0/moe/experts": U, "blocks": {1: {"moe/experts": V}}}
    return Case(updates, utilization, factors, {"blocks/1": -1})


# Prefixes of every length, names, absence.


@case
def _whole_model_by_a_bare_array():
    updates = {"a": fill(E, D), "b": [fill(E), fill(E, D, F)]}
    factors = {"a": along(PHI_U, (E, D), 0), "b/0": PHI_U, "b/1": along(PHI_U, (E, D, F), 0)}
    return Case(updates, U, factors)


@case
def _whole_model_by_routing_counts():
    counts = excitation_optax.RoutingCounts(counts=8 * UV, tokens=np.full([L], 8.0, np.float32))
    return Case([fill(L, E, D), fill(L, E)], counts, {"0": along(PHI, (L, E, D), 0, 1), "1": PHI})


@case
def _parameters_that_are_one_array():
    return Case(fill(E, D), U, {"": along(PHI_U, (E, D), 0)})


@case
def _routing_counts_and_fractions_side_by_side():
    counts = excitation_optax.RoutingCounts(counts=jnp.asarray(10 * V), tokens=jnp.asarray(10.0))
    updates = {"first": {"w": fill(E, D)}, "second": {"w": fill(E, D)}, "third": {"w": fill(E, D)}}
    factors = {"first/w": along(PHI_U, (E, D), 0), "second/w": along(PHI_V, (E, D), 0)}
    return Case(updates, {"first": U, "second": counts}, factors)


@case
def _none_is_absent():
    updates = {"first": {"w": fill(E, D)}, "second": {"w": fill(E, D), "b": fill(E)}, "third": fill(7)}
    utilization = {"first": None, "second": {"w": V, "b": None}, "third": None, "no such layer": None}
    return Case(updates, utilization, {"second/w": along(PHI_V, (E, D), 0)})


@case
def _int_keys_addressed_by_strings():
    updates = {"layers": {0: fill(E, D), 1: fill(E, D), 10: fill(E, D)}}
    factors = {"layers/0": along(PHI_U, (E, D), 0), "layers/10": along(PHI_V, (E, D), 0)}
    return Case(updates, {"layers": {"0": U, "10": V}}, factors)


@case
def _string_keys_addressed_by_ints():
    updates = {"layers": {"0": fill(E, D), "1": fill(E, D)}}
    return Case(updates, {"layers": {1: V}}, {"layers/1": along(PHI_V, (E, D), 0)})


@case
def _string_keys_addressed_by_a_list():
    updates = {"layers": {"0": fill(E, D), "1": fill(E, D), "2": fill(E, D)}}
    return Case(updates, {"layers": [None, V]}, {"layers/1": along(PHI_V, (E, D), 0)})


@case
def _names_that_begin_alike():
    updates = {"layer_1": fill(E, D), "layer_10": fill(E, D), "layer": fill(E, D)}
    return Case(updates, {"layer_1": U}, {"layer_1": along(PHI_U, (E, D), 0)})


# Axes.


@case
def _layers_first():
    updates = {"moe": {"kernel": fill(L, E, D, F), "bias": fill(L, E, F)}, "router": fill(L, D, E)}
    factors = {"moe/kernel": along(PHI, (L, E, D, F), 0, 1), "moe/bias": along(PHI, (L, E, F), 0, 1)}
    return Case(updates, {"moe": UV}, factors)


@case
def _layers_second():
    updates = {"moe": {"kernel": fill(E, L, D, F), "bias": fill(E, L, F)}, "router": fill(D, L, E)}
    factors = {"moe/kernel": along(PHI, (E, L, D, F), 1, 0), "moe/bias": along(PHI, (E, L, F), 1, 0)}
    return Case(updates, {"moe": UV}, factors, (1, 0))


@case
def _as_many_layers_as_experts():  # where only the spec, and no shape, can tell which axis is which
    square = np.concatenate([UV, np.full([1, E], 0.3, np.float32)])
    phi = np.stack([PHI_U, PHI_V, np.ones(E)])
    return Case({"w": fill(E, E, E)}, {"w": square}, {"w": along(phi, (E, E, E), 2, 1)}, (-1, 1))


@case
def _stacked_neurons():  # a negative axis counts from the end of each leaf
    updates = {"kernel": fill(L, D, E), "bias": fill(L, E)}
    return Case(updates, UV, {"kernel": along(PHI, (L, D, E), 0, 2), "bias": PHI}, (0, -1))


@case
def _negative_axes_out_of_order():
    updates = {"kernel": fill(E, D, L), "bias": fill(D, E, D, L)}
    factors = {"kernel": along(PHI, (E, D, L), 2, 0), "bias": along(PHI, (D, E, D, L), 3, 1)}
    return Case(updates, UV, factors, (-1, -3))


@case
def _three_axes_of_utilization():
    utilization = np.stack([UV, UV[::-1], UV, UV])  # [4, L, E]
    phi = np.stack([PHI, PHI[::-1], PHI, PHI])
    return Case({"w": fill(L, E, D, 4)}, {"w": utilization}, {"w": along(phi, (L, E, D, 4), 3, 0, 1)}, (3, 0, -3))


@case
def _neurons_of_dense_layers():
    updates = {
        "hidden": {"kernel": fill(D, E), "bias": fill(E)},
        "output": {"kernel": fill(E, 2), "bias": fill(2)},
    }
    return Case(updates, {"hidden": U}, {"hidden/kernel": along(PHI_U, (D, E), 1), "hidden/bias": PHI_U}, -1)


@case
def _numpy_int_and_one_tuple():
    updates = {"a": fill(D, E), "b": fill(D, E)}
    factors = {"a": along(PHI_U, (D, E), 1), "b": along(PHI_V, (D, E), 1)}
    return Case(updates, {"a": U, "b": V}, factors, {"a": np.int64(1), "b": (1,)})


@case
def _specs_for_each_layer():
    updates = {"dense": {"w": fill(D, E)}, "stack": [fill(E, L, D), fill(E, L)], "leading": {"w": fill(E, D)}}
    factors = {
        "dense/w": along(PHI_U, (D, E), 1),
        "stack/0": along(PHI, (E, L, D), 1, 0),
        "stack/1": along(PHI, (E, L), 1, 0),
        "leading/w": along(PHI_V, (E, D), 0),
    }
    return Case(updates, {"dense": U, "stack": UV, "leading": V}, factors, {"dense": -1, "stack": (1, 0)})


@case
def _specs_for_each_leaf():
    updates = {"moe": {"kernel": fill(D, E, F), "bias": fill(E, F)}, "other": {"kernel": fill(D, E, F)}}
    factors = {"moe/kernel": along(PHI_U, (D, E, F), 1), "moe/bias": along(PHI_U, (E, F), 0)}
    return Case(updates, {"moe": U}, factors, {"moe": {"kernel": 1, "bias": 0}, "other": 2})


@case
def _specs_above_utilization_by_patterns():
    updates = {"blocks": [{"w": fill(D, E), "v": fill(E)}, {"w": fill(D, E), "v": fill(E)}]}
    factors = {"blocks/0/w": along(PHI_U, (D, E), 1), "blocks/1/w": along(PHI_V, (D, E), 1)}
    factors |= {"blocks/0/v": PHI_U, "blocks/1/v": PHI_V}
    utilization = {"blocks": [{"{w,v}": U}, {"?": V}]}
    return Case(updates, utilization, factors, {"blocks/*/w": 1, "**/v": None})


@case
def _one_axis_spread_over_several():  # experts are stored as [E1, E2, ...]
    u = np.array([0.1, 0.2, 0.3, 0.2, 0.1, 0.3], np.float32)  # of mean 0.2
    factors = {"w": along(5 * u, (L, E, D), (0, 1)), "v": along(5 * u, (D, E, 2), (2, 1))}
    return Case({"w": fill(L, E, D), "v": fill(D, E, 2)}, {"{w,v}": u}, factors, {"w": ((0, 1),), "v": ((2, 1),)})


@case
def _one_axis_spread_over_several_beside_layers():
    u = np.stack([[0.1, 0.2, 0.3, 0.2, 0.1, 0.3]] * 4).astype(np.float32) * np.float32([[1], [2], [3], [0.5]])
    factors = {"w": along(np.stack([5 * u[0]] * 4), (2, 4, E, D), 1, (2, 0))}
    return Case({"w": fill(2, 4, E, D)}, {"w": u}, factors, (1, (2, 0)))


@case
def _callable_of_the_updates():
    updates = {"kernel": fill(D, F, E), "bias": fill(F, E)}
    factors = {"kernel": along(PHI_U, (D, F, E), 2), "bias": along(PHI_U, (F, E), 1)}
    return Case(updates, U, factors, lambda tree: jax.tree.map(lambda x: x.ndim - 1, tree))


@case
def _callable_that_returns_none():
    return Case({"w": fill(E, D)}, U, {"w": along(PHI_U, (E, D), 0)}, lambda tree: None)


@case
def _tuple_of_ints_is_a_spec():
    return Case((fill(L, E), fill(L, E, D)), UV, {"0": PHI, "1": along(PHI, (L, E, D), 0, 1)}, (0, 1))


# Experts that are separate modules.


def expert():
    return {"kernel": fill(D, F), "bias": fill(F)}


@case
def _experts_in_order_of_their_numbers():
    u = np.arange(1, 13, dtype=np.float32) / 16
    updates = {"moe": {"router": fill(D, 12), **{f"expert_{k}": expert() for k in range(12)}}}
    factors = {}
    for k in range(12):
        phi = (k + 1) / 6.5  # 6.5 is the mean of 1..12
        factors |= {f"moe/expert_{k}/kernel": np.full((D, F), phi), f"moe/expert_{k}/bias": np.full(F, phi)}
    return Case(updates, {"moe/expert_{expert}": u}, factors)


@case
def _experts_with_other_numbers_are_ranked():
    updates = {"moe": {f"e{k}x": fill(D) for k in (10, 2, 7)}}
    factors = {f"moe/e{k}x": np.full(D, phi) for k, phi in zip((2, 7, 10), PHI_U, strict=True)}
    return Case(updates, {"moe/e{expert}x": U}, factors)


@case
def _experts_of_a_list():
    updates = {"experts": [expert() for _ in range(E)], "router": fill(D, E)}
    factors = {f"experts/{k}/kernel": np.full((D, F), PHI_U[k]) for k in range(E)}
    factors |= {f"experts/{k}/bias": np.full(F, PHI_U[k]) for k in range(E)}
    return Case(updates, {"experts/{expert}": U}, factors)


class ThreeExperts(eqx.Module):
    expert_0: Any
    expert_1: Any
    expert_2: Any
    router: Any
    activation: Callable


@case
def _experts_that_are_attributes_of_an_equinox_module():
    linears = [eqx.nn.Linear(D, F, key=jax.random.key(k), use_bias=k != 1) for k in range(E)]
    updates = {"moe": eqx.filter(ThreeExperts(*linears, fill(D, E), jax.nn.gelu), eqx.is_array)}
    factors = {f"moe/expert_{k}/weight": np.full((F, D), PHI_U[k]) for k in range(E)}
    factors |= {f"moe/expert_{k}/bias": np.full(F, PHI_U[k]) for k in (0, 2)}
    return Case(updates, {"moe/expert_{expert}": U}, factors)


class NnxExperts(nnx.Module):
    def __init__(self):
        self.gate = nnx.Param(fill(D, E))
        self.experts = nnx.List([nnx.Linear(D, F, rngs=nnx.Rngs(k)) for k in range(E)])


@case
def _experts_of_an_nnx_list():
    updates = nnx.state(NnxExperts(), nnx.Param)
    factors = {f"experts/{k}/kernel/value": np.full((D, F), PHI_V[k]) for k in range(E)}
    factors |= {f"experts/{k}/bias/value": np.full(F, PHI_V[k]) for k in range(E)}
    return Case(updates, {"experts/{expert}": V}, factors)


@case
def _experts_apart_with_stacked_layers():
    updates = {"moe": {f"expert_{k}": {"kernel": fill(L, D, F), "bias": fill(L, F)} for k in range(E)}}
    factors = {f"moe/expert_{k}/kernel": along(PHI[:, k], (L, D, F), 0) for k in range(E)}
    factors |= {f"moe/expert_{k}/bias": along(PHI[:, k], (L, F), 0) for k in range(E)}
    return Case(updates, {"moe/expert_{expert}": UV}, factors)


@case
def _experts_apart_with_layers_on_another_axis():
    updates = {f"expert_{k}": fill(D, L) for k in range(E)}
    factors = {f"expert_{k}": along(PHI[:, k], (D, L), 1) for k in range(E)}
    return Case(updates, {"expert_{expert}": UV}, factors, {"expert_*": -1})


@case
def _some_experts_are_frozen():  # as eqx.partition leaves them: None, all of an expert or some of it
    updates = {"moe": [{"w": None, "b": None}, {"w": fill(D), "b": None}, {"w": fill(D), "b": fill(1)}]}
    factors = {"moe/1/w": np.full(D, 1.0), "moe/2/w": np.full(D, 1.5), "moe/2/b": np.full(1, 1.5)}
    return Case(updates, {"moe/{expert}": U}, factors)


@case
def _parts_of_frozen_experts():
    updates = {"moe": [None, {"w": fill(D), "b": None}, {"w": fill(D), "b": fill(1)}]}
    return Case(updates, {"moe/{expert}/w": U}, {"moe/1/w": np.full(D, 1.0), "moe/2/w": np.full(D, 1.5)})


@case
def _experts_apart_in_one_layer_and_in_an_array_in_another():
    updates = {
        "a": {"router": fill(D, E), "expert_0": fill(D), "expert_1": fill(D), "expert_2": fill(D)},
        "b": fill(D, E),
    }
    factors = {f"a/expert_{k}": np.full(D, PHI_U[k]) for k in range(E)} | {"b": along(PHI_V, (D, E), 1)}
    return Case(updates, {"a/expert_{expert}": U, "b": V}, factors, {"b": -1})


@case
def _experts_apart_in_several_projections():
    updates = {"moe": {name: [fill(D), fill(F), fill(D)] for name in ("up", "down", "norm")}}
    factors = {f"moe/{name}/{k}": np.full((D, F, D)[k], PHI_U[k]) for name in ("up", "down") for k in range(E)}
    return Case(updates, {"moe/{up,down}/{expert}": U}, factors)


# Other people's layouts.


@case
def _maxtext():
    moe = {
        "gate": {"kernel": fill(D, L, E), "bias": fill(E, L)},
        "wi_0": fill(E, L, D, F),
        "wi_1": fill(E, L, D, F),
        "wo": fill(E, L, F, D),
        "wi_0_bias": fill(E, L, F),
        "wo_bias": fill(E, L, D),
        "shared_experts": {"wi_0": {"kernel": fill(D, L, F)}, "wo": {"kernel": fill(F, L, D)}},
    }
    updates = {"decoder": {"layers": {"MoeBlock_0": moe, "self_attention": {"out": fill(D, L, D)}}}}
    experts = {name: moe[name].shape for name in ("wi_0", "wi_1", "wo", "wi_0_bias", "wo_bias")}
    factors = {f"decoder/layers/MoeBlock_0/{name}": along(PHI, shape, 1, 0) for name, shape in experts.items()}
    return Case(updates, {"**/MoeBlock_0/w*": UV}, factors, (1, 0))


@case
def _v_moe():
    def mlp(*lead):
        return {
            "Dense_0": {"kernel": fill(*lead, D, F), "bias": fill(*lead, F)},
            "Dense_1": {"kernel": fill(*lead, F, D), "bias": fill(*lead, D)},
        }

    blocks = {f"encoderblock_{i}": {"Mlp": mlp()} for i in (0, 2)}
    blocks |= {
        f"encoderblock_{i}": {"Moe": {"Mlp": mlp(E), "Router": {"dense": {"kernel": fill(D, E)}}}} for i in (1, 3)
    }
    updates = FrozenDict({"Encoder": {**blocks, "encoder_norm": {"scale": fill(D)}}, "head": {"kernel": fill(D, 2)}})
    factors = {}
    for i, phi in ((1, PHI_U), (3, PHI_V)):
        base = f"Encoder/encoderblock_{i}/Moe/Mlp"
        factors |= {
            f"{base}/Dense_0/kernel": along(phi, (E, D, F), 0),
            f"{base}/Dense_0/bias": along(phi, (E, F), 0),
            f"{base}/Dense_1/kernel": along(phi, (E, F, D), 0),
            f"{base}/Dense_1/bias": along(phi, (E, D), 0),
        }
    entries = {f"encoderblock_{i}": {"Moe": {"Mlp": u}} for i, u in ((1, U), (3, V))}
    return Case(updates, {"Encoder": entries}, factors)


class MoELinear(eqx.Module):
    weight: Any
    bias: Any = None


class LevanterExperts(eqx.Module):
    w1: MoELinear
    w2: MoELinear
    w3: MoELinear
    act: Callable


class LevanterBlock(eqx.Module):
    gate: MoELinear
    experts: Any
    shared_expert: MoELinear


@case
def _levanter():
    experts = LevanterExperts(
        MoELinear(fill(L, E, D, F)), MoELinear(fill(L, E, F, D)), MoELinear(fill(L, E, D, F)), str
    )
    block = LevanterBlock(MoELinear(fill(L, E, D)), experts, MoELinear(fill(L, D, F)))
    updates = eqx.filter({"transformer": {"layers": {"stacked": block}}}, eqx.is_array)
    base = "transformer/layers/stacked/experts"
    factors = {
        f"{base}/w1/weight": along(PHI, (L, E, D, F), 0, 1),
        f"{base}/w2/weight": along(PHI, (L, E, F, D), 0, 1),
        f"{base}/w3/weight": along(PHI, (L, E, D, F), 0, 1),
    }
    return Case(updates, {"transformer": {"layers": {"stacked": {"experts": UV}}}}, factors)


@case
def _small_teaching_repo():
    def layer():
        return {"gate": {"kernel": fill(D, E)}, **{f"expert_{k}": {"Dense_0": expert()} for k in range(E)}}

    updates = {"embed": fill(7, D), "block_0": {"moe": layer()}, "block_1": {"moe": layer()}}
    factors = {}
    for i, phi in enumerate(PHI):
        for k in range(E):
            base = f"block_{i}/moe/expert_{k}/Dense_0"
            factors |= {f"{base}/kernel": np.full((D, F), phi[k]), f"{base}/bias": np.full(F, phi[k])}
    return Case(updates, {f"block_{i}/**/expert_{{expert}}": u for i, u in enumerate(UV)}, factors)


# Parameters that are another transformation's.

MASKED = optax.MaskedNode()


@case
def _masked_leaf():
    updates = {"moe": {"kernel": fill(E, D), "bias": MASKED}, "other": MASKED}
    return Case(updates, {"moe": U, "other": V}, {"moe/kernel": along(PHI_U, (E, D), 0)})


@case
def _masked_layer():
    updates = {"first": MASKED, "second": {"w": fill(E, D)}}
    utilization = {"first": {"moe": {"w": U}}, "second": V}
    return Case(updates, utilization, {"second/w": along(PHI_V, (E, D), 0)}, {"first": {"moe": {"w": -1}}})


@case
def _masked_experts():
    updates = {
        "first": MASKED,
        "second": {
            "expert_0": {"w": fill(D), "b": MASKED},
            "expert_1": MASKED,
            "expert_2": {"w": fill(D), "b": fill(1)},
        },
    }
    factors = {"second/expert_0/w": np.full(D, PHI_V[0]), "second/expert_2/w": np.full(D, PHI_V[2])}
    return Case(updates, {"first/expert_{expert}": U, "**/expert_{expert}/w": V, "third/**/w": None}, factors)


@case
def _masked_layer_below_any_names():
    updates = {"first": MASKED, "second": {"experts": fill(E)}}
    return Case(updates, {"**/first/**/experts": U, "**/second/experts": V}, {"second/experts": PHI_V})


def zero_sum_update(updates, utilization, expert_axis, wrap=lambda tx: tx, jit=False):
    tx = wrap(excitation_optax.scale_by_excitation(excitation_optax.zero_sum, expert_axis=expert_axis))
    update = jax.jit(tx.update) if jit else tx.update
    return update(updates, tx.init(updates), utilization=utilization)[0]


def check(updates, scaled, factors, same_object):
    assert jax.tree.structure(scaled) == jax.tree.structure(updates)
    before, after = leaves_by_path(updates), leaves_by_path(scaled)
    assert set(factors) <= set(before), "the case names a leaf that is not there"
    for path, leaf in before.items():
        if path in factors:
            assert after[path].dtype == leaf.dtype
            expected = np.asarray(leaf, np.float64) * factors[path]
            np.testing.assert_allclose(after[path], expected, rtol=1e-6, atol=0, err_msg=path)
        elif same_object:
            assert after[path] is leaf, path
        elif not isinstance(leaf, optax.MaskedNode):
            assert np.asarray(after[path]).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("name", CASES)
def test_scales_the_experts_and_nothing_else(name):
    updates, utilization, factors, expert_axis = CASES[name]()
    check(updates, zero_sum_update(updates, utilization, expert_axis), factors, same_object=True)


@pytest.mark.parametrize("name", CASES)
def test_describe_agrees_with_what_is_scaled(name):
    updates, utilization, factors, expert_axis = CASES[name]()
    excitation = excitation_optax.excitation(utilization, excitation_optax.zero_sum)
    phis = {path or "(root)": phi for path, phi in leaves_by_path(excitation).items()}
    description = excitation_optax.describe(updates, utilization, expert_axis)
    for described, (path, leaf) in zip(description.parameters, leaves_by_path(updates).items(), strict=True):
        assert described.path == (path or "(root)")
        assert described.shape == (None if isinstance(leaf, optax.MaskedNode) else leaf.shape)
        if path not in factors:
            assert (described.scaled_by, described.axes, described.expert) == (None, (), None)
            continue
        phi = phis[described.scaled_by]
        phi = phi if described.expert is None else phi[..., described.expert]
        np.testing.assert_allclose(along(phi, described.shape, *described.axes), factors[path], rtol=1e-6)
    assert f"{len(factors)} of {len(leaves_by_path(updates))} parameter leaves are scaled" in str(description)


@pytest.mark.parametrize("name", CASES)
def test_describe_takes_shapes(name):
    updates, utilization, _, expert_axis = CASES[name]()
    of_shapes = excitation_optax.describe(*jax.eval_shape(lambda *trees: trees, updates, utilization), expert_axis)
    assert of_shapes == excitation_optax.describe(updates, utilization, expert_axis)


JITTED = [
    "nnx_state_of_a_module",
    "maxtext",
    "levanter",
    "small_teaching_repo",
    "callable_of_the_updates",
    "masked_layer",
]


@pytest.mark.parametrize("name", JITTED)
def test_under_jit(name):
    updates, utilization, factors, expert_axis = CASES[name]()
    check(updates, zero_sum_update(updates, utilization, expert_axis, jit=True), factors, same_object=False)


TWO_LAYERS = {"first": {"w": (E, D), "b": (E,)}, "second": {"w": (E, D), "b": (E,)}, "head": (D, 2)}


def two_layers():
    return jax.tree.map(lambda shape: fill(*shape), TWO_LAYERS, is_leaf=lambda x: isinstance(x, tuple))


FIRST_ONLY = {"first/w": along(PHI_U, (E, D), 0), "first/b": PHI_U}
ALL_TRUE = {"w": True, "b": True}


@pytest.mark.parametrize(
    ("mask", "factors"),
    [
        ({"first": True, "second": False, "head": False}, FIRST_ONLY),
        ({"first": ALL_TRUE, "second": {"w": False, "b": False}, "head": False}, FIRST_ONLY),
        ({"first": {"w": False, "b": True}, "second": False, "head": True}, {"first/b": PHI_U}),
        (lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree), {"first/b": PHI_U, "second/b": PHI_V}),
    ],
    ids=["prefix", "leaves", "both", "callable"],
)
def test_masked(mask, factors):
    updates = two_layers()
    scaled = zero_sum_update(updates, {"first": U, "second": V}, None, wrap=lambda tx: optax.masked(tx, mask))
    check(updates, scaled, factors, same_object=True)


@pytest.mark.parametrize(
    "labels",
    [
        {"first": "moe", "second": "plain", "head": "plain"},
        {"first": {"w": "moe", "b": "moe"}, "second": {"w": "plain", "b": "plain"}, "head": "plain"},
    ],
    ids=["prefix", "leaves"],
)
def test_partition(labels):
    updates = two_layers()
    scaled = zero_sum_update(
        updates,
        {"first": U, "second": {"w": V, "b": None}},
        None,
        wrap=lambda tx: optax.partition({"moe": optax.chain(optax.scale(2.0), tx), "plain": optax.identity()}, labels),
    )
    check(updates, scaled, {path: 2 * factor for path, factor in FIRST_ONLY.items()}, same_object=True)


def test_partition_with_an_excitation_for_each_label():
    updates = two_layers()
    tx = optax.partition(
        {
            "up": excitation_optax.scale_by_excitation(excitation_optax.zero_sum),
            "down": excitation_optax.scale_by_excitation(excitation_optax.inverted),
            "none": optax.identity(),
        },
        {"first": "up", "second": "down", "head": "none"},
    )
    scaled, _ = tx.update(updates, tx.init(updates), utilization={"first": U, "second": U})
    inverse = np.array([18.0, 9.0, 6.0]) / 11  # 1/u is 10, 5, 10/3, of mean 55/9
    factors = FIRST_ONLY | {"second/w": along(inverse, (E, D), 0), "second/b": inverse}
    check(updates, scaled, factors, same_object=True)


@pytest.mark.parametrize(("utilization", "expert_axis"), [(U, 0), (U, (0,)), (U, None), (U, np.int32(-2))])
def test_same_axis_said_in_different_ways(utilization, expert_axis):
    updates = {"w": fill(E, D)}
    check(updates, zero_sum_update(updates, utilization, expert_axis), {"w": along(PHI_U, (E, D), 0)}, same_object=True)
