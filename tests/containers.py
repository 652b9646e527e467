"""One folder of images in the containers that others use: lists, tar shards, parquet files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet


def keys_of(images: Path) -> list[str]:
    """The keys of a folder, in no helpful order."""
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    return keys[1::2] + keys[::2]


def write_list(images: Path, name: str, labels: dict[str, str] | None = None) -> Path:
    """A list beside the images: text, or a table with a column of labels."""
    delimiter = {".csv": ",", ".tsv": "\t"}.get(Path(name).suffix)
    rows = keys_of(images)
    if delimiter is not None:
        quoted = [f'"{key}"' if delimiter in key else key for key in rows]
        rows = ["path" + (f"{delimiter}label" if labels else "")]
        rows += [
            text + (f"{delimiter}{labels[key]}" if labels else "")
            for text, key in zip(quoted, keys_of(images), strict=True)
        ]
    (images / name).write_text("\n".join(rows) + "\n")
    return images / name


def write_tars(images: Path, folder: Path, shards: int = 2, labels: dict[str, object] | None = None) -> str:
    """Tar shards in WebDataset layout; returns their name with braces."""
    folder.mkdir()
    keys = keys_of(images)
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:03d}.tar", "w") as archive:
            for key in keys[shard::shards]:
                archive.add(images / key, key)
                if labels is not None:
                    data = json.dumps({"label": labels[key], "caption": "a picture"}).encode()
                    member = tarfile.TarInfo(key.rpartition(".")[0] + ".json")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"{folder}/part-{{000..{shards - 1:03d}}}.tar"


def write_parquet(
    images: Path,
    file: Path,
    labels: dict[str, int] | None = None,
    names: list[str] | None = None,
    paths: bool = True,
    rows_per_group: int = 5,
) -> Path:
    """A parquet file in Hugging Face's layout: a struct of bytes and path, and labels with the names of the classes."""
    keys = keys_of(images)
    values = [{"bytes": (images / key).read_bytes(), "path": key if paths else None} for key in keys]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(values, kind)}
    features: dict[str, dict] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array([labels[key] for key in keys], pyarrow.int64())
        features["label"] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, file, row_group_size=rows_per_group)
    return file
