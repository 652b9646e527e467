"""Faults of a training run that need hardware which is simulated here."""

from __future__ import annotations

import weakref

import pytest
import torch
from faults import tally
from tiny_runs import tiny_config

from train import fit
from train.errors import TrainError
from train.task import TokenLabelTask


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int, after: int = 0) -> None:
    """From the forward pass after `after` others on, a device that holds `images` images at a time."""
    forward, calls = TokenLabelTask.forward, iter(range(1 << 30))

    def limited(task: TokenLabelTask, batch: object) -> dict[str, torch.Tensor]:
        if next(calls) >= after and len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(task, batch)

    monkeypatch.setattr(TokenLabelTask, "forward", limited)


@pytest.mark.fault(36)
def test_out_of_memory_names_the_micro_batch_that_fits_and_keeps_the_checkpoint(images, store, tmp_path, monkeypatch):
    config = tiny_config(images, store, tmp_path / "run", **{"run.batch_size": 12, "run.save_every": 1})
    limit_memory(monkeypatch, images=2, after=1)
    with pytest.raises(TrainError, match=r"out of memory: got 12 images at a time.*run.micro_batch=2 fits") as told:
        fit(config)
    assert told.value.exit_status == 1
    tally(36, injected=1)
    run = config.run.model_copy(update={"micro_batch": 2})
    summary = fit(config.model_copy(update={"run": run}), resume="auto")
    assert summary.steps > 1


@pytest.mark.fault(36)
def test_what_the_failed_pass_held_is_free_before_smaller_ones_are_tried(images, store, tmp_path, monkeypatch):
    """Or they would fail for its activations, and be called too large themselves."""
    forward, held = TokenLabelTask.forward, []

    def limited(task: TokenLabelTask, batch: object) -> dict[str, torch.Tensor]:
        if any(activations() is not None for activations in held):
            raise torch.OutOfMemoryError("the failed pass has it all")
        output = forward(task, batch)
        if len(batch) > 6:
            held.append(weakref.ref(output["loss"]))
            raise torch.OutOfMemoryError
        return output

    monkeypatch.setattr(TokenLabelTask, "forward", limited)
    with pytest.raises(TrainError, match=r"run\.micro_batch=6 fits"):
        fit(tiny_config(images, store, tmp_path / "run", **{"run.batch_size": 12}))
    assert held
    tally(36, injected=1)


@pytest.mark.fault(36)
@pytest.mark.parametrize("tried", [[12, 6, 2], [10, 4, 2]])  # halved, and even: mixed pairs stay together
def test_out_of_memory_says_so_when_nothing_fits(images, store, tmp_path, monkeypatch, tried):
    sizes = []
    limit_memory(monkeypatch, images=1)
    limited = TokenLabelTask.forward
    monkeypatch.setattr(TokenLabelTask, "forward", lambda task, batch: (sizes.append(len(batch)), limited(task, batch)))
    with pytest.raises(TrainError, match="Not even two images fit"):
        fit(tiny_config(images, store, tmp_path / "run", **{"run.batch_size": tried[0]}))
    assert sizes == tried
    tally(36, injected=1)
