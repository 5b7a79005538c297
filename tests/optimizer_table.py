"""Every optimizer and wrapper that Optax 0.2.8 exports, and where Excitation goes with each.

`test_contract.py` holds each row to what it says; `python tests/optimizer_table.py` prints the table of
docs/compatibility.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import optax
from optax import contrib

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
DECAY = "decoupled weight decay is scaled too; the README has the recipe that leaves it alone"

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
        "its `value_fn` must take (and may ignore) `utilization=`; the guarantees of its line search are for the "
        "unscaled step",
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
        "it looks at gradients only: a NaN in the utilization passes; `apply_if_all_finite` stops it",
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


def markdown() -> str:
    """The table for docs/compatibility.md."""
    places = {
        "after": "`chain(optimizer, scale_by_excitation(...))`",
        "inside": "`wrapper(chain(optimizer, scale_by_excitation(...)))`",
        "no": "not supported",
    }
    rows = [f"| `{row.name}` | {row.where} | {row.note} |" for row in AFTER + INSIDE + NO]
    return "\n".join(
        [
            "# Optimizers and wrappers",
            "",
            "Where Excitation goes with each optimizer and wrapper that Optax 0.2.8 exports. `tests/test_contract.py`",
            "runs every row; this page is what `python tests/optimizer_table.py` prints.",
            "",
            *[f"* **{where}**: {meaning}" for where, meaning in places.items()],
            "",
            "| Optimizer or wrapper | Excitation goes | Note |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(markdown(), end="")
