"""The folder in which a run leaves its weights for timm: `timm.create_model("local-dir:runs/x/timm", pretrained=True)`.

A backbone of timm's is written without our token head; our own models as they are, and `import model` registers their
names with timm.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from labeler.base.errors import TokenLabelError, error_text
from labeler.base.whole_files import TEMPORARY
from model.wrapper import TokenLabeled
from train.evaluation.validate import load_trained
from train.record.checkpoint_folders import FOLDER as CHECKPOINTS

log = logging.getLogger("train")

FOLDER = "timm"


def leave_for_timm(run: Path) -> None:
    """Write a run's best weights for timm and the labeler; logs a warning where that is not possible.

    Args:
        run: the run's folder.
    """
    try:
        trained = load_trained(run)
        names = [trained.class_name(number) for number in range(trained.net.num_classes)]
        write_timm_folder(run, trained.net, trained.transform, names)
    except (TokenLabelError, OSError, ValueError, LookupError, AttributeError, AssertionError) as error:
        log.warning("no folder for timm is left in %s: %s", run, error_text(error))


def write_timm_folder(run: Path, net: nn.Module, transform: Mapping[str, Any], class_names: Sequence[str]) -> Path:
    """Write the weights of a trained network where timm reads them; the folder is whole or absent.

    Args:
        run: The run's folder.
        net: The network, on the CPU.
        transform: mean, std, crop_pct and crop_mode of its evaluation.
        class_names: One for each class, or empty.

    Returns:
        The folder, `timm/` within the run's.

    Raises:
        OSError: The disk does not take it.
        ValueError: timm cannot describe such a model.
    """
    from timm.models import save_for_hf

    backbone: Any = net.backbone if isinstance(net, TokenLabeled) else net
    height, width = net.img_size  # type: ignore[misc]
    shown = {name: transform[name] for name in ("mean", "std", "crop_pct", "crop_mode")}
    shown |= {"input_size": (net.in_chans, height, width), "interpolation": "bicubic"}
    # Beside the checkpoints, where the next process of this run sweeps away what one that was killed left.
    temporary = run / CHECKPOINTS / f"{TEMPORARY}{FOLDER}-{os.getpid()}-{secrets.token_hex(4)}"
    names = {"label_names": list(class_names)} if class_names else {}
    try:
        save_for_hf(backbone, str(temporary), model_config=names, safe_serialization=True, data_config=shown)
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        os.rename(temporary, run / FOLDER)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run / FOLDER
