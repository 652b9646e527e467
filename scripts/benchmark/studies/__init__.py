"""Measurements with a command of their own: kernels, bytes and time of a step, large stores, real maps."""
