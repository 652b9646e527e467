"""What a training run is: the sections of a recipe, typed, frozen and checked at the door."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

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


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no conversion of types, no change once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and (not value or "\0" in value):
            raise ValueError(f"{info.field_name} {'holds a zero byte' if value else 'is empty'}; give a path or a name")
        return value


class ModelConfig(Section):
    """
    name            one of `python -m model list`, or any of timm's: those get a token head (`model.token_label`)
    img_size        side of the square input in pixels
    num_classes     None: as many as the label store, or the folders, have
    drop_path_rate  of stochastic depth
    aux_weight      what the largest auxiliary logit over the tokens adds to a class logit in evaluation; None: 0.5, or
                    0 where loss.dense_weight is 0, as an untrained head says nothing
    args            anything else that `timm.create_model` takes: embed_dim, depth, pretrained, …
    weights         begin with these: a run's folder, one of its checkpoints, a published file, or a state dict of
                    timm's `name`; resolution and class count may differ
    weights_ema     take the averaged weights there
    new_heads       forget the heads of `weights` even if the class count is the same
    train           "heads": everything else is frozen, its statistics too
    freeze_statistics  BatchNorm uses its running statistics and keeps them, in training too
    """

    name: str
    img_size: Count = 224
    num_classes: Count | None = None
    drop_path_rate: Decay = 0.0
    aux_weight: Number | None = None
    args: dict[str, bool | int | float | str] = {}
    weights: str | None = None
    weights_ema: bool = False
    new_heads: bool = False
    train: Literal["all", "heads"] = "all"
    freeze_statistics: bool = False


class DataConfig(Section):
    """
    images        training images: a folder, or one of tar shards
    store         label store; None with token_labels=false: plain classification
    token_labels  false: every target is the image's true class, everything else unchanged (the ablation)
    validation    folder of images in the same class folders; None: no evaluation while training
    image_list, cache, backend, threads, prefetch  as `pipeline.LoaderConfig`
    """

    images: str
    store: str | None = None
    token_labels: bool = True
    validation: str | None = None
    image_list: str | None = None
    cache: Literal["none", "ram", "ram-compressed"] = "none"
    backend: Literal["auto", "dali", "reference"] = "auto"
    threads: Threads | None = None
    prefetch: Count = 2

    @model_validator(mode="after")
    def _labels(self) -> DataConfig:
        if self.token_labels and self.store is None:
            raise ValueError("data.store is missing; label the images first, or set data.token_labels=false")
        return self


class AugmentConfig(Section):
    """As `pipeline.LoaderConfig`; mix "auto": tokens where the model has a place for it, else pixels of whole patches.

    mean, std  None: the model's own; crop_pct, crop_mode  of the evaluation
    """

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    hflip: Share = 0.5
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: Number = 0.0
    erase_prob: Share = 0.25
    erase_mode: Literal["pixel", "const"] = "pixel"
    mix: Literal["auto", "none", "token", "image"] = "auto"
    mix_alpha: Rate = 1.0
    mix_prob: Share = 1.0
    mean: Colour | None = None
    std: Colour | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.9
    crop_mode: Literal["center", "squash"] = "center"


class LossConfig(Section):
    """As `train.TokenLabelLoss`.

    final_temperature  the last step's; from the first step's it moves in a straight line. None: constant
    """

    dense_weight: Number = 1.0
    cls_weight: Number = 1.0
    smoothing: Decay = 0.1
    ground_truth: bool = False
    temperature: Rate = 1.0
    final_temperature: Rate | None = None

    def temperature_at(self, step: int, steps: int) -> float:
        """For the step after `step` others of a run of `steps`."""
        if self.final_temperature is None or step == 0:
            return self.temperature
        share = step / (steps - 1)
        return (1 - share) * self.temperature + share * self.final_temperature


class OptimizerConfig(Section):
    """
    name          any of timm's; "radamw" is RAdam with decoupled weight decay
    lr            at the top of the schedule, for the whole batch as it is: nothing is scaled by its size
    layer_decay   factor of the learning rate from each layer to the one before it; None: the same everywhere
    decay_all     weight decay on every parameter, as the published training of DeMansia did; otherwise what the model
                  marks and all vectors (norms, biases, A, D, position and class tokens) have none
    clip_grad     largest norm of all gradients together; None: no clipping
    """

    name: str = "adamw"
    lr: Rate = 1e-3
    weight_decay: Number = 0.05
    betas: tuple[Decay, Decay] | None = None
    eps: Rate | None = None
    momentum: Decay = 0.9
    layer_decay: Rate | None = None
    decay_all: bool = False
    clip_grad: Rate | None = None


class ScheduleConfig(Section):
    """The learning rate moves with every step; durations are in epochs and may be fractions.

    kind       "cosine": once from lr to min_lr; "restarts": again and again, each cycle `cycle_factor` times as long as
               the one before; "constant"
    epochs     all but cooldown_epochs, which follow at min_lr; steps  overrides the sum of both
    warmup_epochs  linear from warmup_lr, within epochs
    """

    kind: Literal["cosine", "restarts", "constant"] = "cosine"
    epochs: Rate = 300
    steps: Count | None = None
    cooldown_epochs: Number = 0
    warmup_epochs: Number = 0
    warmup_lr: Number = 1e-6
    min_lr: Number = 1e-5
    first_cycle: Rate = 10
    cycle_factor: Annotated[float, Field(ge=1)] = 2.0

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.warmup_epochs >= self.epochs and self.steps is None:
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs:g} of {self.epochs:g} epochs; make it shorter"
            )
        return self


class EmaConfig(Section):
    """Moving average of the weights; decay None: none is kept. warmup: timm's, a smaller decay at first."""

    decay: Decay | None = None
    warmup: bool = False


class RunConfig(Section):
    """
    out            the run's folder; {recipe} stands for the recipe's name
    batch_size     images of one optimizer step, over all ranks and micro-batches
    micro_batch    images that a rank's device works on at a time; None: its whole share. Any divisor gives the same
                   gradient, but for BatchNorm in training, which sees micro-batches
    precision      of the forward pass; "auto": bfloat16 on a GPU, float32 on a CPU
    threads        of torch on a CPU; None: the machine's cores shared among its ranks. Results differ with it.
    log_every      steps between two lines of metrics.jsonl
    eval_every     epochs between two evaluations; the last epoch always has one
    save_every     steps between two checkpoints; None: every `eval_every` epochs. The last `keep` of them stay.
    skip_non_finite  steps in a row whose loss may be NaN or infinite; they are left out. 0: the first one stops the run
    tracker        also report to Weights & Biases or trackio: pip install '.[wandb]' or '.[trackio]'
    """

    out: str = "runs/{recipe}"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    batch_size: Count = 768
    micro_batch: Count | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    threads: Threads | None = None
    log_every: Count = 50
    eval_every: Count = 1
    save_every: Count | None = None
    keep: Annotated[int, Field(ge=1)] = 2
    skip_non_finite: Annotated[int, Field(ge=0)] = 0
    tensorboard: bool = True
    tracker: Literal["none", "wandb", "trackio"] = "none"
    progress: bool = True


class TrainConfig(Section):
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
