"""Settings of a teacher: typed, frozen, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option

VIEWS = ("full", "center")
AUTOCASTS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TeacherConfig:
    """Which network labels, and how it sees an image. The store's plan keeps all of it in the teacher's record."""

    name: str = option(
        "a timm model, a run's folder, local-dir:DIR, hf-hub:NAME, torchvision:NAME, or package.module:function",
        affects="recorded",
    )
    checkpoint: str | None = option(
        "weights, .safetensors or weights-only .pt; without it the library's pretrained ones", None, affects="recorded"
    )
    ema: bool | None = option(
        "the checkpoint's averaged weights, or its plain ones; without it averaged ones where it has some",
        None,
        affects="recorded",
    )
    random_weights: bool = option("seeded random weights, to try the machinery", False, affects="recorded")
    num_classes: int | None = option(
        "classes of the head, where the name alone does not tell", None, affects="recorded", lowest=1
    )
    input_size: int | None = option(
        "side of the square input in pixels; without it the teacher's own", None, affects="recorded", lowest=1
    )
    mean: tuple[float, float, float] | None = option(
        "mean of each color channel, 0 to 1; without it the teacher's own", None, affects="recorded"
    )
    std: tuple[float, float, float] | None = option(
        "standard deviation of each color channel; without it the teacher's own", None, affects="recorded"
    )
    view: str = option(
        "full: squeeze the whole picture to the input; center: the teacher's own evaluation crop",
        "full",
        affects="recorded",
        choices=VIEWS,
    )
    flip: bool = option(
        "average with the pass over the mirrored image: truer maps at twice the cost", True, affects="recorded"
    )
    autocast: str = option(
        "precision of the forward pass; auto: bfloat16 on a GPU, float16 on a V100 or T4, float32 on a CPU",
        "auto",
        affects="recorded",
        choices=AUTOCASTS,
    )
    compile: bool = option("run the teacher through torch.compile", False, affects="rounding")

    def __post_init__(self) -> None:
        check_options(self)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != 3:
                raise InputError(f"{name} takes one number per color", got=values, expected="three numbers")
        if self.std is not None and not min(self.std) > 0:
            raise InputError("std must be positive: pixels are divided by it", got=self.std)
        if self.checkpoint and self.random_weights:
            raise InputError("checkpoint and random_weights exclude each other", remedy="Give one of them.")
