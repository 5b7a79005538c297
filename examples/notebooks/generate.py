"""Writes the notebooks in this folder, which Colab opens, from docs/notebooks/*.md.

The text is what people edit. Notebooks are made without outputs, and the same text
makes the same bytes: `make notebooks`.
"""

import pathlib
import re
import tomllib
from typing import Any

import jupytext
import nbformat

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))


def repository() -> str:
    """The address, such as https://github.com/owner/name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def notebook(path: pathlib.Path) -> Any:
    """The notebook that a text is, with links to other pages as addresses."""
    made: Any = jupytext.reads(path.read_text(), fmt="md:myst")
    kernel = made.metadata["kernelspec"]
    made.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    here = f"{repository()}/blob/main"
    notebooks = rf"]({here}/examples/notebooks/\1.ipynb)"
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # by default a random one
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.md\)", notebooks, cell.source)
            cell.source = cell.source.replace("](../", f"]({here}/docs/")
    return made


def ipynb(path: pathlib.Path) -> str:
    """What stands in the file that Colab opens."""
    return nbformat.writes(notebook(path)) + "\n"


def ipynb_path(path: pathlib.Path) -> pathlib.Path:
    """Where that file is."""
    return ROOT / "examples" / "notebooks" / f"{path.stem}.ipynb"


if __name__ == "__main__":
    for text in TEXTS:
        ipynb_path(text).write_text(ipynb(text))
        print(ipynb_path(text).relative_to(ROOT))
