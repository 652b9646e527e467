"""Backbones of our own: DeMansia, Vision Mamba, LV-ViT, and the trunk that they share."""
