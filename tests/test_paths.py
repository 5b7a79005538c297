"""The path language: which nodes of a tree of names a pattern matches."""

import collections

import optax
import pytest

from excitation_optax import _paths

MOE = {
    "router": 0,
    "w_in": 0,
    "w_out": 0,
    "experts": {"up": 0, "down": 0, "experts": 0},
    "shared": {"experts": {"up": 0}},
}
TREE = _paths.Tree(
    {
        "embed": 0,
        "layers": [MOE, MOE, {"mlp": 0}],
        "net/~/moe": {"expert": 0, "expert_1": 0, "expert_02": 0, "expert_norm": 0},
        "odd": {"{a,b}": 0, "a": 0, "*": 0, "x.y[0]": 0, "w{1}": 0},
        "block2_e13": {"e_0_1": 0},
    }
)


@pytest.mark.parametrize(
    ("pattern", "nodes"),
    [
        ("embed", "embed"),
        ("", "(root)"),
        ("**", "(root)"),
        ("/layers//2/", "layers/2"),
        ("layers/*/router", "layers/0/router layers/1/router"),
        ("layers/?/w_*", "layers/0/w_in layers/0/w_out layers/1/w_in layers/1/w_out"),
        ("layers/0/{w_in,w_out}", "layers/0/w_in layers/0/w_out"),
        ("layers/0/w_{in,out,gate}", "layers/0/w_in layers/0/w_out"),
        ("layers/0/{w_i?,r*}", "layers/0/router layers/0/w_in"),
        ("{embed,layers}/**", "embed layers"),  # ** is also no name at all
        ("layers/0/**/experts", "layers/0/experts layers/0/shared/experts"),  # the highest of nodes above one another
        ("layers/0/experts/**/up", "layers/0/experts/up"),
        ("**/**/mlp", "layers/2/mlp"),
        ("**/1/**/up", "layers/1/experts/up layers/1/shared/experts/up"),
        ("net/~/moe/expert_{expert}", "net/~/moe/expert net/~/moe/expert_02 net/~/moe/expert_1"),
        ("**/moe/expert_{expert}", "net/~/moe/expert net/~/moe/expert_02 net/~/moe/expert_1"),
        ("odd/{a,b}", "odd/{a,b}"),  # names of the tree are taken literally
        ("odd/*", "odd/*"),
        ("**/*", "odd/*"),
        ("odd/x.y[0]", "odd/x.y[0]"),
        ("odd/x.y[*]", "odd/x.y[0]"),
        ("odd/{c,x.y}*", "odd/x.y[0]"),
        ("odd/w{1}", "odd/w{1}"),
        ("Layers/*", ""),
        ("layers/*/mlp/w", ""),
    ],
)
def test_find(pattern, nodes):
    assert " ".join(str(match.node) for match in TREE.find(pattern)) == nodes


@pytest.mark.parametrize(
    ("pattern", "name", "digits"),
    [
        ("expert_{expert}", "expert_12", "12"),
        ("{expert}", "007", "007"),
        ("*{expert}*", "block2_e13", "13"),  # the last run that fits
        ("*{expert}_*", "block2_e13", "2"),
        ("e{expert}", "e13x", None),
        ("e1{expert}", "e13", None),  # a whole run of digits
        ("{up,down}_{expert}", "down_3", "3"),
        ("{x_1,x}_{expert}", "x_1", "1"),  # in braces too, a number in the name is the expert's
        ("{x_10,x}_{expert}", "x_10", "10"),
        ("{x_1,x}_{expert}", "x_1_2", "2"),
        ("linear_{expert}", "linear", "0"),  # the first of Haiku's modules has no number
        ("*_{expert}", "linear", None),
        ("linear{expert}", "linear", None),
    ],
)
def test_the_number_of_an_expert(pattern, name, digits):
    (match,) = _paths.Tree({name: 0, "other": 0}).find(pattern) or [None]
    assert (match and match.digits) == digits


def test_a_name_without_a_number_is_not_number_0_beside_one_that_is():
    tree = _paths.Tree({"a": {"linear": 0, "linear_0": 0, "linear_1": 0}, "b": {"linear": 0, "linear_1": 0}})
    numbers = {str(match.node): match.digits for match in tree.find("**/linear_{expert}")}
    assert numbers == {"a/linear_0": "0", "a/linear_1": "1", "b/linear": "0", "b/linear_1": "1"}


def test_wildcards_of_each_name():
    (match,) = [m for m in TREE.find("**/experts/{u*,v?}") if str(m.node) == "layers/1/experts/up"]
    assert match.wildcards == (("layers/1",), (), ("p", None))


def test_none_and_masked_nodes_end_a_path():
    tree = _paths.Tree({"a": {"e_0": None, "e_1": {"w": 0}, "e_2": optax.MaskedNode()}, "b": optax.MaskedNode()})
    found = [(str(m.node), m.digits, m.is_whole) for m in tree.find("a/e_{expert}/w")]
    assert found == [("a/e_0", "0", False), ("a/e_1/w", "1", True), ("a/e_2", "2", False)]
    assert [str(m.node) for m in tree.find("**/w")] == ["a/e_1/w", "a/e_2", "b"]  # what a mask may hide


def test_keys_of_every_kind_are_names():
    Pair = collections.namedtuple("Pair", "first second")
    tree = {"list": [0, (0,)], "pair": Pair(0, {3: 0}), "x": None}
    assert list(_paths.join(tree)) == ["list/0", "list/1/0", "pair/first", "pair/second/3"]
    assert _paths.join({"moe": {"a/b": 1}, "moe/c": 2, "": 3}) == {"": 3, "moe/a/b": 1, "moe/c": 2}


@pytest.mark.parametrize("make", [_paths.join, _paths.Tree])
def test_names_that_are_the_same(make):
    with pytest.raises(ValueError, match="Two leaves have the same path a/b"):
        make({"a": {"b": 0}, "a/b": 0})
