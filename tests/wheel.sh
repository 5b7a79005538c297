#!/bin/sh
# Builds the wheel and tries it in an empty environment, outside of the checkout: as it is, then with Flax, then with
# what telemetry needs too.
set -eu
: "${UV:=uv}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$UV" build --quiet --wheel --out-dir "$dir" .
cp tests/wheel_check.py "$dir"
cd "$dir"
"$UV" venv --quiet env
for extra in "" "[flax]" "[telemetry]"; do
    VIRTUAL_ENV="$dir/env" "$UV" pip install --quiet "$(ls "$dir"/*.whl)$extra"
    env/bin/python -W error wheel_check.py
done
