"""Training on many devices: a mesh, checkpoints, and what to type on GPU nodes and TPU slices (README.md)."""
