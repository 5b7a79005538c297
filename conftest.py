"""Names that the examples in docstrings use without importing them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import excitation_optax


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, excitation_optax=excitation_optax)
