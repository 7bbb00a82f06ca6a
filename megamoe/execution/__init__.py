"""How a call runs: experts and their weights, products, the steps of a call."""
