"""Models that use the layer: routers, checkpoints, blocks."""
