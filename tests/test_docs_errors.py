"""docs/errors.md: the text below each block is what the block prints, so its errors are the library's own."""

import contextlib
import io
import pathlib
import re

import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "errors.md").read_text()
BLOCK = re.compile(r"^```python( continuation)?\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("as_users_have_it")
def test_what_a_block_prints_is_the_text_below_it():
    names, texts = {}, 0
    for continued, code, text in BLOCK.findall(PAGE):
        names, output = names if continued else {}, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "docs/errors.md", "exec"), names)
        assert output.getvalue() == text
        texts += bool(text)
    assert texts > 10
