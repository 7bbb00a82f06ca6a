"""A small DeepSeek-V4 that is trained in FP4 on one book, over ranks, and generates from what was saved in FP4."""
