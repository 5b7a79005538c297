"""How describe prints, and what it asks about. That it agrees with the transform is held in test_experts.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from excitation_optax import RoutingCounts, describe, scale_by_excitation


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def table(*lines):
    return "\n".join(lines)


def test_the_table():
    params = {"router": ones(2, 4), "experts": {"kernel": ones(4, 2, 3), "bias": ones(4, 3)}}
    description = describe(params, {"experts": ones(4)})
    assert str(description) == table(
        "parameter       shape      scaled by  along",
        "experts/bias    [4, 3]     experts    axis 0 (4)",
        "experts/kernel  [4, 2, 3]  experts    axis 0 (4)",
        "router          [2, 4]     -",
        "2 of 3 parameter leaves are scaled: 36 of 44 parameters.",  # 12 + 24 of 12 + 24 + 8
    )
    assert repr(description) == str(description)
    with pytest.raises(dataclasses.FrozenInstanceError):
        description.parameters = ()


def test_the_table_of_separate_modules_of_stacked_layers():
    params = {"moe": {"gate": ones(2, 3), "expert_0": ones(2, 3), "expert_1": {"b": ones(2)}}}
    assert str(describe(params, {"moe/expert_{expert}": ones(2, 2)})) == table(
        "parameter       shape   scaled by            along",
        "moe/expert_0    [2, 3]  moe/expert_{expert}  all of it, as expert 0, axis 0 (2)",
        "moe/expert_1/b  [2]     moe/expert_{expert}  all of it, as expert 1, axis 0 (2)",
        "moe/gate        [2, 3]  -",
        "moe/expert_{expert} is one entry: moe/expert_0, moe/expert_1",
        "2 of 3 parameter leaves are scaled: 8 of 14 parameters.",  # 6 + 2 of 6 + 2 + 6
    )


def test_the_table_of_other_axes():
    counts = RoutingCounts(ones(2, 4), ones(2))
    params = {"moe": {"b": ones(4, 2), "wi": ones(4, 2, 3, 5)}, "grid": ones(2, 3, 7)}
    expert_axis = {"moe": (1, 0), "grid": ((1, 0),)}
    assert str(describe(params, {"m*/{b,wi}": counts, "grid": ones(6)}, expert_axis)) == table(
        "parameter  shape         scaled by  along",
        "grid       [2, 3, 7]     grid       axes (1, 0) (6)",
        "moe/b      [4, 2]        m*/{b,wi}  axis 1 (2), axis 0 (4)",
        "moe/wi     [4, 2, 3, 5]  m*/{b,wi}  axis 1 (2), axis 0 (4)",
        "m*/{b,wi} is one entry: moe/b, moe/wi",
        "3 of 3 parameter leaves are scaled: 170 of 170 parameters.",  # 42 + 8 + 120
    )


def test_many_nodes_are_shortened():
    params = {f"expert_{k}": ones(3) for k in range(64)}
    lines = str(describe(params, {"expert_{expert}": ones(64)})).splitlines()
    shown = "expert_0, expert_1, expert_10, expert_11, ..., expert_9"
    assert lines[-2] == f"expert_{{expert}} is one entry: {shown}"


def test_what_holds_no_parameters_is_listed():
    """Masked nodes, integers, and the functions that Equinox modules hold."""
    masked = optax.MaskedNode()
    params = {"experts": {"w": ones(4, 2), "frozen": masked}, "relu": jax.nn.relu, "step": np.arange(3), "none": None}
    description = describe(params, {"experts": ones(4)})
    assert [(p.path, p.shape, p.scaled_by) for p in description.parameters] == [
        ("experts/frozen", None, None),
        ("experts/w", (4, 2), "experts"),
        ("relu", None, None),
        ("step", None, None),
    ]
    assert str(description).endswith("1 of 4 parameter leaves are scaled: 8 of 8 parameters.")


def test_large_numbers_and_scalars():
    params = {"a": ones(1000, 2000), "b": ones(), "root": ones(4)}
    assert str(describe(params, {"a": ones(1000)})).endswith("2,000,000 of 2,000,005 parameters.")
    assert describe(ones(4, 3), ones(4)).parameters[0].path == "(root)"


@pytest.mark.parametrize(
    ("shape", "utilization", "doubtful"),
    [
        ((8, 8), (8,), True),  # a router [D, E] with D = E
        ((8,), (8,), True),  # a router's bias
        ((8, 3, 8), (8,), True),  # experts last
        ((2, 8), (2, 8), True),  # a bias per layer
        ((8, 8, 3), (8, 8), True),  # layers behind experts
        ((8, 3), (8,), False),
        ((8, 3, 5), (8,), False),
        ((2, 8, 2), (2, 8), False),
    ],
)
def test_asks_about_shapes_that_fit_another_way(shape, utilization, doubtful):
    description = describe({"moe": {"w": ones(*shape)}}, {"moe": ones(*utilization)})
    assert description.doubtful == ((f"moe/w {list(shape)}",) if doubtful else ())
    question = f"Is this meant? moe/w {list(shape)}: by their shapes, these could also be routers"
    assert (question in str(description)) == doubtful


def test_asks_nothing_where_axes_are_said_or_experts_are_apart():
    dense = {"kernel": ones(8, 8), "bias": ones(8)}
    assert "?" not in str(describe(dense, ones(8), -1))
    assert "?" not in str(describe({"a": dense}, {"a": ones(8)}, {"**/kernel": 0, "a/b*": 0}))
    assert "?" not in str(describe([ones(2), ones(2)], {"{expert}": ones(2)}))
    assert str(describe({"a": dense}, {"a": ones(8)}, {"**/kernel": 0})).count("?") == 1


def test_rejects_what_the_transform_rejects():
    params, utilization = {"a": {"w": jnp.ones((3, 4))}}, {"a": jnp.ones(4)}
    for call in (
        lambda: describe(params, utilization),
        lambda: scale_by_excitation().update(params, optax.EmptyState(), utilization=utilization),
    ):
        with pytest.raises(ValueError, match=r"a/w \[3, 4\] .* have \[3\] entries, not \[4\]"):
            call()
