"""Stores from elsewhere: a child process checks them completely before this process opens them with HDF5.

libhdf5 crashes on some damaged files, and a malicious file can take any amount of time or memory. So a store that this
user has neither written nor checked is first read by a child process that cannot write and has limited memory and time.
It reads every shard, row and attribute. If all is well, the store's digest is noted in the user's state folder
(`$XDG_STATE_HOME/token-labeling/stores`, else `~/.local/state/…`), so that the check is done once: a store's markers
have the sha256 of every shard, and a shard that differs from its marker is never opened.

The check took 1.6 s for 10 shards of 1,000 rows (18×18 cells, palette 16, 32 MB, one core): 0.3 s to start, and 0.13 ms
per row. Opening a store that was checked before takes 1 ms.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labeler.base.errors import InputError, IntegrityError
from labeler.remote.local_copy import LocalCopy
from labeler.remote.urls import is_url
from labeler.store.parts.find_parts import part_folders
from labeler.store.plan import PLAN_FILE, load_plan
from labeler.store.shard_markers import marker_names, read_foreign_marker, shard_stem

log = logging.getLogger("labeler")

WRITTEN, CHECKED = "written", "checked"
RECORDS_BYTES = 1 << 30  # of plan and markers together
TOO_MANY_FILES = 3  # exit status of the child
COMMAND = (sys.executable, "-P", "-m", "labeler.store.hdf5.inspect_store")


@dataclass(frozen=True)
class Limits:
    """Limits of the child process. A valid store needs less memory than its size plus 2 GB, and a tenth of the time.

    Attributes:
        memory: Bytes of memory beyond what the child has when it starts.
        cpu: Seconds of processor time.
        wall: Seconds of real time.
    """

    memory: int
    cpu: int
    wall: int

    @classmethod
    def of(cls, size: int) -> Limits:
        """Returns the limits for a store of `size` bytes."""
        cpu = 60 + size // 2_000_000
        return cls((2 << 30) + size, cpu, 3 * cpu)


def refuse_hostile(store: Path) -> bool:
    """Checks a store, and each of its parts, in a child process unless that was done before.

    An incomplete or damaged store passes: that is noticed without HDF5 when it is opened.

    Returns:
        Whether this user wrote the whole store.

    Raises:
        IntegrityError: A part is a link, a shard is not what the labeler writes, or the child crashed or ran into a
            limit. It names the file.
    """
    # A list: each part is checked, whatever the first one is.
    written = [refuse_hostile_part(folder) for folder in part_folders(store)]
    return all(written)


def refuse_hostile_part(store: Path) -> bool:
    """Does the same for one folder, without its parts."""
    try:
        digest = _digest(store)
    except (FileNotFoundError, NotADirectoryError):
        return False
    known = _recall(digest)
    if known is None and run_child(store) == "whole":
        _note(digest, CHECKED)
    return known == WRITTEN


def refuse_hostile_shard(store: Path, shard: int, shards: int) -> None:
    """Checks one shard in a child process, unless that was done before; the other shards need not be here.

    Args:
        store: A folder with the plan, all markers and this shard's file.
        shard: Number of the shard.
        shards: Number of shards of the store.

    Raises:
        IntegrityError: The shard is not what the labeler writes, or the child crashed or ran into a limit.
    """
    digest = _digest(store, [f"{shard_stem(shard, shards)}.json"])
    if _recall(digest) is None and run_child(store, None, str(shard)) == "whole":
        _note(digest, CHECKED)


def check_known(store: Path) -> str | None:
    """Returns what is recorded of a store with this plan and these markers: WRITTEN, CHECKED or None."""
    try:
        return _recall(_digest(store))
    except FileNotFoundError:
        return None


def open_folder(store: str | Path) -> tuple[Path, LocalCopy | None]:
    """Returns the folder here with a store's plan and markers.

    Args:
        store: The store's folder, or its URL.

    Returns:
        (the folder, None) or, for a URL, (a folder of the cache, what fetches shards into it).

    Raises:
        InputError: There is no driver or no permission for the URL.
        IntegrityError: The plan or a marker is damaged.
        RemoteError: The URL's service does not answer.
    """
    if isinstance(store, Path) or not is_url(store):
        return Path(store), None
    copy = LocalCopy(store, PLAN_FILE)
    with copy.named():
        plan = load_plan(copy.path)
        if plan is not None:
            copy.fetch_records(marker_names(plan))
            for shard in range(plan.meta.shards):
                read_foreign_marker(copy.path, shard, plan.meta.shards)  # a damaged one is named by its URL here
    return copy.path, copy


def remember_written(store: Path) -> None:
    """Records that this user wrote all of a folder, without its parts, so that it needs no check."""
    _note(_digest(store), WRITTEN)


def _digest(store: Path, names: Sequence[str] | None = None) -> str:
    """Returns the sha256 over plan and markers (None: all), and so over their shards. Nothing is parsed."""
    if names is None:
        names = [name for name in os.listdir(store) if name.startswith("shard-") and name.endswith(".json")]
    digest, left = hashlib.sha256(), RECORDS_BYTES
    for name in [PLAN_FILE, *sorted(names)]:
        # Otherwise a pipe in place of a file would block.
        with open(os.open(store / name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            left -= status.st_size
            if not stat.S_ISREG(status.st_mode) or left < 0:
                raise _refused(
                    store / name, "not a regular file" if left >= 0 else f"more than {RECORDS_BYTES:,} bytes"
                )
            data = file.read(status.st_size)
            digest.update(f"{name} {len(data)} ".encode("utf-8", "surrogateescape") + data)
    return digest.hexdigest()


def _memory() -> Path:
    """Returns the folder where checks are recorded."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "token-labeling" / "stores"


