"""docs/inside.md prints what its comments say that it prints."""

import contextlib
import io
import pathlib
import re

import numpy as np
import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "inside.md").read_text()
BLOCK = re.compile(r"^```python( continuation)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("as_users_have_it")
def test_what_it_prints_stands_beside_it():
    names, seen, options = {}, 0, np.get_printoptions()
    for continued, code in BLOCK.findall(PAGE):
        names, output = names if continued else {}, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "docs/inside.md", "exec"), names)
        comments = [re.sub(r"^.*?# ", "", line).rstrip() for line in code.splitlines() if "# " in line]
        for line in output.getvalue().splitlines():
            assert any(comment.startswith(line) for comment in comments), (line, comments)
            seen += 1
    np.set_printoptions(**options)
    assert seen > 15
