"""Settings of a labeling run: typed, frozen, checked at the door."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.checked_values import one_of, positive
from labeler.base.errors import InputError
from labeler.sources.pixels import ORIENTATIONS
from labeler.store.score_code import QUALITIES
from labeler.teacher.teacher_config import TeacherConfig

PRECISIONS = ("uint8", "float16")
DECODERS = ("auto", "dali", "pil")


@dataclass(frozen=True)
class LabelerConfig:
    """One labeling run.

    quality       "low", "default" or "high": how true, and how large, the labels are
    bytes_per_image  instead: the truest labels of about so many bytes an image, settled on a sample before any shard
    palette, tail, levels, threshold  see `labeler.store.score_code.Encoding`; None: the quality's
    precision     "uint8": codes into one table of 256 scores; "float16": the scores themselves, `palette` dense planes
    orientation   "exif": turn images as their EXIF tag says (the loaders follow the store's setting); "ignore": do not
    min_side      images with a shorter side, in pixels, go to the quarantine
    max_pixels    images with more pixels go to the quarantine before they are decoded
    shard_size    images per shard; None: chosen from the number of images, at most 10,000
    decoder       "auto": DALI on a GPU where it is installed, PIL otherwise, which is faster on a CPU
    workers       0: label in this process; otherwise the number of Ray actors
    ray_address   None: a private Ray on this machine; "auto" or an address: that cluster
    threads       CPU threads per worker; None: the machine's cores shared out
    max_attempts  how often one shard is tried before the run gives it up and names it
    """

    teacher: TeacherConfig
    quality: str = "default"
    bytes_per_image: int | None = None
    palette: int | None = None
    tail: int | None = None
    levels: int | None = None
    threshold: float | None = None
    precision: str = "uint8"
    orientation: str = "exif"
    min_side: int = 8
    max_pixels: int = 100_000_000
    class_names: str | None = None
    image_list: str | None = None
    shard_size: int | None = None
    batch_size: int = 32
    device: str = "auto"
    decoder: str = "auto"
    workers: int = 0
    ray_address: str | None = None
    gpus_per_worker: float = 1.0
    threads: int | None = None
    max_attempts: int = 3
    progress: bool = True

    def __post_init__(self) -> None:
        one_of("--precision", self.precision, PRECISIONS)
        one_of("--quality", self.quality, tuple(QUALITIES))
        if self.bytes_per_image is not None and (self.threshold is not None or self.precision == "float16"):
            raise InputError(
                "--bytes-per-image picks the threshold of uint8 codes itself",
                got=f"--threshold {self.threshold}, --precision {self.precision}", remedy="Give one or the other.",
            )  # fmt: skip
        one_of("--orientation", self.orientation, ORIENTATIONS)
        one_of("--decoder", self.decoder, DECODERS)
        names = ("bytes_per_image", "palette", "shard_size", "batch_size", "threads", "max_attempts", "min_side")
        for name in (*names, "max_pixels"):
            positive("--" + name.replace("_", "-"), getattr(self, name))
        if self.workers < 0:
            raise InputError("--workers is a count", got=self.workers, expected="0 (this process) or more")
        if not self.gpus_per_worker > 0:
            raise InputError("--gpus-per-worker must be positive", got=self.gpus_per_worker)
