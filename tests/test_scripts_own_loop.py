"""docs/own-loop.md does what it says: its code is run as it stands there, on a dozen images."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from tiny import CLASSES, colour_teacher, make_images

from labeler import LabelerConfig, label_images

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"
# What a try-out changes: where the data is, a small network, and less of everything.
CHANGES = {
    '"vit_small_patch16_224", num_classes=1000': f'"test_vit", num_classes={CLASSES}, img_size=32',
    'EPOCHS = "imagenet/train", "labels", 300': 'EPOCHS = "images", "labels", 4',
    "batch_size: int = 64, workers: int = 8": "batch_size: int = 4, workers: int = 1",
    "per_device_train_batch_size=64": "per_device_train_batch_size=4, use_cpu=True",
    "dataloader_num_workers=8": "dataloader_num_workers=1",
    "max_epochs=EPOCHS": "max_epochs=EPOCHS, accelerator='cpu', enable_progress_bar=False, logger=False",
}
LOOPS = {
    "Plain PyTorch": (),
    "timm's `train.py`": (),
    "Lightning": ("lightning",),
    "Hugging Face Trainer": ("transformers", "accelerate"),
}


def code(heading: str) -> str:
    """The code under a heading of the page, changed for a try-out."""
    part = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", part, re.S)
    for old, new in CHANGES.items():
        block = block.replace(old, new)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in six folders, their labels, and the page's `own_data.py`."""
    folder = tmp_path_factory.mktemp("own")
    make_images(folder / "images", 12, CLASSES)
    settings = {"shard_size": 4, "batch_size": 4, "decoder": "pil", "threads": 1, "progress": False}
    label_images(folder / "images", folder / "labels", LabelerConfig(TINY, levels=160, threshold=1e-6, **settings))
    (folder / "own_data.py").write_text(code("The data"))
    return folder


def test_every_loop_of_the_page_is_tried():
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.M)
    assert headings == ["The data", *LOOPS]
    page = PAGE.read_text()
    assert all(old in page for old in CHANGES)


@pytest.mark.parametrize("heading", LOOPS)
def test_a_loop_of_the_page_learns(folder, heading):
    for package in LOOPS[heading]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = folder / f"loop_{list(LOOPS).index(heading)}.py"
    script.write_text("import torch\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n" + code(heading))
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^epoch \d+ loss ([\d.]+)$", done.stdout, re.M)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_pages_crops_have_the_labels_of_their_own_places(folder, monkeypatch):
    """The teacher names a colour: asked about the crop itself, it answers as the crop of its map does."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    from own_data import MEAN, STD, Crops

    torch.manual_seed(0)
    crops = Crops("images", "labels", 32, (4, 4))
    batch = crops.collate([crops[row] for row in [*range(12)] * 8])
    assert batch.labels.tolist() == [row * CLASSES // 12 for row in range(12)] * 8
    pixels = batch.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    answers = colour_teacher().score_maps((pixels - 0.5) / 0.5).softmax(1).flatten(2).mT

    def distance(targets: torch.Tensor) -> float:
        return float((answers - targets).abs().sum(-1).mean())

    tokens = batch.targets.dense_tokens(CLASSES)
    mirrored = tokens.unflatten(1, (4, 4)).flip(2).flatten(1, 2)
    turned = tokens.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert distance(tokens) < 0.5  # of four cells a side, a small crop shows few
    assert min(distance(mirrored), distance(turned)) > 2 * distance(tokens)
