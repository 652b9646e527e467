"""The token-labeling loss with dense targets: plain, slow, and the reference for `train.loss.token_label_loss`.

Legend: B images; C classes; P palette size; h×w token grid, T = h·w.

Jiang et al., "All Tokens Matter" (2021). Smoothing s turns a distribution p into on·p + off with off = s/C and
on = 1 − s + off, as the published code does, so a target sums to on + C·off = 1 + off.

`ground_truth` blends the true class into the class target, never into the tokens' targets. The rule was inferred from
loss values of the published code (tests/fixtures/token_targets.xz). With t the true class's smoothed one-hot vector
(1 − s + off at the class, off elsewhere), before mixing:

    own class target = u·soft + (1 − u)·t,    u = TEACHER_RIGHT = 0.5   where the teacher's top class is the true one
                                              u = TEACHER_WRONG = 0.9   where it is not

This matches all values of TokenLabeling to 5e-8. DeMansia's code has 0.6 and 1.0 instead of 0.5 and 0.9: it drops the
true class exactly where it would correct the teacher. Hard targets do not change. We follow TokenLabeling. An image
without a known label keeps its soft target.

With `classes="images"` the class logits are of other classes than the targets. The class target is t alone, and an
image without a known label has no class loss.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from pipeline.batch import Batch
from pipeline.targets.token_targets import TokenTargets

TEACHER_RIGHT, TEACHER_WRONG = 0.5, 0.9  # the soft target's share of the class target


def dense_token_label_loss(
    outputs: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    grid: tuple[int, int],
    dense_weight: float = 1.0,
    cls_weight: float = 1.0,
    smoothing: float = 0.1,
    ground_truth: bool = False,
    classes: str = "teacher",
) -> torch.Tensor:
    """cls_weight · class loss + dense_weight · mean token loss.

    Args:
        outputs: (cls_logits [B, C], aux_logits [B, T, C]); with classes="images" the two C may differ.
        batch: targets, labels and mix box.
        grid: h, w of the tokens, on which the mix box lies.
        dense_weight: weight of the token loss.
        cls_weight: weight of the class loss.
        smoothing: label smoothing of all targets.
        ground_truth: blend true labels into the class targets.
        classes: of the class logits: "teacher" or "images".

    Returns:
        A scalar in float32, or float64 for float64 logits.
    """
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    cls_logits, aux_logits = (logits.to(dtype) for logits in outputs)
    targets = _as_dtype(batch.targets, dtype)
    if classes == "images":
        own = smoothed_truth(batch.labels, cls_logits.shape[1], smoothing).to(dtype) * (batch.labels >= 0)[:, None]
    else:
        own = smoothed(targets.dense_cls(cls_logits.shape[1]), smoothing)
    if ground_truth:
        own = blend_truth(own, batch.labels, smoothing)
    tokens = smoothed(targets.dense_tokens(aux_logits.shape[2]), smoothing)
    cls_loss = cross_entropy(own, cls_logits)
    if batch.mix is not None:
        inside = batch.mix.mask(grid).to(tokens.device)
        tokens = torch.where(inside[:, None], tokens.flip(0), tokens)
        cls_loss = batch.mix.lam * cls_loss + (1 - batch.mix.lam) * cross_entropy(own.flip(0), cls_logits)
    return cls_weight * cls_loss.mean() + dense_weight * cross_entropy(tokens, aux_logits).mean()


def cross_entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [..., C] with targets [..., C]. Returns [...]."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def smoothed(target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Label smoothing of targets [..., C]."""
    off = smoothing / target.shape[-1]
    return target * (1 - smoothing + off) + off


def smoothed_truth(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """float64 [B, C]: 1 − s + s/C at the true class, s/C elsewhere; of no meaning where the label is −1."""
    return F.one_hot(labels.clamp(min=0), classes).double() * (1 - smoothing) + smoothing / classes


def blend_truth(soft: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Blend the true classes [B] into class targets [B, C], as the module's docstring says."""
    truth = smoothed_truth(labels, soft.shape[1], smoothing).to(soft.dtype)
    share = torch.where(soft.argmax(1) == labels, TEACHER_RIGHT, TEACHER_WRONG).to(soft.dtype)
    share = torch.where(labels < 0, 1.0, share)[:, None]
    return share * soft + (1 - share) * truth


def _as_dtype(targets: TokenTargets, dtype: torch.dtype) -> TokenTargets:
    fields = ("token_scores", "token_background", "cls_scores", "cls_background", "tail_offsets")
    return dataclasses.replace(targets, **{name: getattr(targets, name).to(dtype) for name in fields})
