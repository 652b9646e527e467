"""The compiled kernels, where Numba can be used."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

log = logging.getLogger("pipeline")
WITHOUT = {
    "resize_kernels": "images are resized by Pillow, which takes three times as long",
    "crop_kernels": "label maps are cropped by torch, which takes three times as long",
}


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """Returns a file of compiled kernels; None, with a line in the log, if Numba cannot be used.

    Args:
        name: One of `WITHOUT`.
    """
    try:
        return importlib.import_module(f"pipeline.compiled.{name}")
    except Exception as error:  # Numba refuses a numpy that it does not know, for one
        log.warning("%s: Numba cannot be used (%s)", WITHOUT[name], error)
        return None
