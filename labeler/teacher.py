"""The teacher: a classifier, its weights and its preprocessing, ready to give dense class-logit maps.

`create_teacher` takes a timm name, `torchvision:NAME` or `package.module:function`, finds out how the network gives a
dense map (`labeler.dense_maps`) and checks that on random images. Files of weights are never allowed to run code.

Legend: B batch, C classes, H×W map grid, S side of the square input.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labeler.config import TeacherConfig
from labeler.dense_maps import DenseMap, dense_map, first_line
from labeler.errors import TeacherError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_CHECKPOINT_BYTES = 32 << 30
NESTED_WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")
FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
NO_WEIGHTS_REMEDY = "Give --checkpoint FILE, or --random-weights to try the machinery."


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
    autocast        "none", "bf16" or "fp16", as resolved for the device
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

    def __init__(self, dense: DenseMap, info: TeacherInfo, device: torch.device) -> None:
        self.dense, self.info, self.device = dense, info, device
        self._mean = (255 * torch.tensor(info.mean, device=device)).view(3, 1, 1)
        self._std = (255 * torch.tensor(info.std, device=device)).view(3, 1, 1)

    @torch.inference_mode()
    def score_maps(self, images: Tensor) -> Tensor:
        """Normalised float images [B, 3, S, S] to float32 logits [B, C, H, W]."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        dtype = DTYPES.get(self.info.autocast)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
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
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return self.score_maps(images.sub_(self._mean).div_(self._std))


@dataclass
class _Built:
    """A network with its weights, and how its images are to be prepared."""

    model: nn.Module
    input_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    notes: list[str] = field(default_factory=list)


def create_teacher(config: TeacherConfig, device: str = "cpu") -> LoadedTeacher:
    """The configured teacher on `device` ("cpu", "cuda", "cuda:1", or "auto": a GPU if there is one), checked.

    The global random generators are left as they were.
    """
    place = torch.device(resolve_device(device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built = _build(config)
    model = built.model.eval().requires_grad_(False)
    digest = weights_sha256(model)
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
    notes = [*built.notes, *report.notes]
    if config.compile:
        _compile(dense, notes)
    info = TeacherInfo(
        name=config.name,
        weights_sha256=digest,
        num_classes=report.num_classes,
        input_size=size,
        mean=tuple(float(value) for value in config.mean or built.mean),
        std=tuple(float(value) for value in config.std or built.std),
        interpolation=built.interpolation,
        crop_pct=float(built.crop_pct),
        autocast=_autocast(config.autocast, place),
        flip=config.flip,
        grid=report.grid,
        method=report.method,
        self_test=report.self_test,
        notes=tuple(notes),
    )
    teacher = LoadedTeacher(dense, info, place)
    if (config.compile or info.autocast != "none") and not teacher.score_maps(images).isfinite().all():
        raise TeacherError(f"teacher {config.name} overflows in {info.autocast}", remedy="Give --autocast none.")
    return teacher


def weights_sha256(model: nn.Module) -> str:
    """Digest of names, types, shapes and bytes of all weights and buffers; BatchNorm's batch counters do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resolve_device(device: str) -> str:
    """The device to compute on: for "auto" a GPU where there is one; a device that is not there is refused."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise TeacherError("--device is not known", got=repr(device), expected="auto, cpu or cuda") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise TeacherError(
            f"there is no device {device}", got=f"{torch.cuda.device_count()} GPUs that PyTorch can use",
            remedy="Give --device cpu, or check the driver with nvidia-smi.",
        )  # fmt: skip
    return device


def _autocast(choice: str, device: torch.device) -> str:
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "none"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _compile(dense: Any, notes: list[str]) -> None:
    if hasattr(dense, "features"):
        dense.features = torch.compile(dense.features)
    else:
        notes.append("not compiled: the pooling is replaced while the network runs")


def _build(config: TeacherConfig) -> _Built:
    source, _, name = config.name.rpartition(":")
    state = read_checkpoint(config.checkpoint) if config.checkpoint else None
    if source in ("", "timm"):
        return _from_timm(name, config, state)
    if source == "torchvision":
        return _from_torchvision(name, config, state)
    return _from_function(source, name, config, state)


def _from_timm(name: str, config: TeacherConfig, state: dict[str, Tensor] | None) -> _Built:
    import timm

    if not timm.is_model(name):
        raise _unknown_name("timm", name, timm.list_models())
    try:
        published = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, KeyError):
        raise _unknown_name("timm", name, timm.list_pretrained(name.split(".")[0] + "*")) from None
    classifier = (published.classifier if published else None) or TORCHVISION_HEADS
    arguments: dict[str, Any] = {"num_classes": config.num_classes or _classes_in(state, classifier)}
    if state is None and not config.random_weights:
        _refuse_other_head(name, config.num_classes, published.num_classes if published else None)
        arguments["pretrained"] = True
    model = _create(timm.create_model, arguments, "img_size", config.input_size, name)
    if state is not None:
        try:
            _load(model, state, config.checkpoint)
        except TeacherError:
            if config.input_size is None or not hasattr(model, "set_input_size"):
                raise
            # Weights of the architecture's own input size: they are resampled once they are in place.
            model = _create(timm.create_model, arguments, "img_size", None, name)
            _load(model, state, config.checkpoint)
            model.set_input_size(img_size=config.input_size)
    return _Built(model, **_timm_preprocessing(model.pretrained_cfg))


