"""JAX context managers that have one name in the oldest supported version and another in the newest."""

import jax
import jax.experimental

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before 0.8
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # before 0.7.1
IS_RECENT = jax.__version_info__ >= (0, 10)
