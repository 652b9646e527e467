"""The numerical truth that model tests compare with; tests that need it skip where the folder is missing."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from conftest import SHARED

FOLDER = SHARED / "fixtures"
# Triton's interpreter is chosen before triton is imported: `test_model_interpreter` does so in its own process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("reference", "cpu", *(("triton",) if INTERPRETED else ()))


def tensors(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"numerical fixtures are not at hand ({path.name} in {FOLDER})")
    return load_file(path)


def keys(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.keys.json"
    if not path.exists():
        pytest.skip(f"numerical fixtures are not at hand ({path.name} in {FOLDER})")
    return json.loads(path.read_text())


def state(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a fixture."""
    return {name[3:]: value for name, value in found.items() if name.startswith("sd.")}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, absolute: float = 0.0) -> None:
    """max|difference| ≤ tolerance · max|expected| + absolute."""
    assert found.shape == expected.shape
    allowed = tolerance * expected.abs().max() + absolute
    assert (found - expected).abs().max() <= allowed, f"{(found - expected).abs().max():.2e} > {allowed:.2e}"
