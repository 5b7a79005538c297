"""Checks before a release: `python tools/release_check.py v1.2.3`, and `--built dist` after the build.

Requires only Python. It prints one line for each problem and exits with 1.
"""

import pathlib
import re
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
MOST_BYTES = 1_000_000  # of the source distribution
WANTED = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "excitation_optax/py.typed", "tests/conftest.py")
UNWANTED = ("results/", "uv.lock")


def wrong_with_tag(tag: str, root: pathlib.Path = ROOT) -> list[str]:
    """Lists the files whose version differs from the tag, and a missing date in the changelog or the citation.

    The build reads the version from `excitation_optax/__init__.py`; the other files repeat it for readers.
    """
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        return [f"{tag} is not a release tag such as v1.2.3 or v1.2.3rc1"]
    version = tag.removeprefix("v")
    patterns = {
        "excitation_optax/__init__.py": r'^__version__ = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "README.md": r"^  version = \{(.*)\},$",
    }
    found = {file: _find(pattern, root / file) for file, pattern in patterns.items()}
    wrong = [
        f"{file} has the version {of_file}, the tag {version}" for file, of_file in found.items() if of_file != version
    ]
    heading = rf"^## {re.escape(version)} \((\d\d\d\d-\d\d-\d\d)\)$"
    date = _find(heading, root / "CHANGELOG.md")
    released = _find(r"^date-released: (.*)$", root / "CITATION.cff")
    if date is None:
        wrong.append(f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)'")
    elif released != date:
        wrong.append(f"CITATION.cff has date-released: {released}, CHANGELOG.md {date}")
    return wrong


def wrong_with_built(folder: pathlib.Path) -> list[str]:
    """Lists files that the distributions lack, and files that do not belong there."""
    sdists, wheels = list(folder.glob("*.tar.gz")), list(folder.glob("*.whl"))
    if (len(sdists), len(wheels)) != (1, 1):
        return [f"{folder} must hold one .tar.gz and one .whl; it holds {sorted(p.name for p in folder.iterdir())}"]
    wrong = []
    with tarfile.open(sdists[0]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    wrong += [f"{sdists[0].name} lacks {name}" for name in WANTED if name not in names]
    wrong += [f"{sdists[0].name} holds {name}" for name in names if name.startswith(UNWANTED)]
    if sdists[0].stat().st_size > MOST_BYTES:
        wrong.append(f"{sdists[0].name} has {sdists[0].stat().st_size:,} bytes, more than {MOST_BYTES:,}")
    with zipfile.ZipFile(wheels[0]) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        page = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    wrong += [
        f"the package page has a relative link: {link}" for link in re.findall(r"\]\((?!https://|#)(.*?)\)", page)
    ]
    metadata = {top for top in tops if top.endswith(".dist-info")}
    if tops - metadata != {"excitation_optax"}:
        wrong.append(f"{wheels[0].name} holds {sorted(tops - metadata)}, not only excitation_optax")
    return wrong


def _find(pattern: str, path: pathlib.Path) -> str | None:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    return found and found[1]


if __name__ == "__main__":
    built = sys.argv[1] == "--built"
    problems = wrong_with_built(pathlib.Path(sys.argv[2])) if built else wrong_with_tag(sys.argv[1])
    print("\n".join(problems) or f"{sys.argv[-1]}: no problem found")
    sys.exit(bool(problems))
