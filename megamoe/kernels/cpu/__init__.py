"""The CPU's kernels: products of rows with expert weights and what surrounds them, in C++, compiled when first needed.

paths.py     the ways to compute that there are, and which of them this CPU can run
build.py     from source to a shared library, once for each path, in a cache
library.py   the library's functions on tensors, tested on this machine before they are used
layout.py    how weights are held for the products
products.cpp by vectors or tiles.cpp by AMX; rows.cpp, routing.cpp, out.h, vectors.h, library.h
"""
