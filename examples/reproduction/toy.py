"""Figure 1, bottom: two experts of one weight each, a batch that is routed 75 % to 25 %, and which method is fastest.

The paper gives neither loss nor learning rate nor start. Ours: a bowl, (h0 w0^2 + h1 w1^2) / 2, from (1, 1), where w0
is the weight of the busy expert, which zero_sum moves by 1.5 times its update, and w1 that of the idle one, by 0.5.
Whether that helps depends on which weight lies along the long axis of the bowl, so there are three bowls. On each, all
methods have the same learning rate, 1 over the larger curvature, the largest at which SGD overshoots nowhere; and then
each has the best of a sweep.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import excitation_optax
from examples import training
from examples.reproduction import store

TEXT = pathlib.Path(__file__).with_name("toy.md")
FILE = pathlib.Path("fig1/toy.json")  # in the folder of results
BOWLS = {  # h0, of the busy expert, and h1
    "busy expert along the long axis": (0.1, 1.0),
    "the same, a longer bowl": (0.01, 1.0),
    "busy expert along the short axis": (1.0, 0.1),
}
METHODS = ("SGD", "SGD + momentum", "SGD + zero_sum")
START = (1.0, 1.0)
TOLERANCE = 1e-4  # of the loss, over that at the start
STEPS = 3000
SHOWN = 30  # steps of a trajectory that are kept
RATES = np.geomspace(0.05, 4.0, 201)  # of the sweep, over that of all
# Of a batch of four examples, three go to the first expert.
UTILIZATION = np.array([0.75, 0.25], np.float32)


@functools.partial(jax.jit, static_argnames=("method", "steps"))
def descend(method: str, curvature: jax.Array, learning_rate: jax.Array, steps: int = STEPS):
    """Weights `[steps + 1, 2]` and losses `[steps + 1]` from the start on. Momentum is 0.9."""
    tx = training.OPTIMIZERS["momentum" if "momentum" in method else "sgd"](learning_rate)
    excite = excitation_optax.scale_by_excitation(excitation_optax.zero_sum)
    tx = optax.chain(tx, excite) if "zero_sum" in method else optax.with_extra_args_support(tx)
    params, routed = {"experts": jnp.array(START)}, {"experts": jnp.asarray(UTILIZATION)}
    loss = lambda weights: 0.5 * jnp.sum(curvature * weights**2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: loss(params["experts"]))(params)
        updates, state = tx.update(grads, state, params, utilization=routed)
        return (optax.apply_updates(params, updates), state), params["experts"]

    _, weights = jax.lax.scan(step, (params, tx.init(params)), length=steps + 1)
    return weights, jax.vmap(loss)(weights)


def steps_to_tolerance(losses: np.ndarray) -> int | None:
    """The first step from which the loss stays under the tolerance; None if there is none."""
    above = np.flatnonzero(~(losses <= TOLERANCE * losses[0]))
    return None if above[-1] == len(losses) - 1 else int(above[-1]) + 1


def run() -> dict[str, Any]:
    """Every method on every bowl: trajectories, and steps to the tolerance at the common rate and at the best one."""
    bowls = {}
    for name, (h0, h1) in BOWLS.items():
        curvature, rate, methods = jnp.array([h0, h1]), 1 / max(h0, h1), {}
        for method in METHODS:
            weights, losses = descend(method, curvature, jnp.float32(rate))
            rates = jnp.asarray(rate * RATES, jnp.float32)
            _, swept = jax.vmap(functools.partial(descend, method, curvature))(rates)
            steps = zip(map(steps_to_tolerance, np.asarray(swept)), RATES.tolist(), strict=True)
            best, best_rate = min(pair for pair in steps if pair[0] is not None)
            methods[method] = {
                "steps": steps_to_tolerance(np.asarray(losses)),
                "best_steps": best,
                "best_rate": round(rate * best_rate, 4),
                "trajectory": np.round(np.asarray(weights[: SHOWN + 1], np.float64), 5).tolist(),
            }
        bowls[name] = {"curvature": [h0, h1], "learning_rate": rate, "methods": methods}
    excitation = excitation_optax.zero_sum(jnp.asarray(UTILIZATION), 1.0).tolist()
    settings = {"utilization": UTILIZATION.tolist(), "excitation": excitation, "start": list(START)}
    return settings | {"tolerance": TOLERANCE, "most_steps": STEPS, "bowls": bowls}


def load(folder: pathlib.Path) -> dict[str, Any] | None:
    """What is on file in the folder of results, if anything. Raises ValueError if the file is damaged."""
    return store.load_json(folder / FILE, "fig1")


def markdown(outcome: dict[str, Any]) -> str:
    """A table of steps, and what was chosen."""
    rows = []
    for name, bowl in outcome["bowls"].items():
        curvature = ", ".join(f"{h:g}" for h in bowl["curvature"])
        for method, found in bowl["methods"].items():
            steps = "never" if found["steps"] is None else found["steps"]
            cells = name, curvature, method, steps, found["best_steps"], f"{found['best_rate']:.3g}"
            rows.append(f"| {' | '.join(map(str, cells))} |")
    ratio = outcome["excitation"][0] / outcome["excitation"][1]
    return TEXT.read_text("utf-8").format(**outcome, rows="\n".join(rows), ratio=ratio)


def draw(outcome: dict[str, Any], figure: Any) -> None:
    """Fills a matplotlib figure with the trajectories at the same learning rate, over the loss, bowl by bowl."""
    figure.set_size_inches(12, 4)
    panels = figure.subplots(1, len(outcome["bowls"]), sharey=True)
    w0, w1 = np.meshgrid(np.linspace(-1.2, 1.2, 25), np.linspace(-1.2, 1.2, 25))
    for axes, (name, bowl) in zip(panels, outcome["bowls"].items(), strict=True):
        h0, h1 = bowl["curvature"]
        axes.contour(w0, w1, np.sqrt(h0 * w0**2 + h1 * w1**2), levels=6, cmap="Greys", linewidths=0.6, alpha=0.6)
        for (method, found), color in zip(bowl["methods"].items(), ("gray", "tab:cyan", "tab:pink"), strict=True):
            steps = "never there" if found["steps"] is None else f"{found['steps']} steps"
            x, y = np.array(found["trajectory"]).T
            axes.plot(x, y, ".-", color=color, markersize=4, linewidth=1, label=f"{method}: {steps}")
        axes.plot(0, 0, "k*")
        axes.set(xlabel="w0, of the expert with 75 %", title=f"{name} (h = {h0:g}, {h1:g})", xlim=(-1.2, 1.2))
        axes.title.set_fontsize("small")
        axes.legend(fontsize="x-small", loc="lower left")
    panels[0].set(ylabel="w1, of the expert with 25 %", ylim=(-1.2, 1.2))
