"""Whole programs on the package, each in a folder with its README; run them from the repository's folder."""
