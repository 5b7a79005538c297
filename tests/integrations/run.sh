#!/bin/sh
# Tries Excitation on another project's models: sh tests/integrations/run.sh NAME
# Each project pins its own versions of the others, so each has an environment of its own, .venv-NAME, with what
# tests/integrations/NAME.txt pins. Runs tests/integrations/test_NAME.py and the code of docs/integrations/NAME.md.
set -eu
: "${UV:=uv}"
name=$1
python=${PYTHON:-3.12}
"$UV" venv --quiet --allow-existing --python "$python" ".venv-$name"
VIRTUAL_ENV=".venv-$name" "$UV" pip install --quiet -r "tests/integrations/$name.txt" -e .
".venv-$name/bin/python" -m pytest -m integration "tests/integrations/test_$name.py"
".venv-$name/bin/python" -m pytest --markdown-docs "docs/integrations/$name.md"
