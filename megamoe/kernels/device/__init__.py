"""What several kernels do inside a tile: decoding, rounding, products."""
