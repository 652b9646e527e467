"""The configuration of a training run: the sections of a recipe, typed, frozen and validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from labeler.base.settings import Affects, Settings, names_that_affect, setting

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # torch crashes if the system cannot start that many
Number = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Range = tuple[Rate, Rate]
Color = tuple[float, float, float]
Argument = bool | int | float | str
Byte = Annotated[int, Field(ge=0, le=255)]
Stores = Annotated[tuple[str, ...], Field(min_length=1)]
# Keys of `model.args` that only choose the initial weights; they are not part of the model.
BEGINNING = frozenset({"pretrained", "checkpoint_path", "cache_dir"})


class Section(Settings):
    """A section of a recipe."""

    @field_validator("*")
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any(not text or "\0" in text for text in texts):
            fault = "contains a zero byte" if all(texts) else "is empty"
            raise ValueError(f"{info.field_name} {fault}; give a path or a name")
        return value


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
    auxiliary: Number = setting(
        "weight of the loss of a small convolutional head on the map of stride 16; 0: no such head",
        0.0,
        affects="values",
    )
    evaluation: Literal["whole", "sliding"] = setting(
        "whole: an image is one input; sliding: a window of model.img_size slides over it", "whole", affects="nothing"
    )
    window_step: Share = setting("step of the sliding window, as a share of its side", 2 / 3, affects="nothing")


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


class LossConfig(Section):
    """Weights of the class and token losses, smoothing and temperature. See `train.TokenLabelLoss`."""

    dense_weight: Number = setting("weight of the token loss", 1.0, affects="values")
    cls_weight: Number = setting("weight of the class loss", 1.0, affects="values")
    smoothing: Decay = setting("label smoothing", 0.1, affects="values")
    ground_truth: bool = setting(
        "blend the image's true class into the target of the class loss",
        False,
        affects="values",
    )
    temperature: Rate = setting(
        "divisor of the stored scores: above 1 targets are softer than the teacher's", 1.0, affects="values"
    )
    final_temperature: Rate | None = setting(
        "temperature at the last step, reached linearly; none: constant", None, affects="values"
    )

    def temperature_at(self, step: int, steps: int) -> float:
        """The temperature of a step.

        Args:
            step: number of steps before it.
            steps: steps of the whole run.

        Returns:
            The temperature.
        """
        if self.final_temperature is None or step == 0:
            return self.temperature
        share = step / (steps - 1)
        return (1 - share) * self.temperature + share * self.final_temperature


class OptimizerConfig(Section):
    """Any of timm's optimizers."""

    name: str = setting(
        "a name of timm's; radamw: RAdam with decoupled weight decay; prefix lookahead_: with Lookahead",
        "adamw",
        affects="values",
    )
    lr: Rate = setting("peak learning rate; not scaled by the batch size", 1e-3, affects="values")
    weight_decay: Number = setting("weight decay", 0.05, affects="values")
    betas: tuple[Decay, Decay] | None = setting("Adam's betas; none: the optimizer's default", None, affects="values")
    eps: Rate | None = setting("epsilon; none: the optimizer's default", None, affects="values")
    momentum: Decay = setting("momentum, if the optimizer has one", 0.9, affects="values")
    layer_decay: Rate | None = setting(
        "learning rate of each layer / that of the next layer; none: the same for all",
        None,
        affects="values",
    )
    decay_all: bool = setting(
        "weight decay for every parameter, as in the published DeMansia; false: not for vectors and those that the "
        "model excludes",
        False,
        affects="values",
    )
    clip_grad: Rate | None = setting("largest total norm of the gradients; none: no clipping", None, affects="values")


class ScheduleConfig(Section):
    """Length of the run and learning rate. It changes at every step; durations are in epochs and may be fractions."""

    kind: Literal["cosine", "restarts", "constant", "poly"] = setting(
        "cosine: once from lr to min_lr; restarts: repeated cosine cycles; constant: lr; poly: as a power of the steps "
        "that are left",
        "cosine",
        affects="values",
    )
    power: Rate = setting("poly: the power", 1.0, affects="values")
    epochs: Rate = setting("length of the run in epochs, without cooldown_epochs", 300, affects="values")
    steps: Count | None = setting(
        "length of the whole run in steps, instead of epochs; none: use epochs", None, affects="values"
    )
    cooldown_epochs: Number = setting("additional epochs at min_lr at the end", 0, affects="values")
    warmup_epochs: Number = setting("epochs of linear warm-up from warmup_lr, part of epochs", 0, affects="values")
    warmup_lr: Number = setting("learning rate at the first step of the warm-up", 1e-6, affects="values")
    min_lr: Number = setting("lowest learning rate of a cosine", 1e-5, affects="values")
    first_cycle: Rate = setting("restarts: epochs of the first cycle", 10, affects="values")
    cycle_factor: Annotated[float, Field(ge=1)] = setting(
        "restarts: length of each cycle / length of the previous one", 2.0, affects="values"
    )

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.warmup_epochs >= self.epochs and self.steps is None:
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs:g} of {self.epochs:g} epochs; make it shorter"
            )
        return self


class EmaConfig(Section):
    """Exponential moving average of the weights."""

    decay: Decay | None = setting("decay per step; none: no average", None, affects="values")
    warmup: bool = setting("use a smaller decay in the first steps, as timm does", False, affects="values")


class RunConfig(Section):
    """Output, batch, device, compute precision, logs and checkpoints."""

    task: Literal["classification", "segmentation"] = setting(
        "what is trained: a classifier, or class scores of each pixel (section segmentation)",
        "classification",
        affects="values",
    )
    out: str = setting("the run's folder; {recipe} stands for the recipe's name", "runs/{recipe}", affects="nothing")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = setting(
        "seed of initial weights, order and augmentation", 0, affects="values"
    )
    batch_size: Count = setting("images per optimizer step, over all ranks and micro-batches", 768, affects="values")
    micro_batch: Count | None = setting(
        "images per device at a time (gradient accumulation); none: the device's whole share. Gradients are the same, "
        "but BatchNorm sees micro-batches",
        None,
        affects="rounding",
    )
    device: str = setting("cpu, cuda or auto", "auto", affects="rounding")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "compute precision of the forward pass; auto: bfloat16 on a GPU (float16 on a V100 or T4), float32 on a CPU",
        "auto",
        affects="values",
    )
    compile: bool = setting("run the model through torch.compile", False, affects="rounding")
    channels_last: bool = setting("use channels-last memory format", False, affects="rounding")
    grad_checkpointing: bool = setting(
        "save memory by recomputing each block in the backward pass", False, affects="rounding"
    )
    threads: Threads | None = setting(
        "torch's CPU threads; none: this rank's share of the cores", None, affects="rounding"
    )
    log_every: Count = setting("steps between lines of metrics.jsonl", 50, affects="nothing")
    eval_every: Count = setting("epochs between evaluations; the last epoch always has one", 1, affects="nothing")
    save_every: Count | None = setting(
        "steps between checkpoints; none: every eval_every epochs", None, affects="nothing"
    )
    keep: Annotated[int, Field(ge=1)] = setting(
        "number of checkpoints to keep, in addition to the best one", 2, affects="nothing"
    )
    skip_non_finite: Annotated[int, Field(ge=0)] = setting(
        "how many steps in a row may be skipped for a NaN or infinite loss; 0: the first one stops the run",
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
        micro = self.run.micro_batch
        if micro is not None and micro % 2 and micro < self.run.batch_size and self.augment.mix != "none":
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
