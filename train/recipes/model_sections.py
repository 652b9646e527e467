"""The sections of a recipe that say what is trained: network, adapters, segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from labeler.base.settings import setting
from train.recipes.section import Argument, Byte, Count, Decay, Number, Rate, Section, Share

# Keys of `model.args` that only choose the initial weights; they are not part of the model.
BEGINNING = frozenset({"pretrained", "checkpoint_path", "cache_dir"})


class ModelConfig(Section):
    """The network, its resolution and its initial weights."""

    name: str = setting(
        "a name of `python -m model list`, or any timm model, which gets a token head (`model.token_label`)",
        affects="values",
    )
    img_size: Count = setting("side of the square input in pixels", 224, affects="values")
    num_classes: Count | None = setting(
        "classes of the class head; none: as many as in the label store, or class folders", None, affects="values"
    )
    drop_path_rate: Decay = setting("stochastic depth rate of the last layer", 0.0, affects="values")
    aux_weight: Number | None = setting(
        "in evaluation, weight of each class's largest auxiliary logit, added to its class logit; none: 0.5, "
        "or 0 if loss.dense_weight is 0",
        None,
        affects="nothing",
    )
    args: dict[str, Argument | list[Argument] | dict[str, Argument]] = setting(
        "other arguments of `timm.create_model`: embed_dim, depth, pretrained, …; depths, mixer_options and the like "
        "are lists and tables",
        {},
        affects="values",
    )
    weights: str | None = setting(
        "initial weights: a run's folder, one of its checkpoints, a published file, or a state dict of "
        "timm's model `name`; resolution and class count may differ",
        None,
        affects="nothing",
    )
    weights_ema: bool = setting("use the averaged weights of `weights`", False, affects="nothing")
    new_heads: bool = setting("start with new heads, even if those of `weights` fit", False, affects="nothing")
    train: Literal["all", "heads"] = setting(
        "what is trained; heads: everything else is frozen, including BatchNorm statistics", "all", affects="values"
    )
    freeze_statistics: bool = setting(
        "BatchNorm uses its running statistics in training too, without updating them", False, affects="values"
    )

    @property
    def begins_trained(self) -> bool:
        """Whether the initial weights are trained ones."""
        return self.weights is not None or any(self.args.get(key) for key in BEGINNING - {"cache_dir"})


class LoraConfig(Section):
    """Low-rank adapters (LoRA) beside frozen linear layers; only adapters and heads are trained. Needs peft."""

    rank: Count | None = setting("rank of the adapters; none: no adapters", None, affects="values")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = setting(
        "linear layers with adapters, by the last part of their names; none: the model's projections, in_proj and "
        "out_proj in Mamba blocks, qkv and proj in attention",
        None,
        affects="values",
    )
    scale: Rate = setting("factor of the adapters' output: alpha / rank of other programs", 1.0, affects="values")


class SegmentationConfig(Section):
    """Masks, decoder and evaluation of `run.task=segmentation`; the number of classes is `model.num_classes`."""

    masks: str | None = setting(
        "folder of the masks of data.images: PNG files of class ids with the images' names", None, affects="recorded"
    )
    validation_masks: str | None = setting("folder of the masks of data.validation", None, affects="nothing")
    class_names: tuple[str, ...] | None = setting("names of the classes, in their order", None, affects="nothing")
    ignore_index: Byte = setting("id of a mask's pixels without a class", 255, affects="values")
    decoder: Literal["Unet", "FPN", "UPerNet", "Segformer", "DeepLabV3Plus", "DPT"] = setting(
        "decoder of segmentation_models_pytorch", "Unet", affects="values"
    )
    decoder_args: dict[str, Argument | list[Argument]] = setting(
        "other arguments of the decoder's class: decoder_channels, decoder_segmentation_channels …",
        {},
        affects="values",
    )
    auxiliary: Number = setting(
        "weight of the loss of a small convolutional head on the map of stride 16; 0: no such head",
        0.0,
        affects="values",
    )
    evaluation: Literal["whole", "sliding"] = setting(
        "whole: an image is one input; sliding: a window of model.img_size slides over it", "whole", affects="nothing"
    )
    window_step: Share = setting("step of the sliding window, as a share of its side", 2 / 3, affects="nothing")
