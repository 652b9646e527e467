"""A training step that the device decides on: the same to the last bit, and without waiting for the device."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import FULL, digests, outcome, tiny_config, tiny_data, write_recipe
from torch._subclasses import FakeTensorMode
from unreadable import META, Unreadable, without_autocast

import model  # noqa: F401  registers the names
from pipeline.batch import Batch
from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
from train import fit
from train.errors import NonFiniteError, Stopped
from train.loss.token_label_loss import TokenLabelLoss
from train.optimization import build_optimizer, load_optimizer_state
from train.ranks.distributed import Ranks
from train.ranks.launch import free_port
from train.recipes.config import OptimizerConfig
from train.recipes.recipe import load_recipe
from train.step.late_update import LateUpdate, skips_by_itself, unmoved
from train.step.rollback import ChangingBuffers, Rollback
from train.task import TokenLabelTask, TrainingStep

CPU = torch.device("cpu")
NAN = float("nan")
BUILT = {name: lambda net, name=name: build_optimizer(net, OptimizerConfig(name=name, lr=0.01)) for name in (
    "radamw", "adamw", "sgd", "lion", "nadamw", "lamb", "lookahead_adamw",
)}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    **BUILT,
    "plain sgd": lambda net: torch.optim.SGD(net.parameters(), 0.1),
    "fused adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01, fused=True),
    "fused sgd": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True),
}
ON_THE_HOST = {"lamb", "lookahead_adamw"}  # they count their steps there


@pytest.fixture(scope="module")
def batch() -> Batch:
    return synthetic_batch(4, 32, 8)


def training_step(optimizer: str = "radamw", **settings: Any) -> TrainingStep:
    torch.manual_seed(0)
    net = timm.create_model("demansia_nano", img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=1000).train()
    task = TokenLabelTask(net, TokenLabelLoss(), CPU)  # type: ignore[arg-type]
    task.setup_ema(0.9)
    return TrainingStep(task, OPTIMIZERS[optimizer](net), Ranks(0, 1, CPU), **settings)


def everything(step: TrainingStep) -> Any:
    """Digests of all that a step changes."""
    task = step.task
    return digests([task.network.state_dict(), step._averages(), step.optimizer.state_dict()])


def poisoned(batch: Batch) -> Batch:
    return replace(batch, images=torch.full_like(batch.images, NAN))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_decided_on_the_device_equal_those_of_the_host_to_the_last_bit(batch, optimizer):
    late, here = (training_step(optimizer, late=late, clip_grad=1.0) for late in (True, False))
    kinds = ["good", "good", "good", "bad", "good", "bad", "bad", "good"]
    for number, kind in enumerate(kinds):
        data = batch if kind == "good" else poisoned(batch)
        before = everything(late)
        results = [step.run(data, number) for step in (late, here)]
        assert [result.done for result in results] == [kind == "good"] * 2
        assert everything(late) == everything(here), (number, kind)
        assert (everything(late) == before) == (kind == "bad")
        if kind == "good":
            assert (results[0].loss, results[0].norm) == (results[1].loss, results[1].norm)
    assert late.late == (optimizer not in ON_THE_HOST)
    assert (late._late_update is not None) == late.late
    assert here._late_update is None
    assert skips_by_itself(late.optimizer) == optimizer.startswith("fused")


def test_a_bad_first_step_leaves_no_trace_either(batch):
    step = training_step(late=True)
    before = everything(step)
    assert not step.run(poisoned(batch), 0).done
    assert everything(step) == before
    for number in range(1, 4):
        assert step.run(batch, number).done
    assert step._late_update is not None


def test_a_parameter_that_gets_its_first_gradient_later_is_taken_back_too(batch):
    step = training_step(late=True)
    head = step.task.network.head.weight
    head.requires_grad_(False)
    for number in range(3):
        step.run(batch, number)
    assert step._late_update is not None
    head.requires_grad_(True)
    assert not step._late_update.fits() or head.grad is None
    for number, data in enumerate([batch, poisoned(batch), batch, batch, poisoned(batch)]):
        before = everything(step)
        step.run(data, 3 + number)
        assert (everything(step) == before) == (data is not batch)


def test_only_buffers_that_a_pass_changes_are_copied(batch):
    step = training_step()
    step.task.network.register_buffer("table", torch.zeros(1000), persistent=False)
    for number in range(2):
        step.run(batch, number)
    assert step._buffers is not None
    kept = {id(one) for one in step._buffers._kept.tensors}
    names = {name for name, one in step.task.network.named_buffers() if id(one) in kept}
    changing = {name for name, _ in step.task.network.named_buffers() if "running" in name or "num_batches" in name}
    assert names == changing != set()


def test_buffers_of_other_modules_that_the_first_step_changes_are_put_back_too():
    net = torch.nn.Module()
    net.register_buffer("count", torch.zeros(2))
    net.register_buffer("table", torch.zeros(2))
    buffers = ChangingBuffers(net)
    for _ in range(3):
        buffers.save()
        net.count += 1
        buffers.note_changes()
    buffers.put_back()
    assert net.count.tolist() == [2, 2]
    assert [id(one) for one in buffers._kept.tensors] == [id(net.count)]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_rollback_keeps_every_bit_of_every_type(wanted):
    generator = torch.Generator().manual_seed(0)
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = [(10 * torch.randn(3, 5, generator=generator)).to(dtype) for dtype in types]
    tensors.append(torch.randn(2, 8, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last))
    tensors.append(torch.tensor(-0.0))
    old = copy.deepcopy(tensors)
    rollback = Rollback(tensors)
    rollback.save()
    for tensor in tensors:
        tensor.fill_(NAN if tensor.is_floating_point() else 1)
    new = copy.deepcopy(tensors)
    rollback.put_back_if(torch.tensor(wanted))
    assert digests(tensors) == digests(old if wanted else new)


def on_meta(step: TrainingStep, batch: Batch) -> tuple[TrainingStep, Batch]:
    """The same step with its tensors on the meta device, after a first one here."""
    step.run(batch, 0)
    assert step._buffers is not None
    changing = step._buffers._wanted
    net = step.task.network.to("meta")
    step.task.trainable_module_ema.module.to("meta")
    step.optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.ranks = Ranks(0, 1, META)
    step._buffers = ChangingBuffers(net)
    step._buffers._wanted, step._buffers._first = changing, False
    step._late_update = LateUpdate(step.optimizer, step._averages())
    return step, batch.to("meta")


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("settings", [{}, {"clip_grad": 1.0, "channels_last": True}])
def test_a_step_never_waits_for_the_device(batch, micro_batch, settings, monkeypatch):
    """Forward and backward pass, loss, clipping, update, average, and what takes them back."""
    step, data = on_meta(training_step("sgd", late=True, micro_batch=micro_batch, **settings), batch)
    step.task.criterion.in_place = True
    without_autocast(monkeypatch)
    with Unreadable():
        for number in range(3):
            result = step.run(data, number)
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = result.loss  # nothing but this reads anything


def test_a_step_that_reads_the_device_is_noticed(batch, monkeypatch):
    step, data = on_meta(training_step("sgd", late=True), batch)
    without_autocast(monkeypatch)
    step._late_update = None  # so that the host decides
    with Unreadable(), pytest.raises((RuntimeError, NotImplementedError)):
        step.run(data, 0)
    loaded = batch.images
    with Unreadable(), pytest.raises(AssertionError, match="waits for a copy"):
        loaded.to("meta")
    with Unreadable(), pytest.raises(AssertionError, match="waits for the device"):
        (data.images > 0).nonzero()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of `fit` as on a GPU: decided on the device, and read one step later."""
    monkeypatch.setattr("train.run_parts.TrainingStep", partial(TrainingStep, late=True))


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of steps, from 0, whose images are NaN; to be filled in."""
    run, bad = TrainingStep.run, set[int]()

    def spoiled(self: TrainingStep, batch: Batch, step: int, *rest: Any) -> Any:
        return run(self, poisoned(batch) if step in bad else batch, step, *rest)

    monkeypatch.setattr(TrainingStep, "run", spoiled)
    return bad


def test_a_run_that_reads_late_leaves_the_files_of_one_that_does_not(data, tmp_path, monkeypatch, bad_steps):
    bad_steps |= {2, 4, 5}
    settings = {**FULL, "data.validation": str(data[0]), "run.skip_non_finite": 2, "run.save_every": 4}
    found = {}
    for name, late in (("here", False), ("late", True)):
        monkeypatch.setattr("train.run_parts.TrainingStep", partial(TrainingStep, late=late))
        summary = fit(tiny_config(*data, tmp_path / name, **settings))
        assert summary.skipped == 3
        found[name] = outcome(tmp_path / name)
    assert found["here"] == found["late"]


def test_too_many_bad_steps_in_a_row_end_a_late_run_and_the_checkpoint_has_no_trace(data, tmp_path, late, bad_steps):
    bad_steps |= {3, 4, 6, 7, 8}
    settings = {"run.skip_non_finite": 2, "schedule.steps": 12, "run.save_every": 3}
    with pytest.raises(NonFiniteError, match="not finite at step 9"):
        fit(tiny_config(*data, tmp_path / "run", **settings))
    last = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert last.name == "step-00000006"


def test_a_late_run_ends_one_step_after_a_signal_and_resumes_bit_for_bit(data, tmp_path, late, monkeypatch):
    settings = {**FULL, "run.save_every": 9}
    fit(tiny_config(*data, tmp_path / "whole", **settings))
    run = TrainingStep.run

    def asked(self: TrainingStep, batch: Batch, step: int, stop: Callable[[], bool]) -> Any:
        return run(self, batch, step, lambda: step == 3 or stop())

    config = tiny_config(*data, tmp_path / "stopped", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run", asked)
        with pytest.raises(Stopped, match="stopped after step 5"):  # asked in step 4, while 5 is on its way
            fit(config)
    fit(config, resume="auto")
    whole, stopped = (outcome(tmp_path / name) for name in ("whole", "stopped"))
    assert whole["last"] == stopped["last"]
    assert whole["rows"] == stopped["rows"]


@pytest.mark.parametrize(("name", "how"), [("adamw", "fused"), ("sgd", "fused"), ("radamw", "capturable"),
                                           ("nadamw", "capturable"), ("lion", None)])  # fmt: skip
def test_on_a_gpu_optimizers_are_fused_or_count_their_steps_there(name, how):
    """With tensors that only say that they are on a GPU, and raise an error where one is read."""
    with FakeTensorMode():
        net = torch.nn.Linear(3, 4, device="cuda")
        optimizer = build_optimizer(net, OptimizerConfig(name=name, lr=0.1))
        assert [key for key in ("fused", "capturable") if optimizer.param_groups[0].get(key)] == ([how] if how else [])
        for _ in range(0 if name == "sgd" else 3):  # torch cannot pretend to do fused steps of SGD
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        assert {value.device.type for value in state} == (set() if name == "sgd" else {"cuda"})
        assert LateUpdate.of(optimizer, unmoved(optimizer), []) is not None


def test_a_state_is_loaded_for_the_own_way_to_step(batch):
    """A checkpoint of a fused optimizer goes on with one that is not, as on another device, and the other way."""
    settings = {"fused": {"fused": True}, "plain": {}}
    for first, then in (("fused", "plain"), ("plain", "fused")):
        states = []
        for how in (first, then):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.ones(3))
            optimizer = torch.optim.AdamW([weight], 0.1, **settings[how])
            weight.grad = torch.ones(3)
            optimizer.step()
            states.append((optimizer, weight))
        (saved, _), (optimizer, weight) = states
        load_optimizer_state(optimizer, copy.deepcopy(saved.state_dict()))
        assert optimizer.param_groups[0]["fused"] == settings[then].get("fused")
        optimizer.step()
        assert math.isclose(float(weight[0].detach()), 0.799, abs_tol=2e-3)
        assert float(optimizer.state[weight]["step"]) == 2


def late_runs_of_a_rank(recipes: list[str], ports: list[str]) -> list[str]:
    """What a rank of each run ended with; the host decides the first, and rank 1 asks to stop the last.

    To be called in a process of its own.
    """
    from unittest.mock import patch

    run, ended = TrainingStep.run, []

    def asked(self: TrainingStep, batch: Batch, step: int, stop: Callable[[], bool]) -> Any:
        return run(self, batch, step, lambda: (self.ranks.rank == 1 and step == 3) or stop())

    for number, (recipe, port) in enumerate(zip(recipes, ports, strict=True)):
        os.environ["MASTER_PORT"] = port
        made = partial(TrainingStep, late=number > 0)
        step = asked if number == 2 else run
        with patch("train.run_parts.TrainingStep", made), patch.object(TrainingStep, "run", step):
            try:
                fit(load_recipe(recipe))
                ended.append("done")
            except Stopped as error:
                ended.append(error.problem)
    return ended


def test_two_ranks_decide_alike_and_stop_together_where_one_is_asked(tmp_path):
    """Over gloo, with DDP's static graph: the same files as where the host decides."""
    data = tiny_data(tmp_path / "data", 24)
    names, recipes, ports = ("here", "late", "stopped"), [], []
    for name in names:
        settings = {**FULL, "run.batch_size": 8, "run.save_every": 9}
        recipes.append(str(write_recipe(tiny_config(*data, tmp_path / name, **settings), tmp_path / f"{name}.toml")))
        ports.append(str(free_port()))
    here = Path(__file__).parent
    code = f"import test_train_step as t; print('ended', t.late_runs_of_a_rank({recipes!r}, {ports!r}))"
    path = os.pathsep.join([str(here), str(here.parent)])
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **settings, "RANK": str(rank)},
                         stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=170)[0].splitlines()[-1] for process in ranks]
    assert ended == ["ended ['done', 'done', 'stopped after step 5']"] * 2
    assert outcome(tmp_path / "here") == outcome(tmp_path / "late")
    assert (tmp_path / "stopped/checkpoints/step-00000005").is_dir()
