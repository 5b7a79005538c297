"""Flax NNX models that emit routing, run from a checkout."""
