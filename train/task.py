"""One training step: forward pass, loss, backward pass and weight update.

Legend: B images; C classes; T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from model.token_heads import TokenLabelHeads
from pipeline.batch import Batch
from train.errors import TrainError
from train.loss.token_label_loss import TokenLabelLoss
from train.micro_batches import micro_batches
from train.ranks.distributed import Ranks

DROP_STREAM = 3  # random stream of drop path; `pipeline.order` and `pipeline.augment.draws` use others
SMALLEST_SCALE = 1.0  # of float16 losses; if it has to be smaller, the gradients themselves are infinite


class TokenLabelTask(TrainingTask):
    """timm's TrainingTask for a network with a token head: `task(batch)` returns its loss and outputs.

    Args:
        net: the network; it is moved to `device`.
        loss: the criterion.
        device: where to train.
    """

    def __init__(self, net: TokenLabelHeads, loss: TokenLabelLoss, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module: nn.Module = net.to(device)
        self.criterion = loss.to(device)
        self.compiled = False

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Run the network through torch.compile; arguments as there."""
        compiled: Any = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        self.trainable_module, self.compiled = compiled, True
        return self.trainable_module

    def prepare_distributed(self, device_ids: list[int] | None = None, **kwargs: Any) -> TokenLabelTask:
        """Wrap the network in DistributedDataParallel; arguments as there."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **kwargs)
        return self

    @property
    def network(self) -> TokenLabelHeads:
        """The network itself, without the wrappers of torch.compile and DistributedDataParallel."""
        return unwrap_model(self.trainable_module)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns "loss", a scalar, and "output", what the network returned for the batch."""
        mix: Any = batch.token_mix
        if mix is not None and self.compiled:  # as a mask: a box would be recompiled for each size
            mix = mix.mask(self.network.grid).view(self.network.grid).to(batch.images.device)
        output = self.trainable_module(batch.images, mix=mix)
        return {"loss": self.criterion(output, batch), "output": output}


@dataclass(frozen=True)
class StepResult:
    """Result of a training step.

    Attributes:
        loss: mean over the images of all ranks.
        norm: norm of the gradients before clipping.
        done: False: the step was skipped.
        stop: some rank was asked to stop.
    """

    loss: float
    norm: float
    done: bool
    stop: bool


class TrainingStep:
    """Accumulates a batch's gradient over micro-batches, clips it, and updates the weights and their moving average.

    A step whose loss or gradient is not finite changes nothing: the update is skipped and BatchNorm's statistics are
    restored.

    Args:
        task: network and criterion.
        optimizer: its optimizer.
        ranks: the ranks that train together.
        seed: of the random numbers within the step.
        micro_batch: images at a time; None: the whole batch.
        clip_grad: largest norm of the gradient; None: no clipping.
        precision: of the forward pass.
        channels_last: use channels-last memory format.
    """

    def __init__(
        self,
        task: TokenLabelTask,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        seed: int = 0,
        micro_batch: int | None = None,
        clip_grad: float | None = None,
        precision: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.task, self.optimizer, self.ranks = task, optimizer, ranks
        self.seed, self.micro_batch, self.clip_grad = seed, micro_batch, clip_grad
        self.precision, self.channels_last = precision, channels_last
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == torch.float16)

    def run(self, batch: Batch, step: int, stop: Callable[[], bool] = lambda: False) -> StepResult:
        """Do one step.

        Args:
            batch: this rank's part of the batch.
            step: number of steps before this one.
            stop: whether this rank was asked to stop; called after the backward pass.

        Returns:
            Loss, gradient norm, and whether the step was done or a rank wants to stop.

        Raises:
            TrainError: the GPU is out of memory.
        """
        self._seed(step)
        buffers = [buffer.clone() for buffer in self.task.network.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        loss = None
        with suppress(torch.OutOfMemoryError):
            loss = self._accumulate(batch)
        if loss is None:  # only here, after the error is gone: its traceback holds the activations
            raise self._out_of_memory(batch)
        values = torch.stack([loss.double(), loss.new_tensor(float(stop()), dtype=torch.float64)])
        mean, stops = self.ranks.sum(values).tolist()
        mean /= self.ranks.world_size
        self.scaler.unscale_(self.optimizer)
        largest = math.inf if self.clip_grad is None else self.clip_grad
        norm = float(nn.utils.clip_grad_norm_(self.task.network.parameters(), largest))
        done = math.isfinite(mean) and math.isfinite(norm)
        if done:
            self.scaler.step(self.optimizer)
            self.task.update_ema(step + 1)
        else:
            with torch.no_grad():
                for buffer, before in zip(self.task.network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        self._update_scale(done)
        # A float16 gradient that overflowed needs a smaller scale; the loss is fine.
        scaled = not done and math.isfinite(mean) and self._can_scale_down()
        return StepResult(mean, norm, done or scaled, stops > 0)

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Accumulate the gradients of the whole batch. Returns its loss."""
        parts = micro_batches(batch, self.micro_batch)
        total = torch.zeros((), device=self.ranks.device)
        for part, context in zip(parts, self._contexts(len(parts)), strict=True):
            with context:
                total += self._backward(part, len(part) / len(batch))
        return total

    def _backward(self, part: Batch, share: float) -> torch.Tensor:
        """Add a part's gradient. Returns its share of the loss."""
        with torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.task(self._laid_out(part))["loss"] * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _out_of_memory(self, batch: Batch) -> TrainError:
        """An error that says how many images fit, found by halving their number until a pass succeeds."""
        self.task.trainable_module = self.task.network  # no communication: the other ranks wait elsewhere
        tried = size = min(self.micro_batch or len(batch), len(batch))
        while size > 2:
            size = max(2, size // 4 * 2)  # even: mixed pairs stay together
            try:
                self.optimizer.zero_grad(set_to_none=True)
                with self.task.no_sync():
                    self._backward(micro_batches(batch, size)[0], 1.0)
            except torch.OutOfMemoryError:
                continue
            remedy = f"run.micro_batch={size} fits, with the same gradient; run.grad_checkpointing=true may fit too."
            return TrainError("the GPU is out of memory", got=f"{tried} images at a time", remedy=remedy)
        remedy = "Not even two images fit: use a smaller model, or run.grad_checkpointing=true."
        return TrainError("the GPU is out of memory", got=f"{tried} images at a time", remedy=remedy)

    def _contexts(self, count: int) -> Iterator[AbstractContextManager]:
        """For each micro-batch, a context in which only the last one exchanges gradients between ranks."""
        for i in range(count):
            yield self.task.no_sync() if i < count - 1 else nullcontext()

    def _laid_out(self, batch: Batch) -> Batch:
        if not self.channels_last:
            return batch
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def _seed(self, step: int) -> None:
        """Drop path depends only on seed, step and rank, so that no generator state has to be saved."""
        words = np.random.SeedSequence([DROP_STREAM, self.seed, step, self.ranks.rank]).generate_state(2, np.uint32)
        torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    def _update_scale(self, done: bool) -> None:
        if self.scaler.is_enabled():
            if not done:
                self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
            else:
                self.scaler.update()

    def _can_scale_down(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
