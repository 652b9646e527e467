"""The teacher: a classifier with its weights and preprocessing, ready to produce dense class-logit maps.

`create_teacher` takes a timm name, `torchvision:NAME` or `package.module:function`, builds the network
(`build_classifier`), finds a way to get a dense map from it (`dense_maps`) and tests that on random images.
Files of weights are never allowed to run code. A network whose class token is not in front of the patch tokens
(DeMansia and Vim have it in the middle) is refused unless it has its own `score_maps(images)`.

Legend: B batch, C classes, H×W map grid, S side of the square input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labeler.base.errors import TeacherError
from labeler.base.runtime import DTYPES, pick_device, pick_precision
from labeler.teacher.build_classifier import Classifier, build_classifier, build_frozen
from labeler.teacher.dense_maps import DenseMap, dense_map
from labeler.teacher.linear_head import check_linear, frozen_sha256, give_head, pooled_features
from labeler.teacher.teacher_config import TeacherConfig
from labeler.teacher.weights import weights_sha256


class Teacher(Protocol):
    """The interface that the labeler needs of a teacher."""

    def score_maps(self, images: Tensor) -> Tensor:
        """Computes logits [B, C, H, W] of normalized images [B, 3, S, S]."""
        ...


@dataclass(frozen=True)
class TeacherInfo:
    """What a label store records of its teacher; `dataclasses.asdict` of it is ready for JSON.

    Attributes:
        name: The name that the teacher was created by.
        weights_sha256: Digest of parameters and buffers: equal for equal weights, whatever file they came from.
        num_classes: C.
        input_size: S, in pixels.
        mean: Mean of each color channel, 0 to 1.
        std: Standard deviation of each color channel.
        interpolation: How images are resized: "bilinear", "bicubic", …
        crop_pct: Side of the teacher's own evaluation crop as a share of the resized image's shorter side.
        autocast: "float32", "bfloat16" or "float16", as chosen for the device.
        flip: Whether maps are averaged with those of the mirrored image.
        grid: H, W of a map.
        method: How maps are computed.
        self_test: Result of a pass over random images.
        notes: What a user must know.
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
    logits need no normalization, and the mean of a map stays comparable with the classifier's output.

    Attributes:
        dense: The function from images to maps.
        info: What a store records of the teacher.
        device: The device that it runs on.
        class_names: One for each class, if the weights come with them; otherwise empty.
    """

    def __init__(
        self, dense: DenseMap, info: TeacherInfo, device: torch.device, class_names: tuple[str, ...] = ()
    ) -> None:
        self.dense, self.info, self.device, self.class_names = dense, info, device, class_names
        # Repeated for every pixel of a row: broadcasting three numbers along the channels would not vectorize on CPUs.
        self._mean, self._std = (
            (255 * torch.tensor(values, device=device)).repeat(info.input_size) for values in (info.mean, info.std)
        )

    @torch.inference_mode()
    def score_maps(self, images: Tensor) -> Tensor:
        """Computes float32 logits [B, C, H, W] of normalized float images [B, 3, S, S]."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        dtype = DTYPES[self.info.autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            maps = self.dense(images).float()
            if self.info.flip:
                maps = (maps + self.dense(images.flip(-1)).float().flip(-1)) / 2
        return maps

    @torch.inference_mode()
    def label(self, pixels: Tensor) -> Tensor:
        """Normalizes RGB pixels and computes their maps.

        Args:
            pixels: uint8 [B, S, S, 3], on any device.

        Returns:
            float32 logits [B, C, H, W].

        Raises:
            TeacherError: The pixels have another type or shape.
        """
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
    """Creates a teacher and tests it on random images. The global random generators are left as they were.

    Args:
        config: Settings of the teacher.
        device: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.

    Returns:
        The teacher on its device.

    Raises:
        InputError: This machine has no such device.
        TeacherError: The network cannot be built, its weights do not fit, or it cannot produce a dense map.
    """
    torch_device = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built = build_classifier(config)
    model = built.model.eval().requires_grad_(False)
    digest = weights_sha256(model)
    model, images = _on_device(model, config.input_size or built.input_size, torch_device)
    with torch.inference_mode():
        dense, report = dense_map(model, images, config.name)
    if config.num_classes not in (None, report.num_classes):
        raise TeacherError(
            f"teacher {config.name} has another number of classes", got=report.num_classes, expected=config.num_classes,
            remedy="Omit `num_classes`, or give a `checkpoint` with such a head.",
        )  # fmt: skip
    compile_notes = _compile(dense) if config.compile else ()
    info = TeacherInfo(
        **_input_of(config, built, torch_device),
        weights_sha256=digest,
        num_classes=report.num_classes,
        flip=config.flip,
        grid=report.grid,
        method=report.method,
        self_test=report.self_test,
        notes=(*built.notes, *report.notes, *compile_notes),
    )
    teacher = LoadedTeacher(dense, info, torch_device, built.class_names)
    if (config.compile or info.autocast != "float32") and not teacher.score_maps(images).isfinite().all():
        raise TeacherError(f"teacher {config.name} overflows in {info.autocast}", remedy="Use autocast float32.")
    return teacher


