"""The loss's Triton kernels in Triton's interpreter, against dense targets in float64.

The interpreter is chosen when Triton is imported: the cases run in a process of their own, this file as a script.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 31


def check(dtype: object, palette: int, mixed: bool, classes: int = 75, block: int = 32, tail: int = 0) -> None:
    """Loss, and the gradient in memory of its own and over the logits; odd batch, unused places, any strides.

    The first image's tail is half empty, and the second's altogether.
    """
    import torch

    from pipeline.targets.token_targets import TokenTargets
    from train.loss import loss_triton
    from train.loss.loss_reference import cross_entropy, smoothed

    batch, tokens, random = 3, 2, torch.Generator().manual_seed(palette)
    order = torch.stack([torch.randperm(classes, generator=random) for _ in range(batch)])
    ids, tail_ids = order[:, :palette].clone(), order[:, palette : palette + tail].clone()
    tail_ids[0, tail // 2 :] = tail_ids[1] = -1
    ids[0, palette // 2 + 1 :] = -1
    scores, background = (2 * torch.randn(s, generator=random) for s in ((batch, palette, tokens), (batch, tokens)))
    if palette == 1:
        background[:] = -1e4  # a known label
    logits = (3 * torch.randn(tokens, batch, classes, generator=random)).to(dtype).transpose(0, 1)
    inside, weight = torch.tensor([True, False]), torch.rand(batch, tokens, generator=random)
    offsets = 2 * torch.randn(tail_ids.shape, generator=random)
    if tail and palette == 8:
        offsets[2, 0] = 90.0  # whose power overflows
    sparse = ids, scores, background, 0.1, inside if mixed else None
    target = (*sparse, *((tail_ids, offsets) if tail else (None, None)))

    wide = logits.double().requires_grad_()
    whole = scores[:, :, 0], background[:, 0]
    targets = TokenTargets(ids, scores.double(), background.double(), *whole, tail_ids, offsets.double())
    dense = smoothed(targets.dense_tokens(classes), 0.1)
    dense = torch.where(inside[:, None], dense.flip(0), dense) if mixed else dense
    expected = cross_entropy(dense, wide)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), wide)

    loss, lse = loss_triton.token_loss(logits, *target, block=block)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    out = torch.empty(batch, tokens, classes, dtype=dtype)
    loss_triton.token_gradient(weight, logits, *target, lse, out, block=block)
    # Triton's interpreter cuts a bfloat16 off where a device rounds it.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, tolerance)
    torch.testing.assert_close(out.double(), gradient, rtol=rounding, atol=1e-6 if rounding > 1e-9 else 1e-12)
    over = logits.clone()
    loss_triton.token_gradient(weight, over, *target, lse, over, block=block)
    assert torch.equal(over, out)
    print("agrees")


def check_bad_values() -> None:
    """A class that the logits lack, NaN and infinity show; logits of −inf in all of the first block do not."""
    import torch

    from train.loss import loss_triton

    logits = torch.randn(1, 4, 40)
    logits[0, 1, 3], logits[0, 2, 30], logits[0, 3, :16] = float("nan"), float("inf"), float("-inf")
    target = torch.tensor([[20]]), torch.zeros(1, 1, 4), torch.full((1, 4), -1e4), 0.0, None, None, None
    loss, lse = loss_triton.token_loss(logits, *target, block=16)
    torch.testing.assert_close(lse[0, 3], logits[0, 3].logsumexp(0))
    assert loss[0].isfinite().tolist()[:3] == [True, False, False]
    loss, lse = loss_triton.token_loss(logits, torch.tensor([[40]]), *target[1:], block=16)
    assert loss.isnan().all()
    out = torch.zeros_like(logits)
    loss_triton.token_gradient(torch.ones(1, 4), logits, torch.tensor([[40]]), *target[1:], lse, out, block=16)
    assert out.isnan().all()
    logits, offsets = torch.randn(1, 4, 40), torch.zeros(1, 2)
    for ids, tail_ids in (([[20]], [[3, 40]]), ([[40]], [[3, 4]]), ([[20]], [[3, -1]])):
        known = max(ids[0] + tail_ids[0]) < 40
        some = torch.tensor(ids), torch.zeros(1, 1, 4), torch.zeros(1, 4), 0.0, None, torch.tensor(tail_ids), offsets
        loss, lse = loss_triton.token_loss(logits, *some, block=16)
        loss_triton.token_gradient(torch.ones(1, 4), logits, *some, lse, out, block=16)
        assert (loss.isnan().all(), out.isnan().all()) == (not known, not known)
        assert loss.isfinite().all() == known
    print("agrees")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    for case in itertools.product((torch.float32, torch.bfloat16), (1, 8, 32), (False, True)):
        check(*case)
    check(torch.float64, 8, True)
    check(torch.float16, 8, True)
    check(torch.float32, 64, True, classes=64, block=1024)
    check(torch.float32, 5, False, classes=5)
    for case in itertools.product((torch.float32, torch.float64), (1, 8, 32), (False, True)):
        check(*case, tail=9)
    check(torch.bfloat16, 8, True, tail=9)
    check(torch.float32, 5, True, classes=9, tail=4)  # nothing outside palette and tail
    check_bad_values()
