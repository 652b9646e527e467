"""All sections of a recipe in one `TrainConfig`, typed, frozen and validated; each setting is in a `*_sections.py`."""

from __future__ import annotations

from pydantic import model_validator

from labeler.base.settings import Affects, names_that_affect
from train.recipes.data_sections import AugmentConfig, DataConfig
from train.recipes.model_sections import BEGINNING, LoraConfig, ModelConfig, SegmentationConfig
from train.recipes.section import Section
from train.recipes.training_sections import EmaConfig, LossConfig, OptimizerConfig, RunConfig, ScheduleConfig

__all__ = [
    "BEGINNING",
    "SECTIONS",
    "AugmentConfig",
    "DataConfig",
    "EmaConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmentationConfig",
    "TrainConfig",
    "keys_that_affect",
]


class TrainConfig(Section):
    """A recipe: the whole configuration of a run, by section."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.loss.dense_weight == 0 and self.loss.cls_weight == 0:
            raise ValueError("loss.dense_weight and loss.cls_weight are both 0: nothing would be learned")
        if self.schedule.min_lr > self.optimizer.lr and self.schedule.kind != "constant":
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g} is above optimizer.lr {self.optimizer.lr:g}; lower it"
            )
        if self.segments:
            self._refuse_for_segmentation()
        if self.lora.rank is not None and self.model.train == "heads":
            raise ValueError("model.train=heads trains no adapters; use model.train=all with lora.rank")
        if self.lora.rank is not None and not self.model.begins_trained:
            raise ValueError(
                "lora.rank freezes the network's weights, but they are random; "
                "set model.weights, or model.args.pretrained=true"
            )
        micro, mixes = self.run.micro_batch, self.augment.mix != "none" and not self.segments
        if micro is not None and micro % 2 and micro < self.run.batch_size and mixes:
            raise ValueError(f"run.micro_batch is {micro}; make it even: images are mixed in pairs")
        return self

    @property
    def segments(self) -> bool:
        """Whether the task is segmentation."""
        return self.run.task == "segmentation"

    @property
    def measures(self) -> tuple[str, str]:
        """What an evaluation measures; the first decides which checkpoint is the best."""
        return ("miou", "pixel_accuracy") if self.segments else ("top1", "top5")

    def _refuse_for_segmentation(self) -> None:
        """Raise ValueError for what a segmentation run lacks, or cannot have."""
        missing = {"segmentation.masks": self.segmentation.masks, "model.num_classes": self.model.num_classes}
        if self.data.validation is not None:
            missing["segmentation.validation_masks"] = self.segmentation.validation_masks
        for name, value in missing.items():
            if value is None:
                raise ValueError(f"{name} is missing, which run.task=segmentation needs")
        names = self.segmentation.class_names
        if names is not None and len(names) != self.model.num_classes:
            raise ValueError(f"segmentation.class_names has {len(names)} names for {self.model.num_classes} classes")
        refused = {
            "data.store": self.data.store is not None,
            "lora.rank": self.lora.rank is not None,
            "model.train=heads": self.model.train == "heads",
            f"augment.mix={self.augment.mix}": self.augment.mix in ("token", "image"),
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name} is not for run.task=segmentation; leave it out, or set it to none")


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in TrainConfig.model_fields.items()}  # type: ignore[misc]


def keys_that_affect(*what: Affects) -> frozenset[str]:
    """`section.key` of every setting that affects one of `what`."""
    return frozenset(f"{name}.{key}" for name, section in SECTIONS.items() for key in names_that_affect(section, *what))
