"""Safe loading of published checkpoints: `.ckpt`, `.pth`, `.pth.tar`, `.safetensors`. No code from a file is run.

What is particular to a family of models stands beside its builder; see `model.families`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from labeler.base.errors import ModelError
from labeler.base.weight_files import read_weight_file
from model.families import Family, PublishedWeights, State, families, family_of_state

MAX_BYTES = 8 << 30  # several times the largest published file, optimizer state included


def load_reference_checkpoint(path: str | Path, model: nn.Module | None = None, ema: bool = False) -> nn.Module:
    """Load the weights of a published checkpoint into a model.

    Vim was also published with overlapping patches, which are not supported. The settings saved in its files tell the
    two apart. A bare state dict does not, and is refused if overlap is likely: 27×27 positions of 16-pixel patches fit
    432 pixels without overlap, and 224 pixels with patches that overlap by half. Pass `model` to load it anyway.

    Args:
        path: the checkpoint file.
        model: the model to load into; its resolution may differ from the file's. None: a model for square images is
            built to fit the weights.
        ema: load the averaged weights: those in the same file, or in DeMansia's second file, `…-EMA.ckpt`.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the file is missing, unsafe, too large or not finite, or its weights do not fit the model.
    """
    weights = _contents(Path(path), ema)
    family = family_of_state(weights.state)
    net = _built_for(family, weights) if model is None else model
    state = weights.state if family is None else _converted(family, weights, net)
    _refuse_faults(net, state, weights.file)
    _refuse_non_finite(net, state, weights.file)
    net.load_state_dict(state, strict=False)
    return net.eval()


def read_state_dict(path: str | Path, ema: bool = False) -> State:
    """Read the weights of any model from a file.

    Args:
        path: the checkpoint file.
        ema: read the averaged weights.

    Returns:
        The state dict, without prefixes of wrappers.

    Raises:
        ModelError: the file is missing, unsafe or too large, or holds no weights.
    """
    return _contents(Path(path), ema).state


def _contents(file: Path, ema: bool) -> PublishedWeights:
    """The weights of the file, or of the second file beside it that holds the averaged ones."""
    found = read_weight_file(file, ema=None if ema else False, error=ModelError, max_bytes=MAX_BYTES)
    if not ema or found.averaged or file.stem.endswith("EMA"):
        return PublishedWeights(file, found.state, found.settings)
    second = file.with_name(f"{file.stem}-EMA{file.suffix}")
    if not second.is_file():
        raise ModelError(
            f"there are no averaged weights: got none in {file}, and no {second.name}; load the plain weights instead"
        )
    return _contents(second, False)


def _refuse_faults(net: nn.Module, state: State, file: Path) -> None:
    """Raises ModelError on missing, unexpected or mis-shaped weights."""
    own = net.state_dict()
    faults = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        some = {fault: ", ".join(keys[:3]) + ", …" * (len(keys) > 3) for fault, keys in faults.items() if keys}
        lines = [f"{len(faults[fault])} {fault} ({names})" for fault, names in some.items()]
        raise ModelError(
            f"{file} does not fit {type(net).__name__}: got {'; '.join(lines)}, expected exactly "
            "the model's own weights; check its size and num_classes, or omit model="
        )


def _refuse_non_finite(net: nn.Module, state: State, file: Path) -> None:
    """Raises ModelError if a weight would be NaN or infinite in the model's dtype, which may be narrower."""
    broken = [
        key for key, own in net.state_dict().items() if key in state and not state[key].to(own.dtype).isfinite().all()
    ]
    if broken:
        names = ", ".join(broken[:3]) + ", …" * (len(broken) > 3)
        raise ModelError(
            f"{file} has weights that are not finite: got NaN or infinity in {len(broken)} tensors ({names}), expected "
            "numbers; either the training diverged or the file is damaged; use an earlier checkpoint"
        )


def _built_for(family: Family | None, weights: PublishedWeights) -> nn.Module:
    """Build the model of the family whose size fits the weights."""
    if family is None:
        raise ModelError(
            f"{weights.file} is of no known family",
            got=", ".join([*list(weights.state)[:3], "…"]),
            expected=f"weights of one of the families {', '.join(one.title for one in families())}",
            remedy="Pass model=, the model to load them into.",
        )
    try:
        build = family.builder(weights)
        with torch.device("meta"):  # no memory is allocated for shapes that are not checked yet
            net = build()
        _refuse_faults(net, _converted(family, weights, net), weights.file)
        return build()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the shapes in {weights.file} are not those of any {family.title} model",
            got=repr(error),
            remedy="Pass model=, the model to load them into.",
        ) from error


def _converted(family: Family, weights: PublishedWeights, net: nn.Module) -> State:
    """The weights with the names and shapes of the model."""
    try:
        return family.convert(weights.state, net)
    except ModelError:
        raise
    except Exception as error:  # a damaged file can break a conversion in any way
        raise ModelError(
            f"{weights.file} cannot be converted for {type(net).__name__}",
            got=repr(error),
            expected=f"the weights of a {family.title} model",
        ) from error
