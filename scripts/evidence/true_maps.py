"""Label stores of what a mosaic really shows: in each cell the share of its pixels that each class has.

No teacher is asked, so a table with these tells what place is worth apart from how good a teacher is. The maps are
written as TokenLabeling's files, the five largest classes of each cell, and come into a store as any such files do.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import labeler.__main__
from labeler.store.label_store import LabelStore
from scripts.cifar10 import CLASSES, command

KEPT = 5  # classes of a cell
FLOOR = 0.01  # share that a class has where it is not there


def true_store(pictures: Path, truth: Path, store: Path, cells: int) -> dict[str, Any]:
    """Makes the store of mosaics' true maps.

    Args:
        pictures: folder of `CLASS/*.png`.
        truth: folder of the same files, a byte per pixel: its class.
        store: folder to write to; kept if it is whole.
        cells: cells of a side.

    Returns:
        `teacher`, which is None; `agreement`, the share of maps that name their mosaic's class; `bytes` of a row.
    """
    maps = store.with_name(f"{store.name}-maps")
    write_maps(truth, maps, cells)
    what = [str(maps), "--images", str(pictures), "--store", str(store), "--num-classes", str(len(CLASSES))]
    made = command(labeler.__main__, ["import-token-labels", *what, "--json"])
    return {"teacher": None, "agreement": made["agreement"], "bytes": LabelStore(store).bytes / made["rows"]}


def write_maps(truth: Path, out: Path, cells: int) -> None:
    """Writes a map for each file of `truth`, as `CLASS/NAME.pt`; all or none, and nothing if they are there."""
    if out.exists():
        return
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in sorted(truth.glob("*/*.png")):
        file = unfinished / path.parent.name / f"{path.stem}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(true_map(np.asarray(Image.open(path)), cells), file)
    os.replace(unfinished, out)


def true_map(classes: np.ndarray, cells: int) -> torch.Tensor:
    """The map of a picture as a file holds it.

    Args:
        classes: uint8 [side, side], the class of each pixel.
        cells: cells of a side; the picture's side is a multiple.

    Returns:
        float16 [2, 5, cells, cells]: logits and class ids. Softmax, with 0 for the other classes, gives each class its
        share of the cell's pixels, plus a hundredth.
    """
    size = len(classes) // cells
    cell = classes.reshape(cells, size, cells, size)
    shares = torch.from_numpy(np.stack([(cell == id).mean((1, 3)) for id in range(len(CLASSES))]))
    largest = shares.topk(KEPT, dim=0)
    return torch.stack([torch.log(largest.values / FLOOR + 1), largest.indices.double()]).half()
