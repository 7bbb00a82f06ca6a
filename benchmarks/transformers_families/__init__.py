"""The layer under every family of transformers whose experts have an expert-parallel rule."""
