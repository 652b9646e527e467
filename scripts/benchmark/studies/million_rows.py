"""Opens tar shards and parquet files of a million tiny images: seconds, and memory of the process.

`python -m scripts.benchmark.studies.million_rows [--images 1000000]` writes 1.5 GB of tar shards and 50 MB of parquet
files to a temporary folder, and opens each in a process of its own, the tar shards again with the index that the first
time kept.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROWS = 10_000  # of a file
OPEN = """
import resource, sys, time
from labeler.sources.open_source import open_source
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
import pyarrow.parquet
before, started = resident(), time.perf_counter()
source = open_source(sys.argv[1], progress=False)
seconds = time.perf_counter() - started
kept = resident() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
started = time.perf_counter()
for position in range(0, len(source), max(1, len(source) // 1000)):
    assert source.read(position)
reads = (time.perf_counter() - started) / 1000
print(f"{len(source):,} images: {seconds:.1f} s, {kept:.0f} MB kept, {peak:.0f} MB at the peak,", end=" ")
print(f"{1e6 * reads:.0f} us a read")
"""


def write_tars(folder: Path, images: int) -> None:
    """Writes shards of ROWS images of three bytes."""
    for first in range(0, images, ROWS):
        with tarfile.open(folder / f"{first // ROWS:05d}.tar", "w") as archive:
            for i in range(first, min(images, first + ROWS)):
                member = tarfile.TarInfo(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG")
                member.size = 3
                archive.addfile(member, io.BytesIO(b"jpg"))


def write_parquet(folder: Path, images: int) -> None:
    """Writes files of ROWS images of three bytes, in row groups of 100."""
    import pyarrow
    import pyarrow.parquet

    for first in range(0, images, ROWS):
        rows = range(first, min(images, first + ROWS))
        values = [{"bytes": b"jpg", "path": f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG"} for i in rows]
        table = pyarrow.table({"image": values, "label": [i % 1000 for i in rows]})
        pyarrow.parquet.write_table(table, folder / f"{first // ROWS:05d}.parquet", row_group_size=100)


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        environment = os.environ | {"TOKEN_LABELING_CACHE": f"{root}/cache"}
        for name, write in (("tar", write_tars), ("parquet", write_parquet)):
            folder = Path(root) / name
            folder.mkdir()
            write(folder, options.images)
            for again in ("", ", with the kept index") if name == "tar" else ("",):
                command = [sys.executable, "-c", OPEN, str(folder)]
                result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                print(f"{name}{again}: {result.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
