"""The parts of a run, built from its recipe, and what a checkpoint keeps of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from labeler.base.errors import InputError, IntegrityError, MismatchError
from labeler.base.runtime import DTYPES, pick_precision, set_gpu_products, set_threads
from model.token_heads import TokenLabelHeads
from pipeline.targets.mask_files import survey_warnings
from train.adapters.lora import add_adapters
from train.loaders import class_folders, training_loader, transform_of, validation_loader
from train.loss.token_label_loss import TokenLabelLoss
from train.network import as_checkpointed, build_network, set_classes
from train.optimization import LearningRate, build_optimizer, load_optimizer_state, total_steps
from train.ranks.distributed import Ranks
from train.recipes.config import TrainConfig
from train.record.adapter_weights import split_weights
from train.record.checkpoint import AdapterRecord, CheckpointInfo, read_state, read_weights, write_base
from train.record.continuation import refuse_other_classes, refuse_other_past, refuse_other_run
from train.record.step_losses import StepLosses
from train.segmentation.evaluate import MaskedImages
from train.segmentation.loss import SegmentationLoss
from train.segmentation.network import build_segmentation
from train.task import TokenLabelTask, TrainingStep

log = logging.getLogger("train")


class RunParts:
    """Network, loaders, loss, optimizer and schedule of a run, at its first step.

    Errors come in the order of their cost: settings, then the names of the images, then the images.

    Args:
        config: the recipe.
        ranks: the ranks that train together.
        start: the record of the checkpoint to continue from, see `restore`; None: a new run.

    Attributes:
        loader: the training batches.
        validation: the images of the evaluation; None: no evaluation.
        task: the network with its loss and moving average.
        optimizer: its optimizer.
        rate: sets the learning rate of each step.
        train_step: does a step.
        precision: of the forward pass.
        steps: steps of the whole run.
        losses: sums up the losses of the steps.

    Raises:
        InputError: settings, images or labels cannot be used.
        MismatchError: the checkpoint, the labels or the images do not fit.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, start: CheckpointInfo | None) -> None:
        self.config, self.ranks = config, ranks
        if start is not None:
            refuse_other_run(config, start, ranks)
        self.threads = set_threads(config.run.threads or (None if start is None else start.threads))
        self.precision = DTYPES[pick_precision(config.run.precision, ranks.device)]
        if self.precision == torch.float16 and ranks.device.type == "cpu":
            raise InputError("run.precision=float16 needs a GPU", expected="float32 or bfloat16 on a CPU")
        if ranks.device.type == "cuda":
            set_gpu_products(self.precision)
        torch.manual_seed(config.run.seed)  # the same initial weights on all ranks
        model = config.model if start is None else as_checkpointed(config.model, start)
        net: Any
        if config.segments:
            net = build_segmentation(model, config.segmentation)
        else:
            net = build_network(model, config.loss.dense_weight)
            add_adapters(net, config.lora, config.model.name)
        build_optimizer(net, config.optimizer)  # checks the settings before any image is read; heads may change below
        chosen = start.classes if start is not None and config.data.classes == "auto" else None
        self.loader = training_loader(config, net, ranks, chosen)
        if start is not None:
            refuse_other_past(config, start, len(self.loader))
            refuse_other_classes(self.loader, start)
        if not config.segments:
            set_classes(net, self.loader.num_classes, self.loader.aux_classes, model)
        # Computed once, as it takes a pass over all images; every checkpoint records it.
        self.class_folders = class_folders(self.loader)
        self.transform = transform_of(config, net, self.loader.samples.orientation)
        self.validation = validation_loader(config, net, ranks, self.loader, self.class_folders)
        self._report_masks()
        self.steps = total_steps(config.schedule, len(self.loader))
        self.losses = StepLosses(config, self.precision)
        self.adapter: AdapterRecord | None = None
        self._prepare(net)

    def _report_masks(self) -> None:
        """Log which classes no mask has, and masks without any labeled pixel."""
        surveyed: list[Any] = [(self.loader.mask_survey, self.loader.masks)]
        if isinstance(self.validation, MaskedImages):
            surveyed.append((self.validation.survey, self.validation.masks))
        for survey, masks in surveyed:
            if survey is not None and self.ranks.first:
                for line in survey_warnings(survey, masks, self.config.segmentation.class_names or ()):
                    log.warning("%s", line)

    def class_iou(self, score: Any) -> dict[str, float]:
        """Class -> IoU of an evaluation's score, of classes that occur; empty for classification."""
        if not self.config.segments:
            return {}
        names = self.config.segmentation.class_names or tuple(map(str, range(self.loader.num_classes)))
        return {name: iou for name, iou in zip(names, score.iou, strict=True) if iou == iou}

    def _prepare(self, net: Any) -> None:
        config, ranks = self.config, self.ranks
        if config.run.grad_checkpointing:
            net.set_grad_checkpointing(True)
        if config.run.channels_last:
            net = net.to(memory_format=torch.channels_last)
        loss: Any
        if config.segments:
            loss = SegmentationLoss(config.segmentation.ignore_index, config.segmentation.auxiliary)
        else:
            loss = TokenLabelLoss(
                **config.loss.model_dump(exclude={"final_temperature"}),
                grid=self.loader.config.grid,
                in_place=ranks.device.type == "cuda",  # a CPU is faster with the gradient computed beside the loss
                classes="teacher" if self.loader.aux_classes is None else "images",
            )
        self.task = TokenLabelTask(net, loss, ranks.device)
        self.optimizer = build_optimizer(net, config.optimizer)
        self.rate = LearningRate(self.optimizer, config.schedule, len(self.loader))
        if config.ema.decay is not None:
            self.task.setup_ema(config.ema.decay, config.ema.warmup)
        if config.run.compile:
            self.task.compile()
        if ranks.world_size > 1:
            self.task.prepare_distributed(
                [ranks.device.index] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # One backward pass per step; the parts of a batch come with `no_sync`, which a static graph forbids.
                static_graph=(config.run.micro_batch or self.loader.config.batch_size) >= self.loader.config.batch_size,
            )
        self.train_step = TrainingStep(
            self.task,
            self.optimizer,
            ranks,
            seed=config.run.seed,
            micro_batch=config.run.micro_batch,
            clip_grad=config.optimizer.clip_grad,
            precision=self.precision,
            channels_last=config.run.channels_last,
        )

    @property
    def net(self) -> TokenLabelHeads:
        """The network itself, without the wrappers of torch."""
        return self.task.network

    @property
    def ema(self) -> torch.nn.Module | None:
        """The network with averaged weights; None: the recipe has no moving average."""
        return self.task.trainable_module_ema.module if self.task.has_ema() else None

    def keep_frozen(self, run: Path) -> None:
        """Write the frozen weights of a run with adapters to its folder, before any checkpoint."""
        if self.config.lora.rank is not None:
            _, frozen = split_weights(self.net, self.net.state_dict())
            self.adapter = AdapterRecord(self.config.lora.scale, write_base(run, frozen))

    def weights(self, net: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the network or its moving average: all weights, or those of adapters and heads."""
        state = net.state_dict()
        return state if self.adapter is None else split_weights(self.net, state)[0]

    def state_dict(self) -> dict[str, Any]:
        """The resume state other than the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            **self.losses.state_dict(),
        }

    def info(self, step: int, accuracy: dict[str, float]) -> CheckpointInfo:
        """The record of a checkpoint.

        Args:
            step: steps done.
            accuracy: of the weights at that step; empty: not evaluated.

        Returns:
            The record.
        """
        loader, store = self.loader, self.loader.samples.store
        return CheckpointInfo(
            step=step,
            epoch=loader.epoch,
            model=self.config.model.model_dump(),
            num_classes=loader.num_classes,
            aux_weight=self.net.aux_weight,
            class_names=list(self.config.segmentation.class_names or loader.class_names),
            class_folders=self.class_folders,
            transform=self.transform,
            config=self.config.model_dump(),
            world_size=self.ranks.world_size,
            threads=self.threads,
            accuracy=accuracy,
            classes=loader.samples.classes.kind,
            aux_classes=loader.aux_classes,
            adapter=self.adapter,
            aux_class_names=list(store.meta.class_names) if store and loader.aux_classes is not None else [],
        )

    def restore(self, folder: Path, info: CheckpointInfo) -> None:
        """Continue from a checkpoint.

        Args:
            folder: the checkpoint's folder.
            info: its record.

        Raises:
            MismatchError: it belongs to other images, labels or settings.
            IntegrityError: it holds no state of such a run.
        """
        state = read_state(folder, info)
        try:
            self.loader.load_state_dict(state["loader"])
            self.net.load_state_dict(read_weights(folder, info, merged=False))
            if self.ema is not None:
                self.ema.load_state_dict(read_weights(folder, info, ema=True, merged=False))
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.train_step.scaler.load_state_dict(state["scaler"])
            self.losses.load_state_dict(state)
        except MismatchError as error:
            remedy = "Resume with the same images, labels and settings, or start anew with that run as model.weights=."
            raise MismatchError(error.problem, got=error.got, expected=error.expected, remedy=remedy) from None
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            remedy = "Resume from another checkpoint."
            raise IntegrityError(f"{folder} holds no state of this run", got=got, remedy=remedy) from None
