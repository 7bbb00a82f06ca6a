"""Training: a layer whose experts are parameters, and its backward pass in waves; numerics.md has the contract."""

from megamoe.training.layer import TrainableMoE
from megamoe.training.loop.balance import update_bias
from megamoe.training.loop.replicated import sum_gradients, sum_over_ranks

__all__ = ["TrainableMoE", "sum_gradients", "sum_over_ranks", "update_bias"]
