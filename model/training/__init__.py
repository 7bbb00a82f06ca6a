"""Experts of a stock transformers model that train: their weights stay where transformers has them."""

from megamoe.model.training.experts import TrainedExperts
from megamoe.model.training.slices import gather_slices, take_slice

__all__ = ["TrainedExperts", "gather_slices", "take_slice"]
