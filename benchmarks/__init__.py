"""Benchmarks, and the sweep over models of other packages."""
