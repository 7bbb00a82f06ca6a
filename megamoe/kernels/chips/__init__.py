"""What differs between chips: limits, instructions, tiles; what compilers made for them."""
