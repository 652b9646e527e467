"""Benchmarks of each part against its alternatives: `python -m scripts.benchmark`."""
