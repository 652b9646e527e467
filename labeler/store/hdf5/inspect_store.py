"""The child process that reads all of a store from elsewhere, see `labeler.store.foreign_store`."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from labeler.base.errors import IntegrityError, TokenLabelError
from labeler.base.open_files import OpenFiles
from labeler.store.foreign_store import TOO_MANY_FILES, printable
from labeler.store.hdf5 import VIEW_FILE
from labeler.store.hdf5.read_shard import ShardReader, file_rows
from labeler.store.plan import FORMAT_VERSION, PLAN_FILE, Plan, load_plan
from labeler.store.row_checks import shard_problems, value_problems
from labeler.store.shard_markers import check_file, read_marker

log = logging.getLogger("labeler")

DECODED_BYTES = 4 << 30  # of one shard's planes
BLOCK_BYTES = 64 << 20  # decoded at once


def inspect(store: Path, say: Callable[[str], None]) -> bool:
    """Reads all of a store.

    Args:
        store: The store's folder.
        say: Called with the name of each file before it is opened.

    Returns:
        Whether every shard exists and matches its marker.

    Raises:
        IntegrityError: A shard is not what the labeler writes.
    """
    say(PLAN_FILE)
    try:
        plan = load_plan(store)
    except TokenLabelError:
        return False  # the parent reads the plan and says so itself
    if plan is None:
        return False
    readers, files, last = [], OpenFiles(), ""
    for shard in range(plan.meta.shards):
        try:
            marker = read_marker(store, shard, plan.meta.shards)
            if marker is None:
                continue
            say(marker.file)
            if not stat.S_ISREG(os.stat(store / marker.file).st_mode):
                raise IntegrityError("not a regular file")
            check_file(store, marker)
        except (IntegrityError, FileNotFoundError):
            continue
        # All readers are kept, so that the memory limit covers what a process that uses the store needs.
        readers.append(ShardReader(store / marker.file, plan.layout, marker.rows, files=files))
        last = _inspect_shard(plan, shard, readers[-1], marker.quarantine, last)
    return len(readers) == plan.meta.shards


def inspect_one(store: Path, shard: int, say: Callable[[str], None]) -> bool:
    """Reads one shard, whose neighbours need not be here.

    Args:
        store: A folder with the plan, the markers and the shard's file.
        shard: Number of the shard.
        say: Called with the name of each file before it is opened.

    Returns:
        Whether it matches its marker.

    Raises:
        IntegrityError: The shard is not what the labeler writes.
    """
    say(PLAN_FILE)
    plan = load_plan(store)
    if plan is None:
        return False
    shards = plan.meta.shards
    marker = read_marker(store, shard, shards)
    if marker is None:
        return False
    say(marker.file)
    check_file(store, marker)
    before = read_marker(store, shard - 1, shards) if shard else None
    after = read_marker(store, shard + 1, shards) if shard + 1 < shards else None
    reader = ShardReader(store / marker.file, plan.layout, marker.rows)
    last = _inspect_shard(plan, shard, reader, marker.quarantine, before.last_key if before else "")
    if after is not None and last >= after.first_key:
        raise IntegrityError("keys that are not below those of later shards")
    return True


def _inspect_shard(plan: Plan, shard: int, reader: ShardReader, quarantine: list[dict[str, str]], last: str) -> str:
    """Raises IntegrityError for what the labeler never writes; returns the last key. `last`: that of earlier shards."""
    problems = shard_problems(plan, shard, reader, quarantine)
    if plan.meta.format_version == FORMAT_VERSION and (more := reader.attributes.keys() - plan.meta.attributes(shard)):
        problems.append(f"unknown attributes {sorted(more)[:3]}")
    own = np.array(plan.code_values, np.float32)
    if reader.code_values is not None and not np.array_equal(reader.code_values, own):
        problems.append("code values that differ from the plan's")
    keys = reader.keys
    if keys and keys[0] <= last:
        problems.append("keys that are not above those of earlier shards")
    problems += [f"a key that leaves the image root: {key!r}" for key in keys if not _stays_below(key)][:1]
    row = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in plan.layout.values())
    if row * reader.rows > DECODED_BYTES:
        problems.append(f"{row * reader.rows:,} bytes when decoded, more than {DECODED_BYTES:,}")
    if not problems:
        step = max(1, BLOCK_BYTES // row)
        for start in range(0, reader.rows, step):
            rows = reader.read(np.arange(start, min(start + step, reader.rows)))
            if problems := value_problems(plan, rows):
                break
    if problems:
        raise IntegrityError("; ".join(problems))
    return keys[-1] if keys else last


def _stays_below(key: str) -> bool:
    """Whether a key is a path below the image root."""
    return "\0" not in key and not {"", ".", ".."} & set(key.split("/"))


def main(arguments: list[str]) -> int:
    """Runs the child process. It prints each file before reading it, and the result at the end."""
    store, memory, cpu, name = Path(arguments[0]), int(arguments[1]), int(arguments[2]), "".join(arguments[3:])
    output = sys.stdout
    _limit(memory, cpu)

    def say(line: str) -> None:
        print(printable(line), file=output, flush=True)

    try:
        if name.isdigit():
            say("whole" if inspect_one(store, int(name), say) else "not whole")
        elif name:
            say(VIEW_FILE)
            say(str(file_rows(store, name)))
        else:
            say("whole" if inspect(store, say) else "not whole")
        return 0
    except IntegrityError as error:
        say(str(error.got or error.problem))
        return 1
    except MemoryError:
        say(f"more memory needed than {memory:,} bytes")
        return 1
    except Exception as error:  # whatever the file caused, it is not a store of ours
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return TOO_MANY_FILES
        say(f"{type(error).__name__}: {error}")
        return 1


def _limit(memory: int, cpu: int) -> None:
    """Limits memory, processor time, file writes and core dumps of this process."""
    import resource

    used = os.times()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a store may have thousands of shards
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        mapped = int((file.read().split() or ["0"])[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, mapped + memory),
        (resource.RLIMIT_CPU, int(used.user + used.system) + cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        most = value + 5 * (limit == resource.RLIMIT_CPU)  # SIGXCPU first: at the hard limit the process is just killed
        if hard != resource.RLIM_INFINITY:
            value, most = min(value, hard), min(most, hard)
        try:
            resource.setrlimit(limit, (value, most))
        except (ValueError, OSError):  # a system without this limit; the one on real time still holds
            log.debug("no limit %d here", limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
