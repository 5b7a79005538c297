"""wheel.sh runs this where the wheel is installed: import, docstring examples, and a tiny training run."""

import doctest
import importlib
import importlib.metadata
import importlib.util
import pathlib
import pkgutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

start = time.perf_counter()
import excitation_optax  # noqa: E402

seconds = time.perf_counter() - start
for name in ("flax", "matplotlib", "tensorboardX", "wandb"):
    assert name not in sys.modules, f"import excitation_optax imports {name}"
folder = pathlib.Path(excitation_optax.__file__).parent
assert "site-packages" in folder.parts, folder
assert (folder / "py.typed").exists()
assert importlib.metadata.version("excitation_optax") == excitation_optax.__version__
assert importlib.util.find_spec("models") is None, "models must not be in the wheel"

NEEDS = {"flax": "flax", "_sow": "flax", "plotting": "matplotlib"}  # modules whose examples need an extra
extras = {name for name in ("flax", "matplotlib") if importlib.util.find_spec(name)}
names = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "excitation_optax": excitation_optax}  # as in conftest.py
for name in ("metrics", "telemetry", *(name for name, extra in NEEDS.items() if extra in extras)):
    names[name] = importlib.import_module(f"excitation_optax.{name}")
if "flax" in extras:
    from flax import linen, nnx

    names |= {"linen": linen, "nnx": nnx, "excitation_flax": names.pop("flax")}
    for example in doctest.DocTestParser().get_examples(names["excitation_flax"].__doc__):
        exec(example.source, names)
attempted = 0
for module in pkgutil.iter_modules([str(folder)]):
    if NEEDS.get(module.name) in {None, *extras}:
        loaded = importlib.import_module(f"excitation_optax.{module.name}")
        failed, tried = doctest.testmod(loaded, extraglobs=names, optionflags=doctest.ELLIPSIS)  # pytest sets it too
        assert failed == 0
        attempted += tried
assert attempted > 30

params = {"router": jnp.zeros((2, 4)), "experts": jax.random.normal(jax.random.key(0), (4, 2))}
x = jax.random.normal(jax.random.key(1), (64, 2))
tx = optax.chain(optax.adam(0.05), excitation_optax.scale_by_excitation())


def loss_fn(params):
    gate, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 1)
    y = gate[:, 0] * jnp.sum(params["experts"][chosen[:, 0]] * x, axis=-1)
    return jnp.mean((y - jnp.sin(x[:, 0])) ** 2), {"experts": excitation_optax.count_routing(chosen, 4)}


@jax.jit
def step(params, opt_state):
    (loss, utilization), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, utilization=utilization)
    return optax.apply_updates(params, updates), opt_state, loss


opt_state = tx.init(params)
losses = []
for _ in range(30):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
assert losses[-1] < 0.5 * losses[0], losses
print(
    f"wheel {excitation_optax.__version__}, with {' and '.join(sorted(extras)) or 'no extra'}: import {seconds:.2f} s "
    f"after optax, {attempted} examples run"
)
