"""Files made to do harm: label stores, and what `torch.save` could have written."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tiny import CLASSES, GRID
from tiny_runs import TINY_RECIPE

from labeler.base.whole_files import read_sealed, sealed

PALETTE = 6  # as many places as the tiny teacher has classes
IN_OPEN, IN_ACCESS, IN_MODIFY = 0x20, 0x1, 0x2


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("shard-*.h5"))


def repair(store: Path, **entries: Any) -> None:
    """Give each shard's marker the size and digest that its file has now, and `entries`."""
    for path in shards(store):
        marker = store / f"{path.name.split('.')[0]}.json"
        data = path.read_bytes()
        record = {**read_sealed(marker), "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **entries}
        marker.write_bytes(sealed(record))


def edit_plan(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = read_sealed(store / "plan.json")
    change(record)
    (store / "plan.json").write_bytes(sealed(record))


@contextmanager
def watched(*paths: Path) -> Iterator[Callable[[], int]]:
    """Gives how often the files were opened, read or written by any process since (Linux tells)."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    for path in paths:
        assert libc.inotify_add_watch(handle, os.fsencode(path), IN_OPEN | IN_ACCESS | IN_MODIFY) >= 0
    seen = bytearray()

    def events() -> int:
        with suppress(BlockingIOError):
            seen.extend(os.read(handle, 1 << 16))
        return len(seen) // 16

    try:
        yield events
    finally:
        os.close(handle)


def _replace(file: h5py.File, name: str, **how: Any) -> Any:
    del file[name]
    return file.create_dataset(name, **how)


def external_storage(file: h5py.File, canary: Path) -> None:
    _replace(file, "target", shape=(4,), dtype="<i4", external=[(str(canary), 0, h5py.h5f.UNLIMITED)])


def external_link(file: h5py.File, canary: Path) -> None:
    del file["scores"]
    file["scores"] = h5py.ExternalLink(str(canary), "/scores")


def soft_link(file: h5py.File, canary: Path) -> None:
    del file["background"]
    file["background"] = h5py.SoftLink("/scores")


def cycle_of_links(file: h5py.File, canary: Path) -> None:
    del file["target"], file["region"]
    file["target"], file["region"] = h5py.SoftLink("/region"), h5py.SoftLink("/target")


def cycle_of_groups(file: h5py.File, canary: Path) -> None:
    del file["target"]
    file["target"] = file["/"]


def virtual_data(file: h5py.File, canary: Path) -> None:
    layout = h5py.VirtualLayout((4, PALETTE, GRID, GRID), "u1")
    layout[:] = h5py.VirtualSource(str(canary), "scores", (4, PALETTE, GRID, GRID))
    del file["scores"]
    file.create_virtual_dataset("scores", layout)


def huge_dimensions(file: h5py.File, canary: Path) -> None:
    _replace(file, "scores", shape=(10**12, PALETTE, GRID, GRID), dtype="u1", chunks=(1, PALETTE, GRID, GRID),
             fletcher32=True)  # fmt: skip


def huge_chunks(file: h5py.File, canary: Path) -> None:
    del file["target"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1 << 28,))
    settings.set_fletcher32()
    space = h5py.h5s.create_simple((4,), (h5py.h5s.UNLIMITED,))
    h5py.h5d.create(file.id, b"target", h5py.h5t.STD_I32LE, space, settings)


def variable_length(file: h5py.File, canary: Path) -> None:
    _replace(file, "key", data=["a", "b", "c", "d"], dtype=h5py.string_dtype())


def no_checksum(file: h5py.File, canary: Path) -> None:
    _replace(file, "scores", data=file["scores"][:], chunks=(1, PALETTE, GRID, GRID), compression="gzip")


def skipped_checksum(file: h5py.File, canary: Path) -> None:
    """The filter is named, but the chunk says that it was left out."""
    data = file["scores"]
    plain = np.ascontiguousarray(data[0])
    data.id.write_direct_chunk((0, 0, 0, 0), plain.tobytes(), filter_mask=0xFFFFFFFF)


def unknown_filter(file: h5py.File, canary: Path) -> None:
    del file["scores"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1, PALETTE, GRID, GRID))
    settings.set_fletcher32()
    settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((4, PALETTE, GRID, GRID))
    h5py.h5d.create(file.id, b"scores", h5py.h5t.STD_U8LE, space, settings)


def extra_object(file: h5py.File, canary: Path) -> None:
    file["more"] = np.zeros(3)


def wrong_type(file: h5py.File, canary: Path) -> None:
    _replace(file, "target", data=file["target"][:].astype("<f4"), chunks=(4,), fletcher32=True)


def wrong_rank(file: h5py.File, canary: Path) -> None:
    _replace(file, "target", data=file["target"][:][:, None], chunks=(4, 1), fletcher32=True)


def missing_chunk(file: h5py.File, canary: Path) -> None:
    data = file["scores"][:]
    made = _replace(file, "scores", shape=data.shape, dtype="u1", chunks=(1, *data.shape[1:]), fletcher32=True)
    made[1:] = data[1:]


def missing_small_chunk(file: h5py.File, canary: Path) -> None:
    _replace(file, "target", shape=(4,), dtype="<i4", chunks=(4,), fletcher32=True)


def committed_type(file: h5py.File, canary: Path) -> None:
    data = file["target"][:]
    file["kind"] = np.dtype("<i4")
    made = _replace(file, "target", shape=(4,), dtype=file["kind"], chunks=(4,), fletcher32=True)
    made[:] = data
    del file["kind"]


def compound_type(file: h5py.File, canary: Path) -> None:
    _replace(file, "target", shape=(4,), dtype=np.dtype([("a", "<i2"), ("b", "<i2")]), chunks=(4,), fletcher32=True)


def unbounded_attribute(file: h5py.File, canary: Path) -> None:
    file.attrs.create("writer", "x" * 100_000, dtype=h5py.string_dtype())


def unknown_attribute(file: h5py.File, canary: Path) -> None:
    file.attrs["more"] = 1


def attribute_of_a_data_set(file: h5py.File, canary: Path) -> None:
    file["scores"].attrs["more"] = 1


def reference_attribute(file: h5py.File, canary: Path) -> None:
    file.attrs.create("writer", file["scores"].ref, dtype=h5py.ref_dtype)


def oversized_chunk(file: h5py.File, canary: Path) -> None:
    """A chunk of 10 kB that is 10 MB when decompressed."""
    import zlib

    file["scores"].id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(10_000_000)) + b"\0\0\0\0")


HOSTILE_SHARDS = [
    external_storage, external_link, soft_link, cycle_of_links, cycle_of_groups, virtual_data, huge_dimensions,
    huge_chunks, variable_length, no_checksum, skipped_checksum, unknown_filter, extra_object, wrong_type, wrong_rank,
    missing_chunk, missing_small_chunk, committed_type, compound_type, unbounded_attribute, unknown_attribute,
    attribute_of_a_data_set, reference_attribute, oversized_chunk,
]  # fmt: skip


class Canary:
    """Makes a file when it is unpickled as code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def training_checkpoint(folder: Path) -> Path:
    """An honest one of a tiny model, with averaged weights and a training state."""
    from model import token_label
    from train.recipes.config import ModelConfig
    from train.record.checkpoint import CheckpointInfo, save_checkpoint

    config = ModelConfig(**TINY_RECIPE["model"], num_classes=CLASSES)
    net = token_label(config.name, CLASSES, img_size=config.img_size, **config.args)
    state = {"loader": {"epoch": 1}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "skipped": 0}
    info = CheckpointInfo(
        step=1, epoch=1, model=config.model_dump(), num_classes=CLASSES, aux_weight=0.5, class_names=[],
        class_folders={"a": 0}, transform={"mean": [0.5] * 3}, config={}, world_size=1, threads=1,
    )  # fmt: skip
    save_checkpoint(folder / "step-00000001", info, net.state_dict(), net.state_dict(), state)
    return folder / "step-00000001"


def archive(path: Path, data: bytes, entries: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """A file as of `torch.save` with this pickle and these storages."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for name, content in (entries or {}).items():
            file.writestr(f"archive/data/{name}", content)
        file.writestr("archive/version", "3\n")
    return path


def calling(module: str, name: str, *numbers: int) -> bytes:
    """The pickle of a call with whole numbers."""
    arguments = b"".join(b"\x8a\x08" + struct.pack("<q", number) for number in numbers)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


def strided(path: Path, *shape: int) -> Path:
    """One stored number, shown as many."""
    torch.save({"w": torch.zeros(1).expand(shape)}, path)
    return path


def compressed(path: Path, size: int) -> Path:
    """A tensor of `size` zeros in an archive of a thousandth of that."""
    whole = path.with_suffix(".whole")
    torch.save({"w": torch.zeros(8, dtype=torch.uint8)}, whole)
    with zipfile.ZipFile(whole) as file:
        data = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    whole.unlink()
    # The storage's length and the tensor's are the pickle's only eights.
    data = data.replace(b"K\x08", b"\x8a\x08" + struct.pack("<q", size))
    return archive(path, data, {"0": bytes(size)}, zipfile.ZIP_DEFLATED)


def overlapping(path: Path, size: int, names: int) -> Path:
    """Many entries of an archive that are one and the same piece of it."""
    archive(path, pickle.dumps({}, 2), {"0": bytes(size)})
    with zipfile.ZipFile(path, "a") as file:
        (first,) = [entry for entry in file.infolist() if entry.filename.endswith("data/0")]
        for i in range(1, names):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(copy, name, getattr(first, name))
            file.filelist.append(copy)
        file._didModify = True
    return path


def tensor_bombs(folder: Path, size: int = 300_000_000) -> dict[str, Path]:
    """Files of a few kilobytes, or of 0.3 MB where they are compressed, that ask for `size` bytes or far more."""
    folder.mkdir(parents=True, exist_ok=True)
    legacy = folder / "legacy.pt"
    torch.save({"w": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    data = legacy.read_bytes().replace(b"K\x03N", b"\x8a\x08" + struct.pack("<q", 10**9) + b"N")
    legacy.write_bytes(data)
    return {
        "strides": strided(folder / "strides.pt", 10**6, 10**6),
        "compression": compressed(folder / "compressed.pt", size),
        "overlap": overlapping(folder / "overlap.pt", 1 << 16, 30_000),
        "bytes": archive(folder / "bytes.pt", calling("builtins", "bytearray", size)),
        "empty tensor": archive(folder / "tensor.pt", calling("torch", "Tensor", 10**6, 10**6)),
        "typed tensor": archive(folder / "typed.pt", calling("torch", "DoubleTensor", size)),
        "storage": archive(folder / "storage.pt", calling("torch.storage", "UntypedStorage", size)),
        "pickle": archive(folder / "pickle.pt", b"\x80\x02" + b"]" * (5 << 20) + b"."),
        "legacy": legacy,
    }
