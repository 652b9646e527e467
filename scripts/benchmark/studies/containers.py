"""The loader's speed from tar shards and parquet files against a folder of the same images.

    python -m scripts.benchmark.studies.containers --images IMAGES --store labels

Writes the images as two tar shards and as one parquet file into a temporary folder. Each loader warms up for one epoch;
then they take turns, an epoch each, in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

from labeler.sources.open_source import open_source
from pipeline import LoaderConfig, TokenLabelLoader, create_loader

ROWS_PER_GROUP = 100  # of a parquet file, as Hugging Face's writer has for images
FOLDER = "folder"


def write_tars(images: Path, keys: tuple[str, ...], folder: Path, shards: int = 2) -> str:
    """Writes tar shards. Returns their name with braces."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:03d}.tar", "w") as archive:
            for key in keys[shard::shards]:
                archive.add(images / key, key)
    return f"{folder}/part-{{000..{shards - 1:03d}}}.tar"


def write_parquet(images: Path, keys: tuple[str, ...], file: Path) -> str:
    """Writes a parquet file in Hugging Face's layout. Returns its name."""
    values = [{"bytes": (images / key).read_bytes(), "path": key} for key in keys]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, file, row_group_size=ROWS_PER_GROUP)
    return str(file)


def epoch_speed(loader: TokenLabelLoader) -> float:
    """Returns images/s of an epoch."""
    started, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch.labels)
    return seen / (time.perf_counter() - started)


def measure(images: Path, store: str, side: int, batch: int, epochs: int) -> dict[str, list[float]]:
    """Returns container -> images/s of each epoch."""
    keys = open_source(images).keys
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOKEN_LABELING_CACHE"] = f"{folder}/cache"
        containers = {
            FOLDER: str(images),
            "tar": write_tars(images, keys, Path(folder) / "tars"),
            "parquet": write_parquet(images, keys, Path(folder) / "images.parquet"),
        }
        common = {"store": store, "image_size": side, "grid": (side // 16, side // 16), "batch_size": batch}
        loaders = {name: create_loader(LoaderConfig(images=place, **common)) for name, place in containers.items()}
        for loader in loaders.values():
            epoch_speed(loader)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(epochs):
            for name, loader in loaders.items():
                speeds[name].append(epoch_speed(loader))
        return speeds


def main() -> None:
    parser = argparse.ArgumentParser("scripts.benchmark.studies.containers", description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--store", required=True, help="their label store")
    parser.add_argument("--side", type=int, default=224, help="side of the crops in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each (%(default)s)")
    options = parser.parse_args()
    speeds = measure(options.images, options.store, options.side, options.batch, options.epochs)
    whole = statistics.median(speeds[FOLDER])
    for name, found in speeds.items():
        median = statistics.median(found)
        share = f"{median / whole:.2f} of the folder's"
        print(f"{name:10}{median:8,.0f} images/s  {share}  {min(found):,.0f} to {max(found):,.0f}")


if __name__ == "__main__":
    main()
