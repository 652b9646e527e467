"""fsspec's file systems: opened for a URL, told apart by version, and written to. The only file that imports fsspec."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.base.whole_files import TEMPORARY, sync_folder
from labeler.remote.failures import NotThere

# Services that show an object only when it is whole. Elsewhere it is written under another name first.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
# What services call the mark of one version of a file, the best first.
MARKS = (
    "ETag", "etag", "generation", "VersionId", "blob_id", "md5Hash", "Content-MD5", "content_md5", "Digest",
    "Last-Modified", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip


@dataclass(frozen=True)
class FileIdentity:
    """One version of a file.

    Attributes:
        size: Its bytes; None if the service does not say.
        mark: What the service tells versions apart by, such as an ETag or a time; empty if it has nothing.
    """

    size: int | None
    mark: str


def identity_of(info: dict[str, Any], url: str) -> FileIdentity:
    """Returns the version that a driver's description of a file tells."""
    if info.get("type") == "directory":
        raise NotThere(f"{url} is a folder", expected="a file")
    key = next((key for key in MARKS if info.get(key) is not None), None)
    value = info.get(key or "")
    mark = f"{key} {value.timestamp() if isinstance(value, datetime) else value}" if key else ""
    if "ino" in info:
        mark += f" inode {info['ino']}"
    size = info.get("size")
    return FileIdentity(None if size is None else int(size), mark)


def version_text(identity: FileIdentity) -> str:
    """Describes a version, for messages."""
    size = "unknown size" if identity.size is None else f"{identity.size} bytes"
    return f"{size}, {identity.mark}" if identity.mark else size


def open_file_system(url: str, protocol: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and its path there."""
    try:
        import fsspec
    except ImportError:
        remedy = "pip install 'token-labeling[remote]'"
        raise InputError(f"{url} needs fsspec, which is not installed", remedy=remedy) from None
    options: dict[str, Any] = {}
    if protocol in ("http", "https") and "client_kwargs" not in fsspec.config.conf.get(protocol, {}):
        try:
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        except ImportError:
            pass  # fsspec's own import fails next, and is told
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        driver = DRIVERS.get(protocol) or error.name or "its driver"
        raise InputError(f"{url} needs a driver that is not installed", remedy=f"pip install {driver}") from None
    except ValueError as error:
        raise InputError(f"{url} cannot be opened", got=error, expected="a URL such as s3://… or hf://…") from None
    return fs, str(path).rstrip("/")


def write_whole(fs: Any, protocol: str, path: str, source: Path | bytes) -> None:
    """Writes a file of which readers see nothing before it is whole, wherever the service allows it.

    Args:
        fs: fsspec's file system.
        protocol: The URL's.
        path: The file's path there.
        source: The file to send, or its content.
    """
    if protocol in OBJECT_STORES:
        write(fs, path, source)
    else:
        _write_by_renaming(fs, protocol, path, source)


def write(fs: Any, path: str, source: Path | bytes) -> None:
    """Writes a file: the content, or the file that has it."""
    if isinstance(source, bytes):
        fs.pipe_file(path, source)
    else:
        fs.put_file(str(source), path)


def _write_by_renaming(fs: Any, protocol: str, path: str, source: Path | bytes) -> None:
    """Writes a file under another name first."""
    folder, _, name = path.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/{TEMPORARY}{name}-{secrets.token_hex(4)}"
    try:
        write(fs, temporary, source)
        if protocol in ("file", "local"):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(Path(folder))
        else:
            fs.mv(temporary, path)
    except BaseException:
        if fs.exists(temporary):
            fs.rm_file(temporary)
        raise
