"""Run by colab.sh: the first two code cells of a notebook install and import all it needs."""

import pathlib
import sys

import nbclient
import nbformat

path, folder = map(pathlib.Path, sys.argv[1:])
notebook = nbformat.read(path, as_version=4)
numbers = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"][:2]
notebook.cells = notebook.cells[: numbers[-1] + 1]
notebook.cells.append(nbformat.v4.new_code_cell("print(excitation_optax.__file__)"))
nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
assert outputs[-1].get("name") == "stdout", outputs
print(f"{path.stem}: installed and imported, from {outputs[-1].text.strip()}")