def _recall(digest: str) -> str | None:
    """Returns what is recorded of a store: "written", "checked" or None."""
    try:
        return (_memory() / digest).read_text().strip()
    except OSError:
        return None


def _note(digest: str, how: str) -> None:
    """Records that a store was written or checked."""
    try:
        _memory().mkdir(parents=True, exist_ok=True)
        (_memory() / digest).write_text(how + "\n")
    except OSError as error:
        log.debug("the check of a store cannot be recorded: %s", error)


def view_rows(store: Path, name: str) -> int:
    """Returns the rows of a data set in `labels.h5`. A child process opens the file, since no digest covers it."""
    return int(run_child(store, None, name))


def run_child(store: Path, limits: Limits | None = None, *more: str) -> str:
    """Runs the child process on a store.

    Args:
        store: The store's folder.
        limits: Limits of the child; None: those for the store's size.
        more: Name of a data set whose rows to count, or number of a shard to check; none: check the store.

    Returns:
        The last line that the child printed.

    Raises:
        InputError: The child may not open as many files as there are shards.
        IntegrityError: The child refused the store, crashed or ran into a limit.
    """
    # Blocks on the disk: a sparse file may claim any length.
    size = sum(entry.stat().st_blocks * 512 for entry in os.scandir(store) if entry.is_file())
    limits = limits or Limits.of(size)
    if size > 1 << 30:
        log.warning("checking %s (%.1f GB) before it is opened for the first time", store, size / 1e9)
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONIOENCODING": "utf-8",
        "HDF5_PLUGIN_PRELOAD": "::",
        # Every BLAS thread reserves memory, which would count against the limit.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [*COMMAND, os.path.abspath(store), str(limits.memory), str(limits.cpu), *more]
    child = subprocess.Popen(
        arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        output, _ = child.communicate(timeout=limits.wall)
        status = child.returncode
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        status = -signal.SIGXCPU
    finally:
        child.kill()
    lines = output.decode("utf-8", "replace").splitlines() or [PLAN_FILE]
    if status == 0:
        return lines[-1]
    if status == TOO_MANY_FILES:
        raise InputError(
            f"{str(store)!r} has more shards than this process may have open files",
            got=lines[-1], expected="room to open them all, as a reader does", remedy="Raise the limit (ulimit -Hn).",
        )  # fmt: skip
    if status == 1 and len(lines) > 1:
        raise _refused(store / printable(lines[-2]), printable(lines[-1]))
    raise _refused(store / printable(lines[-1]), _ended(status, limits))


def _ended(status: int, limits: Limits) -> str:
    """Describes how the child ended."""
    if status == -signal.SIGXCPU:
        return f"the check did not end within {limits.cpu} s of processor time or {limits.wall} s in all"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"exit status {status}"
    return f"a crash of the process that checked it ({name})"


def printable(text: str) -> str:
    """Removes characters that could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def _refused(path: Path, got: str) -> IntegrityError:
    """Returns the error for a file that the check refused."""
    return IntegrityError(
        f"{str(path)!r} is refused", got=got, expected="what the labeler writes",
        remedy="The store was opened in a child process only. Get it from its author again, or label the images again.",
    )  # fmt: skip
