"""Reading `torch.save`'s files from anywhere: no code is run, and no more memory is taken than the file is long.

`torch.load(weights_only=True)` runs no code, but allocates what a file asks for: zeros that are compressed, or calls of
`bytearray(10**12)` and `torch.Tensor(10**6, 10**6)` are a few bytes in a file. So the archive and the pickle are looked
at first, and afterwards the tensors may not show more than the file holds. `labeler` and `model` each have this file,
since neither imports the other; a test keeps the two equal.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_PICKLE = 4 << 20  # bytes; the pickle of a checkpoint names its tensors, which lie elsewhere in the file
MAX_ENTRIES = 100_000
LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages: then the raw tensors follow
# What checkpoints are made of. torch allows more, among it makers of tensors of any size.
PLAIN = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|(builtins|__builtin__) (set|complex)|_codecs encode|"
    r"torch (Size|[a-z]\w*|\w+Storage)|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|"
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
)
# Ways of a pickle to name a class that the weights-only reader does not know, or that hide the name from a scan.
OTHER_NAMES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"})


def load_plain(source: Path | bytes, allowed: Sequence[Any] = (), max_pickle: int = MAX_PICKLE) -> Any:
    """What a file of `torch.save` holds, on the CPU; `source` is its path or its bytes.

    allowed     more classes, harmless ones, that the file may hold, as `torch.serialization.safe_globals` takes them
    max_pickle  bytes that its pickle may have

    Raises ValueError where the file could run code or take more memory than its own size, and what `torch.load`
    raises where it is damaged.
    """
    more = {_name(item) for item in allowed}
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if zipfile.is_zipfile(file):
            _check_pickle(io.BytesIO(_check_archive(file, size, max_pickle)), 1, more, max_pickle)
        else:
            file.seek(0)
            _check_pickle(file, LEGACY_PICKLES, more, max_pickle)
        file.seek(0)
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(file, map_location="cpu", weights_only=True)
    tensors = list(_tensors(content))
    if any(tensor.layout != torch.strided for tensor in tensors):
        raise ValueError("a tensor that is not dense")
    # Strides of 0 and shared storages show the same bytes often; so do tied weights, in moderation.
    if (total := sum(tensor.numel() * tensor.element_size() for tensor in tensors)) > 8 * size + (1 << 20):
        raise ValueError(f"tensors of {total:,} bytes in a file of {size:,}")
    return content


def _check_archive(file: BinaryIO, size: int, max_pickle: int) -> bytes:
    """The pickle in a zip archive whose entries are stored as they are, each in its own place."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{len(entries):,} entries in the archive, more than {MAX_ENTRIES:,}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch.save does not write")
        if (total := sum(entry.file_size for entry in entries)) > size:
            raise ValueError(f"entries of {total:,} bytes in a file of {size:,}")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} pickles in the archive, expected one")
        if pickles[0].file_size > max_pickle:
            raise ValueError(f"a pickle of {pickles[0].file_size:,} bytes, more than {max_pickle:,}")
        return archive.read(pickles[0])


def _check_pickle(file: BinaryIO, count: int, more: set[str], max_pickle: int) -> None:
    """Refuse names of anything but plain holders in `count` pickles that follow each other."""
    start = file.tell()
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(file):
            name = str(argument)
            if operation.name == "GLOBAL" and not PLAIN.fullmatch(name) and name not in more:
                raise ValueError(f"a pickle that asks for {name.replace(' ', '.')[:100]}")
            if operation.name in OTHER_NAMES:
                raise ValueError(f"a pickle with {operation.name}, which torch.save does not write")
            if file.tell() - start > max_pickle:
                raise ValueError(f"a pickle of more than {max_pickle:,} bytes")


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor below a structure, once; without recursion, and each part once: it may be deep, or share parts."""
    pending, seen = [content], set()
    while pending:
        part = pending.pop()
        if isinstance(part, torch.Tensor):
            yield part
            continue
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            pending += part
        if vars_of := getattr(part, "__dict__", None):
            pending.append(vars_of)


def _name(item: type | tuple[Any, str]) -> str:
    name = item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
    return " ".join(name.rsplit(".", 1))
