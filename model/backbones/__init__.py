"""Backbones of our own: DeMansia, DeMansia-2, Vision Mamba, LV-ViT, and the trunk that they share.

Those in stages, MILA and MambaVision, are in `hierarchical/`.
"""
