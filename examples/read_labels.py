"""Look into a label store: what it holds, and one image's map. `pip install token-labeling` is enough, without torch.

python read_labels.py STORE [KEY]

`read_with_h5py.py` beside this file does the same without this package.
"""

from __future__ import annotations

import sys

import numpy as np

from labeler import LabelStore


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    with LabelStore(sys.argv[1]) as store:
        print(store)
        key = sys.argv[2] if len(sys.argv) == 3 else store.keys[0]
        maps = store.read([store.row_of(key)])  # of any rows, in any order; ScoreMaps says what is in it
        names, classes = store.meta.class_names, store.meta.num_classes
    p = maps.dense()[0]  # float32 [C, H, W]: each cell's distribution over all classes
    top = maps.top1()[0]  # int64 [H, W]
    print(f"{key}: {p.shape[1]}×{p.shape[2]} cells; each one's class:")
    for line in top:
        print(" ".join(f"{number:>{len(str(classes))}}" for number in line))
    for number in np.argsort(-p.mean((1, 2)))[:3].tolist():
        print(f"{names[number] if names else f'class {number}':>24} {p[number].mean():7.2%}")


if __name__ == "__main__":
    main()
