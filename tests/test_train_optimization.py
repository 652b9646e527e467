"""Optimizer, schedule and moving average equal their formulas, written out here; weight decay goes where it should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from labeler import InputError
from model.token_heads import TokenLabelHeads
from train.network import build_network
from train.optimization import LearningRate, build_optimizer, total_steps
from train.ranks.distributed import Ranks
from train.recipes.config import EmaConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from train.task import TokenLabelTask, TrainingStep

MODEL = ModelConfig(
    name="demansia_nano", img_size=32, num_classes=6, args={"patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4}
)
STEPS = 50
# Both sides compute in float64; what differs is the order of a few operations per step, a rounding of 1e-16 each.
TIGHT = 1e-12


class Point(nn.Module):
    """A matrix, a vector and a statistic, whose gradients a quadratic gives; no forward pass of a network is needed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.register_buffer("statistic", torch.zeros(2, dtype=torch.float64))

    def loss(self, step: int) -> torch.Tensor:
        return ((self.matrix - step % 7) ** 2).sum() + ((self.vector * math.cos(step)) ** 2).sum()


def adamw(state: dict, value: torch.Tensor, grad: torch.Tensor, t: int, lr: float, decay: float) -> torch.Tensor:
    """Loshchilov & Hutter (2019), algorithm 2, with decay scaled by the learning rate. t counts from 1."""
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return value - lr * decay * value - lr * update


def radamw(state: dict, value: torch.Tensor, grad: torch.Tensor, t: int, lr: float, decay: float) -> torch.Tensor:
    """Liu et al. (2020), algorithm 2, with decoupled decay; eps stands at sqrt(v), as in torch."""
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    longest = 2 / (1 - 0.999) - 1
    length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
    update = m / (1 - 0.9**t)
    if length > 5:
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        update = math.sqrt(rectified) * update * math.sqrt(1 - 0.999**t) / (v.sqrt() + 1e-8)
    return value - lr * decay * value - lr * update


def cosine(share: float, lr: float, lowest: float) -> float:
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * share)) / 2


def rates(config: ScheduleConfig, lr: float, epoch_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    schedule = LearningRate(optimizer, config, epoch_steps)
    found = []
    for step in range(total_steps(config, epoch_steps)):
        told = schedule.set(step)
        assert optimizer.param_groups[0]["lr"] == told
        found.append(told)
    return found


@pytest.mark.parametrize(("name", "formula"), [("adamw", adamw), ("radamw", radamw)])
def test_fifty_steps_of_optimizer_schedule_and_average_equal_their_formulas(name, formula):
    """Warm-up, cosine and cooldown at once; weight decay on the matrix alone; the average from the second step on."""
    net: Any = Point()
    optimizer = build_optimizer(net, OptimizerConfig(name=name, lr=0.1, weight_decay=0.3))
    schedule = ScheduleConfig(epochs=4, cooldown_epochs=1, warmup_epochs=0.8, warmup_lr=1e-3, min_lr=0.01)
    rate = LearningRate(optimizer, schedule, epoch_steps=10)
    task = TokenLabelTask(net, nn.Module(), torch.device("cpu"))  # type: ignore[arg-type]
    task.setup_ema(0.9)
    values = {key: value.detach().clone() for key, value in net.named_parameters()}
    states: dict[str, dict] = {key: {} for key in values}
    averages: dict[str, torch.Tensor] = {}
    assert total_steps(schedule, 10) == STEPS
    for step in range(STEPS):
        rate.set(step)
        optimizer.zero_grad()
        net.loss(step).backward()
        grads = {key: value.grad.clone() for key, value in net.named_parameters()}
        optimizer.step()
        net.statistic += step
        task.update_ema(step + 1)
        lr = 1e-3 + step * (0.1 - 1e-3) / 8 if step < 8 else cosine(step / 40, 0.1, 0.01) if step < 40 else 0.01
        for key in values:
            values[key] = formula(states[key], values[key], grads[key], step + 1, lr, 0.3 if key == "matrix" else 0)
            torch.testing.assert_close(net.get_parameter(key).detach(), values[key], rtol=TIGHT, atol=TIGHT)
        for key, value in {**values, "statistic": net.statistic}.items():
            averages[key] = value.clone() if step == 0 else 0.9 * averages[key] + 0.1 * value
    for key, value in task.trainable_module_ema.module.state_dict().items():
        torch.testing.assert_close(value, averages[key], rtol=TIGHT, atol=TIGHT)
        assert not torch.equal(value, net.state_dict()[key])


def test_an_average_that_warms_up_begins_with_a_smaller_decay():
    net: Any = Point()
    task = TokenLabelTask(net, nn.Module(), torch.device("cpu"))  # type: ignore[arg-type]
    task.setup_ema(0.9999, EmaConfig(decay=0.9999, warmup=True).warmup)
    expected = net.matrix.detach().clone()
    for step in range(STEPS):
        with torch.no_grad():
            net.matrix += 1
        task.update_ema(step + 1)
        decay = min(0.9999, 1 - (1 + step) ** (-2 / 3))  # timm's: 0 in the first step
        expected = decay * expected + (1 - decay) * net.matrix.detach()
    torch.testing.assert_close(task.trainable_module_ema.module.matrix.detach(), expected, rtol=TIGHT, atol=TIGHT)


def test_restarts_begin_at_the_top_in_cycles_twice_as_long():
    config = ScheduleConfig(kind="restarts", epochs=31, cooldown_epochs=2, first_cycle=1, cycle_factor=2, min_lr=1e-3)
    found = rates(config, 1.0, epoch_steps=7)
    expected = [cosine(i / length, 1.0, 1e-3) for length in (7, 14, 28, 56, 112) for i in range(length)]
    assert found == pytest.approx([*expected, *[1e-3] * 14], rel=1e-12)
    assert [i for i, lr in enumerate(found) if lr == 1.0] == [0, 7, 21, 49, 105]


def test_the_schedule_of_the_paper_is_five_whole_cycles():
    from train.recipes.recipe import load_recipe

    found = rates(load_recipe("demansia_tiny").schedule, 1e-3, epoch_steps=4)
    assert [i / 4 for i, lr in enumerate(found) if lr == pytest.approx(1e-3, rel=1e-9)] == [0, 10, 30, 70, 150]
    assert len(found) == 310 * 4
    assert found[-1] < 1e-6 + 1e-3 * (math.pi / 640 / 2) ** 2  # a quarter of an epoch before the end of the last one


def test_a_constant_rate_stays_after_its_warm_up():
    config = ScheduleConfig(kind="constant", epochs=3, warmup_epochs=0.5, warmup_lr=0.2, min_lr=5.0)
    assert rates(config, 1.0, epoch_steps=8) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 20], rel=1e-12)


