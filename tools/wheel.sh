#!/bin/sh
# Builds the wheel and tests it in an empty environment outside the checkout: first without extras, then with Flax, then
# with the packages for telemetry too.
set -eu
: "${UV:=uv}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$UV" build --quiet --wheel --out-dir "$dir" .
cp tools/wheel_check.py "$dir"
cd "$dir"
"$UV" venv --quiet env
for extra in "" "[flax]" "[telemetry]"; do
    VIRTUAL_ENV="$dir/env" "$UV" pip install --quiet "$(ls "$dir"/*.whl)$extra"
    env/bin/python -W error wheel_check.py
done
