"""The teacher: a classifier, its weights and its preprocessing, ready to give dense class-logit maps.

`create_teacher` takes a timm name, `torchvision:NAME` or `package.module:function`, builds the network
(`classifiers`), finds out how it gives a dense map (`dense_maps`) and checks that on random images.
Files of weights are never allowed to run code. A network whose class token does not stand in front of the patch tokens
(DeMansia and Vim keep it in their middle) is refused unless it has a `score_maps(images)` of its own.

Legend: B batch, C classes, H×W map grid, S side of the square input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from labeler.base.errors import TeacherError
from labeler.base.runtime import DTYPES, pick_device, pick_precision
from labeler.teacher.classifiers import build_classifier
from labeler.teacher.dense_maps import DenseMap, dense_map
from labeler.teacher.teacher_config import TeacherConfig
from labeler.teacher.weights import weights_sha256


class Teacher(Protocol):
    """What the labeler asks of a teacher."""

    def score_maps(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] to logits [B, C, H, W]."""
        ...


@dataclass(frozen=True)
class TeacherInfo:
    """What a label store keeps about its teacher; `dataclasses.asdict` of it is ready for JSON.

    weights_sha256  digest of parameters and buffers: equal for equal weights, whatever file they came from
    crop_pct        side of the teacher's own evaluation crop as a share of the resized picture's shorter side
    autocast        "float32", "bfloat16" or "float16", as chosen for the device
    grid            H, W of a map
    method          how the maps are got; self_test: what a pass over random images showed; notes: what a user must know
    """

    name: str
    weights_sha256: str
    num_classes: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    autocast: str
    flip: bool
    grid: tuple[int, int]
    method: str
    self_test: str
    notes: tuple[str, ...]


class LoadedTeacher:
    """A teacher on its device.

    With `info.flip`, logits of the image and of its mirror image (mirrored back along W) are averaged. Averaging
    log-probabilities instead would differ by one constant per location, which every softmax over the classes removes;
    the logits cost no normalisation, and the mean of a map stays comparable with the classifier's output.
    """

    def __init__(
        self, dense: DenseMap, info: TeacherInfo, device: torch.device, class_names: tuple[str, ...] = ()
    ) -> None:
        self.dense, self.info, self.device, self.class_names = dense, info, device, class_names
        # Once for every pixel of a row: three numbers broadcast along the colours would leave CPUs without vectors.
        self._mean, self._std = (
            (255 * torch.tensor(values, device=device)).repeat(info.input_size) for values in (info.mean, info.std)
        )

    @torch.inference_mode()
    def score_maps(self, images: Tensor) -> Tensor:
        """Normalised float images [B, 3, S, S] to float32 logits [B, C, H, W]."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        dtype = DTYPES[self.info.autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            maps = self.dense(images).float()
            if self.info.flip:
                maps = (maps + self.dense(images.flip(-1)).float().flip(-1)) / 2
        return maps

    @torch.inference_mode()
    def label(self, pixels: Tensor) -> Tensor:
        """RGB pixels uint8 [B, S, S, 3] on any device to float32 logits [B, C, H, W]."""
        side = self.info.input_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side, 3):
            raise TeacherError(
                f"teacher {self.info.name} cannot read these pixels", got=f"{pixels.dtype} {list(pixels.shape)}",
                expected=f"uint8 [B, {side}, {side}, 3]",
            )  # fmt: skip
        rows = pixels.to(self.device, non_blocking=True).reshape(len(pixels), side, 3 * side).float()
        images = rows.sub_(self._mean).div_(self._std).view(len(pixels), side, side, 3)
        return self.score_maps(images.permute(0, 3, 1, 2))


def create_teacher(config: TeacherConfig, device: str = "cpu") -> LoadedTeacher:
    """The configured teacher on `device` ("cpu", "cuda", "cuda:1", or "auto": a GPU if there is one), checked.

    The global random generators are left as they were.
    """
    place = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built = build_classifier(config)
    model = built.model.eval().requires_grad_(False)
    digest = weights_sha256(model)
    # Weights of 3-D convolutions have no channels-last form.
    volumes = any(tensor.dim() == 5 for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    model = model.to(place) if volumes else model.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = config.input_size or built.input_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(place)
    with torch.inference_mode():
        dense, report = dense_map(model, images.contiguous(memory_format=torch.channels_last), config.name)
    if config.num_classes not in (None, report.num_classes):
        raise TeacherError(
            f"teacher {config.name} has another number of classes", got=report.num_classes, expected=config.num_classes,
            remedy="Leave --num-classes away, or give the --checkpoint of such a head.",
        )  # fmt: skip
    compile_notes = _compile(dense) if config.compile else ()
    info = TeacherInfo(
        name=config.name,
        weights_sha256=digest,
        num_classes=report.num_classes,
        input_size=size,
        mean=tuple(float(value) for value in config.mean or built.mean),
        std=tuple(float(value) for value in config.std or built.std),
        interpolation=built.interpolation,
        crop_pct=float(built.crop_pct),
        autocast=pick_precision(config.autocast, place),
        flip=config.flip,
        grid=report.grid,
        method=report.method,
        self_test=report.self_test,
        notes=(*built.notes, *report.notes, *compile_notes),
    )
    teacher = LoadedTeacher(dense, info, place, built.class_names)
    if (config.compile or info.autocast != "float32") and not teacher.score_maps(images).isfinite().all():
        raise TeacherError(f"teacher {config.name} overflows in {info.autocast}", remedy="Use autocast float32.")
    return teacher


def _compile(dense: Any) -> tuple[str, ...]:
    """Compiles what gives the features, or notes why not."""
    if not hasattr(dense, "features"):
        return ("not compiled: the pooling is replaced while the network runs",)
    dense.features = torch.compile(dense.features)
    return ()
