"""The gradient transformation: each expert's update times its excitation."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from excitation_optax import _arrays, _experts, _paths, _routing, _scaling, _strategies


@_arrays.exportable
class ScaleByExcitationState(NamedTuple):
    """The state if gamma is a schedule or the strategy is random; otherwise it is `optax.EmptyState`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, updates made so far


def scale_by_excitation(
    strategy: _strategies.Strategy = _strategies.positive_sum,
    gamma: optax.ScalarOrSchedule = 1.0,
    *,
    expert_axis: Any = None,
    component: _scaling.Component = "both",
    axis_name: Hashable | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each expert's update by its excitation, a function of how much of the batch was routed to it.

    .. math:: \Delta\theta_t^{(k), Exc} = \Phi(u_k, \gamma) \cdot \Delta\theta_t^{(k)} \qquad \text{(equations 2 to 4)}

    Chain it **after** any optimizer whose update is added to the parameters; it then scales the whole update, decoupled
    weight decay included. Put it **inside** `optax.contrib.schedule_free` and `optax.contrib.mechanize`, which keep
    parameters of their own.

    Every update requires the keyword `utilization`, the routing of the batch that its gradients came from: a mapping
    (or any tree) from path patterns to fractions `[..., E]` or `RoutingCounts`. One entry is one layer, or one stack of
    layers. Every parameter at or below a node that a pattern matches is scaled; all others stay the same, bit for bit.
    Nested dicts and `/` mean the same, `None` is absent, `""` is the root of the tree.

    In a pattern such as `moe/experts`, `*` stands for any characters of one name, `?` for one character, and `**` for
    any number of names, also none. `{w_in,w_out}` stands for either; both are one layer. `expert_{expert}` stands for
    the number of the expert that owns the whole subtree.

    Args:
      strategy: Phi, a callable `(utilization [..., E], gamma) -> excitation [..., E]`. If it has an unbound keyword
        `key`, it is random and gets `fold_in(key(seed), step)`, the same for all layers.
      gamma: the intensity, not negative; a number, a traced scalar, or a schedule of the step.
      expert_axis: the axes of a parameter that the axes of its utilization run along. None: the leading axes in order
        (parameters `[L, E, ...]` for utilization `[L, E]`). An int, for utilization `[E]` (-1: the neurons of a Dense
        kernel and bias). A tuple with an element for each axis of the utilization, experts last (`(1, 0)`: parameters
        `[E, L, ...]`). An element that is a tuple spreads one axis over several, the first counting most (`((0, 1),)`:
        parameters `[E1, E2, ...]` for utilization `[E1 * E2]`). A mapping from path patterns to these. A callable of
        the updates that returns any of these. For entries with `{expert}` it names the axes of the layers only.
      component: `"both"` multiplies by Phi. Let r be the norm of a layer's excited update over the norm of its plain
        update. `"direction"` multiplies by Phi / r, so the layer's step keeps its length. `"norm"` multiplies by r, so
        the layer's step keeps its direction. With these two, a NaN in one expert makes the whole layer NaN, masked
        arrays are not in the norm, and inside `jax.shard_map` and `jax.pmap` each device must hold whole arrays.
      axis_name: the mapped axis, or a tuple of them, under `jax.pmap` or `jax.shard_map`, over which `RoutingCounts`
        are summed. Counts that you summed yourself stay right, since their quotient does not change.
      seed: for random strategies.

    Raises:
      ValueError: here, if an argument is malformed; while tracing an update, if the utilization, the parameters, the
        strategy's result or the state do not fit each other.

    Example:
      >>> params = {"router": jnp.ones((2, 3)), "experts": jnp.ones((3, 2))}
      >>> tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> state = tx.init(params)
      >>> utilization = {"experts": jnp.array([0.1, 0.2, 0.3])}
      >>> updates, state = tx.update(params, state, params, utilization=utilization)
      >>> updates["experts"][:, 0]
      Array([-0.05, -0.1 , -0.15], dtype=float32)
    """
    is_random = _strategies.is_random(strategy)
    counts_steps = is_random or callable(gamma)
    if not callable(gamma):
        _check_gamma(gamma)
    if component not in _scaling.COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(_scaling.COMPONENTS)}; got {component!r}.")
    if not callable(expert_axis):
        _experts.specs(expert_axis)  # raises if it is malformed
    if not _arrays.is_scalar(seed, jnp.integer) or (isinstance(seed, int) and not -(2**63) <= seed < 2**63):
        raise ValueError(f"seed must be an integer of at most 64 bits; got {_arrays.show_value(seed)}.")

    def init_fn(params):
        del params
        return ScaleByExcitationState(jnp.zeros([], jnp.int32)) if counts_steps else optax.EmptyState()

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        del params
        _check_state(state, counts_steps)
        step_gamma = gamma(state.count) if callable(gamma) else gamma
        _check_gamma(step_gamma)
        key = jax.random.fold_in(jax.random.key(seed), state.count) if is_random else None

        entries = _experts.entries_of(utilization, other_arguments=extra_args)
        tree = _paths.Tree(updates)
        layers = _experts.match_experts(tree, entries, expert_axis)
        entries = entries if axis_name is None else _routing.sum_over(axis_name, entries)
        for pattern, layer in layers.items():
            phi = _excite(pattern, entries[pattern], strategy, step_gamma, key)
            arrays = [jnp.asarray(tree.leaves[leaf]) for leaf in layer.placements]
            placements = tuple(layer.placements.values())
            scaled = _scaling.scale_layer(phi, arrays, placements, component) if arrays else []
            for leaf, update in zip(layer.placements, scaled, strict=True):
                tree.leaves[leaf] = update
        if counts_steps:
            state = ScaleByExcitationState(optax.safe_increment(state.count))
        return tree.treedef.unflatten(tree.leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def excitation(
    utilization: Any,
    strategy: _strategies.Strategy = _strategies.positive_sum,
    gamma: jax.typing.ArrayLike = 1.0,
    *,
    key: jax.Array | None = None,
) -> Any:
    """Returns the tree of the excitations Phi `[..., E]`, as `scale_by_excitation` applies them (section 3.2).

    Args:
      utilization: a tree whose leaves are fractions `[..., E]` or `RoutingCounts`.
      strategy: as for `scale_by_excitation`.
      gamma: as for `scale_by_excitation`, but instead of a schedule its value at one step.
      key: required for random strategies; the transform's own at step `t` is `fold_in(key(seed), t)`.

    Example:
      >>> excitation_optax.excitation({"experts": jnp.array([0.1, 0.2, 0.3])}, excitation_optax.zero_sum)
      {'experts': Array([0.5, 1. , 1.5], dtype=float32)}
    """
    is_random = _strategies.is_random(strategy)
    if is_random and key is None:
        raise ValueError(f"The strategy {_strategies.name(strategy)} is random: pass key=, a jax.random key.")
    _check_gamma(gamma)
    entries = _experts.entries_of(utilization)
    phi = [_excite(path, leaf, strategy, gamma, key if is_random else None) for path, leaf in entries.items()]
    return jax.tree.structure(utilization, is_leaf=_routing.is_counts).unflatten(phi)


def _excite(path: str, leaf: Any, strategy: _strategies.Strategy, gamma: Any, key: Any) -> jax.Array:
    """Phi of one layer, or stack of layers, in float32 or wider."""
    u = _scaling.replicated(_routing.fractions(leaf))
    phi = strategy(u, gamma) if key is None else strategy(u, gamma, key=key)
    if np.shape(phi) != u.shape:
        raise ValueError(
            f"The strategy {_strategies.name(strategy)} turned the utilization at {path or _paths.ROOT} from "
            f"{list(u.shape)} into {_arrays.show_value(phi)}. It must return the excitation of every expert."
        )
    return _scaling.replicated(_arrays.float32_or_wider(phi))


def _check_gamma(gamma: Any) -> None:
    hint = " It is the same for all experts. excitation() takes a schedule's value at one step."
    _arrays.check_finite("gamma", gamma, hint=f"{hint} To favor idle experts, use the strategy `inverted`.")


def _check_state(state: Any, counts_steps: bool) -> None:
    expected = ScaleByExcitationState if counts_steps else optax.EmptyState
    if not isinstance(state, expected):
        raise ValueError(
            f"scale_by_excitation expects the state {expected.__name__} with this strategy and gamma; got "
            f"{type(state).__name__}. Its state is at most a count of steps, so take it from tx.init(params). If the "
            "state was restored from a checkpoint without a target, give it one: the state of tx.init(params). If you "
            "add Excitation to a saved run, restore the old state with the old optimizer, then pass "
            "(old_state, excitation.init(params)) to optax.chain(old_optimizer, excitation)."
        )
