"""Transformers models that train with their experts over ranks, and the checkpoint that is written of one."""
