"""One step of training: a batch through network and loss, its gradient, and the weights' update.

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

DROP_STREAM = 3  # of random numbers; `pipeline.order` and `pipeline.augment.draws` use others
SMALLEST_SCALE = 1.0  # of float16 losses; needing less means that the gradients themselves are infinite


class TokenLabelTask(TrainingTask):
    """timm's task for a network with a token head: `task(batch)` gives its loss and outputs."""

    def __init__(self, net: TokenLabelHeads, loss: TokenLabelLoss, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module: nn.Module = net.to(device)
        self.criterion = loss.to(device)
        self.compiled = False

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        compiled: Any = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        self.trainable_module, self.compiled = compiled, True
        return self.trainable_module

    def prepare_distributed(self, device_ids: list[int] | None = None, **kwargs: Any) -> TokenLabelTask:
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **kwargs)
        return self

    @property
    def network(self) -> TokenLabelHeads:
        """The network itself, without what compiles or distributes it."""
        return unwrap_model(self.trainable_module)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        mix: Any = batch.token_mix
        if mix is not None and self.compiled:  # a mask: the sides of each box would be compiled anew
            mix = mix.mask(self.network.grid).view(self.network.grid).to(batch.images.device)
        output = self.trainable_module(batch.images, mix=mix)
        return {"loss": self.criterion(output, batch), "output": output}


@dataclass(frozen=True)
class StepResult:
    """loss: mean over all ranks' images; norm of the gradients before clipping; done: False where it was left out."""

    loss: float
    norm: float
    done: bool
    stop: bool  # some rank was asked to stop


class TrainingStep:
    """Accumulates a batch's gradient over micro-batches, clips it, and updates weights and their average.

    A step whose loss or gradient is not finite changes nothing: the update is left out and statistics are put back.
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
        """The step after `step` others. `stop` is asked when its gradients are there."""
        self._seed(step)
        buffers = [buffer.clone() for buffer in self.task.network.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        loss = None
        with suppress(torch.OutOfMemoryError):
            loss = self._accumulate(batch)
        if loss is None:  # not before the error is gone: its traceback holds the pass's activations
            raise self._out_of_memory(batch)
        told = torch.stack([loss.double(), loss.new_tensor(float(stop()), dtype=torch.float64)])
        mean, stops = self.ranks.sum(told).tolist()
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
        # A float16 gradient that overflowed is mended by a smaller scale, and no fault of the loss.
        scaled = not done and math.isfinite(mean) and self._can_scale_down()
        return StepResult(mean, norm, done or scaled, stops > 0)

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Gradients of the whole batch; its loss."""
        parts = micro_batches(batch, self.micro_batch)
        total = torch.zeros((), device=self.ranks.device)
        for part, context in zip(parts, self._contexts(len(parts)), strict=True):
            with context:
                total += self._backward(part, len(part) / len(batch))
        return total

    def _backward(self, part: Batch, share: float) -> torch.Tensor:
        """Adds a part's gradient; its share of the loss."""
        with torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.task(self._laid_out(part))["loss"] * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _out_of_memory(self, batch: Batch) -> TrainError:
        """Says how many images at a time would fit: half as many, again and again, until a pass goes through."""
        self.task.trainable_module = self.task.network  # other ranks wait elsewhere: nothing must be exchanged
        tried = size = min(self.micro_batch or len(batch), len(batch))
        while size > 2:
            size = max(2, size // 4 * 2)  # even: mixed pairs stay together
            try:
                self.optimizer.zero_grad(set_to_none=True)
                with self.task.no_sync():
                    self._backward(micro_batches(batch, size)[0], 1.0)
            except torch.OutOfMemoryError:
                continue
            remedy = f"run.micro_batch={size} fits, and gives the same gradient; so may run.grad_checkpointing=true."
            return TrainError("the GPU is out of memory", got=f"{tried} images at a time", remedy=remedy)
        remedy = "Not even two images fit: use a smaller model, or run.grad_checkpointing=true."
        return TrainError("the GPU is out of memory", got=f"{tried} images at a time", remedy=remedy)

    def _contexts(self, count: int) -> Iterator[AbstractContextManager]:
        """Ranks exchange gradients once, with the last micro-batch."""
        for i in range(count):
            yield self.task.no_sync() if i < count - 1 else nullcontext()

    def _laid_out(self, batch: Batch) -> Batch:
        if not self.channels_last:
            return batch
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def _seed(self, step: int) -> None:
        """Dropped paths depend on seed, step and rank alone, so that no generator's state needs keeping."""
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
