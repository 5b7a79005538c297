"""Rules of the repository: imports run one way, and every public name is documented with an example."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import excitation_optax

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {  # of our own packages
    "excitation_optax": {"excitation_optax"},
    "models": {"excitation_optax", "models"},
    "examples": {"excitation_optax", "models", "examples"},
    "benchmarks": {"excitation_optax", "models", "examples", "benchmarks"},
    "tools": {"excitation_optax", "models", "examples", "tools"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    paths = list((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops & set(MAY_IMPORT) <= MAY_IMPORT[package], path
        assert not any(name.startswith("optax._src") for name in imported(path)), path


# In addition to jax, optax and numpy.
MAY_NEED = {"flax.py": {"flax"}, "_sow.py": {"flax"}, "plotting.py": {"matplotlib"}}


def test_the_library_needs_jax_optax_and_numpy_alone():
    for path in (ROOT / "excitation_optax").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert tops <= {"excitation_optax", "jax", "numpy", "optax"} | MAY_NEED.get(path.name, set()), path


def test_import_leaves_out_what_is_not_needed():
    """In one Python, as each takes seconds to start: the package, then telemetry, then plotting before it draws."""
    code = """if True:
        import sys
        loaded = lambda *names: [name for name in names if name in sys.modules]
        import excitation_optax
        print(loaded("excitation_optax.plotting", "excitation_optax.telemetry"))
        from excitation_optax import telemetry
        print(loaded("chex", "flax", "tensorboardX", "wandb"))
        from excitation_optax import plotting
        print(loaded("matplotlib"))
        plotting.load_over_time([1, 2], [[0.5, 0.5], [1.0, 0.0]])
        print(loaded("matplotlib.pyplot"))
    """
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == ["[]"] * 4


MODULES = [
    "excitation_optax",
    "excitation_optax.flax",
    "excitation_optax.metrics",
    "excitation_optax.plotting",
    "excitation_optax.telemetry",
]
FUNCTIONS = [
    (module, name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if callable(getattr(importlib.import_module(module), name))
]
SHOWN_BY_OTHERS = {"Description", "Routing", "Strategy"}  # and states
API = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_every_public_name_has_an_example_and_is_in_the_api(module, name):
    public = getattr(importlib.import_module(module), name)
    page = API[module.removeprefix("excitation_optax.")]
    one_by_one = re.search(rf"^\.\. auto(class|function):: {name}$", page, re.MULTILINE)
    assert one_by_one or f".. automodule:: {module}\n   :members:" in page or name == "Strategy"
    if name not in SHOWN_BY_OTHERS and not name.endswith("State"):
        assert ">>>" in public.__doc__


MODEL_MODULES = [path.stem for path in (ROOT / "models").glob("*.py") if path.stem != "__init__"]


@pytest.mark.parametrize("module", MODEL_MODULES)
def test_every_public_name_of_the_models_is_documented_and_in_the_api(module):
    assert f".. automodule:: models.{module}\n   :members:" in API["models"]
    loaded = importlib.import_module(f"models.{module}")
    for name, public in vars(loaded).items():
        if not name.startswith("_") and getattr(public, "__module__", None) == loaded.__name__:
            assert public.__doc__, name


def test_the_changelog_has_the_version():
    heading = rf"^## {re.escape(excitation_optax.__version__)}"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_contributing_lists_targets_and_paths():
    """CONTRIBUTING.md has every target of the Makefile, and every path that it names exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^([a-z -]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets:
        assert any(f"`make {name}`" in text for name in target.split()) or target in ("help", "clean"), target
    for path in re.findall(r"`((?:tests|tools|docs|examples|excitation_optax|results|\.ci|\.github)/[\w./]*)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for path in (ROOT / "excitation_optax").glob("[!_]*.py"):
        assert path.name in text, path
    for path in (ROOT / "excitation_optax").glob("_[!_]*.py"):
        assert f"  {path.name} " in text, path
