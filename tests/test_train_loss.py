"""The token-labeling loss: the published losses, closed form against dense targets, and what it refuses.

Legend: B images; C classes; P palette size; R tail size; h×w token grid, T = h·w.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fixtures import SOURCES, about, close, tensors

from labeler.base.errors import InputError
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from pipeline.targets.token_targets import TokenTargets, label_targets
from train.loss.loss_reference import cross_entropy, dense_token_label_loss, smoothed
from train.loss.token_label_loss import TokenLabelLoss, token_cross_entropy

GRID = (3, 4)
BOX = MixBox(1, 0, 3, 3, 0.5)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
tail_or_not = pytest.mark.parametrize("tail", [0, 5], ids=["no tail", "tail"])
mixed_or_not = pytest.mark.parametrize("mix", [None, BOX], ids=["not mixed", "mixed"])


def make_batch(targets: TokenTargets, mix: MixBox | None = None, labels: torch.Tensor | None = None) -> Batch:
    n = len(targets)
    labels = torch.full((n,), -1) if labels is None else labels
    h, w = (14, 14) if targets.token_background.shape[1] == 196 else GRID
    return Batch(torch.zeros(n, 3, 8 * h, 8 * w), targets, labels, mix)


def make_targets(
    batch: int, palette: int, classes: int, dtype: torch.dtype = torch.float32, unused: int = 0, tail: int = 0
) -> TokenTargets:
    """Random ones; the last `unused` places of every other image are empty.

    So is the last place of every tail, and all of the second image's.
    """
    random = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(max(classes, palette), generator=random) for _ in range(batch)])
    ids = order[:, :palette].clone()
    if unused:
        ids[::2, -unused:] = -1
    shapes = ((batch, palette, 12), (batch, 12), (batch, palette), (batch,))
    targets = TokenTargets(ids, *(2 * torch.randn(shape, generator=random, dtype=dtype) for shape in shapes))
    if not tail:
        return targets
    tail_ids = order[:, palette : palette + tail].clone()
    tail_ids[:, -1] = tail_ids[1:2] = -1
    offsets = 2 * torch.randn(tail_ids.shape, generator=random, dtype=dtype)
    offsets[:, -1] = math.nan  # never read
    return dataclasses.replace(targets, tail_classes=tail_ids, tail_offsets=offsets)


def tail_arguments(targets: TokenTargets) -> dict[str, torch.Tensor]:
    return {"tail_classes": targets.tail_classes, "tail_offsets": targets.tail_offsets}


def make_outputs(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    shapes = ((batch, classes), (batch, 12, classes))
    cls_logits, aux_logits = (torch.randn(s, generator=random, dtype=dtype).mul_(2).requires_grad_() for s in shapes)
    return cls_logits, aux_logits


def as_double(batch: Batch) -> Batch:
    wide = batch.targets.each(lambda part: part.double() if part.is_floating_point() else part)
    return dataclasses.replace(batch, targets=wide)


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
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("own", [7, 23], ids=["fewer classes", "as many classes"])
def test_the_class_head_of_own_classes_learns_the_labels_and_tokens_the_teacher(dtype, mix, smoothing, own):
    """Against the dense loss in float64; the second image has no label, and so no class loss."""
    labels = torch.tensor([3, -1, 6, 0, 3])
    batch = make_batch(make_targets(5, 6, 23, dtype, tail=4), mix, labels)
    options = {"smoothing": smoothing, "cls_weight": 0.7, "dense_weight": 0.4, "classes": "images"}
    outputs = make_outputs(5, own, dtype)[0], make_outputs(5, 23, dtype)[1]
    loss = TokenLabelLoss(**options)(outputs, batch)
    found = torch.autograd.grad(loss, outputs)
    wide = tuple(logits.detach().double().requires_grad_() for logits in outputs)
    dense = dense_token_label_loss(wide, as_double(batch), GRID, **options)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert loss.dtype == dtype
    assert abs(loss - dense) <= tolerance * abs(dense)
    for one, other in zip(found, torch.autograd.grad(dense, wide), strict=True):
        assert (one - other).abs().max() <= tolerance * max(1e-3, float(other.abs().max()))


def test_the_class_loss_of_own_classes_is_torchs_smoothed_cross_entropy():
    labels = torch.tensor([3, 1, 6, 0])
    cls_logits, cross = make_outputs(4, 7)[0], torch.nn.functional.cross_entropy
    for mix, lam in ((None, 1.0), (BOX, 0.5)):
        batch = make_batch(make_targets(4, 6, 23), mix, labels)
        loss = TokenLabelLoss(smoothing=0.1, classes="images")(cls_logits, batch)
        own, partners = (cross(cls_logits, y, label_smoothing=0.1) for y in (labels, labels.flip(0)))
        torch.testing.assert_close(loss, lam * own + (1 - lam) * partners)


def test_what_does_not_go_with_own_classes_is_refused():
    with pytest.raises(InputError, match=r"ground_truth blends .*Set ground_truth=false"):
        TokenLabelLoss(ground_truth=True, classes="images")
    with pytest.raises(InputError, match="classes is out of range: got 'folders'"):
        TokenLabelLoss(classes="folders")
    outputs = make_outputs(4, 7)[0], make_outputs(4, 23)[1]
    batch = make_batch(make_targets(4, 6, 23), labels=torch.tensor([3, 1, 6, 0]))
    with pytest.raises(InputError, match="auxiliary logits do not fit"):  # unless it was meant
        TokenLabelLoss()(outputs, batch)
    with pytest.raises(InputError, match="auxiliary logits do not fit"):
        TokenLabelLoss(classes="images")((outputs[0], outputs[1][:, 1:]), batch)


@both_types
@mixed_or_not
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "palette", "classes", "unused", "tail"),
    [(4, 6, 23, 0, 5), (5, 6, 23, 3, 9), (2, 4, 9, 4, 3), (4, 5, 9, 0, 4), (3, 6, 23, 0, 1)],
    ids=["even", "odd, unused", "empty palettes", "P + R = C", "all unused"],
)
def test_closed_form_with_a_tail_equals_dense(
    dtype: torch.dtype, mix: MixBox | None, smoothing: float, batch: int, palette: int, classes: int, unused: int,
    tail: int,
) -> None:  # fmt: skip
    targets = make_targets(batch, palette, classes, dtype, unused, tail)
    assert_equals_dense(make_batch(targets, mix), dtype, classes, smoothing=smoothing)


@mixed_or_not
def test_one_image_with_a_tail_and_one_whose_palette_is_all_classes(mix: MixBox | None) -> None:
    targets = make_targets(1, 4, 7, torch.float64)
    tail = dataclasses.replace(
        targets, tail_classes=targets.classes.new_tensor([[5, 6]]), tail_offsets=torch.ones(1, 2).double()
    )
    tail.classes[:] = torch.tensor([[0, 1, 2, 3]])
    assert_equals_dense(make_batch(tail, mix), torch.float64, 7)
    targets = make_targets(3, 7, 7, torch.float64)
    ids = torch.tensor([[-1, -1], [-1, 6], [5, 6]])
    targets.classes[:] = torch.arange(7)
    targets.classes[1, 6], targets.classes[2, 5:] = -1, -1  # palette and tail are all classes
    targets.cls_background[0] = targets.token_background[0] = 2000.0  # of nobody
    tail = dataclasses.replace(targets, tail_classes=ids, tail_offsets=torch.full((3, 2), -3.0).double())
    assert_equals_dense(make_batch(tail, mix), torch.float64, 7)


@mixed_or_not
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 31.75), (torch.float32, 100.0), (torch.float64, 800.0)])
def test_offsets_whose_powers_overflow(mix: MixBox | None, dtype: torch.dtype, offset: float) -> None:
    targets = make_targets(4, 6, 23, dtype, 2, 5)
    targets.tail_offsets[2, 0], targets.tail_offsets[3, 1], targets.tail_offsets[0, :4] = offset, offset, -offset
    outputs = make_outputs(4, 23, dtype)
    for smoothing in (0.0, 0.1):
        found = TokenLabelLoss(smoothing=smoothing)(outputs, make_batch(targets, mix))
        expected = dense_token_label_loss(outputs, as_double(make_batch(targets, mix)), GRID, smoothing=smoothing)
        # A score of 100 has a last bit of 8e-6.
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)
        gradients = (torch.autograd.grad(loss, outputs) for loss in (found, expected))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


def logit_targets() -> TokenTargets:
    """As of imported files: 0 is every class's score where it is not among a cell's first."""
    targets = make_targets(4, 6, 23, torch.float64)
    zero = torch.zeros_like(targets.token_background)
    scores = targets.token_scores.clamp(min=0)
    return dataclasses.replace(targets, token_scores=scores, token_background=zero, cls_background=zero[:, 0])


@mixed_or_not
@pytest.mark.parametrize("kind", ["palette", "palette and tail", "logit"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(kind: str, mix: MixBox | None) -> None:
    """Tokens and crop alike; of mixed images the crop's answer is the mean of both."""
    targets = logit_targets() if kind == "logit" else make_targets(4, 6, 23, torch.float64, 2, 5 * ("tail" in kind))
    tokens, whole = targets.dense_tokens(23), targets.dense_cls(23)
    if mix is not None:
        tokens = torch.where(mix.mask(GRID)[:, None], tokens.flip(0), tokens)
        whole = mix.lam * whole + (1 - mix.lam) * whole.flip(0)
    outputs = tuple(p.log().requires_grad_() for p in (whole, tokens))
    loss = TokenLabelLoss(smoothing=0.0)(outputs, make_batch(targets, mix))
    entropy = sum(-(p * p.log()).sum(-1).mean() for p in (whole, tokens))
    torch.testing.assert_close(loss, entropy, rtol=1e-12, atol=0)
    for gradient in torch.autograd.grad(loss, outputs):
        assert gradient.abs().max() < 1e-15
    # The teacher's answer, and no other, is where it vanishes.
    further = targets.tail_offsets + 0.01 if "tail" in kind else targets.tail_offsets
    moved = dataclasses.replace(targets, cls_background=targets.cls_background + 0.01, tail_offsets=further)
    cls_gradient, aux_gradient = torch.autograd.grad(
        TokenLabelLoss(smoothing=0.0)(outputs, make_batch(moved, mix)), outputs
    )
    assert cls_gradient.abs().max() > 1e-5
    assert (float(aux_gradient.abs().max()) > 1e-6) == ("tail" in kind)


