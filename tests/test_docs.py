"""Links and anchors hold, figures and errors are those of the results and the library, and the pages stay short."""

import contextlib
import functools
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
GENERATED = [DOCS / "compatibility.md", DOCS / "reproduction.md", DOCS / "studies.md", *DOCS.glob("notebooks/*.md")]


@functools.cache
def text_of(path):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(path):
    """The anchors that GitHub and the site make from headings."""
    titles = re.findall(r"^#+ (.+?)\s*$", text_of(path), re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_hold(page):
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("README.md", "docs/does-it-help.md"),
        ("docs/results.md", "docs/reproduction.md"),
        ("docs/strategies.md", "docs/reproduction.md docs/studies.md"),
    ],
)
def test_differences_are_those_of_the_results(page, source):
    """A report writes the sources, or their tables."""
    quoted = re.findall(r"[+-]\d+\.\d+\s\[[^]]+\]", (ROOT / page).read_text())
    assert len(quoted) > 5
    for difference in quoted:
        assert any(" ".join(difference.split()) in (ROOT / path).read_text() for path in source.split()), difference


BLOCK = re.compile(r"^```python( continuation)?\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("as_users_have_it")
def test_the_errors_of_the_page_are_those_of_the_library():
    names, texts = {}, 0
    for continued, code, text in BLOCK.findall((DOCS / "troubleshooting.md").read_text()):
        names, output = names if continued else {}, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "docs/troubleshooting.md", "exec"), names)
        assert output.getvalue() == text
        texts += bool(text)
    assert texts == 10


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 7168
    assert len(readme.split()) <= 850


def test_the_documentation_is_short():
    """As `wc -w` counts, code included; generated pages and notebooks are left out."""
    pages = set(DOCS.glob("**/*.md")) - set(GENERATED)
    assert sum(len(page.read_text().split()) for page in pages) <= 15_000
