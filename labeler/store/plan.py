"""The plan of a store: images, settings and shards. It is written first, and never changed.

The plan has everything that affects the value of a label; a later run that differs in any of it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from labeler.base.errors import IntegrityError, MismatchError
from labeler.base.version import __version__
from labeler.base.whole_files import read_sealed, write_sealed
from labeler.sources.decoding.pixels import ORIENTATIONS
from labeler.store.parts.find_parts import PLAN_FILE
from labeler.store.row_schema import Layout, row_layout
from labeler.store.score_code import Encoding, ScoreCode

if TYPE_CHECKING:
    from labeler.sources.image_source import ImageSource

HEAD_FILE = "head.safetensors"  # a linear head that was fitted for the store; the plan has its digest
FORMAT_NAME = "token-label store"
FORMAT_VERSION = "2.0"
READABLE = ("1", "2")  # major versions
KINDS = frozenset({("logprob", "uint8"), ("logprob", "float16"), ("logit", "float16")})
# Bounds of what a plan can say: readers allocate memory by it.
ClassCount = Annotated[int, Field(ge=1, le=1 << 31)]
PaletteSize = Annotated[int, Field(ge=1, le=1 << 16)]
TailSize = Annotated[int, Field(ge=0, lt=1 << 16)]
Side = Annotated[int, Field(ge=1, le=4096)]
ImageCount = Annotated[int, Field(ge=1, le=1 << 40)]
ShardCount = Annotated[int, Field(ge=1, le=1_000_000)]
MAX_ROW = 32 << 20  # scores of one image
Record = TypeVar("Record")


@dataclass(frozen=True)
class StoreMeta:
    """The content of a store; also the attributes of every shard.

    Attributes:
        num_classes: C.
        class_names: One for each class, or empty.
        palette: P, palette slots of a row.
        grid: H, W of the maps.
        score_kind: "logprob" or "logit" (see FORMAT.md).
        precision: Score precision: "uint8" or "float16".
        orientation: "exif" or "ignore": whether images were rotated as their EXIF tag says before labeling.
        teacher: name, weights_sha256, input_size, view, interpolation, mean, std, …
        dataset_fingerprint: Fingerprint of the images, see `ImageSource.fingerprint`.
        num_images: Number of images, quarantined ones included.
        shards: Number of shards.
        tail: R, tail slots of a row.
        format: Always "token-label store".
        format_version: Version of the format.
        writer: Program and version that wrote the store.
    """

    num_classes: ClassCount
    class_names: tuple[str, ...]
    palette: PaletteSize
    grid: tuple[Side, Side]
    score_kind: str
    precision: str
    orientation: str
    teacher: Mapping[str, Any]
    dataset_fingerprint: str
    num_images: ImageCount
    shards: ShardCount
    tail: TailSize = 0
    format: str = FORMAT_NAME
    format_version: str = FORMAT_VERSION
    writer: str = f"token-labeling {__version__}"

    __pydantic_config__ = ConfigDict(extra="ignore")  # later versions of the format may add entries

    def attributes(self, shard: int | None = None) -> dict[str, Any]:
        """Returns the attributes of a shard's file, or (None) of the view over all shards; structures as JSON text."""
        plain = asdict(self)
        for name in ("class_names", "teacher"):
            plain[name] = json.dumps(plain[name], ensure_ascii=False, sort_keys=True)
        if self.format_version.startswith("1."):
            del plain["tail"]
        elif shard is not None:  # a thousand names are larger than a hundred rows: the plan and the view have them
            del plain["class_names"]
        return plain if shard is None else {**plain, "shard": shard}


@dataclass(frozen=True)
class Plan:
    """The plan of a store.

    Attributes:
        meta: The content of the store.
        settings: The labeling settings that affect the values of labels.
        shard_size: Images per shard; shard i has the sorted keys from i·shard_size on.
        key_bytes: Width of the key field: the longest key, in UTF-8 bytes.
        code_values: The 256 scores of the uint8 codes; empty for float16.
        class_folders: folder name -> class id; empty if the images' folders do not name their classes.
    """

    meta: StoreMeta
    settings: Mapping[str, Any]
    shard_size: ImageCount
    key_bytes: Annotated[int, Field(ge=1, le=1 << 16)]
    code_values: tuple[FiniteFloat, ...] = ()
    class_folders: Mapping[str, int] = field(default_factory=dict)

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def head(self) -> tuple[int, str] | None:
        """Size and sha256 of the file of the teacher's linear head; None if it has none that was fitted for the store.

        Raises:
            IntegrityError: The plan says neither.
        """
        record = self.meta.teacher.get("head")
        if record is None:
            return None
        size, digest = (record.get("size"), record.get("sha256")) if isinstance(record, dict) else (None, None)
        if type(size) is not int or not 0 < size < 1 << 40 or type(digest) is not str:
            raise IntegrityError(f"{PLAN_FILE} does not say what {HEAD_FILE} is", got=shortened(record))
        return size, digest

    @property
    def layout(self) -> Layout:
        """The data sets of every shard."""
        m = self.meta
        return row_layout(m.palette, m.grid, m.num_classes, m.score_kind, m.precision, self.key_bytes, m.tail)

    @property
    def encoding(self) -> Encoding:
        """How maps are encoded."""
        chosen = {name: self.settings[name] for name in ("levels", "threshold") if name in self.settings}
        return Encoding(self.meta.palette, self.meta.tail, precision=self.meta.precision, **chosen)

    @cached_property
    def code(self) -> ScoreCode:
        """The meaning of the stored numbers."""
        values = np.array(self.code_values, np.float32) if self.code_values else None
        return ScoreCode(values, as_background=values is not None and not self.meta.format_version.startswith("1."))

    def slice_of(self, shard: int) -> slice:
        """Returns the slice of the sorted images that a shard covers."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.meta.num_images))

    def save(self, store: Path) -> bool:
        """Writes the plan. Returns False if another run's plan was there first."""
        return write_sealed(store / PLAN_FILE, asdict(self))


