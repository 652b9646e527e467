"""Settings of a labeling run: typed, frozen, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option
from labeler.sources.pixels import ORIENTATIONS
from labeler.store.score_code import QUALITIES
from labeler.teacher.teacher_config import TeacherConfig

PRECISIONS = ("uint8", "float16")
DECODERS = ("auto", "dali", "pil")


@dataclass(frozen=True)
class LabelerConfig:
    """One labeling run. What affects values is kept by the store's plan, and a run that resumes may not change it."""

    teacher: TeacherConfig = option("the network that labels", affects="recorded")
    quality: str = option(
        "how true the labels are, and how large", "default", affects="recorded", choices=tuple(QUALITIES)
    )
    bytes_per_image: int | None = option(
        "the truest labels of about so many bytes an image, settled on a sample before any shard",
        None,
        affects="values",
        lowest=1,
    )
    palette: int | None = option(
        "most classes with a plane of scores; without it the quality's", None, affects="recorded", lowest=1
    )
    tail: int | None = option("most classes that share one plane; without it the quality's", None, affects="recorded")
    levels: int | None = option(
        "steps of the square root of a probability; without it the quality's", None, affects="recorded"
    )
    threshold: float | None = option(
        "nats that a byte must save to be spent; without it the quality's", None, affects="recorded"
    )
    precision: str = option(
        "uint8: codes into one table of 256 scores; float16: the scores themselves, as dense planes",
        "uint8",
        affects="recorded",
        choices=PRECISIONS,
    )
    orientation: str = option(
        "turn images as their EXIF tag says, or ignore it; loaders follow the store's setting",
        "exif",
        affects="values",
        choices=ORIENTATIONS,
    )
    min_side: int = option("images with a shorter side, in pixels, are quarantined", 8, affects="values", lowest=1)
    max_pixels: int = option(
        "images with more pixels are quarantined before they are decoded", 100_000_000, affects="values", lowest=1
    )
    class_names: str | None = option("file of class names, one a line in the teacher's order", None, affects="recorded")
    image_list: str | None = option("label only the keys of this file, one a line", None, affects="recorded")
    shard_size: int | None = option(
        "images per shard; without it by their number, at most 10,000", None, affects="recorded", lowest=1
    )
    batch_size: int = option("images that the teacher sees at once", 32, affects="rounding", lowest=1)
    device: str = option("cpu, cuda or auto", "auto", affects="rounding")
    decoder: str = option(
        "auto: DALI on a GPU where it is installed, else PIL, which is faster on a CPU",
        "auto",
        affects="rounding",
        choices=DECODERS,
    )
    workers: int = option(
        "0: label in this process; else Ray actors, each with a teacher", 0, affects="nothing", lowest=0
    )
    ray_address: str | None = option(
        '"auto" or host:port of a running cluster; without it a private Ray here', None, affects="nothing"
    )
    gpus_per_worker: float = option("may be a fraction", 1.0, affects="nothing")
    threads: int | None = option(
        "CPU threads per worker; without it the cores are shared out", None, affects="rounding", lowest=1
    )
    max_attempts: int = option("tries of one shard before the run gives it up", 3, affects="nothing", lowest=1)
    progress: bool = option("show a progress bar", True, affects="nothing")

    def __post_init__(self) -> None:
        check_options(self)
        if self.bytes_per_image is not None and (self.threshold is not None or self.precision == "float16"):
            raise InputError(
                "bytes_per_image picks the threshold of uint8 codes itself",
                got=f"threshold {self.threshold}, precision {self.precision}", remedy="Give one or the other.",
            )  # fmt: skip
        if not self.gpus_per_worker > 0:
            raise InputError("gpus_per_worker must be positive", got=self.gpus_per_worker)
