"""Strict JAX for every test, eight CPU devices, and programs that compile fast, as tests run each but once or twice."""

import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

# XLA compiles a training step four times as fast like this: without optimization, and up to jaxlib 0.11 with the older
# of two code generators. `make test-slow`, whose programs compute more, names a level, and then XLA's defaults hold.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    fast = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
    fast += ["--xla_cpu_use_fusion_emitters=false"] if (int(major), int(minor)) < (0, 12) else []
    os.environ["XLA_FLAGS"] = " ".join([*fast, os.environ.get("XLA_FLAGS", "")])

# Programs that the other worker, or an earlier run, compiled are read back: most of the time is compiling.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish():
    """Collects garbage rarely: each time, Python would look at all that the tests have imported."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture
def as_users_have_it():
    """JAX's own promotion, which Optax's Adam needs, in all threads, which no context manager reaches."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """W&B with all that it writes in `tmp_path`, nothing printed, and its helper process ended at the end."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
