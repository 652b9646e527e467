"""How true a store's labels are: three errors in nats, found by running the store's own teacher again on some images.

storage  what the store keeps of the teacher's map, against that map
mirror   what the teacher says of a picture, against what it says of the mirrored one
crop     the store's answer to a random crop, against the teacher's own answer to that crop

Legend: n images; C classes; P palette size; R tail size; H×W map grid; S side of the teacher's square input.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labeler.errors import InputError, IntegrityError
from labeler.images import BadImage, image_digest, image_path, image_root, read_image
from labeler.score_maps import ScoreMaps, dense_scores
from labeler.store import LabelStore

if TYPE_CHECKING:
    from torch import Tensor

    from labeler.decode import Decoder
    from labeler.teacher import LoadedTeacher

SHARES = (0.9, 0.7, 0.5)  # of the sides that a crop keeps
BATCH = 16  # images
KEPT, KEPT_ELEMENTS = 48, 64_000_000  # most images, and numbers, of the maps that are handed on for a chart


@dataclass(frozen=True)
class Audit:
    """Three errors, in nats, means over `images` random images; `missing` more were not found or have changed.

    storage          KL(teacher's map ‖ stored map), mean over cells
    reference        the same of five float16 logits per cell, which is what the reference's files keep
    mirror           KL(map ‖ map of the mirrored image, mirrored back), mean over cells, of single passes
    mirror_averaged  KL(map of a single pass ‖ average of both): what averaging takes away
    crop             share of the sides that a crop keeps -> KL(teacher's answer to the crop ‖ the stored map's mean there)
    flip             whether the store's maps are such averages; input_size: S; precision: of the store
    """

    store: str
    images: int
    missing: int
    storage: float
    reference: float
    mirror: float
    mirror_averaged: float
    crop: dict[str, float]
    flip: bool
    input_size: int
    precision: str

    @property
    def storage_of_reference(self) -> float:
        """`storage` as a share of what the reference's files lose."""
        return self.storage / max(self.reference, 1e-12)

    def advice(self) -> dict[str, str]:
        """What would lower each error, in a few words."""
        finer = "--quality high or --bytes-per-image N" if self.precision == "uint8" else "a larger --palette"
        both = "--tta flip is on: the store keeps the average of both passes"
        return {
            "storage": f"less with more bytes: {finer}",
            "mirror": both if self.flip else "less with --tta flip, which stores the average of both passes",
            "crop": f"less with an --input-size above {self.input_size}",
        }

    def text(self) -> str:
        """The three side by side, one a line."""
        advice = self.advice()
        lines = {
            "storage": f"{self.storage:.3f} ({self.storage_of_reference:.2f} of top-5 float16 files')",
            "mirror": f"{self.mirror:.3f}, to the average {self.mirror_averaged:.3f}",
            "crop": ", ".join(f"{error:.3f} at {share}" for share, error in self.crop.items()),
        }
        wide = max(map(len, lines.values()))
        missing = f", {self.missing} more not found or changed" if self.missing else ""
        return "\n".join(
            [
                f"audit: KL in nats, means over {self.images} images{missing}",
                *(f"  {name:<7}  {line:<{wide}}  {advice[name]}" for name, line in lines.items()),
            ]
        )


def audit_store(
    store: str | Path,
    images: str | Path,
    count: int,
    *,
    device: str = "auto",
    seed: int = 0,
    trusted: bool = False,
    progress: bool = False,
) -> Audit:
    """Run the store's teacher again on `count` random images of it, and say how true its labels are.

    trusted  as for `verify_store`: the store is your own or a friend's, and its teacher may be run

    Raises InputError where the store is not yours, was imported, or none of its images is found; TeacherError,
    IntegrityError where its teacher is no longer there.
    """
    labels = LabelStore(store, trusted=trusted)
    refuse_foreign(labels)
    return audit_labels(labels, images, count, device=device, seed=seed, progress=progress)[0]


def refuse_foreign(labels: LabelStore) -> None:
    """Raise InputError where the teacher that the store names may not be run here."""
    if not labels.trusted:
        raise InputError(
            f"{str(labels.path)!r} was not written in one run of yours, and its teacher may be any code that it names",
            got=repr(labels.meta.teacher.get("name"))[:80],
            remedy="Give --trusted if the store is your own or a friend's, or leave --audit away.",
        )


def audit_labels(
    labels: LabelStore, images: str | Path, count: int, *, device: str = "auto", seed: int = 0, progress: bool = False
) -> tuple[Audit, Tensor]:
    """As `audit_store`, for a store whose teacher may be run; also the maps [K, C, H, W] of at most 48 of the images."""
    import torch
    from tqdm import tqdm

    from labeler.encoder import DENSE_ELEMENTS
    from labeler.verify import teacher_of

    if count < 1 or not len(labels):
        raise InputError("there is nothing to audit", got=f"{count} of {len(labels)} rows", expected="one or more")
    root, meta = image_root(images), labels.meta
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:count])
    there = [row for row in rows.tolist() if image_path(root, labels.keys[row]).is_file()]
    teacher, decoder = teacher_of(labels, device)
    elements = meta.num_classes * meta.grid[0] * meta.grid[1]
    step = max(1, min(BATCH, DENSE_ELEMENTS // elements))
    digests = labels.column("image_digest")
    columns: list[np.ndarray] = []
    maps: list[Tensor] = []
    with tqdm(total=len(there), desc="audit", unit="img", disable=not progress) as bar:
        for start in range(0, len(there), step):
            chunk = there[start : start + step]
            read = [_read_labeled(root, labels.keys[row], int(digests[row])) for row in chunk]
            found = {row: data for row, data in zip(chunk, read, strict=True) if data is not None}
            if found:
                errors, logits = _errors(labels, found, teacher, decoder, seed)
                columns.append(errors)
                room = min(KEPT, max(1, KEPT_ELEMENTS // elements)) - sum(map(len, maps))
                maps.append(logits[: max(0, room)])
            bar.update(len(chunk))
    if not columns:
        raise InputError(
            f"none of the images below {str(root)!r} is one that was labeled", got=f"0 of {len(rows)}",
            remedy="Give --images the folder that was labeled.",
        )  # fmt: skip
    every = np.concatenate(columns)
    storage, reference, mirror, averaged, *crop = every.mean(0).tolist()
    audit = Audit(
        str(labels.path), len(every), len(rows) - len(every), storage, reference, mirror, averaged,
        {str(share): error for share, error in zip(SHARES, crop, strict=True)}, teacher.info.flip,
        teacher.info.input_size, meta.precision,
    )  # fmt: skip
    return audit, torch.cat(maps)


def _read_labeled(root: Path, key: str, digest: int) -> bytes | None:
    """The image file's bytes; None where it is not what was labeled."""
    try:
        data = read_image(root, key)
    except BadImage:
        return None
    return data if image_digest(data) == digest else None


def _errors(
    labels: LabelStore, found: dict[int, bytes], teacher: LoadedTeacher, decoder: Decoder, seed: int
) -> tuple[np.ndarray, Tensor]:
    """float64 [n, 4 + shares]: storage, reference, mirror, to the average, each crop; and the maps [n, C, H, W].

    found  row -> its image file
    """
    import torch

    from labeler.encoder import reference_kl
    from labeler.teacher import LoadedTeacher

    decoded = decoder(list(found.values()))
    if decoded.failures:
        row = list(found)[next(iter(decoded.failures))]
        raise IntegrityError("an image cannot be decoded any more", got=labels.keys[row])
    single = LoadedTeacher(teacher.dense, dataclasses.replace(teacher.info, flip=False), teacher.device)
    first = single.label(decoded.pixels).cpu()
    second = single.label(decoded.pixels.flip(2)).flip(-1).cpu()
    average = (first + second) / 2
    own = average if teacher.info.flip else first
    maps = labels.read(list(found)).to_torch()
    stored = dense_scores(
        maps.classes, maps.scores, maps.background, maps.tail_classes, maps.tail_offsets, maps.num_classes
    )
    columns = [_kl(own, stored), reference_kl(own).double(), _kl(first, second), _kl(first, average)]
    images = [_open(data, labels.meta.orientation) for data in found.values()]
    draws = [np.random.default_rng([seed, row]) for row in found]
    for share in SHARES:
        windows = [
            random_window(image.shape[:2], region, share, draw)
            for image, region, draw in zip(images, maps.region.tolist(), draws, strict=True)
        ]
        columns.append(_kl(answers(teacher, images, windows), crop_scores(maps, _fractions(windows, images))))
    return torch.stack(columns, 1).numpy(), own


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """float64 [n]: KL(softmax p ‖ softmax q) of logits [n, C, …], mean over the places."""
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).flatten(1).mean(1) if p.dim() > 2 else _kl(p[..., None], q[..., None])


def _open(data: bytes, orientation: str) -> np.ndarray:
    """uint8 [height, width, 3]."""
    from labeler.decode_reference import open_rgb

    return np.asarray(open_rgb(data, orientation))


Window = tuple[int, int, int, int]


def random_window(size: tuple[int, ...], region: list[float], share: float, draw: np.random.Generator) -> Window:
    """y0, x0, y1, x1 in pixels of a random crop of `share` of the sides of what the map covers."""
    edges = []
    for length, low, high in zip(size, region[:2], region[2:], strict=True):
        extent = share * (high - low) * length
        start = round(low * length + draw.random() * ((high - low) * length - extent))
        side = max(1, min(length, round(extent)))
        edges.append((min(max(0, start), length - side), side))
    (y, height), (x, width) = edges
    return y, x, y + height, x + width


def _fractions(windows: list[Window], images: list[np.ndarray]) -> Tensor:
    """float64 [n, 4]: windows in pixels as fractions of their images."""
    import torch

    sizes = [[*image.shape[:2], *image.shape[:2]] for image in images]
    return torch.tensor(windows, dtype=torch.float64) / torch.tensor(sizes)


def answers(teacher: LoadedTeacher, images: list[np.ndarray], windows: list[Window]) -> Tensor:
    """float32 [n, C]: the mean of the teacher's map of each crop alone, which it sees at its own input size."""
    import torch

    from labeler.resize import resize

    side, method = teacher.info.input_size, teacher.info.interpolation
    shown = [
        resize(np.ascontiguousarray(image[y0:y1, x0:x1]), side, method)
        for image, (y0, x0, y1, x1) in zip(images, windows, strict=True)
    ]
    return teacher.label(torch.from_numpy(np.stack(shown))).mean((2, 3)).cpu()


def crop_scores(maps: ScoreMaps, boxes: Tensor) -> Tensor:
    """float64 [n, C]: the stored scores of all classes, averaged over each box [n, 4], in fractions of the image.

    Cells count by the part of them that the box covers. Boxes are cut to the map's region.
    """
    import torch

    origin, extent = maps.region[:, :2].repeat(1, 2), (maps.region[:, 2:] - maps.region[:, :2]).repeat(1, 2)
    y0, x0, y1, x1 = ((boxes - origin) / extent).clamp(0, 1).double().unbind(1)
    along_y, along_x = _overlaps(y0, y1, maps.scores.shape[2]), _overlaps(x0, x1, maps.scores.shape[3])
    scores = torch.einsum("nphw,nh,nw->np", maps.scores.double(), along_y, along_x)
    background = torch.einsum("nhw,nh,nw->n", maps.background.double(), along_y, along_x)
    offsets = maps.tail_offsets.double()
    return dense_scores(maps.classes, scores, background, maps.tail_classes, offsets, maps.num_classes)


def _overlaps(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """[n, cells]: the share of the span `low` to `high` [n] of an axis that lies in each cell."""
    import torch

    edges = torch.arange(cells + 1, dtype=torch.float64)[None] / cells
    inside = torch.minimum(torch.maximum(edges, low[:, None]), high[:, None])
    return inside.diff(dim=1) / (high - low)[:, None].clamp(min=1e-12)
