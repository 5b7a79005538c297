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


def messages():
    """Every `raise` of a ValueError or TypeError: where it is, and its message's literal parts, None for the others."""
    for path in sorted([*(ROOT / "excitation_optax").glob("*.py"), *(ROOT / "models").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                (argument,) = node.exc.args
                values = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                parts = [value.value if isinstance(value, ast.Constant) else None for value in values]
                yield pytest.param(parts, id=f"{path.parent.name}/{path.name}:{node.lineno}")


MESSAGES = list(messages())


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
    if any(part and "needs the package tokamax" in part for part in parts) and importlib.util.find_spec("tokamax"):
        pytest.skip("tokamax is installed")
    pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
    assert re.search(rf"^ValueError: {pattern}$", printed, re.MULTILINE), pattern


@pytest.mark.parametrize("parts", MESSAGES)
def test_the_page_names_it(parts):
    """One of the first pieces of the message, between its punctuation and what it quotes, stands in the text."""
    pieces = map(words_of, re.split(r"[.,;:] |\0", "".join("\0" if part is None else part for part in parts)))
    first = [" ".join(piece[:5]) for piece in pieces if len(piece) > 1][:3]
    assert any(f" {piece} " in TEXT for piece in first), first


def test_every_error_is_looked_for():
    assert len(MESSAGES) > 70
    for path in [*(ROOT / "excitation_optax").glob("*.py"), *(ROOT / "models").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert isinstance(node.exc, ast.Call), path
                assert node.exc.func.id == "ValueError", path
