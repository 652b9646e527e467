"""Settings of a teacher: typed, frozen, checked at the door."""

from __future__ import annotations

from dataclasses import dataclass

from labeler.base.checked_values import one_of, positive
from labeler.base.errors import InputError

VIEWS = ("full", "center")
AUTOCASTS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TeacherConfig:
    """Which network labels, and how it sees an image.

    name            timm model, `torchvision:NAME`, or `package.module:function` that returns an nn.Module
    checkpoint      .safetensors or weights-only .pt/.pth file; without it, the library's pretrained weights
    random_weights  the architecture with seeded random weights (tests and benchmarks)
    num_classes     classes of the head, where the name alone does not tell
    input_size      side S of the square input in pixels; None: the teacher's own
    mean, std       per-channel normalisation of images in 0..1; None: the teacher's own
    view            "full": the whole picture squeezed to S×S; "center": the teacher's own evaluation crop
    flip            average with the pass over the mirrored image, mirrored back: truer maps at twice the cost
    autocast        "auto": bfloat16 on a GPU, float16 on one that only emulates it (V100, T4), float32 on a CPU
    compile         run the teacher through torch.compile
    """

    name: str
    checkpoint: str | None = None
    random_weights: bool = False
    num_classes: int | None = None
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    view: str = "full"
    flip: bool = True
    autocast: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        one_of("--view", self.view, VIEWS)
        one_of("--autocast", self.autocast, AUTOCASTS)
        positive("--input-size", self.input_size)
        positive("--num-classes", self.num_classes)
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if values is not None and len(values) != 3:
                raise InputError(f"{option} takes one number per colour", got=values, expected="three numbers")
        if self.std is not None and not min(self.std) > 0:
            raise InputError("--std must be positive: pixels are divided by it", got=self.std)
        if self.checkpoint and self.random_weights:
            raise InputError("--checkpoint and --random-weights exclude each other", remedy="Give one of them.")
