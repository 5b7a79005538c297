"""The notebooks: text and .ipynb agree, addresses are pyproject's, links hold, every cell runs without a warning."""

import os
import re
import time

import nbclient
import nbformat
import pytest

from examples.notebooks import generate

texts = pytest.mark.parametrize("path", generate.TEXTS, ids=lambda path: path.stem)


def test_there_are_three_and_nothing_is_left_over():
    names = {"quickstart", "what_happens_inside", "your_own_moe"}
    assert {path.stem for path in generate.TEXTS} == names
    assert {path.stem for path in generate.ipynb_path(generate.TEXTS[0]).parent.glob("*.ipynb")} == names


@texts
def test_text_and_ipynb_agree(path):
    assert generate.ipynb_path(path).read_text() == nbformat.writes(generate.notebook(path)) + "\n", (
        "run: make notebooks"
    )


@texts
def test_ipynb_is_valid_and_without_outputs(path):
    notebook = nbformat.read(generate.ipynb_path(path), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@texts
def test_addresses_are_those_of_pyproject(path):
    text, repository = path.read_text(), generate.REPOSITORY
    owner_and_name = repository.removeprefix("https://github.com/")
    assert owner_and_name != repository
    colab = "https://colab.research.google.com/github"
    badge = f"]({colab}/{owner_and_name}/blob/main/examples/notebooks/{path.stem}.ipynb)"
    assert text.count(badge) == text.count("colab.research.google.com/github") == 1
    assert re.findall(r'^REPOSITORY = "(.*)"$', text, re.MULTILINE) == [repository]
    assert text.count("github.com/") == 1


@texts
def test_links_hold(path):
    links = re.findall(r"\]\((?!https:)([^)#]+)", path.read_text())
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
    there = f"{generate.REPOSITORY}/blob/main/"
    markdown = "\n".join(cell.source for cell in generate.notebook(path).cells if cell.cell_type == "markdown")
    absolute = re.findall(rf"\]\({there}([^)#]+)", markdown)
    assert len(absolute) == len(links)  # none is left that leads nowhere from Colab
    for link in absolute:
        assert (generate.ROOT / link).exists(), link


@pytest.mark.slow
@texts
def test_it_runs_without_a_warning(path, tmp_path):
    notebook = generate.notebook(path)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as users run it
    environment["PYTHONPATH"] = str(generate.ROOT)
    start = time.perf_counter()
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s")

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert "%pip install" in code[0].source
    assert code[0].outputs == []  # where the package is there, nothing is installed
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert len(str(outputs)) < 1_500_000
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 1
    assert any("parameter leaves are scaled" in output.get("data", {}).get("text/plain", "") for output in outputs) == (
        path.stem != "what_happens_inside"
    )
