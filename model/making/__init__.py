"""Checkpoints made on the spot: tiny random ones of a family's full shape, and mixtures of experts of dense models."""
