"""Published checkpoints without running code: DeMansia's `.ckpt`, Vim's `.pth`, LV-ViT's `.pth.tar`, `.safetensors`.

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
from model.demansia import DeMansia
from model.lvvit import SIZES as LVVIT_SIZES
from model.patch_model import fit_position_embedding
from model.vim import Vim

MAX_BYTES = 8 << 30  # several times the largest published file, optimizer state included
TRAINING_SIDES = (224, 256, 384, 448, 512)  # pixels that pictures are usually cropped to
MAMBA_SIZES = {(128, 12): "nano", (192, 24): "tiny", (384, 24): "small", (768, 24): "base"}

State = dict[str, torch.Tensor]


def load_reference_checkpoint(path: str | Path, model: nn.Module | None = None, ema: bool = False) -> nn.Module:
    """The model with the weights of a published file, in evaluation mode. Raises ModelError where they do not fit.

    model  what to load into; its resolution may differ from the file's. None: built to fit, for square images
    ema    the averaged weights: those beside the others in the file, or DeMansia's second file, `…-EMA.ckpt`

    Vim was also published with overlapping patches, which are not supported. Its files say so in their script's
    settings; a bare state dict does not, and is refused where both readings are likely, as for 27×27 positions of
    16-pixel patches: 432 pixels side by side, or 224 with half a patch shared. A given `model` settles it.
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
    """The weights in a file of any model's, under their own names. Raises ModelError where there are none."""
    return _contents(Path(path), ema)[1]


def _contents(file: Path, ema: bool) -> tuple[Path, State, Any]:
    """The file that holds the weights, these, and its script's settings, None without them."""
    if ema and not file.stem.endswith("EMA"):
        second = file.with_name(f"{file.stem}-EMA{file.suffix}")
        try:
            found = read_weight_file(file, ema=True, error=ModelError, max_bytes=MAX_BYTES)
        except ModelError as error:
            if not error.problem.startswith("there are no averaged weights"):
                raise
            if not second.is_file():
                raise ModelError(
                    f"there are no averaged weights: got none in {file}, and no {second.name}; take the plain weights"
                ) from None
            return _contents(second, False)
        return file, found.state, found.settings
    found = read_weight_file(file, ema=False, error=ModelError, max_bytes=MAX_BYTES)
    return file, found.state, found.settings


def _refuse_faults(net: nn.Module, state: State, file: Path) -> None:
    """Unless the file has every weight of the model, and nothing left over."""
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
        told = [f"{len(faults[fault])} {fault} ({names})" for fault, names in some.items()]
        raise ModelError(
            f"{file} does not fit {type(net).__name__}: got {'; '.join(told)}, expected each weight once; "
            "check its size and num_classes, or leave model away"
        )


def _refuse_non_finite(net: nn.Module, state: State, file: Path) -> None:
    """Where a weight would be NaN or infinite in the model, whose type may hold less than the file's."""
    broken = [
        key for key, own in net.state_dict().items() if key in state and not state[key].to(own.dtype).isfinite().all()
    ]
    if broken:
        names = ", ".join(broken[:3]) + ", …" * (len(broken) > 3)
        raise ModelError(
            f"{file} has weights that are not finite: got NaN or infinity in {len(broken)} tensors ({names}), expected "
            "numbers; the training that wrote it has diverged, or the file is damaged; take an earlier one"
        )


def _built_for(state: State, settings: Any, file: Path) -> nn.Module:
    """A model of the family and size that names and shapes tell; `settings` are the training script's, or None."""
    families = {"layers.0.mixer.A_log": _mamba, "blocks.0.attn.qkv.weight": _lvvit}
    family = next((family for name, family in families.items() if name in state), None)
    if family is None or "pos_embed" not in state:
        names = ", ".join(list(state)[:3])
        raise ModelError(f"{file} is of no known family: got {names}, …, expected DeMansia, Vim or LV-ViT; pass model=")
    try:
        build = family(state, settings, file)
        with torch.device("meta"):  # shapes from a file are not trusted with memory
            _refuse_faults(build(), state, file)
        return build()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the shapes in {file} make no model: got {error!r}; pass model=") from error


def _settings(state: State, patch: int, first: str, blocks: str, trained_at: int | None, file: Path) -> dict[str, Any]:
    """What every family's constructor wants, from shapes."""
    length = state["pos_embed"].shape[1]
    side = math.isqrt(length - 1)
    if side**2 != length - 1 or trained_at not in (None, side * patch):
        raise ModelError(
            f"the positions in {file} do not fit square images cut into patches of {patch}: got {length} positions for "
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
    """Where positions are as likely those of overlapping patches, which no shape shows.

    Vim's overlap by half: s patches in a row are then (s + 1)·P/2 pixels instead of s·P. That is refused where only the
    overlapping reading is a usual side: 27, 31, 47, 55 or 63 patches of 16; hardly a file without overlap has those.
    """
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    overlapping, plain = (side + 1) * patch // 2, side * patch
    if overlapping in TRAINING_SIDES and plain not in TRAINING_SIDES:
        raise ModelError(
            f"overlapping patches cannot be told from larger images by the file alone: got {side}×{side} positions for "
            f"patches of {patch} in {file}, expected the settings of its script beside the weights; if it was trained "
            f"on {plain} pixels, pass model= (built with img_size={plain}); {overlapping} pixels with overlapping "
            "patches are not supported"
        )


def _mamba(state: State, script: Any, file: Path) -> Callable[[], nn.Module]:
    conv = "patch_embed.conv1.weight" in state
    patch = state["patch_embed.proj.weight"].shape[-1] * (2 if conv else 1)
    first = "patch_embed.conv1.weight" if conv else "patch_embed.proj.weight"
    trained_at = getattr(script, "input_size", None)
    found = _settings(state, patch, first, "layers", trained_at, file)
    if not conv and trained_at is None:
        _refuse_overlap(state, patch, file)
    mixer = "layers.0.mixer."
    # Vim's script says in the model's name what no shape shows; DeMansia has one form.
    name = str(getattr(script, "model", ""))
    name = name if "bimamba" in name else "middle_cls_div2"
    found |= {
        "d_state": state[mixer + "A_log"].shape[1],
        "d_conv": state[mixer + "conv1d.weight"].shape[2],
        "expand": len(state[mixer + "A_log"]) // found["embed_dim"],
        "dt_rank": state[mixer + "dt_proj.weight"].shape[1],
        "bidirectional": mixer + "A_b_log" in state,
        "layer_scale": 1.0 if mixer + "gamma" in state else None,
        "halve": "div2" in name,
        "cls_place": "middle" if re.search("mid(dle_)?cls", name) else "start",
    }
    size = MAMBA_SIZES.get((found["embed_dim"], found["depth"]))
    if timm.is_model(registered := f"{'demansia' if conv else 'vim'}_{size}"):
        return partial(timm.create_model, registered, **found)
    return partial(DeMansia, **found) if conv else partial(Vim, stem="patch", **found)


def _lvvit(state: State, script: Any, file: Path) -> Callable[[], nn.Module]:
    patch = 2 * state["patch_embed.proj.weight"].shape[-1]
    found = _settings(state, patch, "patch_embed.conv1.weight", "blocks", None, file)
    for name, size in LVVIT_SIZES.items():
        if (size["embed_dim"], size["depth"]) == (found["embed_dim"], found["depth"]):
            return partial(timm.create_model, name, **found)
    raise ModelError(
        f"no shape in {file} tells how many heads it has and what divides its branches: got width "
        f"{found['embed_dim']}, {found['depth']} blocks, expected those of {', '.join(LVVIT_SIZES)}; pass model="
    )
