"""Mixers: the part of a block that passes information between tokens, by name."""

from model.mixers.mamba import BidirectionalMamba
from model.mixers.registry import Mixer, create_mixer, register_mixer

__all__ = ["BidirectionalMamba", "Mixer", "create_mixer", "register_mixer"]
