# Everything here sets up what it needs, given git, make and python3. uv is taken from PATH, or installed into .uv.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --locked --extra examples
# An interpreter of Python 3.12 or newer, for test-latest: from PATH, or from pyenv's folder.
LATEST := $(shell { $(UV) python find '>=3.12' || ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9].*/bin/python | sort -V | tail -n 1; } 2>/dev/null)

.PHONY: demo test test-latest test-slow lint format types docs-test wheel-test bench clean

demo: $(UV)  ## train Top-K MLPs on scikit-learn's digits, vanilla and excited; a table and a picture
	$(RUN) --no-dev python -m examples.quickstart

test: $(UV)  ## the tests, on the oldest Python and jax that are supported
	$(RUN) pytest -n 2

test-latest: $(UV)  ## the tests, on the newest Python at hand and the newest jax for it
	@test -n "$(LATEST)" || { echo "test-latest: no Python 3.12 or newer was found; skipped."; exit 0; } && \
	if [ -n "$(LATEST)" ]; then UV_PROJECT_ENVIRONMENT=.venv-latest $(RUN) --python "$(LATEST)" pytest -n 2; fi

test-slow: $(UV)
	$(RUN) pytest -n 2 -m slow

lint: $(UV)
	$(RUN) ruff check
	$(RUN) ruff format --check

format: $(UV)
	$(RUN) ruff check --fix
	$(RUN) ruff format

types: $(UV)
	$(RUN) pyrefly check

docs-test: $(UV)  ## every example in a docstring and every block of Python in the README
	$(RUN) pytest --doctest-modules excitation_optax models
	$(RUN) pytest --markdown-docs README.md

wheel-test: $(UV)  ## build the wheel and try it in an empty environment, outside of this folder
	UV=$(abspath $(UV)) sh tests/wheel.sh

bench: $(UV)
	$(RUN) python -m benchmarks.quickstart_epoch

clean:
	rm -rf .venv .venv-latest .uv build dist out .pytest_cache .ruff_cache .hypothesis

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv
