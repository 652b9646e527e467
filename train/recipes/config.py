"""What a training run is: the sections of a recipe, typed, frozen and checked at the door."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from labeler.base.settings import Affects, Settings, names_that_affect, setting

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # torch crashes where the system cannot start as many
Number = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Range = tuple[Rate, Rate]
Colour = tuple[float, float, float]
# Of `model.args`: where the weights come from that a run begins with, which is no part of the model.
BEGINNING = frozenset({"pretrained", "checkpoint_path", "cache_dir"})


class Section(Settings):
    """A part of a recipe."""

    @field_validator("*")
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and (not value or "\0" in value):
            raise ValueError(f"{info.field_name} {'holds a zero byte' if value else 'is empty'}; give a path or a name")
        return value


class ModelConfig(Section):
    """The network, its resolution, and the weights that it begins with."""

    name: str = setting(
        "one of `python -m model list`, or any of timm's, which gets a token head (`model.token_label`)",
        affects="values",
    )
    img_size: Count = setting("side of the square input in pixels", 224, affects="values")
    num_classes: Count | None = setting(
        "classes of the heads; none: as many as the label store, or the folders, have", None, affects="values"
    )
    drop_path_rate: Decay = setting("rate of stochastic depth in the last layer", 0.0, affects="values")
    aux_weight: Number | None = setting(
        "what the largest auxiliary logit over the tokens adds to a class logit in evaluation; none: 0.5, "
        "or 0 where loss.dense_weight is 0",
        None,
        affects="nothing",
    )
    args: dict[str, bool | int | float | str] = setting(
        "anything else that `timm.create_model` takes: embed_dim, depth, pretrained, …", {}, affects="values"
    )
    weights: str | None = setting(
        "begin with these: a run's folder, one of its checkpoints, a published file, or a state dict of "
        "timm's `name`; resolution and class count may differ",
        None,
        affects="nothing",
    )
    weights_ema: bool = setting("take the averaged weights of `weights`", False, affects="nothing")
    new_heads: bool = setting("begin with new heads, even where those of `weights` fit", False, affects="nothing")
    train: Literal["all", "heads"] = setting(
        "heads: everything else is frozen, its statistics too", "all", affects="values"
    )
    freeze_statistics: bool = setting(
        "BatchNorm uses its running statistics and keeps them, in training too", False, affects="values"
    )


class DataConfig(Section):
    """Images, labels, and how they are read."""

    images: str = setting("training images: a folder, a folder of tar shards, or one .tar file", affects="recorded")
    store: str | None = setting(
        "folder of the label store; none, with token_labels=false: plain classification", None, affects="recorded"
    )
    token_labels: bool = setting(
        "false: every target is the image's true class, all else unchanged (the ablation)", True, affects="values"
    )
    validation: str | None = setting(
        "images in the same class folders to evaluate on; none: no evaluation while training", None, affects="nothing"
    )
    image_list: str | None = setting(
        "use only the images that this file names, one key a line", None, affects="recorded"
    )
    cache: Literal["none", "ram", "ram-compressed"] = setting(
        "label rows in memory: none reads the files, ram keeps decoded codes (3 kB an image), ram-compressed the files",
        "none",
        affects="nothing",
    )
    backend: Literal["auto", "dali", "reference"] = setting(
        "what decodes and augments: DALI, or PIL (reference); auto: DALI where it is installed",
        "auto",
        affects="values",
    )
    threads: Threads | None = setting(
        "CPU threads that read and decode; none: the cores shared among the ranks", None, affects="nothing"
    )
    prefetch: Count = setting("batches read ahead", 2, affects="nothing")

    @model_validator(mode="after")
    def _labels(self) -> DataConfig:
        if self.token_labels and self.store is None:
            raise ValueError("data.store is missing; label the images first, or set data.token_labels=false")
        return self


class AugmentConfig(Section):
    """Crops, flips, RandAugment, erasing and mixing in training; the crop of an evaluation."""

    scale: Range = setting(
        "random-resized-crop: smallest and largest share of the image's area", (0.08, 1.0), affects="values"
    )
    ratio: Range = setting(
        "random-resized-crop: narrowest and widest, width to height", (3 / 4, 4 / 3), affects="values"
    )
    hflip: Share = setting("probability of a mirrored crop", 0.5, affects="values")
    interpolation: Literal["random", "bilinear", "bicubic"] = setting(
        "how crops are resized; random: bilinear or bicubic, for each image", "random", affects="values"
    )
    auto_augment: str = setting("RandAugment in timm's notation, 3a, or none", "rand-m9-mstd0.5-inc1", affects="values")
    color_jitter: Number = setting(
        "strength of color jitter; used where auto_augment is 3a or none", 0.0, affects="values"
    )
    erase_prob: Share = setting("probability of random erasing", 0.25, affects="values")
    erase_mode: Literal["pixel", "const"] = setting(
        "what is erased becomes noise (pixel) or the mean color (const)", "pixel", affects="values"
    )
    mix: Literal["auto", "none", "token", "image"] = setting(
        "mix pairs of images in a box: their tokens, or pixels of whole patches; auto: tokens where the model can",
        "auto",
        affects="values",
    )
    mix_alpha: Rate = setting("the box's area is drawn from Beta(alpha, alpha)", 1.0, affects="values")
    mix_prob: Share = setting("share of batches that are mixed", 1.0, affects="values")
    mean: Colour | None = setting("mean of each color channel, 0 to 1; none: the model's own", None, affects="values")
    std: Colour | None = setting(
        "standard deviation of each color channel; none: the model's own", None, affects="values"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] = setting(
        "evaluation: share of the image's shorter side that is shown", 0.9, affects="nothing"
    )
    crop_mode: Literal["center", "squash"] = setting(
        "evaluation: crop the center, or squash the image to a square first", "center", affects="nothing"
    )


class LossConfig(Section):
    """Weights of the class and token losses, smoothing, the teacher's temperature. See `train.TokenLabelLoss`."""

    dense_weight: Number = setting("weight of the token loss", 1.0, affects="values")
    cls_weight: Number = setting("weight of the class loss", 1.0, affects="values")
    smoothing: Decay = setting("label smoothing", 0.1, affects="values")
    ground_truth: bool = setting(
        "the class loss uses the image's true class instead of the teacher's scores of the crop",
        False,
        affects="values",
    )
    temperature: Rate = setting(
        "stored scores are divided by it: above 1 targets are softer than the teacher", 1.0, affects="values"
    )
    final_temperature: Rate | None = setting(
        "temperature at the last step, reached in a straight line; none: constant", None, affects="values"
    )

    def temperature_at(self, step: int, steps: int) -> float:
        """For the step after `step` others of a run of `steps`."""
        if self.final_temperature is None or step == 0:
            return self.temperature
        share = step / (steps - 1)
        return (1 - share) * self.temperature + share * self.final_temperature


