"""Checking a store: every bit of it, its images, and that its teacher still says the same.

Legend: n rows of a shard; C classes; P palette size; H×W map grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.base.errors import InputError, IntegrityError, TokenLabelError
from labeler.base.whole_files import check_file, read_marker
from labeler.config import LabelerConfig, TeacherConfig
from labeler.sources.images import BadImage, image_digest, image_path, read_image
from labeler.store.foreign_store import refuse_hostile, view_rows
from labeler.store.label_store import LabelStore
from labeler.store.plan import Plan, load_plan
from labeler.store.row_checks import shard_problems, value_problems
from labeler.store.shard_file import VIEW_FILE, ShardReader, file_rows
from labeler.store.shard_writer import QUARANTINE_FILE

if TYPE_CHECKING:
    from labeler.sources.decoder import Decoder
    from labeler.sources.images import ImageSet
    from labeler.teacher.create_teacher import LoadedTeacher

MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was checked, and every problem found in one line each.

    relabel_kl: mean KL(teacher run again ‖ store) in nats over the relabeled rows; stored_kl: the same when labeled.
    """

    store: str
    shards: int
    rows: int
    quarantined: int
    bytes: int
    images_checked: int
    relabeled: int
    relabel_kl: float | None
    stored_kl: float | None
    problems: tuple[str, ...]

    def text(self) -> str:
        parts = [
            f"{self.shards} shards, {self.rows:,} rows, {self.bytes:,} bytes, {self.quarantined} in the quarantine"
        ]
        if self.images_checked:
            parts.append(f"{self.images_checked:,} image files compared")
        if self.relabel_kl is not None:
            parts.append(
                f"{self.relabeled} rows labeled again: KL {self.relabel_kl:.4f} (stored with {self.stored_kl:.4f})"
            )
        parts.append(f"{len(self.problems)} problems" if self.problems else "all good")
        return "; ".join(parts)


def verify_store(
    store: str | Path,
    images: str | Path | None = None,
    relabel: int = 0,
    *,
    device: str = "auto",
    progress: bool = False,
    seed: int = 0,
    trusted: bool = False,
) -> Verification:
    """Check a store's plan, markers, digests, layout, rows and view; with `images`, also every image file.

    relabel   run the store's teacher again on this many random rows (needs `images`)
    trusted   the store is your own or a friend's: no check in a child process, and its teacher, which may be any
              function that can be imported, may be run

    Raises InputError where there is no store at all; everything else is a problem in the result.
    """
    path, problems = Path(store), []
    try:
        own = trusted or refuse_hostile(path)
    except IntegrityError as error:
        return Verification(str(path), 0, 0, 0, 0, 0, 0, None, None, (str(error),))
    plan = load_plan(path)
    if plan is None:
        raise InputError(f"{str(path)!r} is not a label store", got="no plan.json", remedy="Give a store's folder.")
    if relabel and images is None:
        raise InputError("--relabel needs --images", remedy="Give the image root that was labeled.")
    if relabel:
        refuse_foreign_teacher(own, plan, path, "--relabel")
    rows = quarantined = 0
    stored_kl = 0.0
    for shard in _progress(range(plan.meta.shards), "verify", progress):
        try:
            marker = read_marker(path, shard, plan.meta.shards)
            if marker is None:
                problems.append(f"shard {shard} is missing: run the labeling command again")
                continue
            check_file(path, marker)
            reader = ShardReader(path / marker.file, plan.layout, marker.rows)
            found = reader.read(np.arange(marker.rows))
            bad = shard_problems(plan, shard, reader, marker.quarantine) + value_problems(plan, found)
            problems += [f"{marker.file}: {problem}" for problem in bad]
        except IntegrityError as error:
            problems.append(str(error))
            continue
        rows, quarantined = rows + marker.rows, quarantined + len(marker.quarantine)
        stored_kl += marker.stats.get("kl", 0.0)
    if not problems:
        problems += _view_problems(path, rows, quarantined, file_rows if own else view_rows)
    checked, relabeled, relabel_kl = 0, 0, None
    if images is not None and not problems:
        checked = _check_images(LabelStore(path, trusted=True), images, problems, progress)
    if relabel and not problems:
        relabeled, relabel_kl = _relabel(
            LabelStore(path, trusted=True), Path(str(images)), relabel, device, seed, problems
        )
    size = sum(file.stat().st_size for file in path.iterdir())
    return Verification(
        str(path),
        plan.meta.shards,
        rows,
        quarantined,
        size,
        checked,
        relabeled,
        relabel_kl,
        stored_kl / max(1, rows) if relabel else None,
        tuple(problems),
    )


def refuse_foreign_teacher(trusted: bool, plan: Plan, store: Path, option: str) -> None:
    """Raise InputError where the teacher that a store names, which may be any code, is not to be run here."""
    if not trusted:
        raise InputError(
            f"{str(store)!r} was not written in one run of yours, and its teacher may be any code that it names",
            got=repr(plan.meta.teacher.get("name"))[:80],
            remedy=f"Give --trusted if the store is your own or a friend's, or leave {option} away.",
        )


