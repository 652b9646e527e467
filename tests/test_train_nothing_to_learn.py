"""A student that answers as its teacher has nothing to learn, whatever kind of store the answer came through.

A loss whose targets are normalised over all classes and whose student is not, or the other way round, pulls a perfect
student away. Here the student is made from the store's distributions, or from the files that were imported, and the
loss from what the loader makes of the same store.

Legend: B images; C classes; H×W map grid, which is the token grid here; T tokens.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ColourTeacher

from labeler import LabelerConfig, LabelStore, TeacherConfig, import_token_label_files, label_images
from pipeline import Batch, LoaderConfig, MixBox, create_loader
from train.loss.token_label_loss import TokenLabelLoss

GRID, CLASSES = 4, 40
BOX = MixBox(1, 0, 3, 3, 1 - 6 / 16)
OLD = Path(__file__).parent / "fixtures" / "store_1_0"


class ManyClasses(ColourTeacher):
    """Forty classes by colour, far more than have a place in the stores below."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(2 * torch.randn(CLASSES, 3, generator=generator), requires_grad=False)
        self.bias = torch.nn.Parameter(2 * torch.randn(CLASSES, 1, 1, generator=generator), requires_grad=False)

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        return super().score_maps(images) + self.bias


def many_classes() -> torch.nn.Module:
    return ManyClasses()


def coded(images: Path, folder: Path, config: LabelerConfig) -> tuple[Path, Path, torch.Tensor]:
    """Codes, cells that count as background, a tail, and classes in none of them."""
    settings = {"palette": 5, "tail": 9, "levels": 20, "threshold": 3e-3}
    return labeled(images, folder, dataclasses.replace(config, **settings), "uint8", 9)


def halves(images: Path, folder: Path, config: LabelerConfig) -> tuple[Path, Path, torch.Tensor]:
    settings = {"palette": 5, "precision": "float16", "levels": None, "threshold": None}
    return labeled(images, folder, dataclasses.replace(config, **settings), "float16", 0)


def labeled(
    images: Path, folder: Path, config: LabelerConfig, precision: str, tail: int
) -> tuple[Path, Path, torch.Tensor]:
    teacher = TeacherConfig("test_train_nothing_to_learn:many_classes")
    label_images(images, folder / "labels", dataclasses.replace(config, teacher=teacher))
    meta = LabelStore(folder / "labels").meta
    assert (meta.score_kind, meta.precision, meta.palette, meta.tail) == ("logprob", precision, 5, tail)
    return images, folder / "labels", stored(folder / "labels")


def old_format(images: Path, folder: Path, config: LabelerConfig) -> tuple[Path, Path, torch.Tensor]:
    shutil.copytree(OLD, folder / "old")
    assert LabelStore(folder / "old/labels").meta.format_version == "1.0"
    return folder / "old/images", folder / "old/labels", stored(folder / "old/labels")


def imported(images: Path, folder: Path, config: LabelerConfig) -> tuple[Path, Path, torch.Tensor]:
    """The teacher is the reference's own reading of its files: 0 is the logit of all but each cell's first five."""
    answers = []
    for i, path in enumerate(sorted(images.rglob("*.jpg"))):
        generator = torch.Generator().manual_seed(i)
        values, ids = (3 * torch.randn(CLASSES, GRID, GRID, generator=generator)).topk(5, dim=0)
        target = (folder / "maps" / path.relative_to(images)).with_suffix(".pt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([values.half(), ids.half()]), target)
        logits = torch.zeros(CLASSES, GRID, GRID, dtype=torch.float64)
        answers.append(logits.scatter_(0, ids, values.half().double()).softmax(0))
    store = folder / "labels"
    import_token_label_files(folder / "maps", images, store, num_classes=CLASSES, progress=False)
    assert LabelStore(store).meta.score_kind == "logit"
    return images, store, torch.stack(answers)


def stored(store: Path) -> torch.Tensor:
    """float64 [N, C, H, W]: the distributions that a store says, each row decoded by itself."""
    labels = LabelStore(store)
    return torch.stack([torch.from_numpy(labels.read([row]).dense()[0]).double() for row in range(len(labels))])


def whole_images(images: Path, store: Path) -> Batch:
    """All images, each shown whole, so that each token is one cell of the map."""
    settings = {"train": False, "crop_pct": 1.0, "crop_mode": "squash", "backend": "pil", "progress": False}
    loader = create_loader(
        LoaderConfig(str(images), str(store), batch_size=64, image_size=32, grid=(GRID, GRID), **settings)
    )
    (batch,) = loader
    assert batch.rows.tolist() == list(range(len(batch)))
    return batch


@pytest.mark.parametrize("mix", [None, BOX], ids=["not mixed", "mixed"])
@pytest.mark.parametrize("kind", [coded, halves, old_format, imported])
def test_a_student_equal_to_its_teacher_has_no_gradient(kind: Callable, mix: MixBox | None, tmp_path, images, config):
    images, store, teacher = kind(images, tmp_path, config)
    batch = dataclasses.replace(whole_images(images, store), mix=mix)
    tokens = teacher.flatten(2).mT
    whole = teacher.log().mean((2, 3)).softmax(1)  # scores are averaged first, and are normalised after
    if mix is not None:
        tokens = torch.where(mix.mask((GRID, GRID))[:, None], tokens.flip(0), tokens)
        whole = mix.lam * whole + (1 - mix.lam) * whole.flip(0)
    for shift in (0.0, 7.0):  # logits are only known up to a constant
        cls, aux = gradients(batch, whole.log() + shift, tokens.log() - shift)
        assert cls.abs().max() < 2e-6
        assert aux.abs().max() < 2e-6
    # Normalised over its first classes alone, the same student would be pulled away.
    first = whole.argsort(1, descending=True)[:, :5]
    kept = torch.zeros_like(whole).scatter_(1, first, 1.0).clamp(min=1e-30)
    cut = whole * kept, tokens * kept[:, None]
    for gradient in gradients(batch, *((p / p.sum(-1, keepdim=True)).log() for p in cut)):
        assert gradient.abs().max() > 1e-3


def gradients(batch: Batch, cls: torch.Tensor, aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each image's class logits [B, C] and of each token's [B, T, C], in the type that training uses."""
    outputs = cls.float().requires_grad_(), aux.float().requires_grad_()
    loss = TokenLabelLoss(smoothing=0.0)(outputs, batch)
    one, other = torch.autograd.grad(loss, outputs)
    return one * len(batch), other * aux[..., 0].numel()
