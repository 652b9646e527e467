"""Safe loading of published checkpoints: DeMansia's `.ckpt`, Vim's `.pth`, LV-ViT's `.pth.tar`, `.safetensors`.

No code from a file is run.

Legend: C classes; T tokens; L = T + 1 sequence length; D model width; E inner width; N state size; P patch side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from labeler.base.errors import ModelError
from labeler.base.weight_files import read_weight_file
from model.backbones.demansia import DeMansia
from model.backbones.lvvit import SIZES as LVVIT_SIZES
from model.backbones.patch_model import fit_position_embedding
from model.backbones.vim import Vim

MAX_BYTES = 8 << 30  # several times the largest published file, optimizer state included
TRAINING_SIDES = (224, 256, 384, 448, 512)  # pixels that pictures are usually cropped to
MAMBA_SIZES = {(128, 12): "nano", (192, 24): "tiny", (384, 24): "small", (768, 24): "base"}

State = dict[str, torch.Tensor]


def load_reference_checkpoint(path: str | Path, model: nn.Module | None = None, ema: bool = False) -> nn.Module:
    """Load the weights of a published checkpoint into a model.

    Vim was also published with overlapping patches, which are not supported. Its files say so in their saved settings;
    a bare state dict does not, and is refused where both readings are likely, as for 27×27 positions of 16-pixel
    patches: 432 pixels without overlap, or 224 with half a patch shared. Pass `model` to decide.

    Args:
        path: the checkpoint file.
        model: the model to load into; its resolution may differ from the file's. None: built to fit the weights, for
            square images.
        ema: load the averaged weights: those in the same file, or in DeMansia's second file, `…-EMA.ckpt`.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the file is missing, unsafe, too large or not finite, or its weights do not fit the model.
    """
    file, state, settings = _contents(Path(path), ema)
    net = _built_for(state, settings, file) if model is None else model
    if hasattr(net, "cls_position") and "pos_embed" in state and state["pos_embed"].ndim == 3:
        state = fit_position_embedding(state, net)  # type: ignore[arg-type]
    _refuse_faults(net, state, file)
    _refuse_non_finite(net, state, file)
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
    return _contents(Path(path), ema)[1]


def _contents(file: Path, ema: bool) -> tuple[Path, State, Any]:
    """The file that holds the weights, the weights, and the training script's settings (None: not saved)."""
    found = read_weight_file(file, ema=None if ema else False, error=ModelError, max_bytes=MAX_BYTES)
    if not ema or found.averaged or file.stem.endswith("EMA"):
        return file, found.state, found.settings
    second = file.with_name(f"{file.stem}-EMA{file.suffix}")
    if not second.is_file():
        raise ModelError(
            f"there are no averaged weights: got none in {file}, and no {second.name}; take the plain weights"
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
            f"{file} does not fit {type(net).__name__}: got {'; '.join(lines)}, expected each weight once; "
            "check the model's size and num_classes, or omit model="
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
            "numbers; the training diverged, or the file is damaged; use an earlier checkpoint"
        )


def _built_for(state: State, settings: Any, file: Path) -> nn.Module:
    """Build the model whose family and size fit the weights; `settings` are the training script's, or None."""
    families = {"layers.0.mixer.A_log": _mamba, "blocks.0.attn.qkv.weight": _lvvit}
    family = next((family for name, family in families.items() if name in state), None)
    if family is None or "pos_embed" not in state:
        names = ", ".join(list(state)[:3])
        raise ModelError(f"{file} is of no known family: got {names}, …, expected DeMansia, Vim or LV-ViT; pass model=")
    try:
        build = family(state, settings, file)
        with torch.device("meta"):  # no memory is allocated for shapes that are not checked yet
            _refuse_faults(build(), state, file)
        return build()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the shapes in {file} make no model: got {error!r}; pass model=") from error


