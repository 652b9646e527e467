"""Backbones of several stages, each on half the grid of the one before it: MILA, MambaVision, and their interface."""
