"""Excitation (arXiv 2602.21798) for Optax: scales each expert's update by how much of the batch was routed to it."""

from excitation_optax import metrics
from excitation_optax._accumulate import AccumulateUtilizationState, accumulate_utilization, ema
from excitation_optax._describe import DescribedParameter, Description, describe
from excitation_optax._experts import children
from excitation_optax._guard import ApplyIfAllFiniteState, apply_if_all_finite
from excitation_optax._patterns import by_pattern
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

__all__ = [
    "AccumulateUtilizationState",
    "ApplyIfAllFiniteState",
    "DescribedParameter",
    "Description",
    "RoutingCounts",
    "ScaleByExcitationState",
    "Strategy",
    "accumulate_utilization",
    "apply_if_all_finite",
    "by_pattern",
    "children",
    "clipped",
    "count_active",
    "count_logits",
    "count_routing",
    "describe",
    "ema",
    "excitation",
    "exp_diff",
    "global_exp",
    "inverted",
    "metrics",
    "positive_sum",
    "random_boost",
    "scale_by_excitation",
    "zero_sum",
]