def test_steps_take_the_place_of_epochs():
    config = ScheduleConfig(steps=30, cooldown_epochs=1, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.1)
    found = rates(config, 1.0, epoch_steps=10)
    expected = [i / 5 for i in range(5)] + [cosine(i / 20, 1.0, 0.1) for i in range(5, 20)] + [0.1] * 10
    assert found == pytest.approx(expected, rel=1e-12)


def test_steps_that_warm_up_and_cooldown_use_up_are_refused():
    for fields in ({"warmup_epochs": 3}, {"cooldown_epochs": 3}, {"warmup_epochs": 1.5, "cooldown_epochs": 1.5}):
        with pytest.raises(InputError, match=r"too small .*got 30 steps, 10 per epoch, expected more than 30"):
            rates(ScheduleConfig(steps=30, **fields), 1.0, epoch_steps=10)
    assert len(rates(ScheduleConfig(steps=31, warmup_epochs=3), 1.0, epoch_steps=10)) == 31


def decays(net: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = build_optimizer(net, config).param_groups
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


@pytest.fixture(scope="module")
def net() -> TokenLabelHeads:
    return build_network(MODEL)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_weight_decay_is_on_matrices_alone_and_on_everything_with_decay_all(net, layer_decay):
    mixer = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "conv1d", "conv1d_b", "out_proj")
    decayed = {f"layers.{i}.mixer.{name}.weight" for i in range(2) for name in mixer}
    decayed |= {f"patch_embed.{name}.weight" for name in ("conv1", "conv2", "conv3", "proj")}
    decayed |= {"head.weight", "aux_head.weight"}
    found = decays(net, OptimizerConfig(weight_decay=0.05, layer_decay=layer_decay))
    assert found == {name: 0.05 if name in decayed else 0.0 for name, _ in net.named_parameters()}
    # Among those without: what the model marks, though they are no vectors.
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.1.mixer.A_b_log"} <= found.keys() - decayed
    found = decays(net, OptimizerConfig(weight_decay=0.05, decay_all=True, layer_decay=layer_decay))
    assert found == {name: 0.05 for name, _ in net.named_parameters()}


def test_each_layer_back_learns_more_slowly_with_layer_decay(net):
    optimizer = build_optimizer(net, OptimizerConfig(lr=0.1, layer_decay=0.5))
    schedule = LearningRate(optimizer, ScheduleConfig(epochs=1, min_lr=0.01, warmup_epochs=0.2, warmup_lr=0.02), 10)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    scales = {"head": 1, "aux_head": 1, "norm_f": 0.5, "layers.1": 0.5, "layers.0": 0.25}
    scales |= {"patch_embed": 0.125, "pos_embed": 0.125, "cls_token": 0.125}
    for step, highest in ((0, 0.02), (1, 0.06), (5, 0.055), (10, 0.01)):
        assert schedule.set(step) == pytest.approx(highest, rel=1e-12)  # of the heads
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                scale = next(scales[start] for start in scales if names[id(parameter)].startswith(start))
                assert group["lr"] == pytest.approx(highest * scale, rel=1e-12)


def test_an_optimizer_that_is_not_known_or_does_not_fit_is_refused(net):
    with pytest.raises(InputError, match=r"unknown optimizer.name: got 'adamwx'. Did you mean 'adamw"):
        build_optimizer(net, OptimizerConfig(name="adamwx"))
    with pytest.raises(InputError, match="optimizer 'adamw' does not accept these settings: got Invalid epsilon"):
        build_optimizer(net, OptimizerConfig(name="adamw").model_copy(update={"eps": -1.0}))


class Fixed(nn.Module):
    """A loss whose gradient is 3 for one parameter and 4 for another: norm 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))


class FixedTask(TokenLabelTask):
    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        net: Any = self.trainable_module
        return {"loss": 3 * net.a.sum() + 4 * net.b.sum()}


@pytest.mark.parametrize(("clip", "expected"), [(None, (3, 4)), (10.0, (3, 4)), (1.0, (0.6, 0.8))])
def test_clipping_shortens_all_gradients_together(clip, expected):
    """To the norm 1 within 1e-6: torch divides by the norm plus that."""
    net: Any = Fixed()
    task = FixedTask(net, nn.Module(), torch.device("cpu"))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    step = TrainingStep(task, optimizer, Ranks(0, 1, torch.device("cpu")), clip_grad=clip)
    result = step.run([None], 0)  # type: ignore[arg-type]
    assert result.norm == pytest.approx(5)  # as it was before clipping
    assert (-net.a.item(), -net.b.item()) == pytest.approx(expected, rel=2e-6)
