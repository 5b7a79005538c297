"""What describe says, how it prints, and that the transform then does so.

Axis letters: E experts, L layers, D model width, F expert hidden width.
"""

import dataclasses
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from excitation_optax import DescribedParameter, RoutingCounts, children, describe, scale_by_excitation, zero_sum


def ones(*shape):
    return jnp.ones(shape)


def fractions(*shape):
    """Utilization `[..., E]` whose zero-sum excitation is nowhere 1 and nowhere twice the same in a layer.

    Of E experts, the n-th has a share proportional to n² + 0.3, from n = 0.
    """
    return jnp.broadcast_to((np.arange(shape[-1], dtype=np.float32) ** 2 + 0.3) / 40, shape) * (
        1 + jnp.arange(np.prod(shape[:-1], dtype=int), dtype=jnp.float32).reshape(*shape[:-1], 1)
    )


# One line for each example: parameters, utilization, expert_axis.
EXAMPLES = {
    "leading axis": (
        {"router": ones(2, 4), "experts": {"kernel": ones(4, 2, 3), "bias": ones(4, 3)}},
        {"experts": fractions(4)},
        None,
    ),
    "stacked layers": ({"layers": {"w": ones(2, 4, 3), "b": ones(2, 4)}}, {"layers": fractions(2, 4)}, None),
    "neurons": ({"dense": {"kernel": ones(3, 4), "bias": ones(4)}, "out": ones(4, 2)}, {"dense": fractions(4)}, -1),
    "second axis": ({"wi": ones(3, 4, 5)}, {"wi": fractions(4)}, 1),
    "layers second": ({"moe": {"wi": ones(4, 2, 3, 5), "b": ones(4, 2)}}, {"moe": fractions(2, 4)}, (1, 0)),
    "tuple of one": ({"moe": ones(3, 4)}, {"moe": fractions(4)}, (-1,)),
    "axis by path": (
        {"a": {"kernel": ones(3, 4), "scale": ones(4, 3)}, "b": ones(4, 2)},
        {"a": fractions(4), "b": fractions(4)},
        {"a": {"kernel": 1}},
    ),
    "axis by callable": ({"a": ones(3, 4), "b": ones(4)}, {"a": fractions(4)}, lambda updates: {"a": -1}),
    "children": (
        {"moe": {"router": ones(4), "expert_2": ones(3), "expert_10": {"w": ones(2, 2)}, "expert_1": ones(1)}},
        {"moe": fractions(3)},
        children("expert_*"),
    ),
    "children of a list": ({"experts": [ones(2), ones(2), ones(2)]}, {"experts": fractions(3)}, children("*")),
    "children of stacked layers": (
        {"moe": {"gate": ones(2, 3), "expert_0": ones(2, 3), "expert_1": {"b": ones(2)}}},
        {"moe": fractions(2, 2)},
        children("expert_*"),
    ),
    "a spec below the entry": (
        {"moe": {"shared": ones(3, 2), "experts": {"e0": ones(4), "e1": ones(4), "e2": ones(4)}}},
        {"moe": fractions(3)},
        {"moe": {"experts": children("e*")}},
    ),
    "masked": (
        {"experts": {"w": ones(4, 2), "frozen": optax.MaskedNode()}, "rest": optax.MaskedNode(), "head": ones(2)},
        {"experts": fractions(4)},
        None,
    ),
    "nothing left unmasked": ({"experts": optax.MaskedNode(), "b": ones(4)}, {"experts": fractions(4)}, None),
    "root": (ones(4, 3), fractions(4), None),
    "None is absent": ({"a": ones(4), "b": ones(4)}, {"a": fractions(4), "b": None}, None),
    "scalars": ({"experts": ones(4), "temperature": ones()}, {"experts": fractions(4)}, None),
    "counts": (
        {"a": ones(4, 3), "b": ones(4)},
        {"a": RoutingCounts(jnp.array([0.0, 1.0, 2.0, 6.0]), jnp.array(6.0))},
        None,
    ),
}
each_example = pytest.mark.parametrize(
    ("params", "utilization", "expert_axis"), EXAMPLES.values(), ids=[name.replace(" ", "_") for name in EXAMPLES]
)


def is_masked(leaf):
    return isinstance(leaf, optax.MaskedNode)


