"""The sections of a recipe for the training itself: loss, optimizer, schedule, average, and the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from labeler.base.settings import setting
from train.recipes.section import Count, Decay, Number, Rate, Section, Threads


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
