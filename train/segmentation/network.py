"""The network of a segmentation run: a decoder of segmentation_models_pytorch on any backbone of timm's names.

Legend: B images; C classes; H, W height and width of the images.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import InputError, IntegrityError, did_you_mean
from model.backbones.feature_pyramid import SUFFIX, FeaturePyramid, below
from train.network import begin_with
from train.recipes.config import ModelConfig, SegmentationConfig
from train.record.checkpoint import CheckpointInfo

log = logging.getLogger("train")

INSTALL = "pip install 'token-labeling[segmentation]'"
MULTIPLE = 32  # sides of the images that decoders take
OF_THE_PYRAMID = ("channels", "layers", "output_stride")  # arguments of a pyramid, not of its backbone
THIRD_MAP = -2  # of the encoder's maps: the one of stride 16


class SegmentationNetwork(nn.Module):
    """Class scores of each pixel.

    It has what the trainer asks of a network with token heads, but for heads.

    Args:
        config: the recipe's section `model`.
        settings: the recipe's section `segmentation`.

    Attributes:
        model: encoder, decoder and head.
        auxiliary: an FCN head on the map of stride 16, used in training; None: there is none.
        num_classes: C.

    Raises:
        InputError: the decoder or the backbone cannot be built, or segmentation_models_pytorch is not installed.
    """

    grid, aux_head, aux_classes, aux_weight, mix_scale = (1, 1), None, None, 0.0, None

    def __init__(self, config: ModelConfig, settings: SegmentationConfig) -> None:
        super().__init__()
        self.num_classes, self.img_size = int(config.num_classes or 1), (config.img_size, config.img_size)
        self.model = _create(config, settings)
        self.pretrained_cfg = timm.get_pretrained_cfg(config.name).to_dict() if timm.is_model(config.name) else {}
        width = self.model.encoder.out_channels[THIRD_MAP]
        self.auxiliary = _fcn(width, self.num_classes) if settings.auxiliary else None
        self._maps: list[torch.Tensor] = []
        if self.auxiliary is not None:
            self.model.encoder.register_forward_hook(lambda module, inputs, maps: self._keep(maps))

    def forward(self, images: torch.Tensor, mix: None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Scores of each pixel.

        Args:
            images: [B, 3, H, W], sides that are multiples of 32.
            mix: None: images are not mixed.

        Returns:
            [B, C, H, W]; in training with an auxiliary head a pair, of the decoder and of that head.
        """
        scores = self.model(images)
        if self.auxiliary is None or not self.training:
            return scores
        other = self.auxiliary(self._maps.pop())
        return scores, F.interpolate(other, scores.shape[2:], mode="bilinear", align_corners=False)

    def _keep(self, maps: Any) -> None:
        self._maps = [maps[THIRD_MAP]]

    @property
    def backbone(self) -> nn.Module:
        """The backbone of timm's, as its names have it."""
        net = self.model.encoder.model
        return getattr(net, "model", net)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay; timm adds norms and biases."""
        own: Any = getattr(self.backbone, "no_weight_decay", set)
        prefix = self._prefix()
        return {prefix + name for name in own()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters for layer decay: those of the backbone, then all that comes after it."""
        matcher: Any = getattr(self.backbone, "group_matcher", None)
        if matcher is None:
            raise ValueError("this backbone has no layers that layer decay knows; set optimizer.layer_decay=none")
        return below(self._prefix(), matcher(coarse))

    def _prefix(self) -> str:
        return "model.encoder.model." + ("model." if hasattr(self.model.encoder.model, "model") else "")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns activation checkpointing of the backbone on or off."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


def build_segmentation(config: ModelConfig, settings: SegmentationConfig) -> SegmentationNetwork:
    """Builds the network with its initial weights, on the CPU.

    Args:
        config: the recipe's section `model`; its `weights` may be those of the plain backbone.
        settings: the recipe's section `segmentation`.

    Returns:
        The network.

    Raises:
        InputError: settings or weights do not fit.
    """
    if config.weights is None:
        return SegmentationNetwork(config, settings)
    plain = config.name.removesuffix(SUFFIX)
    begin = begin_with(Path(config.weights), config.model_copy(update={"name": plain}))
    side = begin.side if plain != config.name else config.img_size
    net = SegmentationNetwork(config.model_copy(update={"img_size": side, "weights": None}), settings)
    if begin.state.keys() >= net.state_dict().keys():  # a run of this task
        _load_all(net, begin.state, begin.described)
    else:
        _load_backbone(net, begin.state, config, begin.described)
    pyramid = net.backbone
    if isinstance(pyramid, FeaturePyramid) and side != config.img_size:
        pyramid.set_input_size(config.img_size)
        net.img_size = (config.img_size, config.img_size)
    return net


