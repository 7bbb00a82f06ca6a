"""Verbs about models: texts from one, and checkpoints made on the spot."""