class OptimizerConfig(Section):
    """Any optimizer of timm's."""

    name: str = setting(
        "a name of timm's; radamw: RAdam with decoupled weight decay; lookahead_… before a name: with Lookahead",
        "adamw",
        affects="values",
    )
    lr: Rate = setting(
        "learning rate at the top of the schedule; it is not scaled by the batch", 1e-3, affects="values"
    )
    weight_decay: Number = setting("weight decay", 0.05, affects="values")
    betas: tuple[Decay, Decay] | None = setting("none: the optimizer's own", None, affects="values")
    eps: Rate | None = setting("none: the optimizer's own", None, affects="values")
    momentum: Decay = setting("momentum, where the optimizer has one", 0.9, affects="values")
    layer_decay: Rate | None = setting(
        "factor of the learning rate from each layer to the one before it; none: the same everywhere",
        None,
        affects="values",
    )
    decay_all: bool = setting(
        "decay every parameter, as the published DeMansia did; false: not vectors and what the model marks",
        False,
        affects="values",
    )
    clip_grad: Rate | None = setting(
        "largest norm of all gradients together; none: no clipping", None, affects="values"
    )


class ScheduleConfig(Section):
    """The learning rate moves with every step; durations are in epochs and may be fractions."""

    kind: Literal["cosine", "restarts", "constant"] = setting(
        "cosine: once from lr to min_lr; restarts: again and again; constant", "cosine", affects="values"
    )
    epochs: Rate = setting("length of the run without cooldown_epochs", 300, affects="values")
    steps: Count | None = setting(
        "length of the whole run in steps, in place of epochs; none: as epochs say", None, affects="values"
    )
    cooldown_epochs: Number = setting("epochs at min_lr after all others", 0, affects="values")
    warmup_epochs: Number = setting("linear warm-up from warmup_lr, within epochs", 0, affects="values")
    warmup_lr: Number = setting("learning rate at the first step of the warm-up", 1e-6, affects="values")
    min_lr: Number = setting("lowest learning rate of a cosine", 1e-5, affects="values")
    first_cycle: Rate = setting("restarts: epochs of the first cycle", 10, affects="values")
    cycle_factor: Annotated[float, Field(ge=1)] = setting(
        "restarts: each cycle is so many times as long as the one before", 2.0, affects="values"
    )

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.warmup_epochs >= self.epochs and self.steps is None:
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs:g} of {self.epochs:g} epochs; make it shorter"
            )
        return self


