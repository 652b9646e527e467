"""Fits multinomial logistic regression to features: float64 on the CPU, deterministic, the penalty chosen by itself.

Minimized is the mean cross-entropy plus l2/2 · ‖W‖² over weights W of *standardized* features. The features are rotated
to the axes of their covariance and scaled by what the second derivatives are where W is 0: there L-BFGS needs some
dozens of steps for a network's features, of which many nearly repeat each other, instead of many hundreds.

Legend: N images, C classes, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10 ** (-exponent / 2) for exponent in range(13))  # of the penalty, in turn: 1, 0.3, 0.1, … 1e-6
STEPS = 100  # of L-BFGS for each strength
HISTORY = 10  # steps that L-BFGS remembers
CHUNK = 2048  # images whose logits are computed at once


@dataclass(frozen=True)
class LinearFit:
    """A linear head, and what it does on held-out images.

    Attributes:
        weight: float32 [C, D], for features as they were given.
        bias: float32 [C].
        l2: Strength of the penalty.
        cross_entropy: Of the held-out images, in nats.
        accuracy: Share of the held-out images whose class has the largest logit.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    cross_entropy: float
    accuracy: float


def fit_linear(features: Tensor, classes: Tensor, held_features: Tensor, held_classes: Tensor, count: int) -> LinearFit:
    """Fits a linear head, with the strength of the L2 penalty that is best for the held-out images.

    The strengths are tried from strong to weak, each from the result of the one before, until the held-out
    cross-entropy rises.

    Args:
        features: float [N, D] to fit on.
        classes: int64 [N]: class ids.
        held_features: float [M, D], held out.
        held_classes: int64 [M].
        count: C.

    Returns:
        The fit.
    """
    problem = _Problem(features, classes, count)
    best: LinearFit | None = None
    for l2 in STRENGTHS:
        weight, bias = problem.solve(l2)
        cross_entropy, accuracy = evaluate(weight, bias, held_features, held_classes)
        if best is not None and cross_entropy >= best.cross_entropy:
            break
        best = LinearFit(weight, bias, l2, cross_entropy, accuracy)
    assert best is not None
    return best


def evaluate(weight: Tensor, bias: Tensor, features: Tensor, classes: Tensor) -> tuple[float, float]:
    """Returns mean cross-entropy in nats, and accuracy, of weight [C, D] and bias [C] on features [N, D]."""
    loss, right = 0.0, 0
    for x, y in zip(features.split(CHUNK), classes.split(CHUNK), strict=True):
        logits = torch.addmm(bias.double(), x.double(), weight.double().T)
        loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
        right += int((logits.argmax(1) == y).sum())
    return loss / len(features), right / len(features)


class _Problem:
    """Logistic regression on rotated, standardized features; the last solution is where the next one begins."""

    def __init__(self, features: Tensor, classes: Tensor, count: int) -> None:
        x = features.double()
        self.mean, std = x.mean(0), x.std(0, correction=0)
        self.scale = torch.where(std > 1e-12 * std.max(), 1 / std, 0.0)  # constant features get no weight
        x = (x - self.mean).mul_(self.scale)
        spread, self.axes = torch.linalg.eigh(x.T @ x / len(x))
        self.spread = spread.clamp(min=0)
        self.x, self.classes, self.count = x @ self.axes, classes, count
        self.rotated = torch.zeros(x.shape[1], count, dtype=torch.float64)
        frequency = torch.bincount(classes, minlength=count).double() / len(classes)
        self.bias = frequency.clamp(min=1e-12).log()

    def solve(self, l2: float) -> tuple[Tensor, Tensor]:
        """Returns float32 weight [C, D] and bias [C] of one strength, for features as they were given."""
        scale = (self.spread / self.count + l2).rsqrt()[:, None]
        weight = (self.rotated / scale).requires_grad_()
        bias = (self.bias / self.count**0.5).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=STEPS, history_size=HISTORY, tolerance_grad=1e-5, tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        @torch.no_grad()
        def closure() -> Tensor:
            rotated = scale * weight
            loss, gradient, of_bias = self._loss(rotated, bias * self.count**0.5)
            weight.grad = scale * (gradient + l2 * rotated)
            bias.grad = of_bias * self.count**0.5
            return loss + l2 / 2 * rotated.square().sum()

        optimizer.step(closure)
        self.rotated, self.bias = (scale * weight).detach(), (bias * self.count**0.5).detach()
        unscaled = self.scale[:, None] * (self.axes @ self.rotated)
        return unscaled.T.float().contiguous(), (self.bias - self.mean @ unscaled).float()

    def _loss(self, rotated: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mean cross-entropy, and its gradients by weight [D, C] of rotated features and by the bias."""
        loss, gradient, of_bias = (
            torch.zeros((), dtype=torch.float64),
            torch.zeros_like(rotated),
            torch.zeros_like(bias),
        )
        for x, y in zip(self.x.split(CHUNK), self.classes.split(CHUNK), strict=True):
            log_p = torch.addmm(bias, x, rotated).log_softmax(1)
            rows = torch.arange(len(x))
            loss -= log_p[rows, y].sum()
            residual = log_p.exp_()
            residual[rows, y] -= 1
            gradient.addmm_(x.T, residual)
            of_bias += residual.sum(0)
        return loss / len(self.x), gradient / len(self.x), of_bias / len(self.x)
