"""Strict JAX for every test, eight CPU devices, and programs that compile fast, as tests run each but once or twice."""

import os

# What stands last counts, so XLA_FLAGS can ask for another level: make test-slow does, as it computes much.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