def _settings(state: State, patch: int, first: str, blocks: str, trained_at: int | None, file: Path) -> dict[str, Any]:
    """The constructor arguments that all families share, from shapes."""
    length = state["pos_embed"].shape[1]
    side = math.isqrt(length - 1)
    if side**2 != length - 1 or trained_at not in (None, side * patch):
        raise ModelError(
            f"{file} does not fit square images of {patch}-pixel patches: got {length} positions for "
            f"{trained_at or 'unknown'} pixels; overlapping patches are not supported; pass model= for other images"
        )
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": state[first].shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": state["pos_embed"].shape[2],
        "depth": len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")}),
        "aux_head": "aux_head.weight" in state,
    }


def _refuse_overlap(state: State, patch: int, file: Path) -> None:
    """Raises ModelError if the positions are probably those of overlapping patches, which no shape shows.

    Vim's patches overlap by half: s patches in a row are then (s + 1)·P/2 pixels instead of s·P. A file is refused if
    only the overlapping reading is a usual image side: 27, 31, 47, 55 or 63 patches of 16 pixels, which are rare
    without overlap.
    """
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    overlapping, plain = (side + 1) * patch // 2, side * patch
    if overlapping in TRAINING_SIDES and plain not in TRAINING_SIDES:
        raise ModelError(
            f"{file} does not say whether its patches overlap: got {side}×{side} positions for patches of {patch}, "
            f"expected the training script's settings beside the weights; if it was trained on {plain} pixels, pass "
            f"model= (built with img_size={plain}); {overlapping} pixels with overlapping patches are not supported"
        )


def _mamba(state: State, script: Any, file: Path) -> Callable[[], nn.Module]:
    conv = "patch_embed.conv1.weight" in state
    patch = state["patch_embed.proj.weight"].shape[-1] * (2 if conv else 1)
    first = "patch_embed.conv1.weight" if conv else "patch_embed.proj.weight"
    trained_at = getattr(script, "input_size", None)
    arguments = _settings(state, patch, first, "layers", trained_at, file)
    if not conv and trained_at is None:
        _refuse_overlap(state, patch, file)
    mixer = "layers.0.mixer."
    # In Vim's files the model's name says what no shape shows; DeMansia has only one form.
    name = str(getattr(script, "model", ""))
    name = name if "bimamba" in name else "middle_cls_div2"
    arguments |= {
        "d_state": state[mixer + "A_log"].shape[1],
        "d_conv": state[mixer + "conv1d.weight"].shape[2],
        "expand": len(state[mixer + "A_log"]) // arguments["embed_dim"],
        "dt_rank": state[mixer + "dt_proj.weight"].shape[1],
        "bidirectional": mixer + "A_b_log" in state,
        "layer_scale": 1.0 if mixer + "gamma" in state else None,
        "halve": "div2" in name,
        "cls_place": "middle" if re.search("mid(dle_)?cls", name) else "start",
    }
    size = MAMBA_SIZES.get((arguments["embed_dim"], arguments["depth"]))
    if timm.is_model(registered := f"{'demansia' if conv else 'vim'}_{size}"):
        return partial(timm.create_model, registered, **arguments)
    return partial(DeMansia, **arguments) if conv else partial(Vim, stem="patch", **arguments)


def _lvvit(state: State, script: Any, file: Path) -> Callable[[], nn.Module]:
    patch = 2 * state["patch_embed.proj.weight"].shape[-1]
    arguments = _settings(state, patch, "patch_embed.conv1.weight", "blocks", None, file)
    for name, size in LVVIT_SIZES.items():
        if (size["embed_dim"], size["depth"]) == (arguments["embed_dim"], arguments["depth"]):
            return partial(timm.create_model, name, **arguments)
    raise ModelError(
        f"{file} has no known LV-ViT size, so its num_heads and skip_lam are unknown: got width "
        f"{arguments['embed_dim']}, {arguments['depth']} blocks, expected those of {', '.join(LVVIT_SIZES)}; "
        "pass model="
    )
