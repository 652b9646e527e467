"""Settings of a labeling run: typed, frozen, checked on creation."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option
from labeler.sources.decoding.pixels import ORIENTATIONS
from labeler.store.score_code import QUALITIES
from labeler.teacher.teacher_config import TeacherConfig

PRECISIONS = ("uint8", "float16")
DECODERS = ("auto", "dali", "cpu", "pil")


@dataclass(frozen=True)
class LabelerConfig:
    """Settings of one labeling run.

    The store's plan keeps the settings that affect values; a resumed run must have the same.
    """

    teacher: TeacherConfig = option("the teacher network", affects="recorded")
    quality: str = option(
        "accuracy of the labels against their size", "default", affects="recorded", choices=tuple(QUALITIES)
    )
    bytes_per_image: int | None = option(
        "target size of the labels in bytes per image; the best encoding of that size is chosen on a sample first",
        None,
        affects="values",
        lowest=1,
    )
    palette: int | None = option(
        "most classes per image with their own score plane; default: set by the quality",
        None,
        affects="recorded",
        lowest=1,
    )
    tail: int | None = option(
        "most classes per image that share the background plane; default: set by the quality", None, affects="recorded"
    )
    levels: int | None = option(
        "quantization steps of the square root of a probability; default: set by the quality", None, affects="recorded"
    )
    threshold: float | None = option(
        "nats of KL divergence that each stored byte must save; default: set by the quality", None, affects="recorded"
    )
    precision: str = option(
        "score precision of the store; uint8: codes into a table of 256 scores; float16: scores in dense planes",
        "uint8",
        affects="recorded",
        choices=PRECISIONS,
    )
    orientation: str = option(
        "exif: rotate images as their EXIF tag says; ignore: do not; loaders follow the store's setting",
        "exif",
        affects="values",
        choices=ORIENTATIONS,
    )
    min_side: int = option(
        "shortest side of an image in pixels; smaller ones are quarantined", 8, affects="values", lowest=1
    )
    max_pixels: int = option(
        "most pixels of an image; larger ones are quarantined without being decoded",
        100_000_000,
        affects="values",
        lowest=1,
    )
    fit_head: bool = option(
        "fit a linear head for the images' own classes (folders or labels) to the features of the teacher network, "
        "which needs no classifier; the head is kept with the store",
        False,
        affects="recorded",
    )
    head_images: int = option(
        "most images to fit and check the head with, shared out equally among the classes",
        20_000,
        affects="recorded",
        lowest=2,
    )
    head_accuracy: float | None = option(
        "lowest accuracy of the head on held-out images, 0 to 1; default: a fifth of the way from chance to 1, and two "
        "standard errors above chance",
        None,
        affects="nothing",
        lowest=0,
        highest=1,
    )
    class_names: str | None = option(
        "file of class names, one per line in the teacher's order", None, affects="recorded"
    )
    image_list: str | None = option(
        "label only the images that this file lists: one path per line, or a table (.csv, .tsv)",
        None,
        affects="recorded",
    )
    shard_size: int | None = option(
        "images per shard; default: by the number of images, at most 10,000", None, affects="recorded", lowest=1
    )
    extend: bool = option(
        "label the images that the store does not have yet into a further part of it; its labels are not touched",
        False,
        affects="nothing",
    )
    batch_size: int = option("images per batch of the teacher", 32, affects="rounding", lowest=1)
    device: str = option("device of the teacher: cpu, cuda or auto", "auto", affects="rounding")
    decoder: str = option(
        "image decoder; cpu: simplejpeg and PIL; pil: PIL alone, the same pixels; auto: DALI on a GPU if it is "
        "installed, otherwise cpu, which is faster there",
        "auto",
        affects="rounding",
        choices=DECODERS,
    )
    workers: int = option(
        "0: label in this process; otherwise the number of Ray actors, each with a teacher",
        0,
        affects="nothing",
        lowest=0,
    )
    ray_address: str | None = option(
        '"auto" or host:port of a running Ray cluster; default: start Ray on this machine', None, affects="nothing"
    )
    gpus_per_worker: float = option("GPUs per Ray actor; may be a fraction", 1.0, affects="nothing")
    threads: int | None = option(
        "CPU threads per worker; default: an equal share of the cores", None, affects="rounding", lowest=1
    )
    max_attempts: int = option("attempts per shard before the run gives up", 3, affects="nothing", lowest=1)
    progress: bool = option("show a progress bar", True, affects="nothing")

    def __post_init__(self) -> None:
        check_options(self)
        if self.bytes_per_image is not None and (self.threshold is not None or self.precision == "float16"):
            raise InputError(
                "`bytes_per_image` picks the threshold of uint8 codes itself",
                got=f"threshold {self.threshold}, precision {self.precision}", remedy="Give one or the other.",
            )  # fmt: skip
        if self.fit_head and (self.class_names or self.teacher.num_classes):
            raise InputError(
                "the classes of a fitted head are the images' own: their folders, or labels",
                got="`fit_head` with `class_names` or `num_classes`",
                remedy="Omit them, or `fit_head`.",
            )  # fmt: skip
        if self.workers and ":" in self.device:
            raise InputError(
                "workers on Ray cannot be given a certain GPU: each sees only its own",
                got=f"device {self.device}, {self.workers} workers", expected="cuda",
                remedy="CUDA_VISIBLE_DEVICES says which GPUs of this machine Ray may give out.",
            )  # fmt: skip
        if not self.gpus_per_worker > 0:
            raise InputError("`gpus_per_worker` must be positive", got=self.gpus_per_worker)
