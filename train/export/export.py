"""`export`: write a trained network for another runtime, and compare the file with the run on real images.

Legend: B images; C classes; S input side.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from labeler.base.errors import InputError, IntegrityError
from labeler.base.whole_files import TEMPORARY, replace_file
from labeler.sources.image_source import BadImage
from train.evaluation.single_images import ImageFile, list_images, load_batches, normalized, printable
from train.evaluation.validate import Trained, load_trained
from train.export import executorch_file, onnx_file
from train.export.compare import Comparison, compare, milliseconds
from train.export.program import Runner, load_program, trace, write_program

log = logging.getLogger("train")

# Format -> suffix of its files, and the packages that write and run them.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": (".pt2", ()),
    "executorch": (".pte", ("executorch",)),
}
INT8 = ("dynamic", "static")
TOLERANCE = 1e-4  # of a float32 file's logits, relative to the largest one


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        file: its path; what its images need and its classes are beside it, in `file`.json.
        format: one of `FORMATS`.
        int8: "dynamic" or "static"; None: float32.
        network: what was exported.
        parameters: of the network.
        size: of the file, in bytes.
        comparison: with the run, on real images.
        file_ms: milliseconds for one image in one thread.
        run_ms: those of the run itself.
    """

    file: str
    format: str
    int8: str | None
    network: str
    parameters: int
    size: int
    comparison: Comparison
    file_ms: float
    run_ms: float

    def text(self) -> str:
        """The result in three lines."""
        kind = "float32" if self.int8 is None else f"int8, {self.int8}"
        return (
            f"{self.file}: {self.format}, {kind}, {self.size / 1e6:.2f} MB; {self.parameters:,} parameters of "
            f"{self.network}\n"
            f"{self.comparison.text()}\n"
            f"one image in one thread: {self.file_ms:.2f} ms, in torch {self.run_ms:.2f} ms"
        )


def export(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    format: str = "onnx",
    int8: str | None = None,
    count: int = 64,
    ema: bool | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
) -> Exported:
    """Write a trained network as one file, for any batch size but for ExecuTorch; adapters are merged.

    The file takes images as `transform` in the .json beside it says, and gives the logits of the run's evaluation.

    Args:
        checkpoint: as for `load_trained`.
        images: real images, for the comparison and, with int8="static", others of them for the ranges of activations.
        out: the file; None: named after the run, in the working folder.
        format: one of `FORMATS`.
        int8: "dynamic" or "static": weights in int8, of an ONNX file; None: float32.
        count: images to compare on, and as many others for the ranges.
        ema: as for `load_trained`.
        img_size: as for `load_trained`.
        crop_pct: as for `load_trained`.

    Returns:
        The file, its differences and its speed.

    Raises:
        InputError: settings, checkpoint or images cannot be used, or a package is missing; raised before any work.
        IntegrityError: the float32 file answers otherwise than the run; it is removed.
    """
    _refuse(format, int8, count)
    trained = load_trained(checkpoint, ema, img_size, crop_pct)
    path = _path(out, Path(checkpoint), format, int8)
    files = list_images(images)
    trained.log_assumptions()
    chosen = _spread(files, count)
    known = _true_classes(chosen, trained)
    threads = torch.get_num_threads()
    batches, kept = _load(chosen, trained)
    calibration = _load(_spread([f for f in files if f not in chosen] or files, count), trained)[0] if int8 else []
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}{path.suffix}")
    try:
        run = _write(trained, temporary, format, int8, calibration)
        labels = None if known is None else [known[i] for i in kept]
        comparison = compare(run, trained.net, batches, labels)
        if int8 is None and comparison.relative_difference > TOLERANCE:
            raise IntegrityError(
                "the exported file answers otherwise than the run",
                got=f"a largest difference of {comparison.relative_difference:.1e}", expected=f"at most {TOLERANCE:g}",
                remedy="It was removed. Please report the network.",
            )  # fmt: skip
        torch.set_num_threads(1)
        one = batches[0][:1].contiguous()
        speed = milliseconds(run, one), milliseconds(trained.net, one)
        os.replace(temporary, path)
    finally:
        torch.set_num_threads(threads)
        temporary.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in trained.net.parameters())
    size = path.stat().st_size
    done = Exported(printable(path), format, int8, trained.name, parameters, size, comparison, *speed)
    _describe(path, trained, done)
    return done


