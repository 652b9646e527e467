"""Backbones and their operators. Of the other packages, this one imports `labeler.base` only.

`import model` registers `demansia_*`, `demansia2_*`, `vim_*`, `lvvit_*`, `mila_*` and `mambavision_*` with timm:
`timm.create_model("demansia_tiny")`. Each plain one also has a feature pyramid for dense prediction, `NAME_sfp`.
"""

from __future__ import annotations

from labeler.base.errors import BackendError, ModelError

try:
    from model.backbones import demansia, demansia2, lvvit, vim
    from model.backbones.hierarchical import mambavision, mila
except ModuleNotFoundError as absent:
    if absent.name not in ("torch", "timm"):
        raise
    text = f"models need {absent.name}, which is not installed. pip install 'token-labeling[train]'"
    raise ModuleNotFoundError(text, name=absent.name) from None
from model.backbones.feature_pyramid import FeaturePyramid, register_pyramids
from model.checkpoints import load_reference_checkpoint
from model.create import token_label
from model.families import Family, PublishedWeights, register_family
from model.mixers import Mixer, create_mixer, register_mixer
from model.ops import selective_scan

NAMES = tuple(name for family in (demansia, demansia2, vim, lvvit, mila, mambavision) for name in family.NAMES)
"""The models that this package registers with timm, by the names that `timm.create_model` takes."""

PYRAMIDS = register_pyramids(name for family in (demansia, demansia2, vim, lvvit) for name in family.NAMES)
"""Those of them that are plain, with a simple feature pyramid: `NAME_sfp`, for dense prediction."""

__all__ = [
    "NAMES",
    "PYRAMIDS",
    "BackendError",
    "Family",
    "FeaturePyramid",
    "Mixer",
    "ModelError",
    "PublishedWeights",
    "create_mixer",
    "load_reference_checkpoint",
    "register_family",
    "register_mixer",
    "selective_scan",
    "token_label",
]
