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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]  # such as https://github.com/owner/name


def notebook(path: pathlib.Path) -> Any:
    """The notebook that a text is, with links to other pages as addresses."""
    made: Any = jupytext.reads(path.read_text(), fmt="md:myst")
    kernel = made.metadata["kernelspec"]
    made.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    main = f"{REPOSITORY}/blob/main"
    notebooks = rf"]({main}/examples/notebooks/\1.ipynb)"
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # by default a random one
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.md\)", notebooks, cell.source)
            cell.source = cell.source.replace("](../", f"]({main}/docs/")
    return made


def ipynb_path(path: pathlib.Path) -> pathlib.Path:
    """The file that Colab opens."""
    return ROOT / "examples" / "notebooks" / f"{path.stem}.ipynb"


if __name__ == "__main__":
    for text in TEXTS:
        nbformat.write(notebook(text), ipynb_path(text))
        print(ipynb_path(text).relative_to(ROOT))
