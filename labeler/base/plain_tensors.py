"""Safe reading of untrusted `torch.save` files: runs no code, and takes little more memory than the file's size.

`torch.load(weights_only=True)` runs no code, but allocates what a file asks for: compressed zeros, or calls of
`bytearray(10**12)` and `torch.Tensor(10**6, 10**6)`, take a few bytes in a file. So the archive and the pickle are
checked first, and afterwards the tensors may not be larger than the file allows.
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

MAX_PICKLE = 4 << 20  # bytes; the pickle of a checkpoint only names its tensors, whose data is elsewhere in the file
MAX_ENTRIES = 100_000
LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages; the raw tensors follow
# What checkpoints are made of. torch allows more, including functions that create tensors of any size.
PLAIN = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|(builtins|__builtin__) (set|complex)|_codecs encode|"
    r"torch (Size|[a-z]\w*|\w+Storage)|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|"
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
)
# Opcodes that name a class in a way that the weights-only reader does not know, or that hide the name from a scan.
OTHER_NAMES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"})


def load_plain(source: Path | bytes, allowed: Sequence[Any] = (), max_pickle: int = MAX_PICKLE) -> Any:
    """Reads the content of a `torch.save` file onto the CPU.

    Args:
        source: Path of the file, or its bytes.
        allowed: More harmless classes that the file may contain, as `torch.serialization.safe_globals` takes them.
        max_pickle: Largest size of its pickle in bytes.

    Returns:
        The content, as `torch.load` returns it.

    Raises:
        ValueError: The file could run code, or take much more memory than its own size. A damaged file raises what
            `torch.load` raises.
    """
    more = {_pickled_name(item) for item in allowed}
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
    # Strides of 0 and shared storages repeat the same bytes, as tied weights do, in moderation.
    if (total := sum(tensor.numel() * tensor.element_size() for tensor in tensors)) > 8 * size + (1 << 20):
        raise ValueError(f"tensors of {total:,} bytes in a file of {size:,}")
    return content


def _check_archive(file: BinaryIO, size: int, max_pickle: int) -> bytes:
    """Returns the pickle of a zip archive, after checking that entries are uncompressed and do not overlap."""
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
    """Raises ValueError if one of `count` consecutive pickles names anything but plain containers and tensors."""
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
    """Yields every tensor in a structure, which may be deep or share parts: no recursion, each part once."""
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


def _pickled_name(item: type | tuple[Any, str]) -> str:
    """Returns how a pickle spells the name of a class: "module name"."""
    name = item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
    return " ".join(name.rsplit(".", 1))