def _refuse(format: str, int8: str | None, count: int) -> None:
    """Raise InputError for settings that do not go together, or a package that is missing."""
    if format not in FORMATS:
        raise InputError("unknown format", got=repr(format), expected=f"one of {', '.join(FORMATS)}")
    if int8 is not None and (int8 not in INT8 or format != "onnx"):
        got = repr(int8) if int8 not in INT8 else f"{format!r}"
        raise InputError("int8 is for ONNX files, dynamic or static", got=got, remedy="Use format onnx, or no int8.")
    if count < 1:
        raise InputError("the comparison needs images", got=f"count {count}", expected="1 or more")
    for package in FORMATS[format][1]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            extra = "executorch" if format == "executorch" else "'token-labeling[export]'"
            raise InputError(
                f"format {format} needs {package}, which cannot be imported", got=error, remedy=f"pip install {extra}"
            ) from None


def _path(out: str | Path | None, checkpoint: Path, format: str, int8: str | None) -> Path:
    """The file to write. Raises InputError if it cannot be one."""
    suffix = FORMATS[format][0]
    if out is None:
        stem = checkpoint.resolve().name if checkpoint.is_dir() else checkpoint.stem
        return Path(f"{stem}{'' if int8 is None else '-int8'}{suffix}")
    path = Path(out)
    if path.suffix != suffix or path.is_dir():
        raise InputError(f"`out` is no name of a file of format {format}", got=repr(str(out)), expected=f"NAME{suffix}")
    if not path.parent.is_dir():
        raise InputError("the folder of `out` does not exist", got=repr(str(path.parent)))
    return path


def _spread(files: Sequence[ImageFile], count: int) -> list[ImageFile]:
    """At most `count` of the files, evenly spread."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _true_classes(files: Sequence[ImageFile], trained: Trained) -> list[int] | None:
    """The classes of the files by their class folders; None where one has none that the run knows."""
    found = [trained.class_folders.get(file.key.split("/")[0]) for file in files]
    return None if None in found else found  # type: ignore[return-value]


def _load(files: Sequence[ImageFile], trained: Trained) -> tuple[list[torch.Tensor], list[int]]:
    """Batches of 1, 3 and then 8 images, and the positions of the files that could be read.

    Raises:
        InputError: none could.
    """
    pixels, kept = [], []
    loaded = (one for batch in load_batches(files, trained, 32) for one in batch)
    for number, (file, one) in enumerate(zip(files, loaded, strict=True)):
        if isinstance(one, BadImage):
            log.warning("%s is left out: %s", printable(file.path), one)
        else:
            pixels.append(one)
            kept.append(number)
    if not pixels:
        raise InputError("none of the images can be used", got=f"{len(files)} that are no images")
    cuts = [0, 1, 4, *range(12, len(pixels), 8), len(pixels)]
    parts = [pixels[a:b] for a, b in itertools.pairwise(cuts)]
    return [normalized(part, trained) for part in parts if part], kept


def _write(trained: Trained, path: Path, format: str, int8: str | None, calibration: Sequence[torch.Tensor]) -> Runner:
    """Write the file and load it again."""
    program = trace(copy.deepcopy(trained.net), (trained.side, trained.side), format != "executorch")
    if format == "torch-export":
        write_program(program, path)
        return load_program(path)
    if format == "executorch":
        executorch_file.write_executorch(program, path)
        return executorch_file.load_executorch(path)
    if int8 is None:
        onnx_file.write_onnx(program, path)
        return onnx_file.load_onnx(path)
    wide = path.with_name(f"{path.stem}-float32.onnx")
    try:
        onnx_file.write_onnx(program, wide)
        onnx_file.quantize(wide, path, int8, calibration)
    finally:
        wide.unlink(missing_ok=True)
    return onnx_file.load_onnx(path)


def _describe(path: Path, trained: Trained, done: Exported) -> None:
    """Write what a user of the file needs to know beside it."""
    names = [trained.class_name(number) for number in range(trained.net.num_classes)]
    batch = 1 if done.format == "executorch" else "batch"
    values: dict[str, Any] = {
        "input": {"name": onnx_file.INPUT, "shape": [batch, 3, trained.side, trained.side], "dtype": "float32"},
        "output": {"name": onnx_file.OUTPUT, "shape": [batch, trained.net.num_classes], "dtype": "float32"},
        "transform": trained.transform,
        "classes": names,
        "export": asdict(done),
    }
    replace_file(path.with_name(f"{path.name}.json"), json.dumps(values, indent=1).encode() + b"\n")
