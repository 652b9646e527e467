"""The token-labeling loss in closed form: no target of size C is ever built.

Legend: B images; C classes; P palette size; h×w token grid, T = h·w.

Design section 6; Jiang et al., "All Tokens Matter" (2021), for the loss and its mixing. For a token with logits x [C],
palette scores v_p, background b of the C − P other classes and smoothing s: off = s/C, on = 1 − s + off,
Z = Σ_p e^{v_p} + (C − P)·e^b, and the target on·p + off sums to S = on + C·off. Then

    loss     = S·logsumexp(x) − (on·e^b/Z + off)·Σ_c x_c − Σ_p (on/Z)·(e^{v_p} − e^b)·x_p
    gradient = S·softmax(x) − target

A GPU reads the logits in both passes and keeps logsumexp [B, T] between them; so does a CPU for half-precision logits,
whose gradient is then rounded once, when its scale is known. For others a CPU forms the gradient in the forward pass,
while a few images' logits are in its cache. Sums are in float32, for float64 logits in float64.
`train.loss_reference` is the same loss with dense targets; it also says what `ground_truth` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from labeler.errors import InputError
from pipeline.batch import Batch
from pipeline.mix import MixBox
from pipeline.targets import NOTHING, TokenTargets
from train.loss_reference import TEACHER_RIGHT, TEACHER_WRONG

# Logits that the CPU takes at a time: few enough to stay in its cache from one operation to the next, enough for the
# operations' own cost not to count. The targets of so many such parts are reckoned together.
PART, PARTS = 1 << 20, 4


class TokenLabelLoss(nn.Module):
    """cls_weight · class loss + dense_weight · mean over tokens.

    smoothing     of targets, as above
    ground_truth  blend true labels into class targets, see `train.loss_reference`
    grid          h, w of the tokens; None: square patches, so that the images' sides give it. Needed for mixing only.
    in_place      the backward pass writes the auxiliary logits' gradient over the logits, which saves a tensor of their
                  size; they are not logits any more then. Ignored where it cannot be done (`token_cross_entropy`).
    """

    def __init__(
        self,
        dense_weight: float = 1.0,
        cls_weight: float = 1.0,
        smoothing: float = 0.1,
        ground_truth: bool = False,
        grid: tuple[int, int] | None = None,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise InputError("smoothing is out of range", got=smoothing, expected="0 ≤ smoothing < 1")
        for name, weight in (("dense_weight", dense_weight), ("cls_weight", cls_weight)):
            if not 0 <= weight < math.inf:
                raise InputError(f"{name} is out of range", got=weight, expected="a finite number, 0 or more")
        self.dense_weight, self.cls_weight, self.smoothing = dense_weight, cls_weight, smoothing
        self.ground_truth, self.grid, self.in_place = ground_truth, grid, in_place

    def forward(
        self, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | list[torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """outputs: (cls_logits [B, C], aux_logits [B, T, C]), or cls_logits alone for the class part alone."""
        cls_logits, aux_logits = _split(outputs, batch)
        # Several gradients are added up for the class logits: in float32.
        loss = self._class_loss(cls_logits.to(_sum_dtype(cls_logits)), batch)
        if aux_logits is None:
            return loss
        partner = None
        if batch.mix is not None:
            grid = _token_grid(batch, aux_logits.shape[1], self.grid)
            partner = _inside(batch.mix, grid, aux_logits.device)
        t = batch.targets
        # The weight goes inside: a backward pass that starts from 1 need not touch the gradient again.
        weight = _weight(aux_logits, self.dense_weight)
        return loss + token_cross_entropy(
            aux_logits, t.classes, t.token_scores, t.token_background, self.smoothing, partner, weight, self.in_place
        )

    def _class_loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The class token is a token whose targets are the whole crop's; mixed, it has its partner's as well."""
        weight = _weight(logits[:, None], self.cls_weight)
        if batch.mix is None:
            return self._class_loss_of(logits, batch, weight, None)
        everywhere = torch.ones(1, dtype=torch.bool, device=logits.device)
        own = self._class_loss_of(logits, batch, weight * batch.mix.lam, None)
        return own + self._class_loss_of(logits, batch, weight * (1 - batch.mix.lam), everywhere)

    def _class_loss_of(
        self, logits: torch.Tensor, batch: Batch, weight: torch.Tensor, partner: torch.Tensor | None
    ) -> torch.Tensor:
        """Towards each image's own target, or with `partner` towards its partner's; weight [B, 1]."""
        t, x = batch.targets, logits[:, None]
        soft = t.classes, t.cls_scores[..., None], t.cls_background[:, None]
        if not self.ground_truth:
            return token_cross_entropy(x, *soft, self.smoothing, partner, weight)
        # The true class's target is a palette of one class: 1 − s + s/C there, s/C elsewhere, smoothed already.
        labels, off = batch.labels.to(logits.device), self.smoothing / logits.shape[1]
        one = t.cls_background.new_zeros(len(labels), 1, 1)
        others = one[:, 0] + (math.log(off) if off else NOTHING)
        truth = labels[:, None], one + math.log(1 - self.smoothing + off), others
        share = _teacher_share(batch.targets, labels, logits.shape[1])[:, None]
        share = share if partner is None else share.flip(0)
        return token_cross_entropy(x, *soft, self.smoothing, partner, weight * share) + token_cross_entropy(
            x, *truth, 0.0, partner, weight * (1 - share)
        )