class EmaConfig(Section):
    """A moving average of the weights."""

    decay: Decay | None = setting("share of the average that a step keeps; none: no average", None, affects="values")
    warmup: bool = setting("smaller decay in the first steps, as timm's", False, affects="values")


class RunConfig(Section):
    """Output, batch, device, precision, logs and checkpoints."""

    out: str = setting("the run's folder; {recipe} stands for the recipe's name", "runs/{recipe}", affects="nothing")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = setting(
        "seed of weights, order and augmentation", 0, affects="values"
    )
    batch_size: Count = setting("images of one optimizer step, over all ranks and micro-batches", 768, affects="values")
    micro_batch: Count | None = setting(
        "images that a device works on at a time; none: its whole share. Gradients are the same, but "
        "BatchNorm sees micro-batches",
        None,
        affects="rounding",
    )
    device: str = setting("cpu, cuda or auto", "auto", affects="rounding")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "of the forward pass; auto: bfloat16 on a GPU (float16 on a V100 or T4), float32 on a CPU",
        "auto",
        affects="values",
    )
    compile: bool = setting("run the model through torch.compile", False, affects="rounding")
    channels_last: bool = setting("channels-last memory format", False, affects="rounding")
    grad_checkpointing: bool = setting(
        "save memory by computing each block again in the backward pass", False, affects="rounding"
    )
    threads: Threads | None = setting(
        "torch's CPU threads; none: the cores shared among the ranks", None, affects="rounding"
    )
    log_every: Count = setting("steps between two lines of metrics.jsonl", 50, affects="nothing")
    eval_every: Count = setting("epochs between two evaluations; the last epoch always has one", 1, affects="nothing")
    save_every: Count | None = setting(
        "steps between two checkpoints; none: every eval_every epochs", None, affects="nothing"
    )
    keep: Annotated[int, Field(ge=1)] = setting("checkpoints that stay, beside the best one", 2, affects="nothing")
    skip_non_finite: Annotated[int, Field(ge=0)] = setting(
        "steps in a row whose loss may be NaN or infinite, which are left out; 0: the first one stops the run",
        0,
        affects="nothing",
    )
    tensorboard: bool = setting("write TensorBoard events", True, affects="nothing")
    tracker: Literal["none", "wandb", "trackio"] = setting(
        "also report to Weights & Biases or trackio (pip install 'token-labeling[wandb]', or '[trackio]')",
        "none",
        affects="nothing",
    )
    progress: bool = setting("show a progress bar", True, affects="nothing")


class TrainConfig(Section):
    """A recipe."""

    model: ModelConfig
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
        micro = self.run.micro_batch
        if micro is not None and micro % 2 and micro < self.run.batch_size and self.augment.mix != "none":
            raise ValueError(f"run.micro_batch is {micro}; make it even: images mix in pairs, which stay together")
        return self


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in TrainConfig.model_fields.items()}  # type: ignore[misc]


def keys_that_affect(*what: Affects) -> frozenset[str]:
    """`section.key` of every setting whose other values would change this."""
    return frozenset(f"{name}.{key}" for name, section in SECTIONS.items() for key in names_that_affect(section, *what))
