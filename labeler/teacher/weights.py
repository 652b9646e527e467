"""Files of weights: read without running their code, put into a model, and known again by a digest.

`read_checkpoint` gives the named tensors of a file, `load_weights` puts all of them into a model or tells which do not
fit, `classes_in` reads the number of classes off the classifier's weight, `weights_sha256` is a model's fingerprint.
`weights_only` forces it on libraries that fetch weights.

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
    """The named tensors in a file of weights; see `labeler.base.weight_files`.

    Args:
        path: The file.
        ema: Take averaged weights, or plain ones; None: averaged ones where the file has some.
    """
    return read_weight_file(path, ema=ema, error=TeacherError).state


def classes_in(state: dict[str, Tensor] | None, classifiers: str | tuple[str, ...]) -> int | None:
    """C, the rows of the last weight [C, D] of the classifier in a checkpoint, if it has one."""
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    named = sorted((name, weight) for name, weight in (state or {}).items() if name.startswith(heads))
    rows = [weight.shape[0] for name, weight in named if name.endswith(".weight") and weight.dim() > 1]
    return rows[-1] if rows else None


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | None) -> None:
    """Every weight of the model from the checkpoint, and nothing left over."""
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
            remedy="Check --teacher, --num-classes and --input-size.",
        )  # fmt: skip
    model.load_state_dict(state, strict=False)


def weights_sha256(model: nn.Module) -> str:
    """Digest of names, types, shapes and bytes of all weights and buffers; BatchNorm's batch counters do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def weights_only() -> Iterator[None]:
    """While it is open, a library's plain torch.load of fetched weights may not unpickle code either."""
    saved = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ[FORCE_SAFE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_SAFE, None)
        os.environ.update({name: value for name, value in saved.items() if value is not None})
