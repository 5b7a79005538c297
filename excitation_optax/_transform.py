"""The gradient transformation: every expert's update times its excitation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from excitation_optax import _experts, _routing, _scaling, _strategies


class ScaleByExcitationState(NamedTuple):
    """State where gamma is a schedule or the strategy is random; otherwise it is `optax.EmptyState`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, updates made so far


def scale_by_excitation(
    strategy: _strategies.Strategy = _strategies.positive_sum,
    gamma: optax.ScalarOrSchedule = 1.0,
    *,
    expert_axis: Any = None,
    component: _scaling.Component = "both",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each expert's update by its excitation, a function of how much of the batch was routed to it.

    .. math::
      \Delta\theta_t^{(k), Exc} = \Phi(u_k, \gamma) \cdot \Delta\theta_t^{(k)}

    Chain it **after** any optimizer whose update is simply added to the parameters (so that it scales the whole update,
    decoupled weight decay included), and **inside** `optax.contrib.schedule_free` and `optax.contrib.mechanize`, which
    keep parameters of their own. It has no state of a parameter's size and no learnable parameter.

    Every update needs the utilization of the batch that its gradients came from, as the keyword `utilization`: a
    *partial tree prefix* of the parameters. A leaf at path p scales every parameter at or below p; what no path covers
    is left untouched, bit for bit. A leaf is an array of fractions `[..., E]`, or a `RoutingCounts`; None counts as
    absent. Paths are compared by plain names, so that a nested dict addresses any kind of tree; a slash in a name
    separates two, as in Haiku's, so that `{"moe/experts": u}` is `{"moe": {"experts": u}}`, and `{"moe/{up,down}": u}`
    names two parameters of one layer.

    Args:
      strategy: Phi, a callable `(utilization [..., E], gamma) -> excitation [..., E]`. One with a keyword `key` is
        random: its state is a count of steps, its key `fold_in(key(seed), count)`, the same for all layers.
      gamma: the intensity, not negative; a number, a traced scalar, or a schedule of the step (the state is then a
        count of steps).
      expert_axis: the parameter axes that utilization's axes run along. None: the leading ones in order (parameters
        `[E, ...]` for utilization `[E]`, `[L, E, ...]` for `[L, E]`). An int, for utilization `[E]` (-1: the neurons of
        a Dense kernel and bias). A tuple of ints, one for each axis of utilization, the experts' last (`(1, 0)`:
        parameters `[E, L, ...]` for utilization `[L, E]`). `children(pattern)`: the experts are separate children of
        the path. Where layers differ, a partial prefix tree of these; or a callable of the updates that returns one.
      component: `"both"` applies Phi. `"direction"` divides by r, so that the step of the layer keeps its length and
        only moves between experts. `"norm"` multiplies every expert of the layer by r, so that only the length changes.
        r is the norm of the layer's excited update over that of the plain one. With these two, a NaN in one expert
        makes the whole layer NaN, and inside `shard_map` and `pmap` every array must be whole on each device.
      seed: for random strategies.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: here, if strategy, gamma or expert_axis is malformed; while tracing an update, if utilization is
        missing, a path matches no parameter, an axis does not fit, the strategy returns a wrong shape, or the state was
        made for other arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import excitation_optax
      >>> params = {"router": jnp.ones((2, 3)), "experts": jnp.ones((3, 2))}
      >>> tx = optax.chain(optax.sgd(0.1), excitation_optax.scale_by_excitation(excitation_optax.zero_sum))
      >>> state = tx.init(params)
      >>> utilization = {"experts": jnp.array([0.1, 0.2, 0.3])}
      >>> updates, state = tx.update(params, state, params, utilization=utilization)
      >>> updates["experts"]
      Array([[-0.05, -0.05],
             [-0.1 , -0.1 ],
             [-0.15, -0.15]], dtype=float32)

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, equations 2 to 4.
    """
    is_random = _strategies.is_random(strategy)
    counts_steps = is_random or callable(gamma)
    if not callable(gamma):
        _check_gamma(gamma)
    if component not in _scaling.COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(_scaling.COMPONENTS)}; got {component!r}.")
    if not _experts.is_function(expert_axis):
        _experts.specs_by_path(expert_axis)

    def init_fn(params):
        del params
        return ScaleByExcitationState(jnp.zeros([], jnp.int32)) if counts_steps else optax.EmptyState()

    def update_fn(updates, state, params=None, *, utilization=None, **extra_args):
        del params
        _check_state(state, counts_steps)
        step_gamma = gamma(state.count) if callable(gamma) else gamma
        _check_gamma(step_gamma)
        key = jax.random.fold_in(jax.random.key(seed), state.count) if is_random else None

        entries = _experts.utilization_by_path(utilization, other_arguments=extra_args)
        matches = _experts.match_experts(updates, entries, expert_axis)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_experts.is_masked)
        layers: dict[_experts.Path, list[tuple[int, _scaling.Placement]]] = {path: [] for path in entries}
        for number, match in enumerate(matches.values()):
            if match is not None:
                place = _scaling.Placement(tuple((axis,) for axis in match.axes), match.child)
                layers[match.entry].append((number, place))
        for path, layer in layers.items():
            phi = _excite(path, entries[path], strategy, step_gamma, key)
            if layer:
                numbers, placements = zip(*layer, strict=True)
                arrays = [jnp.asarray(leaves[number]) for number in numbers]
                scaled = _scaling.scale_layer(phi, arrays, placements, component)
                for number, update in zip(numbers, scaled, strict=True):
                    leaves[number] = update
        if counts_steps:
            state = ScaleByExcitationState(optax.safe_increment(state.count))
        return treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def excitation(
    utilization: Any,
    strategy: _strategies.Strategy = _strategies.positive_sum,
    gamma: jax.typing.ArrayLike = 1.0,
    *,
    key: jax.Array | None = None,
) -> Any:
    """The excitation Phi of every expert, as `scale_by_excitation` applies it: for logging, and for your own scaling.

    Args:
      utilization: a tree whose leaves are fractions `[..., E]` or `RoutingCounts`.
      strategy: Phi, a callable `(utilization [..., E], gamma) -> excitation [..., E]`.
      gamma: the intensity, not negative; of a schedule, its value at the step in question.
      key: for random strategies; the transform's own at step `t` is `fold_in(key(seed), t)`.

    Returns:
      A tree of the same structure, its leaves Phi `[..., E]`, float32 or wider.

    Raises:
      ValueError: if there is no utilization, gamma is malformed, a random strategy is given no key, or the strategy
        returns a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import excitation_optax
      >>> excitation_optax.excitation({"experts": jnp.array([0.1, 0.2, 0.3])}, excitation_optax.zero_sum)
      {'experts': Array([0.5, 1. , 1.5], dtype=float32)}

    References:
      Shaier, `Excitation: Momentum For Experts <https://arxiv.org/abs/2602.21798>`_, section 3.2.
    """
    is_random = _strategies.is_random(strategy)
    if is_random and key is None:
        raise ValueError(f"The strategy {_strategies.name(strategy)} is random: pass key=, a jax.random key.")
    _check_gamma(gamma)
    excitations = [
        _excite(path, leaf, strategy, gamma, key if is_random else None)
        for path, leaf in _experts.utilization_by_path(utilization).items()
    ]
    treedef = jax.tree.structure(utilization, is_leaf=_routing.is_counts)
    return treedef.unflatten(excitations)


def _excite(path: _experts.Path, leaf: Any, strategy: _strategies.Strategy, gamma: Any, key: Any) -> jax.Array:
    """Phi of one layer, or stack of layers, in float32 or wider."""
    u = leaf.utilization if isinstance(leaf, _routing.RoutingCounts) else leaf
    u = _scaling.replicated(_strategies.float32_or_wider(u))
    phi = strategy(u, gamma) if key is None else strategy(u, gamma, key=key)
    if np.shape(phi) != u.shape:
        raise ValueError(
            f"The strategy {_strategies.name(strategy)} turned the utilization at {_experts.show(path)} from "
            f"{list(u.shape)} into {_experts.show_value(phi)}. It must return the excitation of every expert, "
            f"{list(u.shape)}."
        )
    return _scaling.replicated(_strategies.float32_or_wider(phi))


def _check_gamma(gamma: Any) -> None:
    """What is traced cannot be checked."""
    array = isinstance(gamma, (np.generic, np.ndarray, jax.Array))
    if not (
        isinstance(gamma, (int, float))
        or (array and gamma.ndim == 0 and any(jnp.issubdtype(gamma.dtype, kind) for kind in (np.integer, np.floating)))
    ):
        raise ValueError(
            f"gamma must be a scalar, the same for all experts; got {_experts.show_value(gamma)}. "
            "Of a schedule, excitation() takes the value at the step in question."
        )
    if not isinstance(gamma, jax.core.Tracer) and not 0 <= float(gamma) < math.inf:
        raise ValueError(
            f"gamma must be a finite number that is not negative; got {gamma!r}. "
            "To favour idle experts, use the strategy `inverted`."
        )


def _check_state(state: Any, counts_steps: bool) -> None:
    expected = ScaleByExcitationState if counts_steps else optax.EmptyState
    if not isinstance(state, expected):
        raise ValueError(
            f"The optimizer state was made for other arguments: scale_by_excitation expects {expected.__name__} with "
            f"this strategy and gamma, and received {type(state).__name__}. Make it anew with tx.init(params); no "
            "parameter-sized state is lost by that."
        )
