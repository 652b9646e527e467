"""Read one image's labels with h5py and numpy only, for projects that do not install this package.

python read_with_h5py.py STORE [KEY]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np


def read_row(store: Path, key: str | None) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    """(key, class ids [K], probabilities [K, H, W], class names) of one image; the first one where `key` is None.

    The K classes are those of the palette, then those of the tail.
    """
    with h5py.File(store / "labels.h5") as file:
        keys = file["key"][:]
        found = np.arange(1) if key is None else np.flatnonzero(keys == key.encode())
        if not len(found):
            raise KeyError(f"{key!r} is not in {store}")
        row = int(found[0])
        classes, stored = file["classes"][row], file["scores"][row]
        background = file["background"][row] if "background" in file else np.zeros(stored.shape[1:])
        scores = stored
        if "code_values" in file:
            codes = file["code_values"][:]
            scores, background = codes[stored], codes[background]
            if not file.attrs["format_version"].startswith(b"1."):
                scores = np.where(stored == 0, background, scores)  # code 0: as the background in this cell
        if "tail_classes" in file:
            classes = np.concatenate([classes, file["tail_classes"][row]])
            offsets = file["tail_offsets"][row][:, None, None] / 4  # stored in quarter nats
            scores = np.concatenate([scores, background + offsets])
        names, count = json.loads(file.attrs["class_names"]), int(file.attrs["num_classes"])
    used = classes != np.iinfo(classes.dtype).max
    weights = np.exp(scores[used].astype(np.float64))
    total = weights.sum(0) + (count - used.sum()) * np.exp(background.astype(np.float64))
    return keys[row].decode(), classes[used], weights / total, names


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    key, classes, p, names = read_row(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
    print(f"{key}: {p.shape[1]}×{p.shape[2]} cells")
    for number, plane in zip(classes.tolist(), p, strict=True):
        name = names[number] if names else f"class {number}"
        y, x = divmod(int(plane.argmax()), plane.shape[1])
        print(f"{name:>24} {plane.mean():7.2%}  surest at cell {y}, {x}")


if __name__ == "__main__":
    main()
