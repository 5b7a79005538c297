"""Releases: one version, declared dependencies, complete distributions, workflows and forms that parse."""

import ast
import io
import pathlib
import re
import shutil
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml

import excitation_optax
from tools import release_check

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
VERSION = excitation_optax.__version__
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


# The tag.


@pytest.fixture
def released(tmp_path):
    """A checkout that is ready for a release of this version."""
    (tmp_path / "excitation_optax").mkdir()
    for name in ("excitation_optax/__init__.py", "CITATION.cff", "CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    change(tmp_path / "CHANGELOG.md", rf"^## {re.escape(VERSION)} .*$", f"## {VERSION} (2026-12-01)")
    without_date = re.sub(r"^date-released: .*\n", "", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    (tmp_path / "CITATION.cff").write_text(f"{without_date}date-released: 2026-12-01\n")
    return tmp_path


def change(path, pattern, replacement):
    text, times = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert times == 1
    path.write_text(text)


def test_the_right_tag(released):
    assert release_check.wrong_with_tag(f"v{VERSION}", released) == []


def test_another_tag_is_wrong_everywhere(released):
    wrong = release_check.wrong_with_tag("v9.9.9", released)
    assert len(wrong) == 4
    for file in ("excitation_optax/__init__.py", "CITATION.cff", "README.md", "CHANGELOG.md"):
        assert any(line.startswith(file) and "9.9.9" in line for line in wrong), (file, wrong)


@pytest.mark.parametrize("tag", [VERSION, "v1.2", "v1.2.3-rc1", ""])
def test_malformed_tags(released, tag):
    assert release_check.wrong_with_tag(tag, released) == [f"{tag} is not a release tag such as v1.2.3 or v1.2.3rc1"]


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "message"),
    [
        (
            "excitation_optax/__init__.py",
            r'^__version__ = ".*"',
            '__version__ = "0.0.9"',
            "__init__.py has the version 0",
        ),
        ("CITATION.cff", r"^version: .*", "version: 0.0.9", "CITATION.cff has the version 0.0.9"),
        ("CITATION.cff", r"^version: .*\n", "", "CITATION.cff has the version None"),
        ("README.md", r"^  version = .*", "  version = {0.0.9},", "README.md has the version 0.0.9"),
        ("CHANGELOG.md", r"\(2026-12-01\)", "(unreleased)", "CHANGELOG.md has no section"),
        ("CITATION.cff", r"^date-released: .*", "date-released: 2026-11-01", "date-released: 2026-11-01, CHANGELOG.md"),
        ("CITATION.cff", r"^date-released: .*\n", "", "date-released: None, CHANGELOG.md"),
    ],
)
def test_one_forgotten_file(released, file, pattern, replacement, message):
    change(released / file, pattern, replacement)
    (wrong,) = release_check.wrong_with_tag(f"v{VERSION}", released)
    assert message in wrong


def test_the_package_page_has_absolute_links_that_hold():
    page = (ROOT / "README.md").read_text()
    for rule in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert all(link.startswith("https://") for link in links)
    paths = [re.split(r"/main/|#", link)[1] for link in links if "/main/" in link]
    assert len(paths) > 20
    assert all((ROOT / path).exists() for path in paths)
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    assert all(f"/{repository}/" in link for link in links if "/main/" in link)


def test_an_editable_install_exposes_the_library_and_the_models():
    (folder,) = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["dev-mode-dirs"]
    exposed = {path.name: path.resolve() for path in (ROOT / folder).iterdir()}
    assert exposed == {name: ROOT / name for name in ("excitation_optax", "models")}


# Dependencies.