@mixed_or_not
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@tail_or_not
def test_a_temperature_is_a_power_of_the_teachers_answer(mix: MixBox | None, temperature: float, tail: int) -> None:
    targets, outputs = make_targets(4, 6, 23, torch.float64, 2, tail), make_outputs(4, 23, torch.float64)
    batch, loss = make_batch(targets, mix), TokenLabelLoss(0.7, 1.3, temperature=temperature)
    tokens, whole = (p ** (1 / temperature) for p in (targets.dense_tokens(23), targets.dense_cls(23)))
    tokens, whole = (smoothed(p / p.sum(-1, keepdim=True), 0.1) for p in (tokens, whole))
    if mix is not None:
        tokens = torch.where(mix.mask(GRID)[:, None], tokens.flip(0), tokens)
        whole = mix.lam * whole + (1 - mix.lam) * whole.flip(0)
    expected = 1.3 * cross_entropy(whole, outputs[0]).mean() + 0.7 * cross_entropy(tokens, outputs[1]).mean()
    found = loss(outputs, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, outputs) for value in (found, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
    # It may change from step to step; 1 is the teacher as it is.
    loss.temperature = 1.0
    assert loss(outputs, batch) == TokenLabelLoss(0.7, 1.3)(outputs, batch) != found


@both_types
@mixed_or_not
def test_known_labels_on_every_token(dtype: torch.dtype, mix: MixBox | None) -> None:
    batch = make_batch(label_targets(torch.tensor([3, 0, 6]), 12), mix)
    assert_equals_dense(batch, dtype, 7)
    assert_equals_dense(batch, dtype, 7, smoothing=0.0)


@both_types
@tail_or_not
def test_autocast_does_not_round_the_logits(dtype: torch.dtype, tail: int) -> None:
    """Which it does for a matrix product, and a tail is one."""
    batch, outputs = make_batch(make_targets(4, 6, 23, dtype, tail=tail), BOX), make_outputs(4, 23, dtype)
    expected = TokenLabelLoss()(outputs, batch)
    gradient = torch.autograd.grad(expected, outputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = TokenLabelLoss()(outputs, batch)
        assert torch.equal(found, expected)
        for one, other in zip(torch.autograd.grad(found, outputs), gradient, strict=True):
            assert torch.equal(one, other)


@mixed_or_not
def test_the_class_that_the_teacher_names_may_be_of_the_tail(mix: MixBox | None) -> None:
    """Which decides how much of the truth is blended in. Images: right, wrong, unnamed first, all of one score."""
    ids, tail = torch.tensor([[3, 4], [3, 4], [3, 4], [4, 3]]), torch.tensor([[5, 6], [5, 6], [5, -1], [5, 6]])
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, -2.0], [0.5, 0.5]]).double()
    offsets = torch.tensor([[0.2, 2.0], [2.0, 0.2], [-1.0, 9.0], [0.0, 0.0]]).double()
    background = torch.tensor([0.0, 0.0, 0.0, 0.5]).double()
    targets = TokenTargets(
        ids, scores[..., None].expand(-1, -1, 12), background[:, None].expand(-1, 12), scores, background, tail, offsets
    )
    assert targets.dense_cls(9).argmax(1).tolist() == [6, 5, 0, 0]
    for labels in ([6, 6, 3, 4], [3, 5, 5, 3]):
        batch = make_batch(targets, mix, torch.tensor(labels))
        assert_equals_dense(batch, torch.float64, 9, ground_truth=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@mixed_or_not
def test_ground_truth_and_weights(mix: MixBox | None, smoothing: float) -> None:
    targets = make_targets(5, 6, 23, torch.float64, 2)
    targets.cls_scores[:3, 1] = 9.0
    labels = torch.stack([targets.classes[0, 1], targets.classes[1, 0], *torch.tensor([-1, 22, 0])])
    options = {"dense_weight": 0.3, "cls_weight": 2.0, "smoothing": smoothing, "ground_truth": True}
    assert_equals_dense(make_batch(targets, mix, labels), torch.float64, 23, **options)


@tail_or_not
def test_many_classes_and_large_logits(tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32, 32 and 6 images, in parts of 16; logits whose powers overflow."""
    monkeypatch.setattr("train.loss.smoothed_targets.PART", 16 * 12 * 3000)
    random, targets = torch.Generator().manual_seed(0), make_targets(70, 5, 3000, torch.float64, 0, tail)
    logits = (300 * torch.randn(70, 12, 3000, generator=random, dtype=torch.float64)).requires_grad_()
    parts, inside = (targets.classes, targets.token_scores, targets.token_background), BOX.mask(GRID)
    loss = token_cross_entropy(logits, *parts, 0.1, inside, **tail_arguments(targets))
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


@pytest.mark.parametrize("source", SOURCES)
@both_types
def test_published_losses(dtype: torch.dtype, source: str) -> None:
    t, told, done = tensors("token_targets", source), about("token_targets", source), 0
    for row in told["loss_table"]:
        hard, truth = row["target"] == "hard", row["ground_truth"]
        if truth and row["repo"] == "DeMansia" and not hard:
            continue  # another blend, see train.loss.loss_reference
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
        if row["row"] == told["measured"]["loss_grad_row"]:
            cls_gradient, aux_gradient = torch.autograd.grad(found, outputs)
            aux_gradient = torch.where(inside, aux_gradient.flip(0), aux_gradient)
            close(cls_gradient, t["loss.grad_output"], 1e-5)
            close(aux_gradient, t["loss.grad_aux"], 1e-5)
        done += 1
    assert done == 42


@tail_or_not
def test_gradcheck(tail: int) -> None:
    targets = make_targets(3, 4, 12, torch.float64, 1, tail)
    batch = make_batch(targets, BOX, torch.tensor([1, -1, 5]))
    loss = TokenLabelLoss(0.7, 1.3, ground_truth=True)
    torch.autograd.gradcheck(lambda *outputs: loss(outputs, batch), make_outputs(3, 12, torch.float64))
    parts = targets.classes, targets.token_scores, targets.token_background
    weight, logits = torch.randn(3, 12, dtype=torch.float64), make_outputs(3, 12, torch.float64)[1]
    inside, more = BOX.mask(GRID), tail_arguments(targets)
    torch.autograd.gradcheck(lambda x: token_cross_entropy(x, *parts, 0.1, inside, weight, **more).cos(), logits)


@tail_or_not
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_half_precision_is_reckoned_in_float32(dtype: torch.dtype, tolerance: float, tail: int) -> None:
    batch, outputs = make_batch(make_targets(4, 6, 23, tail=tail), BOX), make_outputs(4, 23, dtype)
    loss = 1024 * TokenLabelLoss()(outputs, batch)
    wide = tuple(logits.detach().double().requires_grad_() for logits in outputs)
    dense = 1024 * dense_token_label_loss(wide, as_double(batch), GRID)
    assert loss.dtype == torch.float32
    assert abs(loss - dense) < 1e-6 * dense
    for one, other in zip(torch.autograd.grad(loss, outputs), torch.autograd.grad(dense, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-6)  # one rounding


def test_class_logits_alone_targets_untouched_and_lam() -> None:
    targets, outputs = make_targets(4, 6, 23, unused=2, tail=5), make_outputs(4, 23)
    kept = {name: tensor.clone() for name, tensor in targets.tensors().items()}
    for mix in (None, BOX, MixBox(0, 0, 3, 4, 0.0), MixBox(1, 1, 1, 1, 1.0)):
        batch = make_batch(targets, mix, torch.arange(4))
        alone = TokenLabelLoss(ground_truth=True)(outputs[0], batch)
        torch.testing.assert_close(alone, TokenLabelLoss(0.0, ground_truth=True)(outputs, batch))
        TokenLabelLoss(ground_truth=True)(outputs, batch).backward()
    torch.testing.assert_close(targets.tensors(), kept, rtol=0, atol=0, equal_nan=True)
    partners = TokenLabelLoss()(outputs[0], make_batch(targets, MixBox(0, 0, 3, 4, 0.0)))
    torch.testing.assert_close(partners, TokenLabelLoss()(outputs[0].flip(0), make_batch(targets)))


@tail_or_not
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_not_hidden(bad: float, tail: int) -> None:
    batch = make_batch(make_targets(4, 6, 23, tail=tail))
    for which in (0, 1):
        outputs = [logits.detach().clone() for logits in make_outputs(4, 23)]
        outputs[which].flatten()[5] = bad
        assert not TokenLabelLoss()(outputs, batch).isfinite()


@tail_or_not
def test_in_place_twice_and_second_derivative(tail: int) -> None:
    cls_logits, leaf = make_outputs(4, 23)
    batch = make_batch(make_targets(4, 6, 23, tail=tail), BOX)
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


@tail_or_not
def test_compiled_equals_eager_for_any_box(tail: int) -> None:
    torch._dynamo.reset()
    outputs, targets, loss = make_outputs(4, 23), make_targets(4, 6, 23, tail=tail), TokenLabelLoss(0.5)
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
    beyond, learnt = targets.classes[:, :1] + 23, torch.zeros(4, 1, requires_grad=True)
    tails = {
        name: make_batch(dataclasses.replace(targets, tail_classes=ids, tail_offsets=offsets))
        for name, ids, offsets in (
            ("type", beyond.int(), learnt.detach()),
            ("length", targets.classes[:, :1], torch.zeros(4, 2)),
            ("grows", targets.classes[:, :1], learnt),
            ("beyond", beyond, learnt.detach()),
        )
    }
    grows = dataclasses.replace(targets, token_scores=targets.token_scores.clone().requires_grad_())
    for outputs, data, message in (
        ((cls_logits, aux_logits, aux_logits), batch, r"got tuple of 3"),
        ({"cls": cls_logits}, batch, "got dict"),
        ((cls_logits[:3], aux_logits), batch, r"class logits.*got \(3, 23\), expected \(4, C\)"),
        ((cls_logits, aux_logits[:, :9]), batch, r"got \(4, 9, 23\), expected \(4, 12, 23\).*grid"),
        ((cls_logits, aux_logits), odd, r"tokens do not fit their grid.*grid="),
        ((cls_logits, aux_logits), outside, "mix box leaves the token grid"),
        ((cls_logits[:, :5], aux_logits[..., :5]), batch, r"the targets name a class that the logits lack.*below 5"),
        ((cls_logits, aux_logits), make_batch(grows), "scores requires a gradient"),
        (
            (cls_logits, aux_logits),
            tails["type"],
            r"tail classes do not fit .* got torch.int32 .* int64",
        ),
        ((cls_logits, aux_logits), tails["length"], r"tail_offsets does not fit the logits: got \(4, 2\)"),
        ((cls_logits, aux_logits), tails["grows"], "tail_offsets requires a gradient"),
        ((cls_logits, aux_logits), tails["beyond"], r"a class that the logits lack: got class \d\d, expected below 23"),
        ((cls_logits, aux_logits.int()), batch, "logits cannot be used: got torch.int32"),
    ):
        with pytest.raises(InputError, match=message):
            loss(outputs, data)  # type: ignore[arg-type]
    assert TokenLabelLoss(grid=GRID)((cls_logits, aux_logits), odd).isfinite()
    known = dataclasses.replace(batch, targets=dataclasses.replace(targets, num_classes=24))
    for criterion in (loss, TokenLabelLoss(classes="images")):
        with pytest.raises(InputError, match="another number of classes than the targets: got 23, expected 24"):
            criterion((cls_logits, aux_logits), known)
    parts = targets.classes, targets.token_scores, targets.token_background
    with pytest.raises(InputError, match="a tail needs tail_classes and tail_offsets: got only one of them"):
        token_cross_entropy(aux_logits, *parts, 0.1, tail_classes=beyond)
    wrong = ({"smoothing": 1.0}, {"dense_weight": -1.0}, {"cls_weight": math.nan}, {"temperature": 0.0})
    for options in wrong:
        with pytest.raises(InputError, match="out of range"):
            TokenLabelLoss(**options)


def test_the_grid_comes_with_the_targets() -> None:
    """Six rows of two tokens in a square image: the image's sides would tell another grid."""
    outputs, box = make_outputs(4, 23), MixBox(4, 0, 6, 1, 10 / 12)
    targets = dataclasses.replace(make_targets(4, 6, 23), grid=(6, 2), num_classes=23)
    batch = dataclasses.replace(make_batch(targets, box), images=torch.zeros(4, 3, 32, 32))
    torch.testing.assert_close(TokenLabelLoss()(outputs, batch), dense_token_label_loss(outputs, batch, (6, 2)))


@tail_or_not
@mixed_or_not
def test_torch_func_differentiates_it(tail: int, mix: MixBox | None) -> None:
    outputs, batch = make_outputs(4, 23), make_batch(make_targets(4, 6, 23, tail=tail), mix)
    loss = TokenLabelLoss(ground_truth=True)
    expected = torch.autograd.grad(loss(outputs, batch), outputs)
    found = torch.func.grad(lambda both: loss(both, batch))(tuple(logits.detach() for logits in outputs))
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.jacrev(torch.func.grad(lambda logits: loss(logits, batch)))(outputs[0].detach())


@tail_or_not
def test_the_gradient_of_each_sample(tail: int) -> None:
    """As torch.func, Opacus and studies of influence ask for: each image's own, in one call."""
    outputs, targets = [logits.detach() for logits in make_outputs(4, 23)], make_targets(4, 6, 23, tail=tail)
    parts = list(targets.tensors().values())

    def loss(outputs: list[torch.Tensor], parts: list[torch.Tensor]) -> torch.Tensor:
        one = make_batch(TokenTargets(*(part[None] for part in parts)))
        return TokenLabelLoss()((outputs[0][None], outputs[1][None]), one)

    found = torch.func.vmap(torch.func.grad(loss))(outputs, parts)
    for i in range(4):
        expected = torch.func.grad(loss)([logits[i] for logits in outputs], [part[i] for part in parts])
        torch.testing.assert_close([gradient[i] for gradient in found], expected)
