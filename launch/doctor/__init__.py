"""The doctor: what a machine has for ranks, what it lacks, what to do about it."""
