"""Benchmarks: one module each, one command for all (`python -m benchmarks`), rows kept as data in `results/`."""
