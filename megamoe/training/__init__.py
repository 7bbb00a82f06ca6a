"""Training: a layer whose experts are parameters, and its backward pass in waves; numerics.md has the contract."""

from megamoe.training.layer import TrainableMoE

__all__ = ["TrainableMoE"]
