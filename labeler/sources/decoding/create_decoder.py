"""Chooses a decoder."""

from __future__ import annotations

import importlib.util

from labeler.base.errors import InputError
from labeler.sources.decoding.decode_reference import CpuDecoder, ReferenceDecoder
from labeler.sources.decoding.decoder import Decoder, DecodeSettings


def has_dali() -> bool:
    """Whether DALI is installed. It is not imported."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def automatic_decoder(device: str) -> str:
    """Returns the name of the decoder that "auto" stands for on a device, in labeling and in training."""
    return "dali" if device.startswith("cuda") and has_dali() else "cpu"


def create_decoder(name: str, settings: DecodeSettings) -> Decoder:
    """Creates a decoder.

    Args:
        name: "dali", "cpu", "pil", or "auto": DALI for a GPU if it is installed, otherwise "cpu".
        settings: Settings of the decoder.

    Returns:
        The decoder.

    Raises:
        InputError: DALI is requested and cannot be imported.
    """
    name = automatic_decoder(settings.device) if name == "auto" else name
    if name in ("cpu", "pil"):
        return (CpuDecoder if name == "cpu" else ReferenceDecoder)(settings)
    try:
        from labeler.sources.decoding.decode_dali import DaliDecoder
    except ImportError as error:
        raise InputError(
            "DALI cannot be imported", got=str(error), remedy="Install it, or use `decoder=cpu`."
        ) from None
    return DaliDecoder(settings)
