"""docs/errors.md: the code of the page provokes every error of the library and the models, and its text names each."""

import ast
import contextlib
import importlib.util
import io
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text()
BLOCK = re.compile(r"^```python( continuation)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def words_of(text):
    return re.sub(r"[^\w=]+", " ", text).lower().split()


TEXT = f" {' '.join(words_of(BLOCK.sub('', PAGE)))} "


def raised():
    """The type and the place of everything that is raised."""
    for path in sorted([*(ROOT / "excitation_optax").glob("*.py"), *(ROOT / "models").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                yield node.exc.func.id, (path, node)


def messages():
    """Every `raise`: where it is, and its message's literal parts, with None for what it quotes."""
    for _, (path, node) in raised():
        (argument,) = node.exc.args
        values = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        parts = [value.value if isinstance(value, ast.Constant) else None for value in values]
        yield pytest.param(parts, id=f"{path.parent.name}/{path.name}:{node.lineno}")


MESSAGES = list(messages())
# These take several processes, an environment without matplotlib, and one without tokamax.
ELSEWHERE = ("is split over devices of several processes", "RoutingLog draws with matplotlib")
ELSEWHERE += ("needs the package tokamax",) if importlib.util.find_spec("tokamax") else ()


@pytest.fixture(scope="module")
def printed():
    """What the page's code prints, with JAX as users have it."""
    output, names = io.StringIO(), {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(output):
        for continued, code in BLOCK.findall(PAGE):
            names = names if continued else {}
            exec(compile(code, "docs/errors.md", "exec"), names)
    return output.getvalue()


@pytest.mark.parametrize("parts", MESSAGES)
def test_the_page_provokes_it(parts, printed):
    if any(words in (part or "") for part in parts for words in ELSEWHERE):
        pytest.skip("not provoked here")
    pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
    assert re.search(rf"^ValueError: {pattern}$", printed, re.MULTILINE), pattern


@pytest.mark.parametrize("parts", MESSAGES)
def test_the_page_names_it(parts):
    """One of the first pieces of the message, between its punctuation and what it quotes, stands in the text."""
    pieces = map(words_of, re.split(r"[.,;:] |\0", "".join("\0" if part is None else part for part in parts)))
    first = [" ".join(piece[:5]) for piece in pieces if len(piece) > 1][:3]
    assert any(f" {piece} " in TEXT for piece in first), first


def test_every_error_is_looked_for():
    assert len(MESSAGES) > 80
    kinds = [kind for kind, _ in raised()]
    assert set(kinds) == {"ValueError", "ImportError"}
    assert kinds.count("ImportError") == 1
