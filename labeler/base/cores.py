"""The number of CPU cores that this process may use, which can be fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(system: Path = Path("/")) -> int:
    """Counts the cores that `taskset`, Slurm or the container's quota leave to this process.

    Args:
        system: The folder that has `proc` and `sys`.

    Returns:
        At least 1. A quota of 2.5 cores counts as three: two would leave some of it unused.
    """
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([pinned, *map(math.ceil, _quotas(system))]))


def _quotas(system: Path) -> Iterator[float]:
    """Yields the quota, in cores, of this process's control group and each one above it; cgroup versions 1 and 2."""
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's: then only the root exists.
        for group in (own, *own.parents):
            yield from _quota(root / group)


def _quota(group: Path) -> Iterator[float]:
    """Yields the quota of one control group, in cores; nothing where it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if float(quota) > 0 and float(period) > 0:
                yield float(quota) / float(period)
        except (OSError, ValueError):  # missing, or "max": no limit
            continue
