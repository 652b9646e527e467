"""Files of weights: reads them without running their code, loads them into a model, and computes a digest.

`read_checkpoint` returns the named tensors of a file, `load_weights` loads all of them into a model or says which do
not fit, `classes_in` gets the number of classes from the classifier's weight, `weights_sha256` identifies a model.
`weights_only` makes libraries that fetch weights read them safely.

Legend: C classes, D feature width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labeler.base.errors import TeacherError
from labeler.base.weight_files import read_weight_file

FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_checkpoint(path: str, ema: bool | None = None) -> dict[str, Tensor]:
    """Reads the named tensors of a file of weights; see `labeler.base.weight_files`.

    Args:
        path: The file.
        ema: Use averaged (EMA) weights, or plain ones; None: averaged ones if the file has any.

    Returns:
        name -> tensor.

    Raises:
        TeacherError: The file does not exist, is too large, could run code, or has no weights.
    """
    return read_weight_file(path, ema=ema, error=TeacherError).state


def classes_in(state: dict[str, Tensor] | None, classifiers: str | tuple[str, ...]) -> int | None:
    """Returns C, the rows of the last weight [C, D] of the classifier in a checkpoint; None if there is none."""
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    named = sorted((name, weight) for name, weight in (state or {}).items() if name.startswith(heads))
    rows = [weight.shape[0] for name, weight in named if name.endswith(".weight") and weight.dim() > 1]
    return rows[-1] if rows else None


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | None) -> None:
    """Loads a checkpoint into a model. Raises TeacherError on missing, unknown or mis-shaped weights."""
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    counted = {name for name in own if name.endswith("num_batches_tracked")}
    faults = {
        "missing": sorted(own.keys() - state.keys() - counted),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
            for name in own if name in state and state[name].shape != own[name].shape
        ],
    }  # fmt: skip
    if any(faults.values()):
        got = "; ".join(f"{len(names)} {fault} ({', '.join(names[:3])}…)" for fault, names in faults.items() if names)
        raise TeacherError(
            f"checkpoint {path} does not fit the model", got=f"weights {got}", expected="each weight once",
            remedy="Check `teacher`, `num_classes` and `input_size`.",
        )  # fmt: skip
    model.load_state_dict(state, strict=False)


def weights_sha256(model: nn.Module) -> str:
    """Returns the digest of names, types, shapes and bytes of all weights and buffers, without BatchNorm's counters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def weights_only() -> Iterator[None]:
    """Makes every torch.load inside of the block, such as a library's, refuse to unpickle code."""
    saved = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ[FORCE_SAFE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_SAFE, None)
        os.environ.update({name: value for name, value in saved.items() if value is not None})