def _from_torchvision(name: str, config: TeacherConfig, state: dict[str, Tensor] | None) -> _Built:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown_name("torchvision", name, names)
    weights = models.get_model_weights(name).DEFAULT
    view = weights.transforms()
    size = config.input_size or view.crop_size[0]
    arguments: dict[str, Any] = {}
    if state is None and not config.random_weights:
        _refuse_other_head(config.name, config.num_classes, len(weights.meta["categories"]))
        arguments["weights"] = weights
    elif num_classes := config.num_classes or _classes_in(state, TORCHVISION_HEADS):
        arguments["num_classes"] = num_classes
    model = _create(models.get_model, arguments, "image_size", size, name)
    if state is not None:
        _load(model, state, config.checkpoint)
    crop_pct = view.crop_size[0] / view.resize_size[0]
    mean, std = tuple(view.mean), tuple(view.std)
    return _Built(model, view.crop_size[0], mean, std, view.interpolation.value, crop_pct)


def _from_function(module: str, function: str, config: TeacherConfig, state: dict[str, Tensor] | None) -> _Built:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:
        raise TeacherError(
            f"teacher {module}:{function} cannot be made", got=f"{type(error).__name__}: {first_line(error)}",
            expected="a timm name, torchvision:NAME or package.module:function",
            remedy="The function is called without arguments; its module must be importable from here.",
        ) from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TeacherError(
            f"teacher {module}:{function} is no network", got=type(model).__name__, expected="a torch.nn.Module"
        )
    if state is not None:
        _load(model, state, config.checkpoint)
    published = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if published:
        published = published if isinstance(published, Mapping) else asdict(published)
        return _Built(model, **_timm_preprocessing(published))
    note = "the module says nothing of its preprocessing: ImageNet's mean and std and 224 pixels unless given"
    return _Built(model, notes=[note])


