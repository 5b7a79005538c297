"""Groups of runs that train stacked, and what may differ between the runs of a seed.

Axis letters: S seeds, M members (the runs of a seed).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import excitation_optax
from examples.reproduction import configs, store


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that train stacked: `runs[s][m]`, the same members for every seed."""

    runs: tuple[tuple[Any, ...], ...]

    def __iter__(self):
        return itertools.chain.from_iterable(self.runs)

    @property
    def epochs(self) -> int:
        """The epochs of all its runs together."""
        return sum(run.epochs for run in self)


class Member(NamedTuple):
    """What may differ between the runs of a seed; in a group every array has a leading axis of members."""

    strategy: Any  # its number in the program's strategies
    gamma: Any
    learning_rate: Any
    component: Any = None  # its number in the program's components
    expert_rate: Any = None  # this and the next: only where runs have it
    load_balancing: Any = None


def shared_of(run: Any) -> Any:
    """What runs must have in common to be stacked: everything but what a `Member` and a seed are made of."""
    default = type(run)()
    fields = {name: getattr(default, name) for name in ("seed", *Member._fields) if hasattr(default, name)}
    return dataclasses.replace(run, **fields)


def members_of(group: Group) -> tuple[tuple[str, ...], tuple[configs.Component, ...], Member]:
    """The strategies and components of a group, and its members."""
    runs, found = group.runs[0], {}
    several = {name: tuple(sorted({getattr(run, name) for run in group})) for name in ("strategy", "component")}
    for name in (name for name in Member._fields if hasattr(runs[0], name)):
        values = [getattr(run, name) for run in runs]
        numbered = [several[name].index(value) for value in values] if name in several else None
        found[name] = jnp.array(values, jnp.float32) if numbered is None else jnp.array(numbered)
    return several["strategy"], several["component"], Member(**found)


def missing(group: Group, results: store.Results) -> Group:
    """The group without the seeds and the members of which all runs are on file."""
    rows = [row for row in group.runs if any(run not in results for run in row)]
    columns = [column for column in zip(*rows, strict=True) if any(run not in results for run in column)]
    return Group(tuple(zip(*columns, strict=True)))


def any_of(strategies: Sequence[str], number: jax.Array) -> Any:
    """A strategy that is the one of this number, which may be traced."""
    baseline = lambda utilization, gamma: jnp.ones_like(utilization)
    functions = [baseline if name == "vanilla" else getattr(excitation_optax, name) for name in strategies]

    def chosen(utilization, gamma, *, key):
        values = [
            f(utilization, gamma, **({"key": key} if name == "random_boost" else {}))
            for name, f in zip(strategies, functions, strict=True)
        ]
        return jnp.stack(values)[number]

    return chosen if "random_boost" in strategies else functools.partial(chosen, key=None)


def excite(strategies: Sequence[str], components: Sequence[Any], member: Member, expert_axis: Any, seed: Any) -> Any:
    """Excitation by the member's strategy and component, whose numbers may be traced."""
    strategy = any_of(strategies, member.strategy)
    transforms = [
        excitation_optax.scale_by_excitation(
            strategy, member.gamma, component=component, expert_axis=expert_axis, seed=seed
        )
        for component in components
    ]
    if len(transforms) == 1:
        return transforms[0]

    def update(updates, state, params=None, **extra_args):
        outcomes = [transform.update(updates, state, params, **extra_args) for transform in transforms]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[member.component], *outcomes)

    return optax.GradientTransformationExtraArgs(transforms[0].init, update)
