"""Generation with experts spread over ranks: this package beside transformers' own expert parallelism."""
