"""Settings of a teacher: typed, frozen, checked on creation."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.errors import InputError
from labeler.base.settings import check_options, option

VIEWS = ("full", "center")
AUTOCASTS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher network, and how it sees an image. The store's plan records all of it."""

    name: str = option(
        "a timm model, a run's folder, local-dir:DIR, hf-hub:NAME, torchvision:NAME, or package.module:function",
        affects="recorded",
    )
    checkpoint: str | None = option(
        "file of weights, .safetensors or weights-only .pt; default: the library's pretrained weights",
        None,
        affects="recorded",
    )
    ema: bool | None = option(
        "use the checkpoint's averaged (EMA) weights, or the plain ones; default: averaged weights if there are any",
        None,
        affects="recorded",
    )
    random_weights: bool = option(
        "use random weights with a fixed seed, to try out the tool", False, affects="recorded"
    )
    num_classes: int | None = option(
        "number of classes of the head; default: that of the weights", None, affects="recorded", lowest=1
    )
    input_size: int | None = option(
        "side of the square input in pixels; default: the teacher's own", None, affects="recorded", lowest=1
    )
    mean: tuple[float, float, float] | None = option(
        "mean of each color channel, 0 to 1; default: the teacher's own", None, affects="recorded"
    )
    std: tuple[float, float, float] | None = option(
        "standard deviation of each color channel; default: the teacher's own", None, affects="recorded"
    )
    view: str = option(
        "full: resize the whole image to the square input; center: the teacher's own evaluation crop",
        "full",
        affects="recorded",
        choices=VIEWS,
    )
    flip: bool = option(
        "average with the mirrored image: more accurate maps at twice the cost", True, affects="recorded"
    )
    autocast: str = option(
        "compute precision of the forward pass; auto: bfloat16 on a GPU, float16 on a V100 or T4, float32 on a CPU",
        "auto",
        affects="recorded",
        choices=AUTOCASTS,
    )
    head: str | None = option(
        "file of a linear head, fitted by fit_head, that replaces the network's own classifier",
        None,
        affects="recorded",
    )
    compile: bool = option("run the teacher through torch.compile", False, affects="rounding")

    def __post_init__(self) -> None:
        check_options(self)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != 3:
                raise InputError(f"`{name}` takes one number per color", got=values, expected="three numbers")
        if self.std is not None and not min(self.std) > 0:
            raise InputError("`std` must be positive: pixels are divided by it", got=self.std)
        if self.checkpoint and self.random_weights:
            raise InputError("`checkpoint` and `random_weights` exclude each other", remedy="Give one of them.")
