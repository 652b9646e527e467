"""The sections of a recipe for images and labels: where they are, and how they are augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from labeler.base.settings import setting
from train.recipes.section import Color, Count, Number, Range, Rate, Section, Share, Stores, Threads


class DataConfig(Section):
    """Images, labels and how they are loaded."""

    images: str = setting(
        "training images: a folder, a list (.txt, .csv), .tar or .parquet files, or a URL of any of them",
        affects="recorded",
    )
    store: str | Stores | None = setting(
        "folder of the label store, or a list of several; none with token_labels=false: plain classification",
        None,
        affects="recorded",
    )
    token_labels: bool = setting(
        "false: every target is the image's true class, everything else the same (ablation)", True, affects="values"
    )
    classes: Literal["auto", "teacher", "images"] = setting(
        "classes of the class head. teacher: those of the label store; images: the class folders, or the labels of the "
        "source, while the token head keeps the teacher's; auto: images where the store knows no true class and there "
        "are class folders, else teacher",
        "auto",
        affects="recorded",
    )
    validation: str | None = setting(
        "images for evaluation, in the same class folders; none: no evaluation during training", None, affects="nothing"
    )
    image_list: str | None = setting("use only the images that this file lists", None, affects="recorded")
    cache: Literal["none", "ram", "ram-compressed"] = setting(
        "labels in memory: none reads the files, ram keeps decoded codes (3 kB per image), ram-compressed the files",
        "none",
        affects="nothing",
    )
    backend: Literal["auto", "dali", "cpu", "pil"] = setting(
        "decodes and augments images: dali; cpu, threads of this process; pil, its readable twin; auto: DALI for a GPU "
        "if it is installed, otherwise cpu, which is faster there",
        "auto",
        affects="values",
    )
    threads: Threads | None = setting(
        "CPU threads that read and decode; none: this rank's share of the cores", None, affects="nothing"
    )
    prefetch: Count = setting("batches to load ahead", 2, affects="nothing")

    @model_validator(mode="after")
    def _labels(self) -> DataConfig:
        if self.token_labels and self.store is None:
            raise ValueError("data.store is missing; label the images first, or set data.token_labels=false")
        return self

    @property
    def stores(self) -> tuple[str, ...]:
        """The folders of the label stores."""
        return () if self.store is None else (self.store,) if isinstance(self.store, str) else self.store


class AugmentConfig(Section):
    """Crops, flips, RandAugment, erasing and mixing in training; the crop of an evaluation."""

    scale: Range = setting(
        "random resized crop: smallest and largest share of the image's area", (0.08, 1.0), affects="values"
    )
    ratio: Range = setting(
        "random resized crop: smallest and largest aspect ratio, width / height", (3 / 4, 4 / 3), affects="values"
    )
    hflip: Share = setting("probability of a horizontal flip", 0.5, affects="values")
    interpolation: Literal["random", "bilinear", "bicubic"] = setting(
        "interpolation of crops; random: bilinear or bicubic, drawn per image", "random", affects="values"
    )
    auto_augment: str = setting(
        "RandAugment in timm's notation, 3a (three-augment), or none", "rand-m9-mstd0.5-inc1", affects="values"
    )
    color_jitter: Number = setting(
        "strength of color jitter; used if auto_augment is 3a or none", 0.0, affects="values"
    )
    erase_prob: Share = setting("probability of random erasing", 0.25, affects="values")
    erase_mode: Literal["pixel", "const"] = setting(
        "fill of erased areas: noise (pixel) or the mean color (const)", "pixel", affects="values"
    )
    mix: Literal["auto", "none", "token", "image"] = setting(
        "mix pairs of images within a box: their tokens, or pixels of whole patches; auto: tokens if the model can",
        "auto",
        affects="values",
    )
    mix_alpha: Rate = setting("the box's area is drawn from Beta(alpha, alpha)", 1.0, affects="values")
    mix_prob: Share = setting("probability that a batch is mixed", 1.0, affects="values")
    mean: Color | None = setting("mean of each color channel, 0 to 1; none: the model's own", None, affects="values")
    std: Color | None = setting(
        "standard deviation of each color channel; none: the model's own", None, affects="values"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] = setting(
        "evaluation: the crop's share of the image's shorter side", 0.9, affects="nothing"
    )
    crop_mode: Literal["center", "squash"] = setting(
        "evaluation: crop the center, or squash the image to a square first", "center", affects="nothing"
    )
