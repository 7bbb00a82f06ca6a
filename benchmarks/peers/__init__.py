"""This layer beside the expert-parallel layers that others publish: same weights, tokens, routing, ranks and links."""