def _create(factory: Callable[..., Any], arguments: dict[str, Any], size_name: str, size: int | None, name: str) -> Any:
    """`factory(name, …)`, told the input size where the architecture takes one."""
    arguments = {key: value for key, value in arguments.items() if value is not None}
    try:
        with _weights_only():
            try:
                return factory(name, **({size_name: size} if size else {}), **arguments)
            except TypeError as error:
                if size_name not in str(error):
                    raise
                return factory(name, **arguments)
    except Exception as error:
        got = f"{type(error).__name__}: {first_line(error)}"
        if arguments.get("pretrained") or arguments.get("weights"):
            problem = f"no pretrained weights for {name} could be fetched"
            raise TeacherError(problem, got=got, remedy=NO_WEIGHTS_REMEDY) from error
        raise TeacherError(f"teacher {name} cannot be built", got=got, remedy="Check --input-size.") from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Libraries that fetch weights with a plain torch.load may not unpickle code either."""
    saved = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ[FORCE_SAFE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_SAFE, None)
        os.environ.update({name: value for name, value in saved.items() if value is not None})


def _refuse_other_head(name: str, wanted: int | None, published: int | None) -> None:
    if published == 0:
        raise TeacherError(f"{name} is published without a classification head", remedy=NO_WEIGHTS_REMEDY)
    if wanted is not None and published is not None and wanted != published:
        raise TeacherError(
            f"the pretrained head of {name} has another number of classes", got=f"--num-classes {wanted}",
            expected=published, remedy="Give --checkpoint FILE with weights that were trained on your classes.",
        )  # fmt: skip


def _unknown_name(library: str, name: str, known: list[str]) -> TeacherError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return TeacherError(
        f"{library} knows no such model", got=repr(name), expected=f"a name such as {', '.join(near or known[:3])}",
        remedy="Other teachers: torchvision:NAME or package.module:function.",
    )  # fmt: skip


def _timm_preprocessing(published: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data import resolve_data_config

    view = resolve_data_config(pretrained_cfg=dict(published))
    return {
        "input_size": view["input_size"][-1],
        "mean": tuple(view["mean"]),
        "std": tuple(view["std"]),
        "interpolation": view["interpolation"],
        "crop_pct": view["crop_pct"],
    }


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The named tensors in a .safetensors file or a weights-only file of torch, averaged (EMA) ones first.

    Prefixes that DistributedDataParallel and torch.compile put before the names are taken off.
    """
    file = Path(path)
    if not file.is_file():
        raise TeacherError("there is no such checkpoint", got=path, remedy="Check --checkpoint.")
    if file.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise TeacherError("the checkpoint is too large", got=f"{file.stat().st_size:,} bytes",
                           expected=f"at most {MAX_CHECKPOINT_BYTES:,}")  # fmt: skip
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TeacherError(
            f"checkpoint {path} is not a file of plain weights",
            got=f"a pickle that asks for {asked[1]}" if asked else first_line(error),
            expected=".safetensors, or a state dict that torch.load(weights_only=True) reads",
            remedy="Nothing of it was run; save its state dict alone.",
        ) from error  # fmt: skip
    nested = [content.get(name) for name in NESTED_WEIGHTS] if isinstance(content, Mapping) else []
    state = next((part for part in [*nested, content] if _is_state(part)), None)
    if state is None:
        raise TeacherError(f"checkpoint {path} holds no weights", got=type(content).__name__, expected="a state dict")
    return {WRAPPERS.sub("", name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _is_state(part: object) -> bool:
    """Whether it has tensors in it, all entries named by strings."""
    return (
        isinstance(part, Mapping)
        and all(isinstance(name, str) for name in part)
        and any(isinstance(value, Tensor) for value in part.values())
    )


def _classes_in(state: dict[str, Tensor] | None, classifiers: str | tuple[str, ...]) -> int | None:
    """Rows of the last weight of the classifier in a checkpoint."""
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    named = sorted((name, weight) for name, weight in (state or {}).items() if name.startswith(heads))
    rows = [weight.shape[0] for name, weight in named if name.endswith(".weight") and weight.dim() > 1]
    return rows[-1] if rows else None


def _load(model: nn.Module, state: dict[str, Tensor], path: str | None) -> None:
    """Every weight of the model from the checkpoint, and nothing left over."""
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    counted = {name for name in own if name.endswith("num_batches_tracked")}
    faults = {
        "missing": sorted(own.keys() - state.keys() - counted),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
            for name in own if name in state and state[name].shape != own[name].shape
        ],
    }  # fmt: skip
    if any(faults.values()):
        got = "; ".join(f"{len(names)} {fault} ({', '.join(names[:3])}…)" for fault, names in faults.items() if names)
        raise TeacherError(
            f"checkpoint {path} does not fit the model", got=f"weights {got}", expected="each weight once",
            remedy="Check --teacher, --num-classes and --input-size.",
        )  # fmt: skip
    model.load_state_dict(state, strict=False)
