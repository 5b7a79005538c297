"""How far an update by micro-batches is from that of the whole batch: exact where it can be, and where it cannot.

    python -m benchmarks.accumulation

A figure is the largest difference between the two updates' entries, over the largest entry of their leaf, of the leaf
where it is largest. 840 examples in 8 micro-batches, positive-sum; a Top-K MLP, and a classifier with a dropless MoE.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import excitation_optax
from excitation_optax import flax as excitation_flax
from models import moe, topk_mlp

BATCH, PARTS, INPUTS, CLASSES = 840, 8, 12, 5


class Classifier(nnx.Module):
    """An MoE layer between two dense ones."""

    expert_axis = None

    def __init__(self, *, rngs):
        self.embed = nnx.Linear(INPUTS, 16, rngs=rngs)
        self.moe = moe.MoE(moe.MoEConfig(d_model=16, d_ff=32, num_experts=8, experts_per_token=2), rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        """Logits `[B, C]` of `[B, D]`."""
        return self.head(self.moe(self.embed(x)))


MODELS = {
    "Top-K MLP": lambda: topk_mlp.TopKMLP(
        topk_mlp.TopKMLPConfig(INPUTS, width=32, depth=2, num_classes=CLASSES), rngs=nnx.Rngs(0)
    ),
    "MoE": lambda: Classifier(rngs=nnx.Rngs(0)),
}


def gradients(graphdef, load_balancing, params, batch):
    """Of the mean loss, and the routing."""
    x, labels = batch

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        logits, utilization, sown = excitation_flax.capture_routing(model, moe.AuxiliaryLoss)(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if load_balancing:
            loss += load_balancing * moe.auxiliary_losses(sown).load_balancing
        return loss, utilization

    return jax.grad(loss_fn, has_aux=True)(params)


def far(updates, expected) -> float:
    """The largest difference, relative to the largest entry of its leaf."""
    apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), updates, expected)
    return float(jnp.max(jnp.stack(jax.tree.leaves(apart))))  # NaN if any is


def differences(model, optimizer, load_balancing=0.0) -> tuple[float, float, float]:
    """Of the plain scan, of `accumulate_utilization`, and of `optax.MultiSteps` alone."""
    graphdef, params = nnx.split(model)
    batch = (
        jax.random.normal(jax.random.key(1), (BATCH, INPUTS)),
        jax.random.randint(jax.random.key(2), (BATCH,), 0, CLASSES),
    )
    compute = jax.jit(functools.partial(gradients, graphdef, load_balancing))
    excite = excitation_optax.scale_by_excitation(excitation_optax.positive_sum, expert_axis=model.expert_axis)
    tx = optax.chain(optimizer, excite)
    grads, counts = compute(params, batch)
    expected, _ = tx.update(grads, tx.init(params), params, utilization=counts)

    split = jax.tree.map(lambda a: a.reshape(PARTS, BATCH // PARTS, *a.shape[1:]), batch)
    parts = [compute(params, jax.tree.map(lambda a, i=i: a[i], split)) for i in range(PARTS)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    mean = jax.tree.map(lambda a: a / PARTS, total[0])
    scanned, _ = tx.update(mean, tx.init(params), params, utilization=total[1])

    def through(wrapped):
        state, updates = wrapped.init(params), None
        for grads, counts in parts:
            updates, state = wrapped.update(grads, state, params, utilization=counts)
        return updates

    bare = optax.MultiSteps(tx, PARTS)
    wrapped = excitation_optax.accumulate_utilization(bare, like=counts)
    return far(scanned, expected), far(through(wrapped), expected), far(through(bare), expected)


def main() -> None:
    """Prints the table."""
    print("| model | optimizer | sums of counts | `accumulate_utilization` | bare `MultiSteps` |")
    print("| --- | --- | --: | --: | --: |")
    for name, make in MODELS.items():
        for title, optimizer in (("SGD", optax.sgd(0.1)), ("Adam", optax.adam(1e-3))):
            found = differences(make(), optimizer)
            print(f"| {name} | {title} | " + " | ".join(f"{d:.1e}" for d in found) + " |")
    found = differences(MODELS["MoE"](), optax.sgd(0.1), load_balancing=0.01)
    print("| MoE, load-balancing loss 0.01 | SGD | " + " | ".join(f"{d:.1e}" for d in found) + " |")


if __name__ == "__main__":
    main()
