"""Benchmarks: programs that measure and print tables, imported by nothing but their tests."""
