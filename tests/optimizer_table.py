"""Every optimizer and wrapper that Optax 0.2.8 exports, and where Excitation goes with each; and Flax's loops.

`test_contract.py` holds each row to what it says; `python tests/optimizer_table.py` prints the table of
docs/compatibility.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state
from optax import contrib

import excitation_optax
from excitation_optax import flax as excitation_flax

Tx = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer or wrapper.

    Attributes:
      name: as it is written in code.
      where: after: `chain(optimizer, excitation)`. inside: the wrapper goes around a chain that ends with excitation.
        no: neither works, for the reason in `note`.
      make: the optimizer; or, for inside and no, a function of the transformation that goes inside.
      note: what a user should know.
      per_example: whether it takes the gradients of every example.
    """

    name: str
    where: Literal["after", "inside", "no"]
    make: Callable[..., Tx]
    note: str = ""
    per_example: bool = False

    @property
    def id(self) -> str:
        return f"{self.where}-{self.name.removeprefix('optax.')}"


OWN_PARAMETERS = "it keeps parameters of its own: with Excitation outside, these and the model's drift apart"
DECAY = "decoupled weight decay is scaled too; a [recipe](recipes.md#weight-decay-that-is-not-scaled) leaves it alone"
LINE_SEARCH = "`value_fn` must take (and may ignore) `utilization=`; the search vouches for the unscaled step"

AFTER = [
    Row("optax.adabelief", "after", lambda: optax.adabelief(0.03)),
    Row("optax.adadelta", "after", lambda: optax.adadelta(10.0)),
    Row("optax.adafactor", "after", lambda: optax.adafactor(0.03, min_dim_size_to_factor=2)),
    Row("optax.adagrad", "after", lambda: optax.adagrad(0.1)),
    Row("optax.adam", "after", lambda: optax.adam(0.03)),
    Row("optax.adamax", "after", lambda: optax.adamax(0.03)),
    Row("optax.adamaxw", "after", lambda: optax.adamaxw(0.03, weight_decay=0.1), DECAY),
    Row("optax.adamw", "after", lambda: optax.adamw(0.03, weight_decay=0.1), DECAY),
    Row("optax.adan", "after", lambda: optax.adan(0.03, weight_decay=0.1), DECAY),
    Row("optax.amsgrad", "after", lambda: optax.amsgrad(0.03)),
    Row("optax.fromage", "after", lambda: optax.fromage(0.01), "the shrinking of the weights is scaled too"),
    Row(
        "optax.lamb",
        "after",
        lambda: optax.lamb(0.03, weight_decay=0.1),
        "trust ratios are of unscaled updates; decay as above",
    ),
    Row("optax.lars", "after", lambda: optax.lars(0.5, weight_decay=0.1), "trust ratios are of unscaled updates"),
    Row(
        "optax.lbfgs",
        "after",
        lambda: optax.lbfgs(),
        LINE_SEARCH,
    ),
    Row("optax.lion", "after", lambda: optax.lion(0.01, weight_decay=0.1), DECAY),
    Row("optax.nadam", "after", lambda: optax.nadam(0.03)),
    Row("optax.nadamw", "after", lambda: optax.nadamw(0.03, weight_decay=0.1), DECAY),
    Row("optax.noisy_sgd", "after", lambda: optax.noisy_sgd(0.1, eta=1e-4, key=0), "the noise is scaled too"),
    Row("optax.novograd", "after", lambda: optax.novograd(0.03, weight_decay=0.1), DECAY),
    Row("optax.optimistic_adam", "after", lambda: optax.optimistic_adam(0.01, optimism=0.01)),
    Row("optax.optimistic_adam_v2", "after", lambda: optax.optimistic_adam_v2(0.01)),
    Row("optax.optimistic_gradient_descent", "after", lambda: optax.optimistic_gradient_descent(0.1)),
    Row("optax.polyak_sgd", "after", lambda: optax.polyak_sgd(0.3), "the step size is of the unscaled step"),
    Row("optax.radam", "after", lambda: optax.radam(0.03)),
    Row("optax.rmsprop", "after", lambda: optax.rmsprop(0.01)),
    Row("optax.rprop", "after", lambda: optax.rprop(0.01), "its own step sizes stay as they are"),
    Row("optax.sgd", "after", lambda: optax.sgd(0.1, momentum=0.9)),
    Row("optax.sign_sgd", "after", lambda: optax.sign_sgd(0.01)),
    Row("optax.signum", "after", lambda: optax.signum(0.01)),
    Row("optax.sm3", "after", lambda: optax.sm3(0.1)),
    Row("optax.yogi", "after", lambda: optax.yogi(0.01)),
    Row("optax.contrib.acprop", "after", lambda: contrib.acprop(0.01)),
    Row("optax.contrib.ademamix", "after", lambda: contrib.ademamix(0.01, weight_decay=0.1), DECAY),
    Row("optax.contrib.adopt", "after", lambda: contrib.adopt(0.03)),
    Row("optax.contrib.cocob", "after", lambda: contrib.cocob(), "its bets are settled by the unscaled gradients"),
    Row("optax.contrib.dadapt_adamw", "after", lambda: contrib.dadapt_adamw(1.0, weight_decay=0.1), DECAY),
    Row("optax.contrib.dog", "after", lambda: contrib.dog(1.0), "distances are those of the scaled steps"),
    Row("optax.contrib.dowg", "after", lambda: contrib.dowg(1.0), "distances are those of the scaled steps"),
    Row(
        "optax.contrib.dpsgd",
        "after",
        lambda: contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.01, seed=0),
        "utilization is computed from the data: it is not covered by the privacy guarantee",
        per_example=True,
    ),
    Row("optax.contrib.galore", "after", lambda: contrib.galore(0.03, rank=2)),
    Row("optax.contrib.madgrad", "after", lambda: contrib.madgrad(0.03)),
    Row("optax.contrib.momo", "after", lambda: contrib.momo(0.3), "the step size is of the unscaled step"),
    Row("optax.contrib.momo_adam", "after", lambda: contrib.momo_adam(0.03), "the step size is of the unscaled step"),
    Row("optax.contrib.muon", "after", lambda: contrib.muon(0.03), "Adam takes the parameters that are not matrices"),
    Row("optax.contrib.prodigy", "after", lambda: contrib.prodigy(1.0), "its distance is that of the scaled steps"),
    Row("optax.contrib.simplified_ademamix", "after", lambda: contrib.simplified_ademamix(0.001, alpha=0.0)),
    Row("optax.contrib.sophia", "after", lambda: contrib.sophia(0.03, weight_decay=0.1), DECAY),
    Row(
        "optax.contrib.reduce_on_plateau",
        "after",
        lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=3)),
    ),
    Row(
        "optax.scale_by_backtracking_linesearch",
        "after",
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)),
        LINE_SEARCH,
    ),
    Row("optax.flatten", "after", lambda: optax.flatten(optax.adam(0.03)), "not inside: it hides the paths"),
    Row(
        "optax.contrib.split_real_and_imaginary",
        "after",
        lambda: contrib.split_real_and_imaginary(optax.adam(0.03)),
        "not inside: it forwards no extra arguments",
    ),
]