def restore_segmentation(info: CheckpointInfo, state: dict[str, torch.Tensor]) -> SegmentationNetwork:
    """Rebuilds the network of a checkpoint, in evaluation mode. Raises IntegrityError if its record does not fit."""
    try:
        config = ModelConfig.model_validate(info.model | {"weights": None, "num_classes": info.num_classes})
        settings = settings_of(info)
        net = SegmentationNetwork(config, settings)
        net.load_state_dict(state)
    except (LookupError, ValueError, RuntimeError) as error:
        got = " ".join(str(error).split())[:200]
        raise IntegrityError("the checkpoint's record does not describe a segmentation network", got=got) from None
    return net.eval()


def settings_of(info: CheckpointInfo) -> SegmentationConfig:
    """The section `segmentation` of a checkpoint's recipe."""
    return SegmentationConfig.model_validate_json(json.dumps(info.config["segmentation"]))


def is_segmentation(info: CheckpointInfo) -> bool:
    """Whether a checkpoint is of this task."""
    return info.config.get("run", {}).get("task") == "segmentation"


def _load_all(net: SegmentationNetwork, state: dict[str, torch.Tensor], which: str) -> None:
    """Loads the weights of a segmentation run; layers for another number of classes begin anew, which is logged."""
    own, last = net.state_dict(), ("model.segmentation_head.", "auxiliary.")
    other = [key for key in own if own[key].shape != state[key].shape]
    if wrong := [key for key in other if not key.startswith(last)]:
        raise InputError(
            "model.weights do not fit this network", got=f"{len(wrong)} of another shape ({', '.join(wrong[:3])})",
            expected="the weights of the same model and decoder", remedy=f"Those are of {which}.",
        )  # fmt: skip
    if other:
        log.info("new last layers for %d classes replace trained ones", net.num_classes)
    net.load_state_dict({key: value for key, value in state.items() if key in own and key not in other}, strict=False)


def _load_backbone(net: SegmentationNetwork, state: dict[str, torch.Tensor], config: ModelConfig, which: str) -> None:
    """Loads the weights of a plain network into the backbone; its heads are left out."""
    target: Any = net.backbone
    target = target.backbone if isinstance(target, FeaturePyramid) else target
    given = {key.removeprefix("backbone."): value for key, value in state.items()}
    own = target.state_dict()
    missing = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if missing:
        raise InputError(
            f"model.weights do not fit model.name {config.name!r}",
            got=f"{len(missing)} weights missing or of another shape ({', '.join(missing[:3])})",
            expected="the weights of its backbone",
            remedy=f"Set model.name and model.args to those of the weights: {which}.",
        )
    target.load_state_dict({key: given[key] for key in own})


def _create(config: ModelConfig, settings: SegmentationConfig) -> Any:
    """The network of segmentation_models_pytorch."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise InputError(
            "run.task=segmentation needs segmentation_models_pytorch, which cannot be imported", got=error,
            remedy=INSTALL,
        ) from None  # fmt: skip
    if not timm.is_model(config.name):
        remedy = did_you_mean(config.name, timm.list_models()) or "`python -m model list` and timm.list_models()."
        raise InputError("unknown model.name", got=repr(config.name), remedy=remedy)
    own: dict[str, Any] = {key: value for key, value in config.args.items() if key != "pretrained"}
    if config.drop_path_rate:
        own["drop_path_rate"] = config.drop_path_rate
    if config.name.endswith(SUFFIX):  # the decoders take some names, as `depth`, for their own
        inner = {key: own.pop(key) for key in [*own] if key not in OF_THE_PYRAMID}
        own["backbone_args"] = {**inner, "img_size": config.img_size}
    weights = "imagenet" if config.args.get("pretrained") else None
    try:
        build, more = getattr(smp, settings.decoder), {**settings.decoder_args, **own}
        return build(f"tu-{config.name}", encoder_weights=weights, classes=config.num_classes, **more)
    except Exception as error:  # of timm and of the decoders, of many types
        got = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = f"A backbone of a single stride needs its pyramid: model.name={config.name}{SUFFIX}."
        if config.name.endswith(SUFFIX) or not timm.is_model(config.name + SUFFIX):
            remedy = "See model.args and segmentation.decoder; a decoder needs maps of strides 4 to 32."
        raise InputError(f"{settings.decoder} cannot be built on {config.name!r}", got=got, remedy=remedy) from None


def _fcn(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, classes, 1),
    )