def plan_of(
    images: ImageSource,
    class_folders: Mapping[str, int],
    settings: Mapping[str, Any],
    shard_size: int,
    code_values: tuple[float, ...] = (),
    **content: Any,
) -> Plan:
    """Returns the plan of a store of these images.

    Args:
        images: The images.
        class_folders: See `Plan`, as the next three.
        settings: The labeling settings that affect the values of labels.
        shard_size: Images per shard.
        code_values: The scores of the uint8 codes.
        content: The fields of `StoreMeta` that do not follow from these.

    Returns:
        The plan.
    """
    shards = math.ceil(len(images) / shard_size)
    meta = StoreMeta(dataset_fingerprint=images.fingerprint, num_images=len(images), shards=shards, **content)
    key_bytes = max(len(key.encode()) for key in images.keys)
    return Plan(meta, settings, shard_size, key_bytes, code_values, dict(class_folders))


def load_plan(store: Path) -> Plan | None:
    """Reads the plan of a store.

    Args:
        store: The store's folder.

    Returns:
        The plan; None if there is none.

    Raises:
        MismatchError: The store has a newer format.
        IntegrityError: The plan is damaged, or says what no plan says.
    """
    path = store / PLAN_FILE
    try:
        record = read_sealed(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IntegrityError as error:
        # Unlike a shard it cannot be written again: existing shards could have any other settings.
        raise IntegrityError(
            error.problem, got=error.got, remedy="Restore it from a copy, or label into a new folder."
        ) from None
    meta = record.get("meta")
    if not isinstance(meta, dict):
        raise IntegrityError(f"{str(path)!r} is not a plan", got=type(meta).__name__, expected="the plan of a store")
    version = str(meta.get("format_version", "?"))
    if meta.get("format") != FORMAT_NAME or version.split(".")[0] not in READABLE:
        raise MismatchError(
            f"{str(store)!r} cannot be read by this version",
            got=f"{meta.get('format')!r} format {version}",
            expected=f"{FORMAT_NAME!r} format {' or '.join(f'{major}.x' for major in READABLE)}",
            remedy="Install a version of this package that supports the format.",
        )
    try:
        plan = parse_record(record, Plan)
        problem = _impossible(plan)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise IntegrityError(f"{str(path)!r} is not a plan", got=problem, expected="the plan of a store")
    return plan


def parse_record(record: Mapping[str, Any], kind: type[Record]) -> Record:
    """Converts a record that was read from a file, which may come from elsewhere.

    Args:
        record: The record.
        kind: The dataclass to convert it to.

    Returns:
        The dataclass.

    Raises:
        ValueError: An entry is missing, or has another type or value than the dataclass says; it names each.
    """
    try:
        # As JSON text: lists become tuples, and no other type is converted.
        return _adapter(kind).validate_json(json.dumps(record), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = [(".".join(map(str, one["loc"])), one) for one in error.errors(include_url=False)]
        texts = [
            f"no {name}" if one["type"] == "missing" else f"{name} {shortened(one['input'])}" for name, one in wrong
        ]
        raise ValueError("; ".join(texts)[:300]) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _impossible(plan: Plan) -> str | None:
    """Returns what contradicts itself in a plan, or None."""
    m = plan.meta
    wrong = {
        "number of class names": len(m.class_names) not in (0, m.num_classes),
        "score kind or precision": (m.score_kind, m.precision) not in KINDS,
        "orientation": m.orientation not in ORIENTATIONS,
        "number of code values": len(plan.code_values) != (256 if m.precision == "uint8" else 0),
        "class folders": any(not 0 <= n < m.num_classes for n in plan.class_folders.values()),
        "number of shards": m.shards != -(-m.num_images // plan.shard_size),
        "size of rows": m.palette * m.grid[0] * m.grid[1] > MAX_ROW,
        "tail": m.tail > 0 and m.precision != "uint8",
    }
    return next((f"impossible {name}" for name, fault in wrong.items() if fault), None)


def plain(value: Any) -> Any:
    """Converts tuples to lists, which is how JSON and HDF5 return them."""
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def shortened(value: Any) -> str:
    """Returns a value as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
