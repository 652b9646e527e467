"""The token-labeling loss: the published losses, closed form against dense targets, and what it refuses.

Legend: B images; C classes; P palette size; h×w token grid, T = h·w.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file

from labeler.errors import InputError
from pipeline.batch import Batch
from pipeline.geometry import Views, identity
from pipeline.mix import MixBox
from pipeline.targets import TokenTargets, label_targets
from train.loss import TokenLabelLoss, token_cross_entropy
from train.loss_reference import cross_entropy, dense_token_label_loss, smoothed

GRID = (3, 4)
BOX = MixBox(1, 0, 3, 3, 0.5)
FIXTURE = SHARED / "fixtures" / "token_targets"
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
mixed_or_not = pytest.mark.parametrize("mix", [None, BOX], ids=["not mixed", "mixed"])


def make_batch(targets: TokenTargets, mix: MixBox | None = None, labels: torch.Tensor | None = None) -> Batch:
    n = len(targets)
    labels = torch.full((n,), -1) if labels is None else labels
    h, w = (14, 14) if targets.token_background.shape[1] == 196 else GRID
    views = Views(torch.zeros(n, 4), identity(n))
    return Batch(torch.zeros(n, 3, 8 * h, 8 * w), targets, labels, mix, ("",) * n, np.full(n, -1), views)


def make_targets(
    batch: int, palette: int, classes: int, dtype: torch.dtype = torch.float32, unused: int = 0
) -> TokenTargets:
    """Random ones; the last `unused` places of every other image are empty."""
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(max(classes, palette), generator=random)[:palette] for _ in range(batch)])
    if unused:
        ids[::2, -unused:] = -1
    shapes = ((batch, palette, 12), (batch, 12), (batch, palette), (batch,))
    return TokenTargets(ids, *(2 * torch.randn(shape, generator=random, dtype=dtype) for shape in shapes))


def make_outputs(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    shapes = ((batch, classes), (batch, 12, classes))
    cls_logits, aux_logits = (torch.randn(s, generator=random, dtype=dtype).mul_(2).requires_grad_() for s in shapes)
    return cls_logits, aux_logits


def as_double(batch: Batch) -> Batch:
    classes, *scores = (getattr(batch.targets, field.name) for field in dataclasses.fields(batch.targets))
    return dataclasses.replace(batch, targets=TokenTargets(classes, *(part.double() for part in scores)))


def assert_equals_dense(batch: Batch, dtype: torch.dtype, classes: int, **options: object) -> None:
    """Value and gradients, against the dense loss in float64."""
    outputs = make_outputs(len(batch), classes, dtype)
    loss = TokenLabelLoss(**options)(outputs, batch)  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, outputs)
    outputs = tuple(logits.detach().double().requires_grad_() for logits in outputs)
    dense = dense_token_label_loss(outputs, as_double(batch), GRID, **options)  # type: ignore[arg-type]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert loss.dtype == dtype
    assert abs(loss - dense) <= tolerance * abs(dense)
    for one, other in zip(found, torch.autograd.grad(dense, outputs), strict=True):
        assert (one - other).abs().max() <= tolerance * max(1e-3, float(other.abs().max()))


@both_types
@mixed_or_not
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "palette", "classes", "unused"),
    [(4, 6, 23, 0), (5, 6, 23, 3), (1, 6, 23, 2), (3, 1, 7, 0), (3, 7, 7, 0), (2, 9, 7, 2), (2, 4, 9, 4)],
    ids=["even", "odd, unused", "one image", "one place", "P = C", "P > C", "empty palettes"],
)
def test_closed_form_equals_dense(
    dtype: torch.dtype, mix: MixBox | None, smoothing: float, batch: int, palette: int, classes: int, unused: int
) -> None:
    targets = make_targets(batch, palette, classes, dtype, unused)
    if palette > classes:
        targets.classes[:, classes:] = -1
        targets.classes[:, :classes] = torch.arange(classes).flip(0)
    assert_equals_dense(make_batch(targets, mix), dtype, classes, smoothing=smoothing)


@both_types
@mixed_or_not
def test_known_labels_on_every_token(dtype: torch.dtype, mix: MixBox | None) -> None:
    batch = make_batch(label_targets(torch.tensor([3, 0, 6]), 12), mix)
    assert_equals_dense(batch, dtype, 7)
    assert_equals_dense(batch, dtype, 7, smoothing=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@mixed_or_not
def test_ground_truth_and_weights(mix: MixBox | None, smoothing: float) -> None:
    targets = make_targets(5, 6, 23, torch.float64, 2)
    targets.cls_scores[:3, 1] = 9.0
    labels = torch.stack([targets.classes[0, 1], targets.classes[1, 0], *torch.tensor([-1, 22, 0])])
    options = {"dense_weight": 0.3, "cls_weight": 2.0, "smoothing": smoothing, "ground_truth": True}
    assert_equals_dense(make_batch(targets, mix, labels), torch.float64, 23, **options)


def test_many_classes_and_large_logits() -> None:
    """More than one part and block of images; logits whose powers overflow; class logits of a batch in one part."""
    random, targets = torch.Generator().manual_seed(0), make_targets(70, 5, 3000, torch.float64)
    logits = (300 * torch.randn(70, 12, 3000, generator=random, dtype=torch.float64)).requires_grad_()
    parts, inside = (targets.classes, targets.token_scores, targets.token_background), BOX.mask(GRID)
    loss = token_cross_entropy(logits, *parts, 0.1, inside)
    dense = smoothed(targets.dense_tokens(3000), 0.1)
    expected = cross_entropy(torch.where(inside[:, None], dense.flip(0), dense), logits).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    (one,), (other,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def palette_of_all(target: torch.Tensor, target_hard: torch.Tensor, hard: bool) -> TokenTargets:
    """Published targets [B, C, 2 + T], smoothed by 0.1, as palettes of all C classes.

    A hard target comes smoothed otherwise, 1 − s + s/C and s/C: it is taken as it is, for a loss without smoothing.
    """
    n, classes, off = len(target), target.shape[1], 0.1 / target.shape[1]
    whole, tokens = target[..., 1], target[..., 2:]
    if hard:
        whole, tokens = target_hard, target_hard[..., None].expand(-1, -1, 196)
    else:
        whole, tokens = ((part - off).clamp(min=1e-12) / (0.9 + off) for part in (whole, tokens))
    ids = torch.arange(classes).repeat(n, 1)
    return TokenTargets(ids, tokens.log(), whole.new_zeros(n, 196), whole.log(), whole.new_zeros(n))


@pytest.mark.skipif(not FIXTURE.with_suffix(".json").exists(), reason="the fixtures are not at hand")
@both_types
def test_published_losses(dtype: torch.dtype) -> None:
    t, about, done = load_file(f"{FIXTURE}.safetensors"), json.loads(Path(f"{FIXTURE}.json").read_text()), 0
    for row in about["loss_table"]:
        hard, truth = row["target"] == "hard", row["ground_truth"]
        if truth and row["repo"] == "DeMansia" and not hard:
            continue  # another blend, see train.loss_reference
        (y0, x0, y1, x1), aux = row["box"], t["loss.aux"].to(dtype)
        mix = MixBox(y0, x0, y1, x1, 1 - (y1 - y0) * (x1 - x0) / 196)
        # Published models swap the auxiliary logits back; ours do not.
        inside = mix.mask((14, 14))[:, None]
        outputs = [x.requires_grad_() for x in (t["loss.output"].to(dtype), torch.where(inside, aux.flip(0), aux))]
        targets = palette_of_all(t["loss.target"].to(dtype), t["loss.target_hard"].to(dtype), hard)
        labels = t["loss.target"][..., 0].argmax(1)
        # The published code blends soft targets only.
        loss = TokenLabelLoss(row["dense_weight"], row["cls_weight"], 0.0 if hard else 0.1, truth and not hard)
        found = loss(outputs, make_batch(targets, mix, labels))
        # The published targets are float32 even where the logits are float64.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-7
        assert found.item() == pytest.approx(row["loss_f64"], rel=tolerance), row
        if row["row"] == about["measured"]["loss_grad_row"]:
            cls_gradient, aux_gradient = torch.autograd.grad(found, outputs)
            aux_gradient = torch.where(inside, aux_gradient.flip(0), aux_gradient)
            for one, other in ((cls_gradient, t["loss.grad_output"]), (aux_gradient, t["loss.grad_aux"])):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        done += 1
    assert done == 42


def test_gradcheck() -> None:
    targets = make_targets(3, 4, 6, torch.float64, 1)
    batch = make_batch(targets, BOX, torch.tensor([1, -1, 5]))
    loss = TokenLabelLoss(0.7, 1.3, ground_truth=True)
    torch.autograd.gradcheck(lambda *outputs: loss(outputs, batch), make_outputs(3, 6, torch.float64))
    parts = targets.classes, targets.token_scores, targets.token_background
    weight, logits = torch.randn(3, 12, dtype=torch.float64), make_outputs(3, 6, torch.float64)[1]
    torch.autograd.gradcheck(lambda x: token_cross_entropy(x, *parts, 0.1, BOX.mask(GRID), weight).cos(), logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_half_precision_is_reckoned_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    batch, outputs = make_batch(make_targets(4, 6, 23), BOX), make_outputs(4, 23, dtype)
    loss = 1024 * TokenLabelLoss()(outputs, batch)
    wide = tuple(logits.detach().double().requires_grad_() for logits in outputs)
    dense = 1024 * dense_token_label_loss(wide, as_double(batch), GRID)
    assert loss.dtype == torch.float32
    assert abs(loss - dense) < 1e-6 * dense
    for one, other in zip(torch.autograd.grad(loss, outputs), torch.autograd.grad(dense, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-6)  # one rounding


def test_class_logits_alone_targets_untouched_and_lam() -> None:
    targets, outputs = make_targets(4, 6, 23, unused=2), make_outputs(4, 23)
    kept = [getattr(targets, field.name).clone() for field in dataclasses.fields(targets)]
    for mix in (None, BOX, MixBox(0, 0, 3, 4, 0.0), MixBox(1, 1, 1, 1, 1.0)):
        batch = make_batch(targets, mix, torch.arange(4))
        alone = TokenLabelLoss(ground_truth=True)(outputs[0], batch)
        torch.testing.assert_close(alone, TokenLabelLoss(0.0, ground_truth=True)(outputs, batch))
        TokenLabelLoss(ground_truth=True)(outputs, batch).backward()
    for field, before in zip(dataclasses.fields(targets), kept, strict=True):
        assert torch.equal(getattr(targets, field.name), before)
    partners = TokenLabelLoss()(outputs[0], make_batch(targets, MixBox(0, 0, 3, 4, 0.0)))
    torch.testing.assert_close(partners, TokenLabelLoss()(outputs[0].flip(0), make_batch(targets)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_not_hidden(bad: float) -> None:
    batch = make_batch(make_targets(4, 6, 23))
    for which in (0, 1):
        outputs = [logits.detach().clone() for logits in make_outputs(4, 23)]
        outputs[which].flatten()[5] = bad
        assert not TokenLabelLoss()(outputs, batch).isfinite()


def test_in_place_twice_and_second_derivative() -> None:
    cls_logits, leaf = make_outputs(4, 23)
    batch = make_batch(make_targets(4, 6, 23), BOX)
    loss = 3 * TokenLabelLoss()((cls_logits, leaf), batch)
    expected, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] / 3 for _ in range(2))
    assert torch.equal(expected, again)
    logits = leaf * 1
    used_elsewhere = logits.square().sum()
    loss = TokenLabelLoss(in_place=True)((cls_logits, logits), batch)
    found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == logits.data_ptr()
    for another in (loss, used_elsewhere):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            another.backward()
    before, loss = leaf.detach().clone(), TokenLabelLoss(in_place=True)((cls_logits, leaf), batch)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
    assert torch.equal(leaf, before)  # a parameter or an input is never overwritten
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(TokenLabelLoss()((cls_logits, leaf), batch), leaf, create_graph=True)


def test_compiled_equals_eager_for_any_box() -> None:
    torch._dynamo.reset()
    outputs, targets, loss = make_outputs(4, 23), make_targets(4, 6, 23), TokenLabelLoss(0.5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for box in (None, BOX, MixBox(0, 1, 2, 4, 0.5), MixBox(2, 2, 3, 3, 11 / 12), MixBox(0, 0, 3, 4, 0.0)):
        batch = make_batch(targets, box)
        found, expected = (torch.autograd.grad(f(outputs, batch), outputs) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)


def test_bad_input_is_named() -> None:
    targets = make_targets(4, 6, 23)
    (cls_logits, aux_logits), batch, loss = make_outputs(4, 23), make_batch(targets), TokenLabelLoss()
    outside = make_batch(targets, MixBox(0, 0, 4, 4, 0.0))
    odd = dataclasses.replace(make_batch(targets, BOX), images=torch.zeros(4, 3, 32, 32))
    grows = dataclasses.replace(targets, token_scores=targets.token_scores.clone().requires_grad_())
    for outputs, data, message in (
        ((cls_logits, aux_logits, aux_logits), batch, r"got tuple of 3"),
        ({"cls": cls_logits}, batch, "got dict"),
        ((cls_logits[:3], aux_logits), batch, r"class logits.*got \(3, 23\), expected \(4, C\)"),
        ((cls_logits, aux_logits[:, :9]), batch, r"got \(4, 9, 23\), expected \(4, 12, 23\).*grid"),
        ((cls_logits, aux_logits), odd, r"tokens do not fit their grid.*grid="),
        ((cls_logits, aux_logits), outside, "mix box leaves the token grid"),
        ((cls_logits[:, :5], aux_logits[..., :5]), batch, r"targets name a class that the logits lack.*below 5"),
        ((cls_logits, aux_logits), make_batch(grows), "scores requires a gradient"),
        ((cls_logits, aux_logits.int()), batch, "logits are not usable: got torch.int32"),
    ):
        with pytest.raises(InputError, match=message):
            loss(outputs, data)  # type: ignore[arg-type]
    assert TokenLabelLoss(grid=GRID)((cls_logits, aux_logits), odd).isfinite()
    for options in ({"smoothing": 1.0}, {"dense_weight": -1.0}, {"cls_weight": float("nan")}):
        with pytest.raises(InputError, match="out of range"):
            TokenLabelLoss(**options)
