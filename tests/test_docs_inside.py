"""docs/inside.md prints what its comments say that it prints."""

import contextlib
import io
import pathlib
import re

import numpy as np
import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "inside.md").read_text()
BLOCK = re.compile(r"^```python( continuation)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def print_options():
    """The page sets them for itself."""
    with np.printoptions():
        yield


@pytest.mark.usefixtures("as_users_have_it", "print_options")
def test_what_it_prints_stands_beside_it():
    names, seen = {}, 0
    for continued, code in BLOCK.findall(PAGE):
        names, output = names if continued else {}, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "docs/inside.md", "exec"), names)
        comments = [re.sub(r"^.*?# ", "", line).rstrip() for line in code.splitlines() if "# " in line]
        for line in output.getvalue().splitlines():
            assert any(comment.startswith(line) for comment in comments), (line, comments)
            seen += 1
    assert seen > 15
