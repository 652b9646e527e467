"""The class of the backend that a configuration asks for; only its libraries are imported."""

from __future__ import annotations

import torch

from labeler.base.errors import InputError
from labeler.sources.decoding.create_decoder import automatic_decoder
from pipeline.backends.backend import LoaderBackend
from pipeline.config import LoaderConfig


def choose_backend(config: LoaderConfig, device: torch.device) -> type[LoaderBackend]:
    """Returns the class of the configured backend, or of the one for the device."""
    name = automatic_decoder(device.type) if config.backend == "auto" else config.backend
    if name == "pil":
        from pipeline.backends.pil_backend import PilBackend

        return PilBackend
    if name == "cpu":
        from pipeline.backends.cpu_backend import CpuBackend

        return CpuBackend
    try:
        from pipeline.backends.dali_backend import DaliBackend
    except ImportError as error:
        raise InputError(
            "DALI cannot be imported", got=str(error), remedy='Install it, or use backend="cpu".'
        ) from None
    return DaliBackend
