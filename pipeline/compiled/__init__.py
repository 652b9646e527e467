"""Loops that Numba compiles at their first use, and whether it can. Each has a twin of PIL's or torch's operators."""
