"""A transformers model that trains with its experts over ranks, and the checkpoint that is written of it."""
