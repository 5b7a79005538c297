# Every target sets up what it needs, given git, make and python3. uv is taken from PATH, or installed into .uv.
UV := $(shell command -v uv 2>/dev/null || echo $(CURDIR)/.uv/bin/uv)
RUN := $(UV) run --locked --extra examples
# The newest Python from 3.12 on, for test-latest: in PATH, or in pyenv's folder.
LATEST = $(shell { ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9].*/bin/python; $(UV) python find '>=3.12'; } 2>/dev/null | sort -V | tail -n 1)

# Tests that import jax, numpy and optax only, for test-oldest: test_NAME.py.
CORE_TESTS = $(patsubst %,tests/test_%.py,describe errors metrics paths routing scaling strategies transform)

.PHONY: help demo site test test-latest test-oldest test-slow study-check test-pod test-torch test-tpu test-tunix test-levanter test-easydel test-maxtext lint format types docs docs-test notebooks notebooks-test wheel-test bench gpu gpu-wheels clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: $(UV)  ## train Top-K MLPs on scikit-learn's digits without and with Excitation: a table and a picture
	$(RUN) --no-dev python -m examples.quickstart

test: $(UV)  ## the tests
	$(RUN) pytest -n 2

test-oldest: $(UV)  ## the core's tests with the lowest versions of jax, numpy and optax that pyproject.toml allows
	$(UV) venv --quiet --clear --python 3.11 .venv-oldest
	$(UV) pip install --quiet --python .venv-oldest --resolution lowest-direct -r pyproject.toml --group core-test
	.venv-oldest/bin/python -m pytest -n 2 $(CORE_TESTS)

test-latest: $(UV)  ## the tests, with the newest Python at hand and the newest jax for it
	@if [ -z "$(LATEST)" ]; then echo "test-latest: skipped, no Python from 3.12 on was found"; else \
	set -x; UV_PROJECT_ENVIRONMENT=.venv-latest $(RUN) --python "$(LATEST)" pytest -n 2; fi

test-slow: $(UV)  ## the tests that take longer
	XLA_FLAGS=--xla_backend_optimization_level=3 $(RUN) pytest -n 2 -m slow --ignore-glob='tests/test_pod*'

study-check: $(UV)  ## tiny versions of our studies
	$(RUN) pytest -n 2 -m "slow or not slow" tests/test_study.py tests/test_minis.py

test-pod: $(UV)  ## the training program of examples/pod on any mesh, through every failure; a quarter of an hour
	$(RUN) pytest -n 2 -m slow tests/test_pod*.py

test-torch: $(UV)  ## the MoE layer against Hugging Face's transformers, and by tokamax; PyTorch only on Python 3.11
	UV_PROJECT_ENVIRONMENT=.venv-torch $(UV) run --locked --extra flax --extra torch --extra tokamax \
		pytest -n 2 -m "not slow" tests/test_transformers.py tests/test_grouped.py

test-tpu: $(UV)  ## what the training step sends, compiled for TPUs that are not there
	UV_PROJECT_ENVIRONMENT=.venv-tpu $(RUN) --extra tpu pytest -n 2 -m tpu tests/test_pod_fit.py

test-tunix test-levanter test-easydel test-maxtext: test-%: $(UV)  ## other projects' models, excited, each in an environment of its own
	UV=$(UV) sh tests/integrations/run.sh $*

lint: $(UV)  ## ruff
	$(RUN) ruff check
	$(RUN) ruff format --check

format: $(UV)  ## let ruff fix what it can
	$(RUN) ruff check --fix
	$(RUN) ruff format

types: $(UV)  ## pyrefly
	$(RUN) pyrefly check

docs: $(UV)  ## write docs/compatibility.md, docs/reproduction.md, docs/studies.md, the table of docs/results.md, and pictures
	$(RUN) python -m tools.optimizer_table > docs/compatibility.md
	$(RUN) python -m examples.reproduce report

site: $(UV)  ## build the documentation into out/site; a broken link is an error
	$(RUN) sphinx-build -W --keep-going -q -b html -d out/doctrees docs out/site

docs-test: $(UV)  ## run every example of the docstrings, the README and docs/
	$(RUN) pytest --doctest-modules excitation_optax models
	$(RUN) pytest --markdown-docs README.md docs $(patsubst %,--ignore=docs/integrations/%.md,tunix levanter easydel maxtext)

notebooks: $(UV)  ## write examples/notebooks/*.ipynb from docs/notebooks/*.md
	$(RUN) python -m examples.notebooks.generate

notebooks-test: $(UV)  ## run the notebooks, here and as Colab does, from an empty environment
	$(RUN) pytest -m "slow or not slow" tests/test_notebooks.py
	UV=$(UV) sh tools/colab.sh

wheel-test: $(UV)  ## build the wheel and try it in an empty environment, outside of this folder
	UV=$(UV) sh tools/wheel.sh

gpu-wheels:  ## pack what make gpu needs on a machine without a network: packages, and CIFAR-10 from the folder DATA
	sh benchmarks/gpu.sh pack $(DATA)

gpu:  ## everything that needs a GPU, in at most eight minutes; it needs Python 3.12 with jax, flax, optax and torch
	sh benchmarks/gpu.sh run

bench: $(UV)  ## speed, as ratios measured side by side
	$(RUN) python -m benchmarks.quickstart_epoch
	$(RUN) python -m benchmarks.top_k
	$(RUN) python -m benchmarks.overhead --rows mlp-2048-2 --no-write
	$(RUN) python -m benchmarks.moe_layer
	$(RUN) python -m benchmarks.gpt_step
	$(RUN) python -m benchmarks.accumulation
	$(RUN) python -m benchmarks.sweep

clean:  ## remove what the targets made
	rm -rf .venv .venv-* .uv build dist out .pytest_cache .ruff_cache .hypothesis

$(CURDIR)/.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv
