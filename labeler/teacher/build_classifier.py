"""Builds the classifier of a teacher by name, with its weights and preprocessing.

Names are timm's (`NAME` or `timm:NAME`, `hf-hub:…`, `local-dir:…`), the folder of a training run, torchvision's
(`torchvision:NAME`) or a function's (`package.module:function`, called without arguments). Weights come from a
checkpoint, from the library, or are random if requested.

Legend: S side of the square input.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from labeler.base.errors import TeacherError, TokenLabelError
from labeler.teacher.dense_maps import HEADS, first_line
from labeler.teacher.linear_head import read_head, set_head
from labeler.teacher.teacher_config import TeacherConfig
from labeler.teacher.weights import classes_in, load_weights, read_checkpoint, weights_only

log = logging.getLogger("labeler")

TIMM_SOURCES = ("local-dir:", "hf-hub:", "hf_hub:")
RUN_FOLDER = "timm"  # within the folder of a training run
ENTRY_POINTS = "token_labeling.timm_models"  # packages whose import registers more names with timm
NO_WEIGHTS_REMEDY = "Give `checkpoint=FILE`, or `random_weights` to try out the tool."


@dataclass(frozen=True)
class Classifier:
    """A network with its weights and its preprocessing.

    Attributes:
        model: The network.
        input_size: S, if the settings give none.
        mean: Mean of each color channel, 0 to 1.
        std: Standard deviation of each color channel.
        interpolation: How images are resized.
        crop_pct: Side of the network's own evaluation crop as a share of the resized image's shorter side.
        notes: What a user must know.
        class_names: One for each class, if the weights come with them; otherwise empty.
    """

    model: nn.Module
    input_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


def build_classifier(config: TeacherConfig) -> Classifier:
    """Builds the configured network on the CPU, with its weights. Raises TeacherError if that fails."""
    if config.head is None:
        return _build(config)
    head, _ = read_head(config.head)
    built = build_frozen(config)
    set_head(built.model, head, config.name)
    return replace(built, class_names=head.classes)


def build_frozen(config: TeacherConfig) -> Classifier:
    """Builds the network that a linear head is fitted for; it may lack a classifier. Raises TeacherError if not."""
    # The number of classes is that of the linear head; the network keeps the one of its weights, or has none.
    return _build(replace(config, num_classes=None, head=None), headless=True)


def _build(config: TeacherConfig, headless: bool = False) -> Classifier:
    """Builds the network; `headless`: its weights may lack a classifier."""
    source, _, name = config.name.rpartition(":")
    state = read_checkpoint(config.checkpoint, config.ema) if config.checkpoint else None
    folder = Path(config.name)
    if (folder / RUN_FOLDER / "config.json").is_file():  # a run of ours
        return _from_folder_or_hub(f"local-dir:{folder / RUN_FOLDER}", config, state, headless)
    if config.name.startswith(TIMM_SOURCES):
        return _from_folder_or_hub(config.name, config, state, headless)
    if source in ("", "timm"):
        return _from_timm(name, config, state, headless)
    if source == "torchvision":
        return _from_torchvision(name, config, state)
    return _from_function(source, name, config, state)


def _from_timm(name: str, config: TeacherConfig, state: dict[str, Tensor] | None, headless: bool) -> Classifier:
    """Builds a network by timm's name."""
    import timm

    if not timm.is_model(name):
        register_other_models()
    if not timm.is_model(name):
        raise _unknown_name("timm", name, timm.list_models())
    try:
        published = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        raise _unknown_name("timm", name, timm.list_pretrained(name.split(".")[0] + "*")) from None
    num_classes = config.num_classes or classes_in(state, published.classifier or HEADS)
    arguments: dict[str, Any] = {"num_classes": num_classes or (0 if headless else None)}
    if state is None and not config.random_weights:
        if not headless:
            _refuse_other_head(name, config.num_classes, published.num_classes)
        arguments["pretrained"] = True
    model = _create(timm.create_model, arguments, "img_size", config.input_size, name)
    if state is not None:
        try:
            load_weights(model, state, config.checkpoint)
        except TeacherError:
            if config.input_size is None or not hasattr(model, "set_input_size"):
                raise
            # Weights for the architecture's own input size: they are resampled after loading.
            model = _create(timm.create_model, arguments, "img_size", None, name)
            load_weights(model, state, config.checkpoint)
            model.set_input_size(img_size=config.input_size)
    return Classifier(model, **_timm_preprocessing(model.pretrained_cfg))


def _from_folder_or_hub(
    name: str, config: TeacherConfig, state: dict[str, Tensor] | None, headless: bool
) -> Classifier:
    """Builds a network from a folder or from the Hugging Face Hub, in timm's format."""
    import timm

    register_other_models()
    arguments: dict[str, Any] = {"pretrained": state is None and not config.random_weights}
    arguments["num_classes"] = config.num_classes or classes_in(state, HEADS) or (0 if headless else None)
    model = _create(timm.create_model, arguments, "img_size", config.input_size, name)
    if state is not None:
        load_weights(model, state, config.checkpoint)
    names = model.pretrained_cfg.get("label_names") or ()
    # Names are those of the class head; a model whose token head has other classes gives maps of those.
    fit = len(names) == model.num_classes and getattr(model, "aux_classes", None) is None
    named = tuple(map(str, names)) if fit and state is None else ()
    return Classifier(model, **_timm_preprocessing(model.pretrained_cfg), class_names=named)


def register_other_models() -> None:
    """Lets installed packages register their models with timm, through the entry points of ENTRY_POINTS."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except ImportError as error:
            log.warning("the models of %s cannot be imported: %s", point.value, error)


def _from_torchvision(name: str, config: TeacherConfig, state: dict[str, Tensor] | None) -> Classifier:
    """Builds a network by torchvision's name."""
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
    elif num_classes := config.num_classes or classes_in(state, HEADS):
        arguments["num_classes"] = num_classes
    model = _create(models.get_model, arguments, "image_size", size, name)
    if state is not None:
        load_weights(model, state, config.checkpoint)
    crop_pct = view.crop_size[0] / view.resize_size[0]
    mean, std = tuple(view.mean), tuple(view.std)
    return Classifier(model, view.crop_size[0], mean, std, view.interpolation.value, crop_pct)


def _from_function(module: str, function: str, config: TeacherConfig, state: dict[str, Tensor] | None) -> Classifier:
    """Builds a network with a function, called without arguments."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
    except TokenLabelError:  # it has its own message
        raise
    except Exception as error:
        raise TeacherError(
            f"teacher {module}:{function} cannot be created", got=f"{type(error).__name__}: {first_line(error)}",
            expected="a timm name, torchvision:NAME or package.module:function",
            remedy="The function is called without arguments; its module must be importable from here.",
        ) from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TeacherError(
            f"teacher {module}:{function} does not return a network",
            got=type(model).__name__,
            expected="a torch.nn.Module",
        )
    if state is not None:
        load_weights(model, state, config.checkpoint)
    published = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if published:
        published = published if isinstance(published, Mapping) else asdict(published)
        return Classifier(model, **_timm_preprocessing(published))
    note = "the module does not define its preprocessing: ImageNet's mean and std and 224 pixels are used unless set"
    return Classifier(model, notes=(note,))


def _create(factory: Callable[..., Any], arguments: dict[str, Any], size_name: str, size: int | None, name: str) -> Any:
    """Calls `factory(name, …)`, with the input size if the architecture takes one."""
    arguments = {key: value for key, value in arguments.items() if value is not None}
    try:
        with weights_only():
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
        raise TeacherError(f"teacher {name} cannot be built", got=got, remedy="Check `input_size`.") from error


def _refuse_other_head(name: str, wanted: int | None, published: int) -> None:
    """Raises TeacherError if the published weights have no head, or one of another number of classes."""
    if published == 0:
        remedy = f"Fit one for the classes of your folders with `fit_head`. {NO_WEIGHTS_REMEDY}"
        raise TeacherError(f"{name} is published without a classification head", remedy=remedy)
    if wanted is not None and wanted != published:
        raise TeacherError(
            f"the pretrained head of {name} has another number of classes", got=f"`num_classes={wanted}`",
            expected=published, remedy="Give `checkpoint=FILE` with weights that were trained on your classes.",
        )  # fmt: skip


def _unknown_name(library: str, name: str, known: list[str]) -> TeacherError:
    """Returns the error for an unknown name."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return TeacherError(
        f"{library} has no such model", got=repr(name), expected=f"a name such as {', '.join(near or known[:3])}",
        remedy="Other teachers: torchvision:NAME or package.module:function.",
    )  # fmt: skip


def _timm_preprocessing(published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing in a `pretrained_cfg` of timm."""
    from timm.data import resolve_data_config

    view = resolve_data_config(pretrained_cfg=dict(published))
    return {
        "input_size": view["input_size"][-1],
        "mean": tuple(view["mean"]),
        "std": tuple(view["std"]),
        "interpolation": view["interpolation"],
        "crop_pct": view["crop_pct"],
    }
