"""Every optimizer and wrapper that Optax 0.2.8 exports, and where Excitation goes with each; and Flax's training loops.

`python -m tools.optimizer_table` prints docs/compatibility.md. `tests/test_contract.py` tests every row.
"""

import functools
import operator
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state
from optax import contrib

import excitation_optax
from excitation_optax import flax as excitation_flax

Tx = Any  # an optax.GradientTransformation, or optax.MultiSteps


class Row(NamedTuple):
    """One optimizer or wrapper.

    Attributes:
      name: as users write it.
      make: a function of nothing that returns the optimizer; for a wrapper, a function of the optimizer to wrap.
      note: what a user must know.
    """

    name: str
    make: Callable[..., Tx]
    note: str = ""


def optimizers(note: str, calls: str, **kwargs: Any) -> list[Row]:
    """Rows of optimizers with the same note: `adam 0.03, lion 0.01` has their names in `optax` and learning rates."""
    rows = []
    for name, *learning_rate in map(str.split, calls.split(", ")):
        make = functools.partial(operator.attrgetter(name)(optax), *map(float, learning_rate), **kwargs)
        rows.append(Row(f"optax.{name}", make, note))
    return rows


DECAY = "decoupled weight decay is scaled too; a [recipe](recipes.md#weight-decay-that-is-not-scaled) avoids it"
LINE_SEARCH = "`value_fn` must accept `utilization=`; the search tests the unscaled step"
OWN_PARAMETERS = (
    "it stores its own copy of the parameters; with Excitation outside, that copy and the model drift apart"
)

AFTER = [
    *optimizers("", "adabelief 0.03, adadelta 10, adagrad 0.1, adam 0.03, adamax 0.03, amsgrad 0.03, nadam 0.03"),
    *optimizers("", "optimistic_adam 0.01", optimism=0.01),
    *optimizers("", "optimistic_adam_v2 0.01, optimistic_gradient_descent 0.1, radam 0.03, rmsprop 0.01, sgd 0.1"),
    *optimizers("", "sign_sgd 0.01, signum 0.01, sm3 0.1, yogi 0.01"),
    *optimizers("", "contrib.acprop 0.01, contrib.adopt 0.03, contrib.madgrad 0.03"),
    *optimizers("", "adafactor 0.03", min_dim_size_to_factor=2),
    *optimizers("", "contrib.galore 0.03", rank=2),
    *optimizers("", "contrib.simplified_ademamix 0.001", alpha=0.0),
    Row("optax.contrib.reduce_on_plateau", lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=3))),
    *optimizers(DECAY, "adamaxw 0.03, adamw 0.03, adan 0.03, lion 0.01, nadamw 0.03, novograd 0.03", weight_decay=0.1),
    *optimizers(DECAY, "contrib.ademamix 0.01, contrib.dadapt_adamw 1, contrib.sophia 0.03", weight_decay=0.1),
    *optimizers("the shrinking of the weights is scaled too", "fromage 0.01"),
    *optimizers("trust ratios come from unscaled updates", "lars 0.5", weight_decay=0.1),
    *optimizers("trust ratios come from unscaled updates; decay as above", "lamb 0.03", weight_decay=0.1),
    *optimizers(LINE_SEARCH, "lbfgs"),
    Row(
        "optax.scale_by_backtracking_linesearch",
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)),
        LINE_SEARCH,
    ),
    *optimizers("the noise is scaled too", "noisy_sgd 0.1", eta=1e-4, key=0),
    *optimizers(
        "the step size comes from the unscaled step", "polyak_sgd 0.3, contrib.momo 0.3, contrib.momo_adam 0.03"
    ),
    *optimizers("its own step sizes do not change", "rprop 0.01"),
    *optimizers("its bets use the unscaled gradients", "contrib.cocob"),
    *optimizers("its distance includes the scaled steps", "contrib.dog 1, contrib.dowg 1, contrib.prodigy 1"),
    *optimizers(
        "utilization is computed from the data: the privacy guarantee does not cover it",
        "contrib.dpsgd 0.1",
        **{"l2_norm_clip": 1.0, "noise_multiplier": 0.01, "seed": 0},
    ),
    *optimizers("Adam trains the parameters that are not matrices", "contrib.muon 0.03"),
    Row("optax.flatten", lambda: optax.flatten(optax.adam(0.03)), "not inside: it hides the paths"),
    Row(
        "optax.contrib.split_real_and_imaginary",
        lambda: contrib.split_real_and_imaginary(optax.adam(0.03)),
        "not inside: it forwards no extra arguments",
    ),
]

