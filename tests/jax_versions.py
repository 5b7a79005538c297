"""JAX functions that have one name in the oldest supported version and another in the newest."""

import jax
import jax.experimental

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before 0.8
set_mesh = jax.sharding.set_mesh  # jax.set_mesh from 0.7.1
