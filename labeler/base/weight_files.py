"""Reads files of weights from timm, Lightning and others: state dicts and safetensors. No code in them is run.

Training scripts write more than weights into their files: arguments as an `argparse.Namespace` or yacs' `CfgNode`,
paths, and metrics as numpy scalars. These few harmless types are read as plain values; a file with any other type is
refused.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labeler.base.errors import InputError, error_text
from labeler.base.plain_tensors import load_plain

MAX_BYTES = 32 << 30
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
PLAIN = ("state_dict", "model", "model_state_dict")
COMPILED = re.compile(r"^((module|_orig_mod)\.)+")
ATTRIBUTE = re.compile(r"^(?:(?:module|_orig_mod)\.)*(model|net|backbone|network)\.")
LIGHTNING = "pytorch-lightning_version"

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes:
        state: Named tensors, without the prefixes that wrappers add to the names.
        averaged: Whether these are the averaged (EMA) weights of a file that has both.
        settings: The arguments of the script that wrote it, or Lightning's dictionary of them; None: not saved.
    """

    state: State
    averaged: bool
    settings: Any


class _Dtype:
    """Replaces numpy.dtype in a pickle: keeps its code only, so it cannot take memory."""

    def __init__(self, code: object = "", *rest: object) -> None:
        self.code = str(code)

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and other state, which no number here needs."""


def _scalar(dtype: object, data: object = b"") -> Any:
    """Replaces numpy's constructor of scalars: returns a plain number, or None for anything else."""
    code = getattr(dtype, "code", "")
    if not re.fullmatch(r"[<=|]?[fiub][1248]", code) or not isinstance(data, bytes):
        return None
    return np.frombuffer(data, code)[0].item() if len(data) == np.dtype(code).itemsize else None


# As `torch.serialization.safe_globals` takes them: classes, or substitutes with the name in the pickle.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (collections.OrderedDict, "yacs.config.CfgNode"),  # settings of Swin's scripts, and of those made from them
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_weight_file(
    path: str | Path, *, ema: bool | None = None, error: type[InputError] = InputError, max_bytes: int | None = None
) -> WeightFile:
    """Reads the weights in a file.

    Args:
        path: A .safetensors file, or what `torch.save` wrote: a state dict, or a trainer's checkpoint around one.
        ema: Use averaged (EMA) weights, or plain ones; None: averaged ones if the file has any.
        error: Class of the errors to raise.
        max_bytes: Largest size of the file; None: 32 GiB.

    Returns:
        The weights and other content.

    Raises:
        InputError: The file does not exist, has no weights, or could run code.
    """
    file = Path(path)
    if not file.is_file():
        raise error("there is no such checkpoint", got=str(path), expected="a file")
    limit = max_bytes or MAX_BYTES
    if (size := file.stat().st_size) > limit:
        raise error(f"{file} is too large", got=f"{size:,} bytes", expected=f"at most {limit:,}")
    content = _content(file, error)
    settings = content.get("args", content.get("hyper_parameters")) if isinstance(content, Mapping) else None
    averaged = None if ema is False else _first_state(content, AVERAGED)
    if ema and averaged is None:
        raise error(f"there are no averaged weights in {file}", remedy="Use the plain weights.")
    state = averaged or _first_state(content, (*PLAIN, ""))
    if state is None:
        raise error(f"{file} holds no weights", got=f"a {type(content).__name__}", expected="a state dict")
    if (size := sum(tensor.nbytes for tensor in state.values())) > limit:  # tensors may share what the file stores
        raise error(f"{file} is too large", got=f"{size:,} bytes of weights", expected=f"at most {limit:,}")
    lightning = isinstance(content, Mapping) and LIGHTNING in content
    return WeightFile(unwrapped(state, drop_others=lightning), averaged is not None, settings)


def unwrapped(state: State, drop_others: bool = False) -> State:
    """Removes the prefixes of wrappers from a state dict: `module.`, `_orig_mod.`, or an attribute such as `model.`.

    Args:
        state: Named tensors.
        drop_others: If most names begin with the attribute, drop those that do not, such as those of a loss.

    Returns:
        The state dict with shorter names.
    """
    matches = {name: match for name in state if (match := ATTRIBUTE.match(name))}
    attributes = {match[1] for match in matches.values()}
    whole = len(matches) == len(state) or (drop_others and len(matches) > len(state) / 2)
    if state and whole and len(attributes) == 1:
        return unwrapped({name[matches[name].end() :]: state[name] for name in matches})
    return {COMPILED.sub("", name): tensor for name, tensor in state.items()}


def _content(file: Path, error: type[InputError]) -> Any:
    """Reads a file safely."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return load_plain(file, HARMLESS)
    except Exception as cause:
        asked = re.search(r"GLOBAL ([\w.]+)", str(cause)) or re.search(r"asks for ([\w.]+)", str(cause))
        lines = error_text(cause).splitlines() or [type(cause).__name__]
        raise error(
            f"{file} is not a file of plain weights",
            got=f"a pickle that asks for {asked[1]}" if asked else lines[0][:200],
            expected=".safetensors, or a state dict that torch.load(weights_only=True) reads",
            remedy="Nothing of it was run; save its state dict alone.",
        ) from cause


def _first_state(content: Any, names: tuple[str, ...]) -> State | None:
    """Returns the first of `names` (empty: the content itself) that is a state dict."""
    for name in names:
        part = content if name == "" else content.get(name) if isinstance(content, Mapping) else None
        if isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
            tensors = {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
            if tensors:
                return tensors
    return None
