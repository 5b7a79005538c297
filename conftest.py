"""Names that the examples in docstrings use without importing them."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import excitation_optax


@pytest.fixture(autouse=True)
def _names_of_examples(request, doctest_namespace):
    if not isinstance(request.node, pytest.DoctestItem):
        return
    from flax import linen, nnx  # late, since the core's tests run without Flax

    from excitation_optax import flax as excitation_flax
    from excitation_optax import metrics, plotting, telemetry

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, optax=optax, excitation_optax=excitation_optax)
    doctest_namespace.update(linen=linen, nnx=nnx, excitation_flax=excitation_flax)
    doctest_namespace.update(metrics=metrics, plotting=plotting, telemetry=telemetry)
    for example in doctest.DocTestParser().get_examples(excitation_flax.__doc__):  # the model of its page
        exec(example.source, doctest_namespace)