def leaf_at(tree, path):
    """The leaf of a nested dict (or list) at a path as it is printed."""
    for name in [] if path == "(root)" else path.split("/"):
        tree = tree[int(name) if isinstance(tree, list) else name]
    return tree


# What it says.


def test_leading_axis():
    assert describe(*EXAMPLES["leading axis"]).parameters == (
        DescribedParameter("experts/bias", (4, 3), "experts", (0,)),
        DescribedParameter("experts/kernel", (4, 2, 3), "experts", (0,)),
        DescribedParameter("router", (2, 4), None),
    )


@pytest.mark.parametrize(
    ("example", "axes"),
    [
        ("stacked layers", {"layers/b": (0, 1), "layers/w": (0, 1)}),
        ("neurons", {"dense/bias": (0,), "dense/kernel": (1,), "out": ()}),  # -1, counted from the front
        ("layers second", {"moe/b": (1, 0), "moe/wi": (1, 0)}),  # utilization is [L, E], the parameters [E, L, ...]
        ("tuple of one", {"moe": (1,)}),
        ("axis by path", {"a/kernel": (1,), "a/scale": (0,), "b": (0,)}),
        ("axis by callable", {"a": (1,), "b": ()}),
        ("children of stacked layers", {"moe/expert_0": (0,), "moe/expert_1/b": (0,), "moe/gate": ()}),
    ],
)
def test_axes(example, axes):
    assert {p.path: p.axes for p in describe(*EXAMPLES[example]).parameters} == axes


@pytest.mark.parametrize(
    ("example", "experts"),
    [
        # in natural order, 10 after 2
        ("children", {"moe/expert_1": 0, "moe/expert_10/w": 2, "moe/expert_2": 1, "moe/router": None}),
        ("children of a list", {"experts/0": 0, "experts/1": 1, "experts/2": 2}),
        ("children of stacked layers", {"moe/expert_0": 0, "moe/expert_1/b": 1, "moe/gate": None}),
        ("leading axis", {"experts/bias": None, "experts/kernel": None, "router": None}),
        (
            "a spec below the entry",
            {"moe/experts/e0": 0, "moe/experts/e1": 1, "moe/experts/e2": 2, "moe/shared": None},
        ),
    ],
)
def test_experts_that_are_children(example, experts):
    assert {p.path: p.expert for p in describe(*EXAMPLES[example]).parameters} == experts


def test_masked_nodes_are_listed_as_untouched():
    scaled_by = {p.path: p.scaled_by for p in describe(*EXAMPLES["masked"]).parameters}
    assert scaled_by == {"experts/frozen": None, "experts/w": "experts", "head": None, "rest": None}


@each_example
def test_every_leaf_is_listed_once_in_order(params, utilization, expert_axis):
    described = describe(params, utilization, expert_axis).parameters
    leaves = jax.tree.leaves(params, is_leaf=is_masked)
    assert len(described) == len(leaves)
    for parameter, leaf in zip(described, leaves, strict=True):
        assert leaf_at(params, parameter.path) is leaf
        assert is_masked(leaf) or parameter.shape == leaf.shape


@each_example
def test_shapes_are_enough(params, utilization, expert_axis):
    shapes_of = lambda tree: jax.eval_shape(lambda: tree)
    assert describe(shapes_of(params), shapes_of(utilization), expert_axis) == describe(
        params, utilization, expert_axis
    )