INSIDE = [
    Row("optax.chain", "inside", lambda tx: optax.chain(tx)),
    Row("optax.named_chain", "inside", lambda tx: optax.named_chain(("inner", tx))),
    Row("optax.with_extra_args_support", "inside", lambda tx: optax.with_extra_args_support(tx)),
    Row("optax.masked", "inside", lambda tx: optax.masked(tx, {"router": True, "experts": True})),
    Row(
        "optax.partition",
        "inside",
        lambda tx: optax.partition({"a": tx, "b": tx}, {"router": "a", "experts": "b"}),
        "also under its old name multi_transform",
    ),
    Row(
        "optax.selective_transform",
        "inside",
        lambda tx: optax.selective_transform(tx, freeze_mask={"router": False, "experts": False}),
    ),
    Row(
        "optax.apply_if_finite",
        "inside",
        lambda tx: optax.apply_if_finite(tx, 3),
        "it looks at gradients only; counts from `count_routing` and its like are always finite",
    ),
    Row(
        "optax.conditionally_transform", "inside", lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0)
    ),
    Row("optax.conditionally_mask", "inside", lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0)),
    Row(
        "optax.inject_hyperparams",
        "inside",
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(1.0),
        'of `scale_by_excitation` itself: `static_args=("strategy", "expert_axis")`',
    ),
    Row(
        "optax.apply_every",
        "inside",
        lambda tx: optax.chain(tx, optax.apply_every(2)),
        "as `chain(optimizer, scale_by_excitation(...), apply_every(k))`: each step is scaled by its own utilization",
    ),
    Row(
        "optax.MultiSteps",
        "inside",
        lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
        "it hands on the utilization of the last micro-batch only: wrap it in `accumulate_utilization`, or sum "
        "gradients and `RoutingCounts` in a `lax.scan`, then update once",
    ),
    Row(
        "optax.contrib.mechanize",
        "inside",
        lambda tx: contrib.mechanize(tx),
        OWN_PARAMETERS,
    ),
    Row(
        "optax.contrib.schedule_free",
        "inside",
        lambda tx: contrib.schedule_free(tx, learning_rate=0.1),
        OWN_PARAMETERS,
    ),
    Row(
        "optax.contrib.schedule_free_sgd",
        "inside",
        lambda tx: contrib.schedule_free(optax.chain(tx), learning_rate=0.1),
        "as `schedule_free(chain(sgd(...), scale_by_excitation(...)), ...)`",
    ),
    Row(
        "optax.contrib.schedule_free_adamw",
        "inside",
        lambda tx: contrib.schedule_free(optax.chain(tx, optax.add_decayed_weights(-0.01)), learning_rate=0.1),
        "as `schedule_free(chain(scale_by_rms(...), scale_by_learning_rate(...), scale_by_excitation(...)), ...)`",
    ),
]

