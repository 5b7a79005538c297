"""Links and anchors of the pages exist, and figures are those of the results."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


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


@pytest.mark.parametrize("page", ["why.md", "strategies.md"])
def test_differences_are_those_of_the_results(page):
    results = (ROOT / "docs" / "reproduction.md").read_text()
    quoted = re.findall(r"[+-]\d+\.\d+\s\[[^]]+\]", (ROOT / "docs" / page).read_text())
    assert len(quoted) > 5
    for difference in quoted:
        assert " ".join(difference.split()) in results, difference


def test_claims_are_counted_as_in_the_report():
    def counts(path):
        sentence = re.search(r"Of (\d+) claims of the paper, [^.]*\.", (ROOT / path).read_text())
        return re.findall(r"\d+", sentence[0])[:5]

    assert counts("docs/why.md") == counts("README.md")