INSIDE = [
    Row("optax.chain", optax.chain),
    Row("optax.named_chain", lambda tx: optax.named_chain(("inner", tx))),
    Row("optax.with_extra_args_support", optax.with_extra_args_support),
    Row("optax.masked", lambda tx: optax.masked(tx, {"router": True, "experts": True})),
    Row(
        "optax.selective_transform",
        lambda tx: optax.selective_transform(tx, freeze_mask={"router": False, "experts": False}),
    ),
    Row("optax.conditionally_transform", lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0)),
    Row("optax.conditionally_mask", lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0)),
    Row(
        "optax.partition",
        lambda tx: optax.partition({"a": tx, "b": tx}, {"router": "a", "experts": "b"}),
        "also under its old name multi_transform",
    ),
    Row(
        "optax.apply_if_finite",
        lambda tx: optax.apply_if_finite(tx, 3),
        "it checks gradients only; counts from `count_routing` and the like are always finite",
    ),
    Row(
        "optax.inject_hyperparams",
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(1.0),
        'for `scale_by_excitation` itself: `static_args=("strategy", "expert_axis", "component", "axis_name")`',
    ),
    Row(
        "optax.apply_every",
        lambda tx: optax.chain(tx, optax.apply_every(2)),
        "as `chain(optimizer, scale_by_excitation(...), apply_every(k))`: each step is scaled by its own utilization",
    ),
    Row(
        "optax.MultiSteps",
        lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
        "it forwards only the last micro-batch's utilization: wrap it in `accumulate_utilization`, or sum gradients "
        "and `RoutingCounts` in a `lax.scan`, then update once",
    ),
    Row("optax.contrib.mechanize", contrib.mechanize, OWN_PARAMETERS),
    Row("optax.contrib.schedule_free", lambda tx: contrib.schedule_free(tx, learning_rate=0.1), OWN_PARAMETERS),
    Row(
        "optax.contrib.schedule_free_sgd",
        lambda tx: contrib.schedule_free(optax.chain(tx), learning_rate=0.1),
        "as `schedule_free(chain(sgd(...), scale_by_excitation(...)), ...)`",
    ),
    Row(
        "optax.contrib.schedule_free_adamw",
        lambda tx: contrib.schedule_free(optax.chain(tx, optax.add_decayed_weights(-0.01)), learning_rate=0.1),
        "as `schedule_free(chain(scale_by_rms(...), scale_by_learning_rate(...), scale_by_excitation(...)), ...)`",
    ),
]

NO = [
    Row(
        "optax.lookahead",
        lambda tx: optax.lookahead(tx, 5, 0.5),
        "it forwards no extra arguments, and stores its own copy of the parameters",
    ),
    Row(
        "optax.contrib.sam",
        lambda tx: contrib.sam(tx, optax.chain(contrib.normalize(), optax.sgd(0.05))),
        "it accepts no extra arguments",
    ),
    Row("optax.flatten (around)", optax.flatten, "it hides the paths; use Excitation after it"),
    Row(
        "optax.contrib.split_real_and_imaginary (around)",
        contrib.split_real_and_imaginary,
        "it forwards no extra arguments; use Excitation after it",
    ),
    Row(
        "optax.chain(MultiSteps(...).gradient_transformation(), ...)",
        lambda tx: optax.chain(optax.MultiSteps(tx, 2).gradient_transformation(), optax.identity()),
        "it drops extra arguments",
    ),
]

Update = Callable[[Any, Any], Any]  # of gradients and utilization; returns the new parameters


class FlaxRow(NamedTuple):
    """One way to update parameters with Flax.

    Attributes:
      name: as users write it; `tx` ends with Excitation.
      start: a function of an optimizer and parameters that returns the update.
      wrap: the wrapper around `tx`, if any.
      works: whether the loop forwards the utilization.
      note: what a user must know.
    """

    name: str
    start: Callable[[Tx, Any], Update]
    wrap: Callable[[Tx], Tx] = lambda tx: tx
    works: bool = True
    note: str = ""