NO = [
    Row(
        "optax.lookahead",
        "no",
        lambda tx: optax.lookahead(tx, 5, 0.5),
        "it forwards no extra arguments, and keeps parameters of its own",
    ),
    Row(
        "optax.contrib.sam",
        "no",
        lambda tx: contrib.sam(tx, optax.chain(contrib.normalize(), optax.sgd(0.05))),
        "it accepts no extra arguments",
    ),
    Row("optax.flatten (around)", "no", lambda tx: optax.flatten(tx), "inside, paths are gone; after it all is well"),
    Row(
        "optax.contrib.split_real_and_imaginary (around)",
        "no",
        lambda tx: contrib.split_real_and_imaginary(tx),
        "inside, no extra arguments; after it all is well",
    ),
    Row(
        "optax.chain(MultiSteps(...).gradient_transformation(), ...)",
        "no",
        lambda tx: optax.chain(optax.MultiSteps(tx, 2).gradient_transformation(), optax.identity()),
        "extra arguments are dropped",
    ),
]


@dataclasses.dataclass(frozen=True)
class FlaxRow:
    """One way to update parameters with Flax.

    Attributes:
      name: as it is written in code; `tx` ends with Excitation.
      make: a function of `tx` and the parameters: what holds both, and is updated by `update`.
      update: a function of what `make` made, gradients and utilization; returns the same, and the new parameters.
      inner: the wrapper around `tx` in what `make` makes, to compare with.
      works: whether it does.
      note: what a user should know.
    """

    name: str
    make: Callable[[Tx, Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    inner: Callable[[Tx], Any] = lambda tx: tx
    works: bool = True
    note: str = ""


class _Model(nnx.Module):
    """Parameters as an NNX module has them: `router`, `experts/kernel`, `experts/bias`."""

    def __init__(self, params):
        self.router = nnx.Param(params["router"])
        self.experts = nnx.Dict({name: nnx.Param(value) for name, value in params["experts"].items()})


def _like(model: _Model, grads: Any) -> nnx.State:
    """Gradients as `nnx.grad` gives them."""
    return jax.tree.unflatten(jax.tree.structure(nnx.state(model, nnx.Param)), jax.tree.leaves(grads))


def _nnx(wrap: Callable[[Tx], Any] = lambda tx: tx) -> dict[str, Any]:
    def make(tx, params):
        model = _Model(params)
        return model, nnx.Optimizer(model, wrap(tx), wrt=nnx.Param)

    def update(loop, grads, utilization):
        model, optimizer = loop
        optimizer.update(model, _like(model, grads), utilization=utilization)
        return loop, nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return {"make": make, "update": update, "inner": wrap}


def _model_and_optimizer_update(optimizer, grads, utilization):
    optimizer.update(_like(optimizer.model, grads), utilization=utilization)
    return optimizer, nnx.to_pure_dict(nnx.state(optimizer.model, nnx.Param))


def _linen(state: Any, wrap: Callable[[Tx], Any] = lambda tx: tx) -> dict[str, Any]:
    def update(loop, grads, utilization):
        loop = loop.apply_gradients(grads=grads, utilization=utilization)
        return loop, loop.params

    return {
        "make": lambda tx, params: state.create(apply_fn=None, params=params, tx=wrap(tx)),
        "update": update,
        "inner": wrap,
    }


def _accumulate_two(tx: Tx) -> Tx:
    like = {"experts": excitation_optax.RoutingCounts(jnp.zeros(4), jnp.zeros(()))}
    return excitation_optax.accumulate_utilization(optax.MultiSteps(tx, 2), like)


MULTI_STEPS = "as with Optax: the utilization of the last micro-batch only"
FLAX = [
    FlaxRow("nnx.Optimizer(model, tx, wrt=nnx.Param)", **_nnx()),
    FlaxRow(
        "nnx.Optimizer(model, optax.MultiSteps(tx, k), ...)",
        **_nnx(lambda tx: optax.MultiSteps(tx, 2)),
        note=MULTI_STEPS,
    ),
    FlaxRow(
        "nnx.Optimizer(model, accumulate_utilization(optax.MultiSteps(tx, k), like), ...)",
        **_nnx(_accumulate_two),
        note="the utilization of all micro-batches; `RoutingCounts` are asked for",
    ),
    FlaxRow("nnx.Optimizer(model, apply_if_finite(tx, ...), ...)", **_nnx(lambda tx: optax.apply_if_finite(tx, 5))),
    FlaxRow(
        "nnx.Optimizer(model, optax.contrib.schedule_free(tx, ...), ...)",
        **_nnx(lambda tx: contrib.schedule_free(tx, 0.1)),
    ),
    FlaxRow(
        "nnx.ModelAndOptimizer(model, tx)",
        lambda tx, params: nnx.ModelAndOptimizer(_Model(params), tx),
        _model_and_optimizer_update,
        note="Flax calls it deprecated",
    ),
    FlaxRow("excitation_optax.flax.TrainState", **_linen(excitation_flax.TrainState), note="for Linen"),
    FlaxRow(
        "excitation_optax.flax.TrainState, with optax.MultiSteps(tx, k)",
        **_linen(excitation_flax.TrainState, lambda tx: optax.MultiSteps(tx, 2)),
        note=MULTI_STEPS,
    ),
    FlaxRow(
        "flax.training.train_state.TrainState",
        **_linen(train_state.TrainState),
        works=False,
        note="it hands `tx.update` no extra argument; ours is the same but for that",
    ),
]


def markdown() -> str:
    """The page docs/compatibility.md."""
    plain = ", ".join(f"`{row.name}`" for row in AFTER if not row.note)
    return f"""\
# Optimizers and wrappers

Where Excitation goes with each optimizer and wrapper that Optax 0.2.8 exports, and with Flax's training loops. This
page is what `python tests/optimizer_table.py` prints; `tests/test_contract.py` holds every name on it to what it says
here, by training a small MoE beside one that is scaled by hand.

The parts that optimizers are made of (`scale_by_adam`, `clip_by_global_norm`, `add_decayed_weights`, ...) go into an
`optax.chain` in any order: what stands before Excitation is scaled by it, and what stands after it is not. It has to
stand after whatever normalizes gradients.

## After it: `chain(optimizer, scale_by_excitation(...))`

With nothing to watch: {plain}.

And with something:

| optimizer | what to know |
|---|---|
{_grouped(AFTER)}

## Inside it: `wrapper(chain(optimizer, scale_by_excitation(...)))`

| wrapper | what to know |
|---|---|
{_grouped(INSIDE)}

## Not supported

Each of these raises an error at the first update: they never train without Excitation in silence.

| optimizer or wrapper | why |
|---|---|
{_grouped(NO)}

## Flax

`tx` ends with `scale_by_excitation(...)`; `update` and `apply_gradients` are given `utilization=`.

| loop | works | what to know |
|---|---|---|
{chr(10).join(f"| `{row.name}` | {'yes' if row.works else 'no'} | {row.note} |" for row in FLAX)}
"""


def _grouped(rows: list[Row]) -> str:
    """Table rows, those with the same note as one, in the order in which notes come up."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        if row.note or row.where != "after":
            by_note.setdefault(row.note, []).append(f"`{row.name}`")
    return "\n".join(f"| {', '.join(names)} | {note} |" for note, names in by_note.items())


if __name__ == "__main__":
    print(markdown(), end="")
