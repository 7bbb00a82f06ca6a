"""What a question leaves open: searches, sweeps, comparisons, recommendations."""
