"""Mixers: the part of a block that passes information between tokens, by name."""

from model.mixers.attention import AttentionMixer
from model.mixers.gated_conv import GatedConv
from model.mixers.linear_attention import LinearAttentionMixer
from model.mixers.mamba import BidirectionalMamba
from model.mixers.mamba2 import BidirectionalMamba2, DeMansia2Mixer
from model.mixers.mamba3 import BidirectionalMamba3
from model.mixers.registry import Mixer, create_mixer, register_mixer

__all__ = [
    "AttentionMixer",
    "BidirectionalMamba",
    "BidirectionalMamba2",
    "BidirectionalMamba3",
    "DeMansia2Mixer",
    "GatedConv",
    "LinearAttentionMixer",
    "Mixer",
    "create_mixer",
    "register_mixer",
]
