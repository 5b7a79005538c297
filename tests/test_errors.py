"""Every malformed call is a `ValueError` that says where, what was received, and what to do about it.

A row is what the call was given, and fragments that its message must hold: the path, the shapes, the remedy.
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import excitation_optax
from excitation_optax import RoutingCounts

E, L, D, F = 3, 2, 4, 5
U = jnp.array([0.1, 0.2, 0.3])
UV = jnp.stack([U, U])  # [L, E]


def params():
    return {
        "router": jnp.ones((D, E)),
        "moe": {"kernel": jnp.ones((E, D, F)), "bias": jnp.ones((E, F))},
        "stack": {"kernel": jnp.ones((L, E, D)), "square": jnp.ones((E, E))},
        "separate": {"router": jnp.ones(D), **{f"expert_{k}": {"w": jnp.ones(D)} for k in range(E)}},
        "blocks": [jnp.ones((E, D)), jnp.ones((E, D))],
        "none": None,
        "temperature": jnp.ones(()),
    }


def raises(fragments, call, *args, **kwargs):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (each fragment is matched below)
        call(*args, **kwargs)
    message = str(error.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


class Row(NamedTuple):
    utilization: Any
    fragments: list[str]
    arguments: dict[str, Any] = {}  # noqa: RUF012  (of scale_by_excitation)
    updates: Any = None  # params() unless said otherwise


def drops_layers(utilization, gamma):
    return utilization[0] * gamma


def returns_scalar(utilization, gamma):
    return jnp.sum(utilization) * gamma


def keeps_axes(utilization, gamma):
    return jnp.sum(utilization, axis=-1, keepdims=True) * gamma


NO_UTILIZATION = ["needs the utilization", "utilization={", "TrainState", "hold_utilization", "must forward extra"]
ENDS = "path end where there are experts only"
TYPES = "must be an int, a tuple with an element for each axis of the utilization"

ROWS = {
    # No utilization.
    "utilization is None": Row(None, [*NO_UTILIZATION, "got None"]),
    "empty dict": Row({}, [*NO_UTILIZATION, "got {}"]),
    "empty list": Row([], [*NO_UTILIZATION, "got []"]),
    "Nones only": Row({"moe": None, "stack": {"kernel": None}}, [*NO_UTILIZATION, "'moe': None"]),
    # Paths of utilization.
    "typo": Row({"meo": U}, ["utilization path meo matches no parameter", "Nearest: moe", "router", "describe()"]),
    "typo deep down": Row(
        {"moe": {"kernl": U}}, ["path moe/kernl matches", "Nearest: moe/kernel, moe/bias", "root of the tree"]
    ),
    "wrong case": Row({"MoE": U}, ["path MoE matches no parameter", "At the top level are: blocks, moe, router"]),
    "nothing alike": Row({"##": U}, ["path ## matches no parameter", "blocks, moe, router, separate"]),
    "path with a root of its own": Row({"params": {"moe": U}}, ["params/moe", " moe,", "root of the tree"]),
    "names that differ by their case": Row(
        {"x/Expert": U}, ["Nearest: moe/Expert, moe/expert"], updates={"moe": {"Expert": U, "expert": U}}
    ),
    "below a leaf": Row({"moe": {"kernel": {"w": U}}}, ["path moe/kernel/w matches", "Nearest: moe/kernel"]),
    "at None": Row({"none": U}, ["utilization path none matches no parameter", "At the top level"]),
    "below None": Row({"none": {"w": U}}, ["utilization path none/w matches no parameter", "At the top level"]),
    "beyond the end of a list": Row({"blocks": {2: U}}, ["path blocks/2 matches no parameter", "blocks/1"]),
    "one good path and one bad": Row({"moe": U, "mot": U}, ["utilization path mot matches", "Nearest: moe"]),
    "no parameters at all": Row({"moe": U}, ["path moe matches no parameter", "no names"], updates={"moe": None}),
    "names that differ by type": Row(
        {"a": U}, ["the same path a/0"], updates={"a": collections.OrderedDict([(0, jnp.ones(E)), ("0", jnp.ones(E))])}
    ),
    "names that differ by slashes": Row(
        {"a": U}, ["the same path a/b/c", "Rename one"], updates={"a": {"b/c": U}, "a/b": {"c": U}}
    ),
    "utilization below utilization": Row(
        {"moe": U, "moe/kernel": U}, ["paths moe and moe/kernel both cover moe/kernel", "covered once"]
    ),
    "patterns that overlap": Row(
        {"moe/k*": U, "**/moe": U}, ["paths **/moe and moe/k* both cover moe/kernel", "narrower"]
    ),
    "the same utilization twice": Row({"moe": {"kernel": U}, "moe/kernel": U}, ["the same path moe/kernel"]),
    "axes below axes": Row(
        {"moe": U},
        ["expert_axis paths moe and moe/kernel both cover moe/kernel"],
        {"expert_axis": {"moe": 0, "moe/kernel": 1}},
    ),
    # Patterns.
    "braces with nothing in them": Row({"moe/{}": U}, ["'moe/{}' is malformed", "empty", "{expert}"]),
    "a brace that is not closed": Row({"moe/{kernel": U}, ["'moe/{kernel' is malformed", "unbalanced"]),
    "a brace that is not opened": Row({"moe/kernel}": U}, ["'moe/kernel}' is malformed", "unbalanced"]),
    "a slash within braces": Row({"{moe/kernel,router}": U}, ["malformed", "a slash in braces"]),
    "braces within braces": Row({"{moe,{router}}": U}, ["malformed", "nested"]),
    "two numbers of an expert": Row({"{expert}/{expert}": U}, ["more than once", "one number"]),
    "a malformed pattern of axes": Row({"moe": U}, ["malformed"], {"expert_axis": {"{": 0}}),
    "several layers by any names": Row(
        {"**/w": U},
        ["**/w matches a/w and b/w", "different layers", "one entry for each", "{expert}"],
        updates={"a": {"w": jnp.ones(E)}, "b": {"w": jnp.ones(E)}},
    ),
    "several layers by one name": Row(
        {"layer_*/w": U},
        ["layer_*/w matches layer_0/w and layer_1/w", "different layers"],
        updates={f"layer_{n}": {"w": jnp.ones(E)} for n in range(2)},
    ),
    "several layers of separate experts": Row(
        {"*/{expert}": U}, ["matches a/0 and b/0", "different layers"], updates=dict.fromkeys("ab", [jnp.ones(2)] * 3)
    ),
    "integers only": Row(
        {"ids": U}, ["path ids matches no parameter (only None, integers"], updates={"ids": np.arange(3)}
    ),
    # Axes of parameters.
    "wrong E": Row({"moe": jnp.ones(4)}, ["moe/bias [3, 5]", "at moe,", "axes [4]", "[3] entries, not [4]", ENDS]),
    "router is covered": Row({"router": U}, ["router [4, 3]", "at router", "[4] entries, not [3]", "-1", ENDS]),
    "router is covered by a prefix": Row(
        {"separate": U}, ["separate/expert_0/w [4]", "at separate,", "[4] entries", ENDS]
    ),
    "whole model": Row(
        U,
        ["at (root)", "Name the experts", "expert_axis", ENDS],
        updates={"a": jnp.ones((E, D)), "b": jnp.ones((D, E))},
    ),
    "layer axis is second": Row(
        {"w": UV}, ["w [3, 2, 4]", "axes [2, 3]", "[3, 2] entries", "(1, 0)"], updates={"w": jnp.ones((E, L, D))}
    ),
    "counts of wrong E": Row({"moe": RoutingCounts(jnp.ones(4), jnp.ones(()))}, ["moe/bias [3, 5]", "axes [4]", ENDS]),
    "axis beyond the last": Row(
        {"moe": U}, ["moe/bias [3, 5]", "along the parameter's axes [2]", "out of range"], {"expert_axis": 2}
    ),
    "axis before the first": Row({"moe": U}, ["moe/bias [3, 5]", "[-3]", "out of range", ENDS], {"expert_axis": -3}),
    "scalar parameter": Row({"temperature": U}, ["temperature []", "at temperature,", "out of range", ENDS]),
    "too few axes": Row({"blocks": jnp.ones((L, E, D))}, ["blocks/0 [3, 4]", "[2, 3, 4]", "[0, 1, 2]", "out of range"]),
    "axis named twice": Row(
        {"stack": {"square": jnp.ones((E, E))}},
        ["stack/square [3, 3]", "axes [0, 0]", "one axis twice"],
        {"expert_axis": (0, 0)},
    ),
    "axis named twice by its two names": Row(
        {"stack": {"square": jnp.ones((E, E))}},
        ["stack/square [3, 3]", "axes [0, -2]", "one axis twice"],
        {"expert_axis": (0, -2)},
    ),
    "int for two axes": Row(
        {"stack": {"kernel": UV}}, ["stack/kernel", "the utilization, 2", "it has 1"], {"expert_axis": 1}
    ),
    "one-tuple for two axes": Row({"stack": {"kernel": UV}}, ["the utilization, 2", "it has 1"], {"expert_axis": (1,)}),
    "three-tuple for two axes": Row(
        {"stack": {"kernel": UV}}, ["axes [0, 1, 2]", "the utilization, 2", "it has 3"], {"expert_axis": (0, 1, 2)}
    ),
    "two-tuple for one axis": Row({"moe": U}, ["moe/bias", "the utilization, 1", "it has 2"], {"expert_axis": (0, 1)}),
    "empty tuple": Row({"moe": U}, ["moe/bias", "the utilization, 1", "it has 0"], {"expert_axis": ()}),
    # Separate modules.
    "too few experts": Row(
        {"separate/expert_{expert}": jnp.ones(4)},
        ["separate/expert_{expert} finds 3 experts", "numbers 0, 1, 2;", "[4] has E = 4", "Correct the path"],
    ),
    "too many experts": Row({"separate/expert_{expert}": jnp.ones(2)}, ["finds 3 experts", "[2] has E = 2"]),
    "number matches nothing": Row(
        {"separate/Expert_{expert}": U}, ["separate/Expert_{expert} matches no parameter", "Nearest: separate/expert_"]
    ),
    "numbers written in two ways": Row(
        {"moe/{expert}": U},
        ["same number written as 0 and 00", "which expert"],
        updates={"moe": {"0": jnp.ones(1), "00": jnp.ones(1), "1": jnp.ones(1)}},
    ),
    "a module with the axis of a stack": Row(
        {"separate/expert_{expert}": U},
        ["separate/expert_0/w [4]", "one element for each axis of the utilization, 0", "the layers' axes only"],
        {"expert_axis": 0},
    ),
    "experts without the layers": Row(
        {"separate/expert_{expert}": UV},
        ["separate/expert_0/w [4]", "at separate/expert_{expert},", "[4] entries, not [2]"],
    ),
    # The tree of specs.
    "spec at no parameter": Row(
        {"moe": U}, ["expert_axis path mo matches no parameter", "Nearest: moe"], {"expert_axis": {"mo": 0}}
    ),
    "spec below a leaf": Row(
        {"moe": U},
        ["expert_axis path moe/bias/w matches", "Nearest: moe/bias"],
        {"expert_axis": {"moe": {"bias": {"w": 0}}}},
    ),
    "one axis over several that do not fit": Row(
        {"moe/kernel": U},
        ["run along the parameter's axes [(0, 1)]", "[12] entries, not [3]"],
        {"expert_axis": ((0, 1),)},
    ),
    "callable that returns a string": Row({"moe": U}, [TYPES, "'last'"], {"expert_axis": lambda tree: {"moe": "last"}}),
    # Leaves of utilization.
    "scalar": Row({"moe": jnp.asarray(0.5)}, ["at moe must", "[..., E]", "got float32[]"]),
    "integers": Row({"moe": jnp.array([1, 2, 3])}, ["at moe must", "int32[3]", "RoutingCounts(counts, tokens)"]),
    "booleans": Row({"moe": jnp.array([True, False, True])}, ["at moe must", "bool[3]", "fractions in [0, 1]"]),
    "list of floats": Row({"moe": [0.1, 0.2, 0.3]}, ["at moe/0", "convert it to an array"]),
    "negative": Row({"moe": -U}, ["at moe must not be negative", "float32[3] with the value -0.3"]),
    "negative counts": Row(
        {"moe": RoutingCounts(np.array([1.0, -2.0, 0.0]), np.float32(3))}, ["at moe must not be negative", "-2.0"]
    ),
    "no experts": Row({"moe": jnp.ones((L, 0))}, ["at moe must", "float32[2, 0]", "axis of experts"]),
    "counts with tokens of each expert": Row(
        {"moe": RoutingCounts(U, U)},
        ["Utilization at moe has", "counts of shape [3]", "tokens float32[3]", "must have the shape []"],
    ),
    "stacked counts with tokens in all": Row(
        {"stack": {"kernel": RoutingCounts(UV, jnp.ones(()))}},
        ["Utilization at stack/kernel has", "counts of shape [2, 3]", "tokens float32[]", "the shape [2]"],
    ),
    "counts without an axis": Row(
        {"moe": RoutingCounts(jnp.ones(()), jnp.ones(()))}, ["at moe: the counts must", "got float32[]"]
    ),
    # Strategies.
    "strategy drops the layers": Row(
        {"stack": {"kernel": UV}},
        ["strategy drops_layers", "at stack/kernel", "from [2, 3] into float32[3]", "every expert"],
        {"strategy": drops_layers},
    ),
    "strategy returns a scalar": Row(
        {"moe": U}, ["strategy returns_scalar", "at moe", "from [3] into float32[]"], {"strategy": returns_scalar}
    ),
    "strategy keeps a reduced axis": Row(
        {"moe": U}, ["strategy keeps_axes", "from [3] into float32[1]"], {"strategy": keeps_axes}
    ),
    "schedule of vectors": Row({"moe": U}, ["same for all experts", "float32[3]"], {"gamma": lambda step: jnp.ones(E)}),
    "schedule of None": Row({"moe": U}, ["same for all experts", "None"], {"gamma": lambda step: None}),
    "schedule below zero": Row(
        {"moe": U}, ["gamma", "not negative", "-1.0", "`inverted`"], {"gamma": lambda step: -1.0}
    ),
}


def update(row, through=lambda f: f):
    updates = params() if row.updates is None else row.updates
    tx = excitation_optax.scale_by_excitation(**row.arguments)
    state = tx.init(updates)
    through(tx.update)(updates, state, utilization=row.utilization)


@pytest.mark.parametrize("name", ROWS)
def test_update(name):
    raises(ROWS[name].fragments, update, ROWS[name])


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("negative")])  # cannot be read
def test_update_while_tracing(name):
    raises(ROWS[name].fragments, update, ROWS[name], jax.jit)


def test_rows_fail_for_their_own_reason():
    update(Row({"moe": U, "stack": {"kernel": UV}, "blocks": {1: U}}, []))
    update(Row({"separate/expert_{expert}": U}, []))
    update(Row({"stack": {"square": jnp.ones((E, E))}}, [], {"expert_axis": (0, -1)}))


# `describe` and `excitation` refuse what the transformation refuses.

DESCRIBED = [name for name, row in ROWS.items() if not row.arguments.keys() & {"strategy", "gamma"}]


@pytest.mark.parametrize("name", DESCRIBED)
def test_describe(name):
    row = ROWS[name]
    updates = params() if row.updates is None else row.updates
    raises(row.fragments, excitation_optax.describe, updates, row.utilization, **row.arguments)


EXCITED = ["utilization is None", "empty dict", "Nones only", "scalar", "integers", "list of floats"]
EXCITED += ["counts with tokens of each expert", "strategy drops the layers", "strategy returns a scalar"]


@pytest.mark.parametrize("name", EXCITED)
def test_excitation(name):
    raises(ROWS[name].fragments, excitation_optax.excitation, ROWS[name].utilization, **ROWS[name].arguments)


@pytest.mark.parametrize(
    "strategy", [excitation_optax.random_boost, excitation_optax.clipped(excitation_optax.random_boost, 2.0)]
)
def test_excitation_of_a_random_strategy_without_key(strategy):
    raises(["random_boost is random", "pass key="], excitation_optax.excitation, {"moe": U}, strategy)


# No `utilization=` at all, alone and through wrappers.


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.sgd(0.1), tx)])
def test_forgotten_utilization(wrap):
    tx = wrap(excitation_optax.scale_by_excitation())
    state = tx.init(params())
    raises([*NO_UTILIZATION, "got None"], tx.update, params(), state, params())
    raises([*NO_UTILIZATION, "got None"], jax.jit(tx.update), params(), state, params())


def test_wrapper_that_drops_extra_arguments():
    excite = excitation_optax.scale_by_excitation()
    tx = optax.GradientTransformation(excite.init, lambda updates, state, params=None: excite.update(updates, state))
    chained = optax.chain(optax.sgd(0.1), tx)
    raises(["must forward extra arguments"], chained.update, params(), chained.init(params()), utilization={"moe": U})


# What can be refused before the first update.

NOT_FINITE = ["gamma must be a finite number that is not negative"]
NOT_SCALAR = [*NOT_FINITE, "same for all experts"]
CONSTRUCTION = {
    "negative gamma": ({"gamma": -1.0}, [*NOT_FINITE, "-1.0", "`inverted`"]),
    "negative int gamma": ({"gamma": -2}, [*NOT_FINITE, "-2"]),
    "negative NumPy gamma": ({"gamma": np.float32(-0.5)}, [*NOT_FINITE, "-0.5"]),
    "negative array gamma": ({"gamma": jnp.asarray(-0.5)}, [*NOT_FINITE, "-0.5"]),
    "nan gamma": ({"gamma": float("nan")}, [*NOT_FINITE, "nan"]),
    "infinite gamma": ({"gamma": float("inf")}, [*NOT_FINITE, "inf"]),
    "vector gamma": ({"gamma": jnp.ones(E)}, NOT_SCALAR),
    "one-vector gamma": ({"gamma": np.ones(1)}, NOT_SCALAR),
    "string gamma": ({"gamma": "1.0"}, [*NOT_SCALAR, "'1.0'"]),
    "None gamma": ({"gamma": None}, [*NOT_SCALAR, "None"]),
    "list gamma": ({"gamma": [1.0]}, [*NOT_SCALAR, "[1.0]"]),
    "complex gamma": ({"gamma": 1j}, [*NOT_SCALAR, "1j"]),
    "string strategy": ({"strategy": "zero_sum"}, ["strategy must be a callable", "'zero_sum'", "not its name"]),
    "None strategy": ({"strategy": None}, ["strategy must be a callable", "None"]),
    "gamma for a strategy": ({"strategy": 1.0}, ["strategy must be a callable", "1.0"]),
    "string axis": ({"expert_axis": "last"}, [TYPES, "'last'"]),
    "float axis": ({"expert_axis": 0.0}, [TYPES, "0.0"]),
    "boolean axis": ({"expert_axis": True}, [TYPES, "True"]),
    "boolean in a tuple": ({"expert_axis": {"moe": (0, True)}}, ["at moe", TYPES, "(0, True)"]),
    "float in a tuple": ({"expert_axis": (0, 1.5)}, [TYPES, "(0, 1.5)"]),
    "string in a tree": ({"expert_axis": {"moe": {"kernel": "E"}}}, ["at moe/kernel", TYPES, "'E'"]),
    "list of axes": ({"expert_axis": [0, 1]}, [TYPES, "[0, 1]"]),
    "no axes within a tuple": ({"expert_axis": ((), 0)}, [TYPES, "((), 0)"]),
    "boolean gamma": ({"gamma": True}, [*NOT_SCALAR, "True"]),
    "boolean array gamma": ({"gamma": jnp.asarray(True)}, [*NOT_SCALAR, "bool[]"]),
    "gamma beyond a float": ({"gamma": 10**400}, [*NOT_FINITE, "inf"]),
    "string seed": ({"seed": "a"}, ["seed must be an integer", "'a'"]),
    "boolean seed": ({"seed": True}, ["seed must be an integer", "True"]),
    "fractional seed": ({"seed": 0.5}, ["seed must be an integer", "0.5"]),
    "seed of many bits": ({"seed": 2**64}, ["seed must be an integer of at most 64 bits"]),
    "component": ({"component": "length"}, ["component must be one of both, direction, norm", "'length'"]),
    "array axis": ({"expert_axis": np.array([0, 1])}, [TYPES, "int64[2]", "static_args"]),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name):
    arguments, fragments = CONSTRUCTION[name]
    raises(fragments, excitation_optax.scale_by_excitation, **arguments)


@pytest.mark.parametrize("name", [name for name, (arguments, _) in CONSTRUCTION.items() if "expert_axis" in arguments])
def test_callable_that_returns_what_construction_refuses(name):
    arguments, fragments = CONSTRUCTION[name]
    raises(fragments, update, Row({"moe": U}, [], {"expert_axis": lambda tree: arguments["expert_axis"]}))


@pytest.mark.parametrize(
    "name", [name for name, (arguments, _) in CONSTRUCTION.items() if arguments.keys() & {"strategy", "gamma"}]
)
def test_excitation_refuses_what_construction_refuses(name):
    arguments, fragments = CONSTRUCTION[name]
    raises(fragments, excitation_optax.excitation, {"moe": U}, **arguments)


@pytest.mark.parametrize("name", [name for name, (arguments, _) in CONSTRUCTION.items() if "gamma" in arguments])
def test_schedule_that_returns_what_construction_refuses(name):
    arguments, fragments = CONSTRUCTION[name]
    row = Row({"moe": U}, [], {"gamma": lambda step: arguments["gamma"]})
    raises(fragments, update, row)
    raises(fragments, update, row, jax.jit)


def test_schedule_whose_value_falls_below_zero():
    tx = excitation_optax.scale_by_excitation(gamma=optax.linear_schedule(1.0, -1.0, transition_steps=2))
    updates, state = {"moe": jnp.ones(E)}, tx.init({"moe": jnp.ones(E)})
    for _ in range(2):  # gamma is 1, then 0
        _, state = tx.update(updates, state, utilization={"moe": U})
    raises([*NOT_FINITE, "-1.0"], tx.update, updates, state, utilization={"moe": U})


def test_expert_axis_traced_by_inject_hyperparams():
    tx = optax.inject_hyperparams(excitation_optax.scale_by_excitation, static_args=("strategy",))(
        excitation_optax.zero_sum, gamma=1.0, expert_axis=0
    )
    raises([TYPES, "static_args"], lambda: tx.update(params(), tx.init(params()), utilization={"moe": U}))


# States.

STATELESS = {}
SCHEDULED = {"gamma": lambda step: 1.0}
RANDOM = {"strategy": excitation_optax.random_boost}


@pytest.mark.parametrize("through", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("made_for", "given_to", "fragments"),
    [
        (STATELESS, SCHEDULED, ["the state ScaleByExcitationState", "got EmptyState"]),
        (STATELESS, RANDOM, ["the state ScaleByExcitationState", "got EmptyState"]),
        (SCHEDULED, STATELESS, ["the state EmptyState", "got ScaleByExcitationState"]),
        (RANDOM, STATELESS, ["the state EmptyState", "got ScaleByExcitationState"]),
    ],
)
def test_state_made_for_other_arguments(made_for, given_to, fragments, through):
    state = excitation_optax.scale_by_excitation(**made_for).init(params())
    tx = excitation_optax.scale_by_excitation(**given_to)
    fragments = [*fragments, "with this strategy and gamma", "tx.init(params)"]
    raises(fragments, through(tx.update), params(), state, utilization={"moe": U})


@pytest.mark.parametrize("arguments", [STATELESS, SCHEDULED])
@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.scale_by_schedule(lambda step: 1.0)])
def test_state_of_another_transformation(optimizer, arguments):
    tx, state = excitation_optax.scale_by_excitation(**arguments), optimizer.init(params())
    fragments = [f"got {type(state).__name__}", "tx.init(params)", "add Excitation to a saved run"]
    raises(fragments, tx.update, params(), state, utilization={"moe": U})


@pytest.mark.parametrize("state", [None, {"count": 0}, jnp.zeros([], jnp.int32)])
def test_state_of_no_transformation(state):
    tx = excitation_optax.scale_by_excitation()
    raises(
        ["the state EmptyState", f"got {type(state).__name__}", "without a target"],
        tx.update,
        params(),
        state,
        utilization={"moe": U},
    )


def test_a_misspelt_argument_is_named():
    tx = excitation_optax.scale_by_excitation()
    with pytest.raises(ValueError, match="Extra arguments received: utilisation"):
        tx.update({"moe": jnp.ones((3, 2))}, tx.init(None), utilisation={"moe": jnp.ones(3)})
