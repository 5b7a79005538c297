"""The gradient transformation, which multiplies updates by excitations, and the arithmetic of one layer.

A layer is what one utilization entry covers: one array for all experts, several, or a set of arrays per expert. A stack
of layers has leading axes; each of its layers is scaled by itself. Axis letters: E experts, L layers.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from excitation_optax import _arrays, _experts, _paths, _routing, _strategies

Component = Literal["both", "direction", "norm"]
Placements = tuple[_experts.Placement, ...]


class ScaleByExcitationState(NamedTuple):
    """The state if gamma is a schedule or the strategy is random; otherwise it is `optax.EmptyState`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, updates made so far


def scale_by_excitation(
    strategy: _strategies.Strategy = _strategies.positive_sum,
    gamma: optax.ScalarOrSchedule = 1.0,
    *,
    expert_axis: Any = None,
    component: Component = "both",
    axis_name: Hashable | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each expert's update by its excitation, a function of how much of the batch was routed to it.

    .. math:: \Delta\theta_t^{(k), Exc} = \Phi(u_k, \gamma) \cdot \Delta\theta_t^{(k)} \qquad \text{(equations 2 to 4)}

    Chain it **after** any optimizer whose update is added to the parameters; it then scales the whole update, decoupled
    weight decay included. Put it **inside** `optax.contrib.schedule_free` and `optax.contrib.mechanize`.

    Every update requires the keyword `utilization`, the routing of its gradients' batch: a mapping (or any tree, where
    `None` is absent) from path patterns to fractions `[..., E]` or `RoutingCounts`. An entry is a layer, or a stack of
    layers. Every parameter at or below a node that a pattern matches is scaled; all others stay the same, bit for bit.

    In a pattern such as `moe/experts`, `/` and nested dicts mean the same, and `""` is the root. `*` stands for any
    characters of one name, `?` for one, and `**` for any number of names, or none. `{w_in,w_out}` stands for either;
    both are one layer. `expert_{expert}` stands for the number of the expert that owns the whole subtree.

    Args:
      strategy: Phi, a callable `(utilization [..., E], gamma) -> excitation [..., E]`. If it has an unbound keyword
        `key`, it is random and gets `fold_in(key(seed), step)`, the same for all layers.
      gamma: the intensity, not negative; a number, a traced scalar, or a schedule of the step.
      expert_axis: the axes of a parameter that the axes of its utilization run along. None: the leading axes in order
        (parameters `[L, E, ...]` for utilization `[L, E]`). An int, for utilization `[E]` (-1: the neurons of a Dense
        kernel and bias). A tuple with an element for each axis of the utilization, experts last (`(1, 0)`: parameters
        `[E, L, ...]`). An element that is a tuple spreads one axis over several, the first counting most (`((0, 1),)`:
        parameters `[E1, E2, ...]` for utilization `[E1 * E2]`). A mapping from path patterns to these, or a callable of
        the updates that returns any of these. For entries with `{expert}` it names the axes of the layers only.
      component: `"both"` multiplies by Phi. Let r be the norm of a layer's excited update over the norm of its plain
        update. `"direction"` multiplies by Phi / r, so the layer's step keeps its length. `"norm"` multiplies by r, so
        the layer's step keeps its direction. With these two, a NaN in one expert makes the whole layer NaN, masked
        arrays are not in the norm, and inside `jax.shard_map` and `jax.pmap` each device must hold whole arrays.
      axis_name: the axis, or axes, of `jax.pmap` or `jax.shard_map` to sum `RoutingCounts` over. Twice does no harm.
      seed: for random strategies.

    Raises:
      ValueError: if an argument is malformed; in an update, if utilization, parameters, excitation or state do not fit.

    Example:
      >>> params = {"router": jnp.ones((2, 3)), "experts": jnp.ones((3, 2))}
      >>> tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> utilization = {"experts": jnp.array([0.1, 0.2, 0.3])}
      >>> updates, state = tx.update(params, tx.init(params), params, utilization=utilization)
      >>> updates["experts"][:, 0]
      Array([-0.05, -0.1 , -0.15], dtype=float32)
    """
    is_random = _strategies.is_random(strategy)
    counts_steps = is_random or callable(gamma)
    if not callable(gamma):
        _check_gamma(gamma)
    if component not in get_args(Component):
        raise ValueError(f"component must be one of {', '.join(get_args(Component))}; got {component!r}.")
    if not callable(expert_axis):
        _experts.specs(expert_axis)  # raises if it is malformed
    if not _arrays.is_scalar(seed, jnp.integer) or (isinstance(seed, int) and not -(2**63) <= seed < 2**63):
        raise ValueError(f"seed must be an integer of at most 64 bits; got {_arrays.show_value(seed)}.")

    def init_fn(params):
        return ScaleByExcitationState(jnp.zeros([], jnp.int32)) if counts_steps else optax.EmptyState()

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        _check_state(state, counts_steps)
        step_gamma = gamma(state.count) if callable(gamma) else gamma
        _check_gamma(step_gamma)
        key = jax.random.fold_in(jax.random.key(seed), state.count) if is_random else None

        entries = _experts.entries_of(utilization, other_arguments=extra_args)
        tree = _paths.Tree(updates)
        layers = _experts.match_experts(tree, entries, expert_axis)
        entries = entries if axis_name is None else _routing.sum_over(axis_name, entries)
        for pattern, placements in layers.items():
            phi = _excite(pattern, entries[pattern], strategy, step_gamma, key)
            arrays = [jnp.asarray(tree.leaves[leaf]) for leaf in placements]
            scaled = scale_layer(phi, arrays, tuple(placements.values()), component) if arrays else []
            for leaf, update in zip(placements, scaled, strict=True):
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
      gamma: as for `scale_by_excitation`; for a schedule, pass its value at one step.
      key: required for random strategies; that of the transform at step `t` is `fold_in(key(seed), t)`.

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
    u = replicated(_routing.fractions(leaf))
    phi = strategy(u, gamma) if key is None else strategy(u, gamma, key=key)
    if np.shape(phi) != u.shape:
        raise ValueError(
            f"The strategy {_strategies.name(strategy)} turned the utilization at {path or _paths.ROOT} from "
            f"{list(u.shape)} into {_arrays.show_value(phi)}. It must return the excitation of every expert."
        )
    return replicated(_arrays.float32_or_wider(phi))


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


# jit gives one trace per kind of layer: 48 equal layers of 384 arrays are traced once.
@functools.partial(jax.jit, static_argnums=(2, 3))
def scale_layer(
    phi: jax.Array, updates: Sequence[jax.Array], placements: Placements, component: Component
) -> list[jax.Array]:
    """Scales the updates of a layer by phi `[..., E]`, by phi / r, or by r, the ratio of norms; dtypes are kept."""
    if component == "both":
        factor = phi
    else:
        ratio = _norm_ratio(phi, updates, placements)
        direction = _arrays.divide(phi.astype(ratio.dtype), ratio)
        factor = direction if component == "direction" else jnp.broadcast_to(ratio, phi.shape)
    # An index would make XLA compile a kernel for each expert, with all of phi's computation in it: twice as slow.
    masked = functools.cache(lambda expert: jnp.sum(factor, axis=-1, where=np.arange(phi.shape[-1]) == expert))
    scaled = []
    for update, place in zip(updates, placements, strict=True):
        own = factor if place.expert is None else masked(place.expert)
        wide = np.promote_types(factor.dtype, update.dtype)
        scaled.append((_expand(own, update, place).astype(wide) * update.astype(wide)).astype(update.dtype))
    return scaled


def replicated(x: jax.Array) -> jax.Array:
    """Replicates x on a mesh; otherwise XLA shards it like the experts, and sums over them need an all-reduce."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    replicate = jax.sharding.reshard if mesh.explicit_axes else jax.lax.with_sharding_constraint
    return replicate(x, jax.sharding.PartitionSpec())


