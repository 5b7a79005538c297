#!/bin/sh
# Runs the notebooks as Colab does: an environment with Jupyter and nothing of ours, a kernel that starts elsewhere, and
# an install cell that has to bring it all. The repository's address leads to this checkout's last commit.
set -eu
: "${UV:=uv}"
here=$(pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$UV" venv --quiet --seed "$dir/env"  # --seed: with pip
VIRTUAL_ENV="$dir/env" "$UV" pip install --quiet ipykernel nbclient nbformat
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0="url.file://$here.insteadOf"
GIT_CONFIG_VALUE_0=$(sed -n 's/^Repository = "\(.*\)"$/\1/p' pyproject.toml)
export GIT_CONFIG_VALUE_0
unset PYTHONPATH
for name in your_own_moe quickstart what_happens_inside; do  # the first installs the package, the others what it lacks
    mkdir "$dir/$name"
    "$dir/env/bin/python" tools/colab_check.py "$here/examples/notebooks/$name.ipynb" "$dir/$name"
done
