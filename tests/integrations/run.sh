#!/bin/sh
# Tries Excitation on another project's models: sh tests/integrations/run.sh NAME
# Each project pins its own versions of the others, so each has an environment of its own, .venv-NAME, with what
# tests/integrations/NAME.txt pins. Runs tests/integrations/test_NAME.py and the code of docs/integrations/NAME.md.
set -eu
: "${UV:=uv}"
name=$1
# Python 3.12: PYTHON if it is set, or pyenv's, or the one that uv finds.
python=${PYTHON:-$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python 2>/dev/null | sort -V | tail -n 1)}
"$UV" venv --quiet --allow-existing --python "${python:-3.12}" ".venv-$name"
# The pins are complete; --no-deps, as some of them overrule what a project asks for.
VIRTUAL_ENV=".venv-$name" "$UV" pip install --quiet --no-deps -r "tests/integrations/$name.txt" -e .
# Warnings are errors, but for other projects' spelling, and for what they use although it is on its way out.
run() { ".venv-$name/bin/python" -m pytest -W ignore::DeprecationWarning -W ignore::SyntaxWarning "$@"; }
run -m integration "tests/integrations/test_$name.py"
run --markdown-docs "docs/integrations/$name.md"
