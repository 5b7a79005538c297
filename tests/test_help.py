"""The `--help` pages of all programs, against a snapshot: python tests/test_help.py writes it anew."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SNAPSHOT = pathlib.Path(__file__).with_name("help.txt")
PROGRAMS = ["quickstart", "train_gpt_moe", "train_moe_vit", "pod.train", "reproduce"]
PROGRAMS += [f"reproduce {command}" for command in ("list", "run", "report", "prepare")]
# In one process for all programs, as importing takes most of the time.
CODE = """
import contextlib, os, sys
from examples import quickstart, reproduce, train_gpt_moe, train_moe_vit, training
from examples.pod import train

commands = reproduce.List | reproduce.Run | reproduce.Report | reproduce.Prepare
configs = {
    "quickstart": quickstart.Config,
    "train_gpt_moe": train_gpt_moe.Config,
    "train_moe_vit": train_moe_vit.Config,
    "pod.train": train.Config,
    "reproduce": commands,
}
for program in sys.argv[1:]:
    name, *command = program.split()
    sys.argv = ["program", *command, "--help"]
    print(f"$ python -m examples.{program} --help")
    description = reproduce.__doc__ if name == "reproduce" else None
    with contextlib.suppress(SystemExit):
        training.run_program(print, configs[name], f"examples.{name}", description)
"""


def pages():
    """What all programs print, a hundred columns wide, with no machine's paths."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-c", CODE, *PROGRAMS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.replace(str(ROOT), "CHECKOUT").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.fixture(scope="module")
def shown():
    return pages()


def words(text):
    """Without the frames and line breaks, which depend on the version of tyro and on where the checkout lies."""
    text = re.sub(r"[\s─│╭╮╰╯]+", " ", text)
    return re.sub(r"\(default: [^()]*results\)", "(default: results)", text)


def test_the_pages_are_as_they_were(shown):
    """What changed is meant? python tests/test_help.py"""
    assert words(shown) == words(SNAPSHOT.read_text())


def test_every_option_is_explained(shown):
    options = re.split(r"│ (?=--?[a-z])", shown)[1:]
    assert len(options) > 100
    for option in options:
        name, _, rest = option.partition(" ")
        explained = words(rest).replace("(default:", "").strip()
        assert re.search(r"[a-z]{2,} [a-z]", explained), name


def test_programs_are_named_as_they_are_run(shown):
    for program in PROGRAMS:
        assert f"usage: python -m examples.{program} [-h]" in shown


if __name__ == "__main__":
    SNAPSHOT.write_text(pages())
