"""`Batch` made and moved by somebody else's loop: defaults, devices, pinned memory, DataLoader, Lightning, accelerate.

Legend: B images; S input side; P palette size; T tokens.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from labeler import InputError, ScoreMaps
from pipeline import Batch, MixBox, TokenTargets, Views
from pipeline.targets.token_targets import label_targets
from train.loss.token_label_loss import TokenLabelLoss
from train.micro_batches import micro_batches

B, P, T, S, CLASSES = 3, 2, 4, 8, 5
META = torch.device("meta")


def foreign(mix: MixBox | None = None) -> Batch:
    """What a loop of one's own can give: images, targets, labels."""
    random = torch.Generator().manual_seed(0)
    classes = torch.tensor([[0, 3], [1, -1], [4, 2]])
    planes = (torch.randn(*shape, generator=random) for shape in ((B, P, T), (B, T), (B, P), (B,)))
    return Batch(torch.randn(B, 3, S, S, generator=random), TokenTargets(classes, *planes), torch.arange(B), mix)


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    yield from (batch.images, batch.labels)
    yield from batch.targets.tensors().values()


def test_images_targets_and_labels_make_a_batch():
    batch = Batch(torch.zeros(B, 3, S, S), label_targets(torch.arange(B), T), torch.arange(B))
    assert batch.mix is None
    assert batch.token_mix is None
    assert batch.keys == ("",) * B
    assert batch.rows.tolist() == [-1] * B
    places = torch.rand(B, 6, 2, dtype=torch.float64)
    assert torch.equal(batch.views.to_image(places), places)  # each input shows all of its image


def test_a_foreign_batch_serves_loss_and_micro_batches():
    batch = foreign(MixBox(0, 0, 1, 2, 0.5))
    outputs = torch.randn(B, CLASSES), torch.randn(B, T, CLASSES)
    outputs = tuple(part.requires_grad_() for part in outputs)
    criterion = TokenLabelLoss()
    batch = replace(batch, targets=replace(batch.targets, grid=(2, 2), num_classes=CLASSES))
    parts = micro_batches(batch, 2)
    assert [(part.targets.grid, part.targets.num_classes) for part in parts] == [((2, 2), CLASSES)] * 2
    assert [len(part) for part in parts] == [2, 1]
    order = [[0, 2], [1]]
    split = sum(
        criterion(tuple(out[i] for out in outputs), part) * len(part) / B for part, i in zip(parts, order, strict=True)
    )
    torch.testing.assert_close(split, criterion(outputs, batch))


def test_parts_of_other_lengths_are_refused():
    whole = foreign()
    for targets, labels in ((label_targets(torch.arange(2), T), whole.labels), (whole.targets, torch.arange(4))):
        with pytest.raises(InputError, match="one target and one label for each image: got 3 images"):
            Batch(whole.images, targets, labels)


def test_score_maps_need_neither_region_nor_tail():
    maps = ScoreMaps(np.array([[0, 3]]), np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 4, 4), np.float32), None, 5)
    assert maps.region.tolist() == [[0, 0, 1, 1]]
    assert maps.tail_classes.shape == maps.tail_offsets.shape == (1, 0)


def test_a_batch_moves_to_a_device_as_a_whole():
    """The meta device stands for a GPU: it holds no numbers, and every machine has it."""
    batch = foreign(MixBox(0, 0, 1, 2, 0.5))
    moved = batch.to(META, non_blocking=True)
    assert all(part.device == META for part in tensors(moved))
    assert (moved.mix, moved.keys) == (batch.mix, batch.keys)
    assert moved.views is batch.views
    assert batch.images.device.type == "cpu"
    assert torch.equal(batch.to("cpu").images, batch.images)


@pytest.fixture
def pinned(monkeypatch) -> set[int]:
    """Addresses of what was pinned; without a GPU torch can pin nothing."""
    found: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        found.add(id(copy))
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return found


def test_torchs_pin_memory_pins_every_tensor(pinned):
    moved = pin_memory({"a": [foreign()]})["a"][0]  # what the DataLoader's thread calls
    assert isinstance(moved, Batch)
    assert all(id(part) in pinned for part in tensors(moved))
    assert torch.equal(moved.targets.token_scores, foreign().targets.token_scores)


class Batches(IterableDataset):
    def __iter__(self) -> Iterator[Batch]:
        yield from (foreign(), foreign(MixBox(0, 0, 1, 2, 0.5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataloader_hands_batches_on(workers):
    found = list(DataLoader(Batches(), batch_size=None, num_workers=workers))
    assert [type(batch) for batch in found] == [Batch, Batch]
    assert found[1].mix == MixBox(0, 0, 1, 2, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found[0]), tensors(foreign()), strict=True))
    assert isinstance(pickle.loads(pickle.dumps(found[0])).views, Views)


def test_lightning_moves_a_batch():
    fabric = pytest.importorskip("lightning.fabric.utilities.apply_func", reason="Lightning is not installed")
    moved = fabric.move_data_to_device([foreign(), {"b": foreign()}], META)
    assert all(part.device == META for batch in (moved[0], moved[1]["b"]) for part in tensors(batch))


def test_accelerate_moves_a_batch():
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    moved = operations.send_to_device([foreign(), {"b": foreign()}], META, non_blocking=True)
    assert all(part.device == META for batch in (moved[0], moved[1]["b"]) for part in tensors(batch))