NAMES = {"PIL": "pillow", "haiku": "dm-haiku", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "yaml": "pyyaml"}
OWN = {"benchmarks", "examples", "excitation_optax", "models", "tests", "tools"} | {
    path.stem for folder in ("tests", "tests/integrations") for path in (ROOT / folder).glob("*.py")
}
ELSEWHERE = {
    "examples/reproduce.py": {"tensorflow"},  # checks whether it is installed
    "examples/texts.py": {"tiktoken_ext"},  # a part of tiktoken
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def declared(*tables):
    requirements = [line for table in tables for line in table if isinstance(line, str)]
    names = {re.match(r"[\w-]+", line)[0] for line in requirements}
    extras = {extra for line in requirements for extra in re.findall(r"(?<=excitation_optax\[)\w+", line)}
    of_extras = declared(*(EXTRAS[extra] for extra in extras)) if extras else set()
    return {name.lower().replace("_", "-") for name in names} | of_extras


CORE, EXTRAS, GROUPS = PROJECT["dependencies"], PROJECT["optional-dependencies"], PYPROJECT["dependency-groups"]


@pytest.mark.parametrize(
    ("pattern", "tables"),
    [
        ("excitation_optax/*.py", [CORE, EXTRAS["flax"], EXTRAS["telemetry"]]),  # test_house.py has the files
        ("models/*.py", [CORE, EXTRAS["flax"], EXTRAS["tokamax"]]),
        ("examples/**/*.py", [CORE, EXTRAS["examples"], EXTRAS["telemetry"], GROUPS["docs"]]),
        ("benchmarks/*.py", [CORE, EXTRAS["examples"], EXTRAS["tokamax"], EXTRAS["torch"]]),
        ("tools/*.py", [CORE, EXTRAS["examples"], GROUPS["test"]]),
        ("tests/*.py", [CORE, EXTRAS["examples"], EXTRAS["torch"], GROUPS["core-test"], GROUPS["test"]]),
    ],
)
def test_every_import_is_declared(pattern, tables):
    known = set(sys.stdlib_module_names) | OWN
    paths = list(ROOT.glob(pattern))
    assert paths
    for path in paths:
        allowed = known | ELSEWHERE.get(str(path.relative_to(ROOT)), set())
        distributions = {NAMES.get(name, name).lower().replace("_", "-") for name in set(imported(path)) - allowed}
        assert distributions <= declared(*tables), path


# The distributions.


def write_distributions(folder, sdist, wheel, page=""):
    with tarfile.open(folder / "p-1.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"p-1/{name}"), io.BytesIO())
    with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as archive:
        for name in wheel:
            archive.writestr(name, page if name.endswith("METADATA") else "")


GOOD_WHEEL = ["excitation_optax/__init__.py", "p-1.dist-info/METADATA"]


def test_good_distributions(tmp_path):
    write_distributions(tmp_path, release_check.WANTED, GOOD_WHEEL)
    assert release_check.wrong_with_built(tmp_path) == []


@pytest.mark.parametrize(
    ("sdist", "wheel", "message"),
    [
        (release_check.WANTED[1:], GOOD_WHEEL, "lacks README.md"),
        ([*release_check.WANTED, "results/mlp.jsonl"], GOOD_WHEEL, "holds results/mlp.jsonl"),
        (release_check.WANTED, [*GOOD_WHEEL, "models/moe.py"], "holds ['excitation_optax', 'models'], not only"),
    ],
)
def test_bad_distributions(tmp_path, sdist, wheel, message):
    write_distributions(tmp_path, sdist, wheel)
    (wrong,) = release_check.wrong_with_built(tmp_path)
    assert message in wrong


def test_a_relative_link_on_the_package_page(tmp_path):
    write_distributions(tmp_path, release_check.WANTED, GOOD_WHEEL, "[start](docs/start.md), [web](https://a.b/c)")
    assert release_check.wrong_with_built(tmp_path) == ["the package page has a relative link: docs/start.md"]


def test_nothing_was_built_and_a_large_sdist(tmp_path, monkeypatch):
    assert "must hold one .tar.gz and one .whl" in release_check.wrong_with_built(tmp_path)[0]
    write_distributions(tmp_path, release_check.WANTED, GOOD_WHEEL)
    monkeypatch.setattr(release_check, "MOST_BYTES", 10)
    assert "more than 10" in release_check.wrong_with_built(tmp_path)[0]


# Workflows, forms, citation.


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows(path):
    """Workflows parse, actions are pinned, every job has a time limit, and the scripts and targets exist."""
    for action in re.findall(r"uses: *(.*)", path.read_text()):  # by a hash, which nobody can move
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    targets = " ".join(re.findall(r"^([a-z -]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert set(job.get("needs", "").split()) <= workflow["jobs"].keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            command = step.get("run", "").split()
            for word in command:
                assert not word.startswith((".ci/", "tools/")) or (ROOT / word).exists(), word
            if command[:1] == ["make"]:
                of_matrix = command[1:] == ["${{", "matrix.target", "}}"]
                made = job["strategy"]["matrix"]["target"] if of_matrix else command[1:]
                assert made
                assert set(made) <= set(targets), made


def test_only_the_publishing_job_may_ask_for_an_identity():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    asking = [name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})]
    assert asking == ["publish"]
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert all("run" not in step for step in workflow["jobs"]["publish"]["steps"])


FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    """Forms have the fields that GitHub requires."""
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    assert len({field["attributes"]["label"] for field in fields}) == len(fields)
    assert {field["type"] for field in fields} <= {"input", "textarea", "checkboxes", "dropdown"}


def test_the_command_for_versions_in_the_bug_report_runs():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (command,) = [field["attributes"]["value"] for field in form["body"] if field.get("id") == "versions"]
    exec(re.fullmatch(r'python -c "(.*)"', command.strip())[1], {})


def test_the_citation_is_of_this_project():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["version"] == VERSION
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["abstract"] == PROJECT["description"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["repository-code"] == PROJECT["urls"]["Repository"]
    (paper,) = CITATION["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") == paper["url"].rsplit("/", 1)[1]


def test_the_readme_cites_the_same():
    readme = (ROOT / "README.md").read_text()
    entries = re.findall(r"^@\w+\{.*?^\}", readme, re.MULTILINE | re.DOTALL)
    software = [entry for entry in entries if CITATION["repository-code"] in entry]
    assert len(software) == 1
    assert f"{{{VERSION}}}" in software[0]
    assert CITATION["authors"][0]["name"] in software[0]
    (paper,) = CITATION["references"]
    assert any(paper["title"] in entry and "2602.21798" in entry and "Shaier, Sagi" in entry for entry in entries)
