"""Writes the notebooks beside this file, which Colab opens, from docs/notebooks/*.md: `make notebooks`.

The text is what people edit. Notebooks are made without outputs, and the same text makes the same bytes.
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
    """The address, such as https://github.com/owner/name, from the one place where it stands."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][
        "Repository"
    ]


def notebook(path: pathlib.Path) -> Any:
    """The notebook that a text is. Its cells are numbered, and links to other pages lead to the repository."""
    made: Any = jupytext.reads(path.read_text(), fmt="md:myst")
    made.metadata = {
        "kernelspec": made.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "markdown":
            here = f"{repository()}/blob/main"
            cell.source = re.sub(
                r"\]\(\.\./(?=[\w/]+\.md)", f"]({here}/docs/", cell.source
            )
            cell.source = re.sub(
                r"\]\((\w+)\.md\)",
                rf"]({here}/examples/notebooks/\1.ipynb)",
                cell.source,
            )
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
