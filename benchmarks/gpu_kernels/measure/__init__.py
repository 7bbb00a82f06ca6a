"""What is checked and timed on a device: operands, products and layers, clocks and ceilings."""
