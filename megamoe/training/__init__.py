"""Training: a layer whose experts are parameters, and its backward pass in waves; numerics.md has the contract."""

from megamoe.training.distributed.clip import clip_grad_norm_, grad_norm
from megamoe.training.distributed.replicas import reduce_over_replicas
from megamoe.training.layer import TrainableMoE
from megamoe.training.loop.balance import update_bias
from megamoe.training.loop.replicated import sum_gradients, sum_over_ranks

__all__ = [
    "TrainableMoE",
    "clip_grad_norm_",
    "grad_norm",
    "reduce_over_replicas",
    "sum_gradients",
    "sum_over_ranks",
    "update_bias",
]
