"""The token-labeling loss in closed form, without dense targets over the C classes.

Legend: B images; C classes; P palette size; R tail size; h×w token grid, T = h·w.

Jiang et al., "All Tokens Matter" (2021), for the loss and its mixing. For a token with logits x [C], palette scores
v_p, background score b of the C − P other classes and smoothing s: off = s/C, on = 1 − s + off,
Z = Σ_p e^{v_p} + (C − P)·e^b, and the target on·p + off sums to S = on + C·off. Then

    loss     = S·logsumexp(x) − (on·e^b/Z + off)·Σ_c x_c − Σ_p (on/Z)·(e^{v_p} − e^b)·x_p
    gradient = S·softmax(x) − target

With a tail, a class outside the palette has weight w_c = e^{its offset}, or 1 if it is not in the tail. The sum of
these weights replaces C − P, and in the teacher's part Σ w_c·x_c replaces Σ x_c: a product of a token's logits with one
vector per image.

A GPU reads the logits in both passes and keeps logsumexp [B, T] between them; so does a CPU for half-precision logits,
whose gradient is then rounded once, when its scale is known. For other dtypes a CPU computes the gradient in the
forward pass, while the logits of a few images are in its cache. Sums are in float32, for float64 logits in float64.
The work on each token is in `token_cross_entropy`, on a GPU in `loss_triton`. `loss_reference` is the same loss with
dense targets; it also documents `ground_truth`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from labeler.base.errors import InputError
from pipeline.batch import Batch
from pipeline.targets.token_targets import NOTHING, TokenTargets
from train.loss.loss_reference import TEACHER_RIGHT, TEACHER_WRONG
from train.loss.smoothed_targets import sum_dtype
from train.loss.token_cross_entropy import spread_weight, token_cross_entropy

CLASSES = ("teacher", "images")


class TokenLabelLoss(nn.Module):
    """cls_weight · class loss + dense_weight · mean token loss.

    Args:
        dense_weight: weight of the token loss, 0 or more.
        cls_weight: weight of the class loss, 0 or more.
        smoothing: label smoothing of all targets, 0 ≤ smoothing < 1.
        ground_truth: blend true labels into the class targets, see `train.loss.loss_reference`.
        grid: h, w of the tokens, only needed for mixing; None: the targets' own, or derived from the image size, for
            square patches.
        in_place: the backward pass overwrites the auxiliary logits with their gradient, which saves a tensor of their
            size. Ignored where that is impossible (see `token_cross_entropy`).
        temperature: the teacher's scores are divided by it: above 1 the soft targets are softer. May be changed between
            calls.
        classes: of the class logits. "teacher": those of the targets. "images": the images' own; the class loss is the
            smoothed cross-entropy with `batch.labels`, and an image without a label has none.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        dense_weight: float = 1.0,
        cls_weight: float = 1.0,
        smoothing: float = 0.1,
        ground_truth: bool = False,
        grid: tuple[int, int] | None = None,
        in_place: bool = False,
        temperature: float = 1.0,
        classes: str = "teacher",
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise InputError("smoothing is out of range", got=smoothing, expected="0 ≤ smoothing < 1")
        for name, weight in (("dense_weight", dense_weight), ("cls_weight", cls_weight)):
            if not 0 <= weight < math.inf:
                raise InputError(f"{name} is out of range", got=weight, expected="a finite number, 0 or more")
        if not 0 < temperature < math.inf:
            raise InputError("temperature is out of range", got=temperature, expected="a finite number above 0")
        if classes not in CLASSES:
            raise InputError("classes is out of range", got=repr(classes), expected=" or ".join(map(repr, CLASSES)))
        if ground_truth and classes == "images":
            raise InputError(
                "ground_truth blends the true class into the teacher's target for the image",
                got='classes="images", where the true class is the whole target', remedy="Set ground_truth=false.",
            )  # fmt: skip
        self.own_classes = classes == "images"
        self.dense_weight, self.cls_weight, self.smoothing = dense_weight, cls_weight, smoothing
        self.ground_truth, self.grid, self.in_place = ground_truth, grid, in_place
        self.temperature = temperature

    def forward(
        self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | list[torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            outputs: (cls_logits [B, C], aux_logits [B, T, C]), or only cls_logits for the class loss alone. With
                `classes="images"` the two may have another number of classes.
            batch: the batch that they were computed from, on the same device.

        Returns:
            A scalar in float32, or float64 for float64 logits.

        Raises:
            InputError: the outputs do not fit the batch.
        """
        cls_logits, aux_logits = _split(outputs, batch, self.own_classes)
        if self.temperature != 1:
            batch = dataclasses.replace(batch, targets=batch.targets.tempered(self.temperature))
        # The class logits get several gradients; they are summed in float32.
        loss = self._class_loss(cls_logits.to(sum_dtype(cls_logits)), batch)
        if aux_logits is None:
            return loss
        partner = None
        if batch.mix is not None:
            grid = _token_grid(batch, aux_logits.shape[1], self.grid or batch.targets.grid)
            partner = batch.mix.mask(grid, aux_logits.device)
        t = batch.targets
        # With the weight inside, a backward pass that starts from 1 does not have to scale the gradient again.
        weight = spread_weight(aux_logits, self.dense_weight)
        return loss + token_cross_entropy(
            aux_logits, t.classes, t.token_scores, t.token_background, self.smoothing, partner, weight, self.in_place,
            tail_classes=t.tail_classes, tail_offsets=t.tail_offsets,
        )  # fmt: skip

    def _class_loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The class loss: the class token's target is that of the whole crop, mixed with its partner's."""
        if self.own_classes:
            return self._own_class_loss(logits, batch)
        weight = spread_weight(logits[:, None], self.cls_weight)
        if batch.mix is None:
            return self._class_loss_of(logits, batch, weight, None)
        everywhere = torch.ones(1, dtype=torch.bool, device=logits.device)
        own = self._class_loss_of(logits, batch, weight * batch.mix.lam, None)
        return own + self._class_loss_of(logits, batch, weight * (1 - batch.mix.lam), everywhere)

    def _own_class_loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The class loss with the images' own labels, mixed with the partners'."""
        labels = batch.labels.to(logits.device)
        losses = self._label_losses(logits, labels)
        if batch.mix is not None:
            lam = batch.mix.lam
            losses = lam * losses + (1 - lam) * self._label_losses(logits, labels.flip(0))
        return self.cls_weight * losses.mean()

    def _label_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B]: smoothed cross-entropy with true classes; 0 where the label is −1."""
        return F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", label_smoothing=self.smoothing)

    def _class_loss_of(
        self, logits: torch.Tensor, batch: Batch, weight: torch.Tensor, partner: torch.Tensor | None
    ) -> torch.Tensor:
        """The class loss with each image's own target, or with `partner` that of its partner; weight [B, 1]."""
        t, x = batch.targets, logits[:, None]
        soft = t.classes, t.cls_scores[..., None], t.cls_background[:, None]
        tail: dict[str, Any] = {"tail_classes": t.tail_classes, "tail_offsets": t.tail_offsets}
        if not self.ground_truth:
            return token_cross_entropy(x, *soft, self.smoothing, partner, weight, **tail)
        # The target of the true class is a palette of one class, already smoothed: 1 − s + s/C there, s/C elsewhere.
        labels, off = batch.labels.to(logits.device), self.smoothing / logits.shape[1]
        one = t.cls_background.new_zeros(len(labels), 1, 1)
        others = one[:, 0] + (math.log(off) if off else NOTHING)
        truth = labels[:, None], one + math.log(1 - self.smoothing + off), others
        share = _teacher_share(batch.targets, labels, logits.shape[1])[:, None]
        share = share if partner is None else share.flip(0)
        return token_cross_entropy(x, *soft, self.smoothing, partner, weight * share, **tail) + token_cross_entropy(
            x, *truth, 0.0, partner, weight * (1 - share)
        )


def _teacher_share(targets: TokenTargets, labels: torch.Tensor, count: int) -> torch.Tensor:
    """[B]: the soft target's share of the class target; the rest is the true class's.

    If the background score is the highest, the teacher's top class is unknown and does not count as the true one.
    """
    classes = torch.cat([targets.classes, targets.tail_classes], 1)
    scores = torch.cat([targets.cls_scores, targets.cls_background[:, None] + targets.tail_offsets], 1)
    unused = classes < 0
    highest, index = scores.masked_fill(unused, -math.inf).max(1)
    others = (~unused).sum(1) < count
    top_class = classes.gather(1, index[:, None])[:, 0]
    right = (top_class == labels) & ~(others & (highest <= targets.cls_background))
    share = torch.where(right, TEACHER_RIGHT, TEACHER_WRONG)
    return torch.where(labels < 0, 1.0, share)


def _split(outputs: Any, batch: Batch, own_classes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Class and auxiliary logits. Raises InputError unless they fit each other and the batch."""
    cls_logits, aux_logits = (outputs, None) if isinstance(outputs, torch.Tensor) else _pair(outputs)
    images, tokens = len(batch.targets), batch.targets.token_background.shape[1]
    if cls_logits.ndim != 2 or cls_logits.shape[0] != images:
        raise InputError("class logits do not fit the batch", got=tuple(cls_logits.shape), expected=f"({images}, C)")
    of_targets = aux_logits if own_classes else cls_logits
    if of_targets is not None and batch.targets.num_classes not in (None, of_targets.shape[-1]):
        raise InputError(
            "the logits have another number of classes than the targets",
            got=of_targets.shape[-1],
            expected=batch.targets.num_classes,
            remedy="Give that head as many: num_classes, or aux_classes where the class head has others.",
        )
    if aux_logits is None:
        return cls_logits, None
    classes = aux_logits.shape[-1] if own_classes else cls_logits.shape[1]
    if aux_logits.shape != (images, tokens, classes):
        raise InputError(
            "auxiliary logits do not fit the batch and the class logits",
            got=tuple(aux_logits.shape),
            expected=(images, tokens, classes),
            remedy="The loader's grid must be the model's: image size / patch size along each side.",
        )
    return cls_logits, aux_logits


def _pair(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        length = f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else ""
        raise InputError(
            "the loss cannot use the model's output",
            got=type(outputs).__name__ + length,
            expected="(class logits [B, C], auxiliary logits [B, T, C]), or class logits alone",
            remedy="`token_label` makes any timm model return both.",
        )
    return outputs[0], outputs[1]


def _token_grid(batch: Batch, tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """h, w as given, or of square patches. Raises InputError if the mix box is not on this grid."""
    if grid is None:
        height, width = batch.images.shape[-2:]
        h = math.isqrt(tokens * height // width)
        grid = h, tokens // max(h, 1)
        fits = h * grid[1] == tokens and h * width == grid[1] * height
    else:
        fits = grid[0] * grid[1] == tokens
    if not fits:
        raise InputError(
            "tokens do not fit their grid", got=f"{tokens} tokens", expected=f"{grid[0]} × {grid[1]}",
            remedy="Give TokenLabelLoss(grid=(rows, columns)) for patches that are not square.",
        )  # fmt: skip
    box = batch.mix
    if box is not None and not (0 <= box.y0 <= box.y1 <= grid[0] and 0 <= box.x0 <= box.x1 <= grid[1]):
        raise InputError("the mix box leaves the token grid", got=box, expected=f"within {grid[0]} × {grid[1]} tokens")
    return grid
