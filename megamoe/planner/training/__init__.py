"""A training step of one layer: its backward, what that holds in memory, and whether both passes hide their links."""