class PooledFeatures:
    """The features that a network's classifier reads, as maps [B, D, 1, 1] of one cell."""

    method = "the pooled features"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        """Computes features [B, D, 1, 1] of images [B, 3, S, S]."""
        return pooled_features(self.model, images)[:, :, None, None]


def create_frozen(config: TeacherConfig, device: str = "cpu") -> LoadedTeacher:
    """Creates the frozen network that a linear head is fitted for.

    Args:
        config: Settings of the teacher.
        device: As in `create_teacher`.

    Returns:
        What gives pooled features [B, D, 1, 1], of the image alone, in place of maps. Its digest of the weights is that
        of the network without a classifier.

    Raises:
        InputError: This machine has no such device.
        TeacherError: The network cannot be built, a linear head cannot be its classifier, or there would be no dense
            map with one.
    """
    torch_device = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built = build_frozen(config)
        digest = frozen_sha256(built.model, config.name)
        give_head(built.model, 2, config.name)
    size = config.input_size or built.input_size
    model, images = _on_device(built.model.eval().requires_grad_(False), size, torch_device)
    with torch.inference_mode():
        _, report = dense_map(model, images, config.name)
        check_linear(model, images, config.name)
        dense = PooledFeatures(model)
        width = dense(images).shape[1]
    info = TeacherInfo(
        **_input_of(config, built, torch_device),
        weights_sha256=digest,
        num_classes=width,
        flip=False,
        grid=(1, 1),
        method=dense.method,
        self_test=report.self_test,
        notes=report.notes,
    )
    return LoadedTeacher(dense, info, torch_device)


def _on_device(model: nn.Module, size: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Returns the network on its device, and random images [2, 3, S, S] to test it with."""
    # Weights of 3-D convolutions have no channels-last form.
    volumes = any(tensor.dim() == 5 for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    model = model.to(device) if volumes else model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    return model, images.contiguous(memory_format=torch.channels_last)


def _input_of(config: TeacherConfig, built: Classifier, device: torch.device) -> dict[str, Any]:
    """Returns the fields of `TeacherInfo` that say what goes into the network."""
    return {
        "name": config.name,
        "input_size": config.input_size or built.input_size,
        "mean": tuple(float(value) for value in config.mean or built.mean),
        "std": tuple(float(value) for value in config.std or built.std),
        "interpolation": built.interpolation,
        "crop_pct": float(built.crop_pct),
        "autocast": pick_precision(config.autocast, device),
    }


def _compile(dense: Any) -> tuple[str, ...]:
    """Compiles the function that computes the features; returns a note if there is none to compile."""
    if not hasattr(dense, "features"):
        return ("not compiled: the pooling is replaced while the network runs",)
    dense.features = torch.compile(dense.features)
    return ()
