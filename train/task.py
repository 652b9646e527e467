"""One training step: forward pass, loss, backward pass and weight update.

Legend: B images; C classes; T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
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
from train.step.late_update import LateUpdate, unmoved
from train.step.rollback import ChangingBuffers
from train.step.step_result import StepResult

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
            mix = mix.mask(self.network.grid, batch.images.device).view(self.network.grid)
        output = self.trainable_module(batch.images, mix=mix)
        return {"loss": self.criterion(output, batch), "output": output}


class TrainingStep:
    """Accumulates a batch's gradient over micro-batches, clips it, and updates the weights and their moving average.

    A step whose loss or gradient is not finite changes nothing: neither weights, optimizer, moving average nor the
    statistics of BatchNorm.

    On a GPU the host never waits for the device: whether a step was finite is decided there, and known here once
    somebody reads the step's result, which `fit` does a step later. Elsewhere, for float16, and for optimizers that
    count their steps on the host, the host decides.

    Args:
        task: network and criterion.
        optimizer: its optimizer. A state must be loaded before the first step.
        ranks: the ranks that train together.
        seed: of the random numbers within the step.
        micro_batch: images at a time; None: the whole batch.
        clip_grad: largest norm of the gradient; None: no clipping.
        precision: of the forward pass.
        channels_last: use channels-last memory format.
        late: decide on the device; None: on a GPU.

    Attributes:
        late: whether results should be read a step later.
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
        late: bool | None = None,
    ) -> None:
        self.task, self.optimizer, self.ranks = task, optimizer, ranks
        self.seed, self.micro_batch, self.clip_grad = seed, micro_batch, clip_grad
        self.precision, self.channels_last = precision, channels_last
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == torch.float16)
        self.late = ranks.device.type == "cuda" if late is None else late
        self.late = self.late and not self.scaler.is_enabled()
        self._buffers: ChangingBuffers | None = None
        self._late_update: LateUpdate | None = None

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
        self._buffers = buffers = self._buffers or ChangingBuffers(self.task.network)
        buffers.save()
        self.optimizer.zero_grad(set_to_none=True)
        loss = None
        with suppress(torch.OutOfMemoryError):
            loss = self._accumulate(batch)
        if loss is None:  # only here, after the error is gone: its traceback holds the activations
            raise self._out_of_memory(batch)
        buffers.note_changes()
        asked = loss.new_full((), float(stop()), dtype=torch.float64)
        totals = self.ranks.sum(torch.stack([loss.double(), asked]))
        self.scaler.unscale_(self.optimizer)
        values = torch.cat([totals, self._clipped_norm().double().view(1)])
        if self._late_update is not None and self._late_update.fits():
            self._decide_on_device(values, step, buffers)
            return StepResult(values, self.ranks.world_size)
        return self._decide_here(values, step, buffers)

    def _clipped_norm(self) -> torch.Tensor:
        """Clip the gradients. Returns their norm before, without waiting for it."""
        parameters = [p for p in self.task.network.parameters() if p.grad is not None]
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _decide_here(self, values: torch.Tensor, step: int, buffers: ChangingBuffers) -> StepResult:
        """Update the weights if the step is finite, else put the buffers back; waits for the device."""
        loss, _, norm = values.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            before = unmoved(self.optimizer) if self.late else None
            self.scaler.step(self.optimizer)
            self.task.update_ema(step + 1)
            if before is not None:
                self._late_update = LateUpdate.of(self.optimizer, before, self._averages())
                # The first step makes the state. If it changes the groups, the host counts the steps.
                self.late = self._late_update is not None or (not before[1] and unmoved(self.optimizer)[0] == before[0])
        else:
            buffers.put_back()
        self._update_scale(finite)
        # A float16 gradient that overflowed needs a smaller scale; the loss is fine.
        scaled = not finite and math.isfinite(loss) and self._can_scale_down()
        return StepResult(values, self.ranks.world_size, scaled)

    def _decide_on_device(self, values: torch.Tensor, step: int, buffers: ChangingBuffers) -> None:
        """The same without waiting: update everything, and put all of it back if the step is not finite."""
        assert self._late_update is not None
        bad = ~values.isfinite().all()
        self._late_update.run(bad, lambda: self.task.update_ema(step + 1))
        buffers.put_back_if(bad)

    def _averages(self) -> list[torch.Tensor]:
        """Tensors that the moving average changes."""
        return list(self.task.trainable_module_ema.module.state_dict().values()) if self.task.has_ema() else []

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
            remedy = (
                f"run.micro_batch={size} fits, with the same gradient; run.grad_checkpointing=true may fit too, and so "
                "may the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True."
            )
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