class _Model(nnx.Module):
    """Parameters as an NNX module has them: `router`, `experts/kernel`, `experts/bias`."""

    def __init__(self, params: Any):
        self.router = nnx.Param(params["router"])
        self.experts = nnx.Dict({name: nnx.Param(value) for name, value in params["experts"].items()})


def _nnx(tx: Tx, params: Any, make: Any = nnx.Optimizer) -> Update:
    model = _Model(params)
    optimizer = make(model, tx, wrt=nnx.Param)
    first = () if make is nnx.ModelAndOptimizer else (model,)
    structure = jax.tree.structure(nnx.state(model, nnx.Param))

    def update(grads, utilization):
        grads = jax.tree.unflatten(structure, jax.tree.leaves(grads))
        optimizer.update(*first, grads, utilization=utilization)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return update


def _linen(tx: Tx, params: Any, kind: Any = excitation_flax.TrainState) -> Update:
    state = kind.create(apply_fn=None, params=params, tx=tx)

    def update(grads, utilization):
        nonlocal state
        state = state.apply_gradients(grads=grads, utilization=utilization)
        return state.params

    return update


def _accumulate_two(tx: Tx) -> Tx:
    like = {"experts": excitation_optax.RoutingCounts(jnp.zeros(4), jnp.zeros(()))}
    return excitation_optax.accumulate_utilization(_two_steps(tx), like)


def _two_steps(tx: Tx) -> Tx:
    return optax.MultiSteps(tx, 2)


LAST = "only the last micro-batch's utilization, as in Optax"
FLAX = [
    FlaxRow("nnx.Optimizer(model, tx, wrt=nnx.Param)", _nnx),
    FlaxRow("nnx.Optimizer(model, optax.MultiSteps(tx, k), ...)", _nnx, _two_steps, note=LAST),
    FlaxRow(
        "nnx.Optimizer(model, accumulate_utilization(optax.MultiSteps(tx, k), like), ...)",
        _nnx,
        _accumulate_two,
        note="the utilization of all micro-batches; requires `RoutingCounts`",
    ),
    FlaxRow("nnx.Optimizer(model, apply_if_finite(tx, ...), ...)", _nnx, lambda tx: optax.apply_if_finite(tx, 5)),
    FlaxRow(
        "nnx.Optimizer(model, optax.contrib.schedule_free(tx, ...), ...)",
        _nnx,
        lambda tx: contrib.schedule_free(tx, 0.1),
    ),
    FlaxRow(
        "nnx.ModelAndOptimizer(model, tx)",
        lambda tx, params: _nnx(tx, params, nnx.ModelAndOptimizer),
        note="deprecated by Flax",
    ),
    FlaxRow("excitation_optax.flax.TrainState", _linen, note="for Linen"),
    FlaxRow("excitation_optax.flax.TrainState, with optax.MultiSteps(tx, k)", _linen, _two_steps, note=LAST),
    FlaxRow(
        "flax.training.train_state.TrainState",
        lambda tx, params: _linen(tx, params, train_state.TrainState),
        works=False,
        note="it passes no extra arguments to `tx.update`; use `excitation_optax.flax.TrainState`",
    ),
]


def markdown() -> str:
    """The page docs/compatibility.md."""
    plain = ", ".join(f"`{row.name}`" for row in AFTER if not row.note)
    flax = "\n".join(f"| `{row.name}` | {'yes' if row.works else 'no'} | {row.note} |" for row in FLAX)
    tables = {"after": _grouped([row for row in AFTER if row.note]), "inside": _grouped(INSIDE), "no": _grouped(NO)}
    page = pathlib.Path(__file__).with_suffix(".md").read_text()
    return page.format(plain=plain, flax=flax, **tables)


def _grouped(rows: list[Row]) -> str:
    """Table rows. Optimizers with the same note share a row."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        by_note.setdefault(row.note, []).append(f"`{row.name}`")
    return "\n".join(f"| {', '.join(names)} | {note} |" for note, names in by_note.items())


if __name__ == "__main__":
    print(markdown(), end="")
