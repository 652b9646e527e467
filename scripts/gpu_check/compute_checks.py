"""The parts of `scripts.gpu_check` that compare kernels with float64, and a training step with the CPU's.

Legend: B images; L sequence length; D model width; E inner width; N state size; C classes; P palette size; T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from scripts.gpu_check.__main__ import Says

if TYPE_CHECKING:
    from pipeline.batch import Batch
    from train.step.step_result import StepResult
    from train.task import TrainingStep

# Of the norm of the difference to that of the float64 result; bfloat16 rounds each number by up to 0.4 %.
FORWARD, BACKWARD = {torch.float32: 1e-4, torch.bfloat16: 1e-2}, {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of the difference to the expected result, as a share of its own."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def scan(say: Says, device: str, quick: bool) -> None:
    """The scan and its gradients: shapes of the tests, then the recipe's batch, of which some images are compared."""
    shapes = [(2, 197, 384, 16), (3, 33, 40, 5), (1, 16, 64, 16), (768, 197, 384, 16)]
    for B, L, E, N in shapes[1:3] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for with_bias, with_skip in ((True, True), (False, True), (False, False)):
                _scan_case(say, device, (B, L, E, N), dtype, with_bias, with_skip)


def _scan_case(
    say: Says, device: str, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool, with_skip: bool
) -> None:
    from model.ops import choose_backend, directional_scan

    B, L, E, N = shape
    random = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, generator=random)

    A = -torch.arange(1, N + 1.0, device=device) * (1 + 0.1 * draw(2, E, N).abs())
    inputs = [draw(2, B, L, E).to(dtype), draw(2, B, L, E) * 0.7 - 4.6, A, draw(2, B, L, N).to(dtype)]
    inputs += [draw(2, B, L, N).to(dtype), 1 + 0.1 * draw(2, E) if with_skip else None]  # type: ignore[list-item]
    inputs += [torch.full((2, E), -0.3, device=device) if with_bias else None]  # type: ignore[list-item]
    some = torch.tensor(sorted({0, B // 2, B - 1}), device=device)
    wanted = torch.zeros(
        2, B, L, E, device=device, dtype=dtype
    )  # only some images reach the gradients of A, D and bias
    wanted[:, some] = draw(2, len(some), L, E).to(dtype)
    per_image = (0, 1, 3, 4)
    exact = [
        None if x is None else (x[:, some] if i in per_image else x).double().requires_grad_()
        for i, x in enumerate(inputs)
    ]
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    backend = "triton" if device == "cuda" else choose_backend("auto", device)
    y = directional_scan(*leaves, True, (False, True), backend)
    y_exact = directional_scan(*exact, True, (False, True), "reference")
    gradients = torch.autograd.grad(y, [x for x in leaves if x is not None], wanted)
    expected = torch.autograd.grad(y_exact, [x for x in exact if x is not None], wanted[:, some].double())
    names = [name for name, x in zip(("u", "delta", "A", "B", "C", "D", "bias"), leaves, strict=True) if x is not None]
    errors = {
        name: off(g[:, some] if name in ("u", "delta", "B", "C") else g, e)
        for name, g, e in zip(names, gradients, expected, strict=True)
    }
    what = f"{backend}, B {B}, L {L}, E {E}, N {N}, {dtype}, bias {with_bias}, D {with_skip}".replace("torch.", "")
    say.check(f"scan {what}", off(y[:, some], y_exact), FORWARD[dtype])
    say.check(f"scan's gradients {what}", max(errors.values()), BACKWARD[dtype], each=errors)


def mixer(say: Says, device: str, quick: bool) -> None:
    """The bidirectional mixer around the scan, with whatever is fused into it, against float64 on the CPU."""
    from model.mixers import BidirectionalMamba

    for B, L, D in ((2, 17, 16),) if quick else ((2, 17, 16), (4, 197, 192)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            ours = BidirectionalMamba(D)
            exact = copy.deepcopy(ours).double()
            ours = ours.to(device)
            hidden, wanted = torch.randn(2, B, L, D)
            results = []
            for net, place, kind in ((ours, device, torch.float32), (exact, "cpu", torch.float64)):
                x = hidden.detach().to(place, kind, copy=True).requires_grad_()
                with torch.autocast(place, torch.bfloat16, enabled=net is ours and dtype == torch.bfloat16):
                    y = net(x)
                y.backward(wanted.to(place, y.dtype))
                results.append([y, x.grad, *(p.grad for p in net.parameters())])
            errors = [off(found, expected) for found, expected in zip(*results, strict=True)]
            # In bfloat16 the products around the scan round, too.
            loose = 3 if dtype == torch.bfloat16 else 1
            say.check(f"mixer B {B}, L {L}, D {D}, {dtype}", errors[0], loose * FORWARD[dtype])
            say.check(f"mixer's gradients B {B}, L {L}, D {D}, {dtype}", max(errors[1:]), loose * BACKWARD[dtype])


def loss(say: Says, device: str, quick: bool) -> None:
    """The loss and its gradient, in and out of place, against dense targets in float64."""
    from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
    from train.loss.loss_reference import dense_token_label_loss
    from train.loss.token_label_loss import TokenLabelLoss

    side = 32 if quick else 224
    for B in (2,) if quick else (16, 96):
        data = synthetic_batch(B, side, device=device)
        grid = (side // 16, side // 16)
        drawn = [torch.randn(shape, device=device) for shape in ((B, 1000), (B, grid[0] * grid[1], 1000))]
        for dtype in (torch.float32, torch.bfloat16):
            exact = [x.to(dtype).double().requires_grad_() for x in drawn]
            expected = dense_token_label_loss(tuple(exact), data, grid)
            expected_gradients = torch.autograd.grad(expected, exact)
            for in_place in (False, True):
                leaves = [x.to(dtype).requires_grad_() for x in drawn]
                outputs = tuple(1.0 * x for x in leaves)
                found = TokenLabelLoss(in_place=in_place)(outputs, data)
                gradients = torch.autograd.grad(found, leaves)
                what = f"B {B}, {dtype}, {'in' if in_place else 'out of'} place"
                say.check(f"loss {what}", off(found, expected), 1e-5)
                errors = [off(g, e) for g, e in zip(gradients, expected_gradients, strict=True)]
                say.check(f"loss's gradient {what}", max(errors), FORWARD[dtype])


def step(say: Says, device: str, quick: bool) -> None:
    """A training step as on the CPU; a NaN leaves no trace; and no step waits for the device."""
    import timm

    from scripts.benchmark.inputs.synthetic_batch import synthetic_batch
    from train.loss.token_label_loss import TokenLabelLoss
    from train.optimization import build_optimizer
    from train.ranks.distributed import Ranks
    from train.recipes.config import OptimizerConfig
    from train.task import TokenLabelTask, TrainingStep

    B, side = (4, 32) if quick else (16, 224)
    name, changes = ("demansia_nano", {"depth": 2}) if quick else ("demansia_tiny", {})
    data = synthetic_batch(B, side, device="cpu")

    def steps(place: str, optimizer: str, precision: torch.dtype = torch.float32) -> TrainingStep:
        torch.manual_seed(0)
        net = timm.create_model(name, img_size=side, patch_size=16, num_classes=1000, **changes).train()
        task = TokenLabelTask(net, TokenLabelLoss(in_place=place == "cuda"), torch.device(place))
        task.setup_ema(0.99)
        built = build_optimizer(net, OptimizerConfig(name=optimizer, lr=1e-3))
        late = None if place == "cuda" else optimizer != "sgd"  # rehearsed on a CPU
        return TrainingStep(task, built, Ranks(0, 1, torch.device(place)), precision=precision, late=late)

    def one(place: str, precision: torch.dtype) -> tuple[StepResult, list[torch.Tensor]]:
        made = steps(place, "sgd", precision)
        result = made.run(data.to(place), 0)
        return result, [p.grad for p in made.task.network.parameters() if p.grad is not None]

    _without_tf32()
    expected, expected_gradients = one("cpu", torch.float32)
    for precision, limit in ((torch.float32, 2e-3), (torch.bfloat16, 0.1)):
        result, gradients = one(device, precision)
        error = off(flat(gradients), flat(expected_gradients))
        say.check(f"gradient of a step, {precision}, against the CPU's in float32", error, limit)
        say.check(f"loss of a step, {precision}", abs(result.loss / expected.loss - 1), limit / 10)

    for optimizer in ("radamw", "adamw", "lion"):
        made, here = steps(device, optimizer), data.to(device)
        bad = replace(here, images=torch.full_like(here.images, float("nan")))
        for number in range(3):
            made.run(here, number)
        before = [x.clone() for x in _changed_by(made)]
        done = made.run(bad, 3).done
        traces = sum(not torch.equal(x, y) for x, y in zip(_changed_by(made), before, strict=True))
        say.check(f"tensors that a step with NaN changes, {optimizer}", traces + done, 0, late=made.late)
        waits = _waits(made, here, device)
        say.check(f"waits for the device in 4 steps, {optimizer}", len(waits), 0, waits=waits[:3], late=made.late)


def _changed_by(made: TrainingStep) -> list[torch.Tensor]:
    """Returns all tensors that a training step changes."""
    state = [v for values in made.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return [*made.task.network.state_dict().values(), *made._averages(), *state]


def _waits(made: TrainingStep, data: Batch, device: str) -> list[str]:
    """Runs steps where torch raises an error whenever one waits for a GPU; on a CPU there is nothing to wait for."""
    found = []
    for number in range(4, 8):
        with _errors_at_waits(device):
            try:
                made.run(data, number)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                found.append(str(error).splitlines()[0])
    return found


@contextmanager
def _errors_at_waits(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().double().cpu().flatten() for x in tensors])


def _without_tf32() -> None:
    from labeler.base.runtime import set_gpu_products

    set_gpu_products(torch.float32)