def test_shapes_of_routing_counts():
    params = {"moe": jax.ShapeDtypeStruct((2, 4, 3), jnp.bfloat16)}
    counts = RoutingCounts(jax.ShapeDtypeStruct((2, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32))
    assert describe(params, {"moe": counts}).parameters == (DescribedParameter("moe", (2, 4, 3), "moe", (0, 1)),)


# That the transform does so.


@each_example
def test_the_transform_scales_what_is_described(params, utilization, expert_axis):
    tx = scale_by_excitation(zero_sum, expert_axis=expert_axis)
    updates, _ = tx.update(params, tx.init(params), utilization=utilization)
    for parameter in describe(params, utilization, expert_axis).parameters:
        before, after = leaf_at(params, parameter.path), leaf_at(updates, parameter.path)
        if parameter.scaled_by is None:
            assert after is before
            continue
        u = leaf_at(utilization, parameter.scaled_by)
        u = np.asarray(u.utilization if isinstance(u, RoutingCounts) else u)
        phi = u / u.mean(axis=-1, keepdims=True)
        assert (phi != 1).all()
        for index in np.ndindex(parameter.shape):  # each weight, by the axes and the expert that describe names
            expert = () if parameter.expert is None else (parameter.expert,)
            expected = phi[tuple(index[axis] for axis in parameter.axes) + expert]
            np.testing.assert_allclose(after[index], expected, rtol=1e-5)


# How it prints.


def table(*lines):
    return "\n".join(lines)


def test_the_table():
    params, utilization, _ = EXAMPLES["leading axis"]
    assert str(describe(params, utilization)) == table(
        "parameter       shape      scaled by  along",
        "experts/bias    [4, 3]     experts    axis 0 (4)",
        "experts/kernel  [4, 2, 3]  experts    axis 0 (4)",
        "router          [2, 4]     -",
        "2 of 3 parameter leaves are scaled: 36 of 44 parameters.",  # 12 + 24 of 12 + 24 + 8
    )


def test_the_table_of_children_of_stacked_layers():
    assert str(describe(*EXAMPLES["children of stacked layers"])) == table(
        "parameter       shape   scaled by  along",
        "moe/expert_0    [2, 3]  moe        axis 0 (2), all of it, as expert 0",
        "moe/expert_1/b  [2]     moe        axis 0 (2), all of it, as expert 1",
        "moe/gate        [2, 3]  -",
        "2 of 3 parameter leaves are scaled: 8 of 14 parameters.",  # 6 + 2 of 6 + 2 + 6
    )


def test_the_table_of_stacked_layers_with_experts_first():
    assert str(describe(*EXAMPLES["layers second"])) == table(
        "parameter  shape         scaled by  along",
        "moe/b      [4, 2]        moe        axis 1 (2), axis 0 (4)",
        "moe/wi     [4, 2, 3, 5]  moe        axis 1 (2), axis 0 (4)",
        "2 of 2 parameter leaves are scaled: 128 of 128 parameters.",  # 8 + 120
    )


def test_large_numbers_have_separators():
    params = {"a": jax.ShapeDtypeStruct((1000, 2000), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.float32)}
    assert str(describe(params, {"a": jax.ShapeDtypeStruct((1000,), jnp.float32)})).endswith(
        "1 of 2 parameter leaves are scaled: 2,000,000 of 2,000,005 parameters."
    )


def test_scalar_parameters_count_as_one():
    assert str(describe(*EXAMPLES["scalars"])).endswith("1 of 2 parameter leaves are scaled: 4 of 5 parameters.")


def test_masked_nodes_hold_no_parameters():
    assert str(describe(*EXAMPLES["masked"])).endswith("8 of 10 parameters.")  # 4 * 2 of 4 * 2 + 2


def test_repr_is_the_table():
    description = describe(*EXAMPLES["children"])
    assert repr(description) == str(description)


def test_a_description_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe(*EXAMPLES["leading axis"]).parameters = ()


# How it looks in a notebook.


class Reader(html.parser.HTMLParser):
    """The cells of each table, what stands outside of them, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.outside, self.attributes, self.unfolds, self._open = [], [], set(), [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self._open.append(tag)
        self.attributes |= set(attributes)
        if tag == "table":
            self.tables.append([])
            self.unfolds.append("details" in self._open)
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        else:
            self.outside.append(data)


def html_of(description):
    return Reader(description._repr_html_())


HEADER = ["parameter", "shape", "scaled by", "along"]


def test_html_has_what_is_scaled_first_and_the_rest_folded():
    read = html_of(describe(*EXAMPLES["children of stacked layers"]))
    assert read.tables == [
        [
            HEADER,
            ["moe/expert_0", "[2, 3]", "moe", "axis 0 (2), all of it, as expert 0"],
            ["moe/expert_1/b", "[2]", "moe", "axis 0 (2), all of it, as expert 1"],
        ],
        [HEADER, ["moe/gate", "[2, 3]", "-", ""]],
    ]
    assert read.unfolds == [False, True]
    assert read.outside == ["2 of 3 parameter leaves are scaled: 8 of 14 parameters.", "1 left untouched"]


@each_example
def test_html_says_what_the_text_says(params, utilization, expert_axis):
    description = describe(params, utilization, expert_axis)
    read = html_of(description)
    rows = [row for table in read.tables for row in table[1:]]
    lines = [" ".join(" ".join(row).split()) for row in rows]
    first, *text, summary = [" ".join(line.split()) for line in str(description).splitlines()]
    assert first == " ".join(HEADER)
    assert sorted(lines) == sorted(text)
    assert read.outside[0] == summary
    assert len(read.tables) == (2 if any(p.scaled_by is None for p in description.parameters) else 1)


def test_html_is_escaped():
    name = "<script>alert('&')</script>"
    description = describe({name: ones(2), "b": {name: ones(3)}}, {name: fractions(2)})
    assert name in str(description)
    assert "<script" not in description._repr_html_()
    # The reader undoes the escapes.
    assert [row[0] for table in html_of(description).tables for row in table[1:]] == [name, f"b/{name}"]


def test_html_leaves_colours_to_the_theme():
    assert html_of(describe(*EXAMPLES["leading axis"])).attributes == {("style", "text-align:left")}


def test_html_of_a_large_tree_is_bounded():
    params = {f"layer_{n}": {"experts": ones(2), "norm": ones(1)} for n in range(1234)}
    description = describe(params, {name: {"experts": fractions(2)} for name in params})
    read = html_of(description)
    assert [len(table) for table in read.tables] == [1 + 50 + 1, 1 + 50 + 1]
    assert [table[-1][0] for table in read.tables] == ["… and 1,184 more: print() shows all"] * 2
    assert len(description._repr_html_()) < 25_000
    assert read.outside == [
        "1234 of 2468 parameter leaves are scaled: 2,468 of 3,702 parameters.",
        "1,234 left untouched",
    ]
    assert len(str(description).splitlines()) == 2468 + 2


# Errors, the transform's own.


@pytest.mark.parametrize(
    ("params", "utilization", "expert_axis", "message"),
    [
        ({"a": ones(4)}, None, None, "Excitation needs the utilization of at least one layer; got None"),
        ({"a": ones(4)}, {"a": None}, None, "Excitation needs the utilization"),
        ({"experts": ones(4)}, {"expert": fractions(4)}, None, "path expert matches no parameter. Nearest: experts"),
        ({"a": ones(4)}, {"a": fractions(4)}, {"b": 0}, "The expert_axis path b matches no parameter"),
        ({"a": {"w": ones(3, 4)}}, {"a": fractions(4)}, None, r"a/w \[3, 4\] .* have \[3\] entries, not \[4\]"),
        ({"a": ones(4)}, {"a": fractions(2, 4)}, None, r"a \[4\] .* an axis is out of range"),
        ({"a": ones(4, 4)}, {"a": fractions(4, 4)}, (0, -2), r"\[0, -2\]: one axis is named twice"),
        ({"a": ones(4, 4)}, {"a": fractions(4)}, (0, 1), "expert_axis must name .* 1.* it names 2"),
        ({"a": {"e0": ones(4)}}, {"a": fractions(2)}, children("e*"), r"children\('e\*'\) finds 1 experts at a"),
        ({"a": ones(4)}, {"a": jnp.arange(4)}, None, r"must be floating-point fractions in \[0, 1\]; got int32\[4\]"),
    ],
)
def test_describe_rejects_what_the_transform_rejects(params, utilization, expert_axis, message):
    with pytest.raises(ValueError, match=message):
        describe(params, utilization, expert_axis)
    with pytest.raises(ValueError, match=message):
        scale_by_excitation(expert_axis=expert_axis).update(params, optax.EmptyState(), utilization=utilization)


def test_what_is_no_array_is_left_out():
    """Equinox modules hold functions among their leaves."""
    params = {"experts": {"kernel": jnp.ones((3, 2)), "activation": jax.nn.relu}}
    description = describe(params, {"experts": jnp.ones(3)})
    assert [(p.path, p.shape, p.scaled_by) for p in description.parameters] == [
        ("experts/activation", None, None),
        ("experts/kernel", (3, 2), "experts"),
    ]
    assert "6 of 6 parameters" in str(description)


def test_says_if_what_is_scaled_is_named_like_a_router():
    params = {"moe": {"router": {"w": ones(2, 3)}, "up": ones(2, 3)}}
    question = "Is moe/router/w to be scaled? It is named like a router, a shared expert or attention."
    description = describe(params, {"moe": fractions(2)})
    assert str(description).endswith(f"12 of 12 parameters. {question}")
    assert question in description._repr_html_()
    assert "?" not in str(describe(params, {"moe": {"up": fractions(2)}}))
