"""Training batches of images with their label maps, cropped together: `create_loader`, `Batch`, `TokenTargets`.

Each name below is imported on first use, so that commands start without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.augment.mix import MixBox, mix_pixels, sample_mix_box
    from pipeline.batch import Batch
    from pipeline.config import LoaderConfig
    from pipeline.geometry import Views
    from pipeline.loader import TokenLabelLoader, create_loader
    from pipeline.targets.crop_score_maps import crop_score_maps
    from pipeline.targets.token_targets import TokenTargets

_HOMES = {
    "Batch": "batch",
    "LoaderConfig": "config",
    "MixBox": "augment.mix",
    "TokenLabelLoader": "loader",
    "TokenTargets": "targets.token_targets",
    "Views": "geometry",
    "create_loader": "loader",
    "crop_score_maps": "targets.crop_score_maps",
    "mix_pixels": "augment.mix",
    "sample_mix_box": "augment.mix",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pipeline.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
