"""Excitation (arXiv 2602.21798) for Optax: scales each expert's update by how much of the batch was routed to it."""

import contextlib

import jax.export

from excitation_optax import metrics
from excitation_optax._accumulate import (
    AccumulateUtilizationState,
    HoldUtilizationState,
    accumulate_utilization,
    hold_utilization,
)
from excitation_optax._describe import Description, describe
from excitation_optax._routing import RoutingCounts, count_active, count_logits, count_routing
from excitation_optax._strategies import (
    Strategy,
    clipped,
    exp_diff,
    global_exp,
    inverted,
    positive_sum,
    random_boost,
    zero_sum,
)
from excitation_optax._transform import ScaleByExcitationState, excitation, scale_by_excitation

__version__ = "0.1.0"

__all__ = ["ScaleByExcitationState", "excitation", "scale_by_excitation"]
__all__ += ["Strategy", "clipped", "exp_diff", "global_exp", "inverted", "positive_sum", "random_boost", "zero_sum"]
__all__ += ["RoutingCounts", "count_active", "count_logits", "count_routing"]
__all__ += ["AccumulateUtilizationState", "HoldUtilizationState", "accumulate_utilization", "hold_utilization"]
__all__ += ["Description", "describe", "metrics"]

for _state in (RoutingCounts, ScaleByExcitationState, AccumulateUtilizationState, HoldUtilizationState):
    with contextlib.suppress(ValueError):  # if the package is loaded twice, JAX keeps the first registration
        jax.export.register_namedtuple_serialization(_state, serialized_name=f"excitation_optax.{_state.__name__}")