def _weight(logits: torch.Tensor, weight: float) -> torch.Tensor:
    """[B, T]: each token's part of the weighted mean over tokens."""
    batch, tokens, _ = logits.shape
    return logits.new_full((), weight / (batch * tokens), dtype=_sum_dtype(logits)).expand(batch, tokens)


def _teacher_share(targets: TokenTargets, labels: torch.Tensor, count: int) -> torch.Tensor:
    """[B]: the soft target's part of the class target; the rest is the true class's.

    Where the score of all other classes is highest, the teacher has named no class, hence not the true one.
    """
    unused = targets.classes < 0
    highest, place = targets.cls_scores.masked_fill(unused, -math.inf).max(1)
    others = (~unused).sum(1) < count
    named = targets.classes.gather(1, place[:, None])[:, 0]
    right = (named == labels) & ~(others & (highest < targets.cls_background))
    share = torch.where(right, TEACHER_RIGHT, TEACHER_WRONG)
    return torch.where(labels < 0, 1.0, share)


def _split(outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Class logits and auxiliary logits, once they are known to fit each other and the batch."""
    cls_logits, aux_logits = (outputs, None) if isinstance(outputs, torch.Tensor) else _pair(outputs)
    images, tokens = len(batch.targets), batch.targets.token_background.shape[1]
    if cls_logits.ndim != 2 or cls_logits.shape[0] != images:
        raise InputError("class logits do not fit the batch", got=tuple(cls_logits.shape), expected=f"({images}, C)")
    if aux_logits is not None and aux_logits.shape != (images, tokens, cls_logits.shape[1]):
        raise InputError(
            "auxiliary logits do not fit the batch and the class logits",
            got=tuple(aux_logits.shape),
            expected=(images, tokens, cls_logits.shape[1]),
            remedy="The loader's grid must be the model's: image size / patch size along each side.",
        )
    return cls_logits, aux_logits


def _pair(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        length = f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else ""
        raise InputError(
            "the model's output is not what the loss takes",
            got=type(outputs).__name__ + length,
            expected="(class logits [B, C], auxiliary logits [B, T, C]), or class logits alone",
            remedy="Any timm model gives both through `token_label`.",
        )
    return outputs[0], outputs[1]


def _token_grid(batch: Batch, tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """h, w: as given, or of square patches; the mix box must lie on it."""
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


def _inside(box: MixBox, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """bool [T]: `box.mask(grid)`, made on the device."""
    y, x = (torch.arange(side, device=device) for side in grid)
    return (((y >= box.y0) & (y < box.y1))[:, None] & ((x >= box.x0) & (x < box.x1))).flatten()


def token_cross_entropy(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Weighted sum over all tokens of their cross-entropy towards smoothed targets: float32, or float64 as the logits.

    logits      [B, T, C]
    classes     int64 [B, P]: palette class ids, −1 where a place is unused
    scores      [B, P, T] of the palette's classes; background [B, T] of every other class
    partner     bool [T]: tokens whose target is that of image B−1−b; None: no token's
    weight      [B, T]; None: 1/(B·T), the mean
    in_place    the backward pass overwrites the logits with their gradient. Not done while compiling, nor for a leaf or
                logits without memory of their own. Whoever else needs them for a backward pass later gets an error.

    Gradients go to the logits alone, and have no gradient themselves.
    """
    weight = _weight(logits, 1.0) if weight is None and logits.ndim == 3 else weight
    _check(logits, classes, scores, background, partner, weight)
    over = in_place and not logits.is_leaf and logits.is_contiguous() and not torch.compiler.is_compiling()
    wanted = logits.requires_grad and torch.is_grad_enabled()
    early = wanted and not over and not torch.compiler.is_compiling()
    early = early and logits.device.type == "cpu" and logits.dtype == _sum_dtype(logits)
    return _loss_op(logits, classes, scores, background, weight, float(smoothing), partner, early, over)[0]


def _check(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    partner: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> None:
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise InputError("logits are not usable", got=got, expected="floating point [B, T, C], none of them 0")
    batch, tokens, _ = logits.shape
    if classes.ndim != 2 or len(classes) != batch or classes.shape[1] == 0 or classes.dtype != torch.int64:
        got = f"{classes.dtype} {tuple(classes.shape)}"
        raise InputError("palette classes do not fit the logits", got=got, expected=f"int64 ({batch}, P), P ≥ 1")
    wanted = {"scores": (scores, (batch, classes.shape[1], tokens)), "background": (background, (batch, tokens))}
    if weight is not None:
        wanted["weight"] = (weight, (batch, tokens))
    if partner is not None:
        wanted["partner"] = (partner, (tokens,))
        if partner.dtype != torch.bool:
            raise InputError("partner is not a mask", got=partner.dtype, expected=torch.bool)
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise InputError(f"{name} does not fit the logits", got=tuple(tensor.shape), expected=shape)
        if tensor.requires_grad:
            raise InputError(f"{name} requires a gradient", remedy="Only the logits take one: detach it.")
    for name, (tensor, _shape) in {"classes": (classes, ()), **wanted}.items():
        if tensor.device != logits.device:
            remedy = "Move the batch to the model's device."
            raise InputError(f"{name} is on another device", got=tensor.device, expected=logits.device, remedy=remedy)


@torch.library.custom_op("token_labeling::token_cross_entropy", mutates_args=())
def _loss_op(
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    weight: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    early: bool,
    over: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum of losses, logsumexp [B, T], and with `early` the gradient [B, T, C], else nothing.

    over  the backward pass may write over the logits
    """
    count = logits.shape[2]
    if bool((classes >= count).any()):
        raise InputError(
            "targets name a class that the logits lack", got=f"class {int(classes.max())}",
            expected=f"below {count}", remedy="The model needs as many classes as the label store.",
        )  # fmt: skip
    loss, lse = (logits.new_empty(logits.shape[:2], dtype=_sum_dtype(logits)) for _ in range(2))
    gradient = _new_gradient(logits, early)
    for block, parts in _blocks(logits):
        target = _target(classes, scores, background, smoothing, partner, block, count, lse.dtype)
        scaled = target.subtracted(weight[block])
        total, at_ids = torch.empty_like(lse[block]), lse.new_empty(target.ids.shape)
        for images, within in parts:
            x = logits[images].to(lse.dtype)
            powers, norm, shift = _powers(x, gradient[images] if early else torch.empty_like(x))
            torch.log(norm[..., 0], out=lse[images])
            if shift is not None:
                lse[images] += shift
            total[within] = x.sum(2)
            torch.gather(x, 2, target.ids[within], out=at_ids[within])
            if early:
                _finish_gradient(powers, scaled.total[within, :, None] / norm, scaled, within)
        loss[block] = target.total * lse[block] - target.rest * total - at_ids.mul_(target.extra).sum(2)
    return (loss * weight).sum(), lse, gradient


def _new_gradient(logits: torch.Tensor, early: bool) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if early else logits.new_empty(0)


def _powers(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """e^(x − shift) in `out`, its sum [n, T, 1] over classes, and the shift [n, T].

    Logits of usual size need none, which saves two passes over them. The bounds leave every power that counts a normal
    number; NaN and infinity fail them.
    """
    powers = torch.exp(x, out=out)
    norm = powers.sum(2, keepdim=True)
    low, high = norm.aminmax()
    if low > 1e-20 and high < 1e30:
        return powers, norm, None
    top = x.amax(2, keepdim=True)
    powers = torch.sub(x, top, out=out).exp_()
    return powers, powers.sum(2, keepdim=True), top[..., 0]


def _finish_gradient(powers: torch.Tensor, factor: torch.Tensor, target: _Target, within: slice) -> None:
    """Powers of e [n, T, C] to factor·powers − target, in place; `target` as `_Target.subtracted` gives it."""
    powers.mul_(factor).sub_(target.rest[within, :, None])
    powers.scatter_add_(2, target.ids[within], target.extra[within])


@_loss_op.register_fake
def _(logits, classes, scores, background, weight, smoothing, partner, early, over):  # type: ignore[no-untyped-def]
    dtype = _sum_dtype(logits)
    lse = logits.new_empty(logits.shape[:2], dtype=dtype)
    return logits.new_empty((), dtype=dtype), lse, _new_gradient(logits, early)


@_loss_op.register_kernel("cuda")
def _(logits, classes, scores, background, weight, smoothing, partner, early, over):  # type: ignore[no-untyped-def]
    from train import loss_triton

    loss, lse = loss_triton.token_loss(logits, classes, scores, background, smoothing, partner)
    return (loss * weight).sum(), lse, logits.new_empty(0)


def _write_gradient(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    lse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The gradient of Σ weight·loss to `out`, which may be the logits."""
    if logits.is_cuda:
        from train import loss_triton

        loss_triton.token_gradient(weight, logits, classes, scores, background, smoothing, partner, lse, out)
        return
    for block, parts in _blocks(logits):
        target = _target(classes, scores, background, smoothing, partner, block, logits.shape[2], lse.dtype)
        scaled = target.subtracted(weight[block])
        for images, within in parts:
            x = logits[images].to(lse.dtype)
            powers = torch.sub(x, lse[images, :, None], out=out[images] if out.dtype == x.dtype else x).exp_()
            _finish_gradient(powers, scaled.total[within, :, None], scaled, within)
            if out.dtype != x.dtype:
                out[images] = powers


@torch.library.custom_op("token_labeling::token_cross_entropy_gradient", mutates_args=())
def _gradient_op(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    lse: torch.Tensor,
) -> torch.Tensor:
    out = _new_gradient(logits, True)
    _write_gradient(weight, logits, classes, scores, background, smoothing, partner, lse, out)
    return out


@_gradient_op.register_fake
def _(weight, logits, *_):  # type: ignore[no-untyped-def]
    return _new_gradient(logits, True)


@torch.library.custom_op("token_labeling::token_cross_entropy_gradient_", mutates_args=("logits",))
def _gradient_over_logits_op(
    weight: torch.Tensor,
    logits: torch.Tensor,
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    lse: torch.Tensor,
) -> None:
    _write_gradient(weight, logits, classes, scores, background, smoothing, partner, lse, logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, classes, scores, background, weight, ctx.smoothing, partner, ctx.early, ctx.over = inputs
    _, lse, gradient = output
    ctx.mark_non_differentiable(lse, gradient)
    ctx.set_materialize_grads(False)  # or torch fills a tensor with zeros as the gradient of `gradient`
    ctx.save_for_backward(logits, classes, scores, background, weight, partner, lse)
    ctx.gradient = gradient if ctx.early else None


def _backward(ctx: Any, factor: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if factor is None:
        return (None,) * 9
    if torch.is_grad_enabled():
        raise RuntimeError("token_cross_entropy has no second derivative (create_graph); train.loss_reference has")
    logits, classes, scores, background, weight, partner, lse = ctx.saved_tensors
    if ctx.early:
        # What was formed early is given away. Later passes through a retained graph form the same again, to the bit.
        out, ctx.gradient = ctx.gradient, None
        if out is None:
            out = _loss_op(logits, classes, scores, background, weight, ctx.smoothing, partner, True, False)[2]
        out = out if factor == 1 else out.mul_(factor)
        return (out, *(None,) * 8)
    arguments = (weight * factor, logits, classes, scores, background, ctx.smoothing, partner, lse)
    if ctx.over:
        _gradient_over_logits_op(*arguments)
        out = logits.detach()
    else:
        out = _gradient_op(*arguments)
    return (out, *(None,) * 8)


_loss_op.register_autograd(_backward, setup_context=_keep)


class _Target(NamedTuple):
    """Targets of n images' tokens: every class has `rest`, the palette's `extra` beyond it; `total` is their sum, S."""

    ids: torch.Tensor  # int64 [n, T, P], 0 where a place is unused: it has no extra
    extra: torch.Tensor  # [n, T, P]
    rest: torch.Tensor  # [n, T]
    total: torch.Tensor  # [n, T]

    def subtracted(self, weight: torch.Tensor) -> _Target:
        """Weighted, and the palette's part with the sign that it has in a gradient."""
        weight = weight.to(self.rest.dtype)
        return _Target(self.ids, self.extra * -weight[..., None], self.rest * weight, self.total * weight)


def _target(
    classes: torch.Tensor,
    scores: torch.Tensor,
    background: torch.Tensor,
    smoothing: float,
    partner: torch.Tensor | None,
    images: slice,
    count: int,
    dtype: torch.dtype,
) -> _Target:
    own = _own_target(classes[images], scores[images], background[images], smoothing, count, dtype)
    if partner is None:
        return own
    batch = len(classes)
    others = slice(batch - images.stop, batch - images.start)  # backwards they are the partners, B−1−b of b
    other = _own_target(classes[others], scores[others], background[others], smoothing, count, dtype)
    inside = partner[:, None]
    ids, extra = (torch.where(inside, b.flip(0), a) for a, b in zip(own[:2], other[:2], strict=True))
    return _Target(ids, extra, torch.where(partner, other.rest.flip(0), own.rest), own.total)


def _own_target(
    classes: torch.Tensor, v: torch.Tensor, b: torch.Tensor, smoothing: float, count: int, dtype: torch.dtype
) -> _Target:
    off = smoothing / count
    on = 1 - smoothing + off
    unused = classes[..., None] < 0
    left = count - classes.shape[1] + unused.sum(1)
    # With every class in the palette the background is nobody's score, and may be far above all.
    v, b = v.to(dtype).masked_fill(unused, -math.inf), b.to(dtype).masked_fill(left <= 0, -math.inf)
    top = torch.maximum(v.amax(1), b)
    v, b = v.sub_(top[:, None]).exp_(), b.sub_(top).exp_()
    share = on / (v.sum(1) + left * b)
    extra = v.sub_(b[:, None]).mul_(share[:, None]).masked_fill_(unused, 0)
    ids = classes.clamp(min=0)[:, None].expand_as(extra.mT)
    return _Target(ids, extra.mT, share * b + off, torch.full_like(b, on + count * off))


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Images whose targets are reckoned together, and their parts: images of the batch, and where they are in theirs.

    A part is as many images as have `PART` logits, or one.
    """
    batch, tokens, count = logits.shape
    step = max(1, PART // (tokens * count))
    for start in range(0, batch, PARTS * step):
        stop = min(start + PARTS * step, batch)
        firsts = range(start, stop, step)
        parts = [(slice(i, min(i + step, stop)), slice(i - start, min(i + step, stop) - start)) for i in firsts]
        yield slice(start, stop), parts


def _sum_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