def _view_problems(store: Path, rows: int, quarantined: int, count: Callable[[Path, str], int]) -> list[str]:
    problems = []
    try:
        found = count(store, "scores")
        if found != rows:
            problems.append(f"{VIEW_FILE} shows {found} rows of {rows}: run the labeling command again")
        lines = len((store / QUARANTINE_FILE).read_bytes().splitlines())
        if lines != quarantined:
            problems.append(
                f"{QUARANTINE_FILE} has {lines} lines for {quarantined} images: run the labeling command again"
            )
    except IntegrityError as error:
        problems.append(str(error))
    except (OSError, KeyError) as error:
        problems.append(f"the store is not finished ({error}): run the labeling command again")
    return problems


def _check_images(store: LabelStore, images: str | Path, problems: list[str], progress: bool) -> int:
    """Compare every image file with the digest that was stored when it was labeled."""
    from labeler.sources.images import find_images, image_root, refuse_other_images

    root, keys = image_root(images), store.keys
    if not store.plan.settings.get("from_list"):  # a list may name files that a folder's listing leaves out
        found: ImageSet = find_images(root)
        try:
            known = (*keys, *(entry["key"] for entry in store.quarantine))
            refuse_other_images(found, store.meta.dataset_fingerprint, known, store.path)
        except TokenLabelError as error:
            problems.append(str(error))
            return 0
    digests = store.column("image_digest").tolist()
    compared = 0
    for key, digest in _progress(list(zip(keys, digests, strict=True)), "images", progress):
        compared += 1
        try:
            if image_digest(read_image(root, key)) != digest:
                problems.append(f"{key!r} is not the image that was labeled: its bytes have changed")
        except BadImage as error:
            problems.append(f"{key!r} {error}")
        if len(problems) >= MOST_PROBLEMS:
            problems.append("… and perhaps more")
            break
    return compared


def teacher_of(store: LabelStore, device: str) -> tuple[LoadedTeacher, Decoder]:
    """The store's own teacher and decoder, built again from its record. Raises TeacherError, IntegrityError."""
    from labeler.teacher.create_teacher import create_teacher, resolve_device
    from labeler.worker import decoder_for

    record, device = store.meta.teacher, resolve_device(device)
    if store.meta.score_kind != "logprob":
        raise InputError(f"{str(store.path)!r} was imported", got="no teacher in it", expected="a store labeled here")
    config = LabelerConfig(
        TeacherConfig(
            name=record["name"],
            checkpoint=record["checkpoint"],
            random_weights=record["random_weights"],
            num_classes=store.meta.num_classes,
            input_size=record["input_size"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            view=record["view"],
            flip=record["flip"],
            autocast=record["autocast"],
        ),
        orientation=store.meta.orientation,
    )
    teacher = create_teacher(config.teacher, device)
    if teacher.info.weights_sha256 != record["weights_sha256"]:
        raise IntegrityError(
            "the store's teacher has changed since",
            got=f"weights {teacher.info.weights_sha256[:12]}",
            expected=record["weights_sha256"][:12],
            remedy="Give it the checkpoint that it had.",
        )
    return teacher, decoder_for(teacher, config, device, 1)


def teacher_kl(
    store: LabelStore, rows: np.ndarray, images: Path, teacher: LoadedTeacher, decoder: Decoder
) -> np.ndarray:
    """float64 [K, 2]: KL(teacher ‖ store) of rows, mean over cells, in nats, with the teacher run again on the images.

    The second column is what coding these maps anew costs, which is what an honest row has.
    """
    from labeler.store.encoder import encode_maps, encode_planes

    plan, found = store.plan, []
    for chunk in np.array_split(rows, max(1, len(rows) // 16)):
        decoded = decoder([image_path(images, store.keys[row]).read_bytes() for row in chunk])
        if decoded.failures:
            raise IntegrityError(
                "an image cannot be decoded any more", got=store.keys[chunk[next(iter(decoded.failures))]]
            )
        logits = teacher.label(decoded.pixels)
        if plan.code.as_background or plan.code.values is None:
            anew = encode_maps(logits, plan.encoding).kl
        else:  # format 1.0
            anew = encode_planes(logits, plan.meta.palette, plan.code.values).kl
        log_p = logits.double().log_softmax(1).cpu()
        stored = store.read(chunk).to_torch().dense().double().clamp(min=1e-30).log()
        kl = (log_p.exp() * (log_p - stored)).sum(1).mean((1, 2)).numpy()
        found.append(np.stack([kl, anew], 1))
    return np.concatenate(found)


def _relabel(
    store: LabelStore, images: Path, count: int, device: str, seed: int, problems: list[str]
) -> tuple[int, float | None]:
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:count])
    try:
        teacher, decoder = teacher_of(store, device)
        kl = teacher_kl(store, rows, images, teacher, decoder)
    except IntegrityError as error:
        problems.append(str(error))
        return 0, None
    for row, (value, anew) in zip(rows.tolist(), kl.tolist(), strict=True):
        limit = 1.5 * anew + 0.05  # room for another device's rounding; another image or map is far above
        if not value <= limit:
            problems.append(
                f"row {row} ({store.keys[row]!r}): the teacher now differs by {value:.3f} nats (limit {limit:.3f})"
            )
    return len(rows), float(kl[:, 0].mean())


def _progress(items: Any, name: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not shown)
