"""Images and label maps to training batches, cropped together: `create_loader`, `Batch`, `TokenTargets`."""

from __future__ import annotations

from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from pipeline.geometry import Views
from pipeline.loader import TokenLabelLoader, create_loader
from pipeline.mix import MixBox, mix_pixels, sample_mix_box
from pipeline.targets import TokenTargets, crop_score_maps

__all__ = [
    "Batch",
    "LoaderConfig",
    "MixBox",
    "TokenLabelLoader",
    "TokenTargets",
    "Views",
    "create_loader",
    "crop_score_maps",
    "mix_pixels",
    "sample_mix_box",
]