def _norm_ratio(phi: jax.Array, updates: Sequence[jax.Array], placements: Placements) -> jax.Array:
    """The ratio r of the norm of phi times the update to the norm of the update, `[..., 1]`; 1 where that is 0.

    With each expert's sum of squares s, r ** 2 = sum(phi ** 2 * s) / sum(s). The largest entries are divided out first,
    since float32 squares overflow above 1e19 and vanish below 1e-23.
    """
    wide = functools.reduce(np.promote_types, [jnp.abs(update).dtype for update in updates], phi.dtype)
    absolute = [jnp.abs(update).astype(wide) for update in updates]
    largest = _per_expert(jnp.maximum, absolute, placements, phi.shape)
    divisor = jnp.where(largest == 0, 1, largest)
    own = lambda place: divisor if place.expert is None else divisor[..., place.expert]
    squares = [(a / _expand(own(p), a, p)) ** 2 for a, p in zip(absolute, placements, strict=True)]
    sums = _per_expert(jnp.add, squares, placements, phi.shape)
    # Both cross the devices at once, and only here.
    largest, sums = replicated(jnp.stack([largest, sums]))

    phi = phi.astype(sums.dtype)
    largest_phi = jnp.max(jnp.abs(phi), axis=-1, keepdims=True)
    relative = sums * _arrays.divide(largest, jnp.max(largest, axis=-1, keepdims=True)) ** 2
    before = jnp.sum(relative, axis=-1, keepdims=True)
    after = jnp.sum(_arrays.divide(phi, largest_phi) ** 2 * relative, axis=-1, keepdims=True)
    return jnp.where(before == 0, 1, largest_phi * jnp.sqrt(_arrays.divide(after, before)))


def _per_expert(op: Any, arrays: Sequence[jax.Array], placements: Placements, shape: tuple[int, ...]) -> jax.Array:
    """Reduces arrays by `op`, add or maximum, to one number per expert, `[..., E]`; 0 for one without arrays."""

    def reduced(array: jax.Array, place: _experts.Placement) -> jax.Array:
        axes = [axis for group in place.axes for axis in group]
        kept = op.reduce(array, axis=tuple(axis for axis in range(array.ndim) if axis not in axes))
        kept = jnp.transpose(kept, [sorted(axes).index(axis) for axis in axes])
        if len(axes) == len(place.axes):
            return kept
        return replicated(kept).reshape(shape if place.expert is None else shape[:-1])

    def total(expert: int | None) -> jax.Array:
        parts = [reduced(array, p) for array, p in zip(arrays, placements, strict=True) if p.expert == expert]
        return functools.reduce(op, parts) if parts else jnp.zeros(shape[:-1], arrays[0].dtype)

    apart = placements[0].expert is not None  # a set of arrays for each expert
    return jnp.stack([total(expert) for expert in range(shape[-1])], axis=-1) if apart else total(None)


def _expand(x: jax.Array, array: jax.Array, place: _experts.Placement) -> jax.Array:
    """Reshapes x `[..., E]`, or `[...]` for an array of one expert, so that it broadcasts against the array."""
    axes = [axis for group in place.axes for axis in group]
    x = x.reshape([array.shape[axis] for axis in axes] + [1] * (array.ndim - len(axes)))
    return jnp.moveaxis(x, range(len(axes)), axes)
