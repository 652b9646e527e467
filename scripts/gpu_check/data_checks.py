"""The parts of `scripts.gpu_check` that compare labels, the loader and a resumed run with the CPU's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from scripts.gpu_check.__main__ import Says
from scripts.gpu_check.compute_checks import flat, off

if TYPE_CHECKING:
    from pipeline.batch import Batch
    from train.step.step_result import StepResult

TEACHER = "scripts.benchmark.inputs.synthetic_teacher:synthetic_teacher"


def labels(say: Says, device: str, quick: bool) -> None:
    """Labels from the same pixels, and where DALI is there also from its own."""
    from labeler import LabelerConfig, LabelStore, TeacherConfig, label_images
    from labeler.sources.decoding.create_decoder import has_dali

    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder) / "images", 8 if quick else 64)
        rows = {}
        for name, place, decoder in (("cpu", "cpu", "cpu"), ("device", device, "cpu"), ("dali", device, "dali")):
            if decoder == "dali" and not has_dali():
                say(left_out="labels with DALI", why="DALI is not installed")
                continue
            config = LabelerConfig(
                TeacherConfig(TEACHER, autocast="float32"), device=place, decoder=decoder, threads=2, progress=False
            )
            label_images(images, Path(folder) / name, config)
            store = LabelStore(Path(folder) / name)
            rows[name] = store.read(np.arange(len(store))).to_torch().dense()
        for name in set(rows) - {"cpu"}:
            gap = float((rows[name] - rows["cpu"]).abs().max())
            say.check(
                f"largest difference of a probability, {name} against the CPU", gap, 0.02 if name == "device" else 0.2
            )


def loader(say: Says, device: str, quick: bool) -> None:
    """Batches of the loader on the device, against those of the CPU."""
    from labeler import LabelerConfig, TeacherConfig, label_images
    from labeler.sources.decoding.create_decoder import has_dali
    from pipeline import LoaderConfig, create_loader

    with tempfile.TemporaryDirectory() as folder:
        images, store = draw_images(Path(folder) / "images", 16 if quick else 128), f"{folder}/labels"
        label_images(images, store, LabelerConfig(TeacherConfig(TEACHER), device="cpu", threads=2, progress=False))

        def batches(place: str, backend: str) -> list[Any]:
            config = LoaderConfig(
                str(images), store, batch_size=8 if quick else 32, image_size=64, grid=(4, 4), erase_mode="const",
                erase_prob=0.5, auto_augment="rand-m9-mstd0.5-inc1", device=place, backend=backend, threads=2,
                progress=False,
            )  # fmt: skip
            return [batch.to("cpu") for batch in create_loader(config)]

        for backend in ("cpu", "dali"):
            if backend == "dali" and not has_dali():
                say(left_out="the loader with DALI", why="DALI is not installed")
                continue
            pairs = list(zip(batches(device, backend), batches("cpu", backend), strict=True))
            pixels = [float((a.images - b.images).abs().mean()) for a, b in pairs]
            scores = [off(a.targets.token_scores, b.targets.token_scores) for a, b in pairs]
            same = all(torch.equal(a.labels, b.labels) and a.keys == b.keys for a, b in pairs)
            limit = 1e-6 if backend == "cpu" else 0.02  # a GPU's JPEG decoder rounds differently
            say.check(f"mean difference of a pixel, backend {backend}", max(pixels), limit)
            say.check(f"token scores, backend {backend}", max(scores), 1e-5)
            say.check(f"order and labels, backend {backend}", float(not same), 0)


def resume(say: Says, device: str, quick: bool) -> None:
    """A run that is stopped and resumed, against one left alone: bit for bit on a CPU, on a GPU as near as told."""
    from train import fit, load_recipe
    from train.errors import Stopped
    from train.record.checkpoint import read_weights
    from train.record.checkpoint_folders import find_checkpoint
    from train.task import TrainingStep

    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder) / "images", 24)

        def config(name: str) -> Any:
            settings = {
                "data.images": images, "data.token_labels": "false", "data.store": "none", "data.validation": "none",
                "data.backend": "cpu", "data.threads": 1, "model.img_size": 32, "ema.decay": 0.9, "schedule.steps": 8,
                "run.out": f"{folder}/{name}", "run.batch_size": 8, "run.device": device, "run.threads": 1,
                "run.save_every": 3, "run.log_every": 2, "run.tensorboard": "false", "run.progress": "false",
                "model.args": "{patch_size=8, embed_dim=16, depth=1, d_state=4}",
            }  # fmt: skip
            return load_recipe("demo", [f"{key}={value}" for key, value in settings.items()])

        def weights(name: str, ema: bool) -> torch.Tensor:
            found = read_weights(*find_checkpoint(Path(folder) / name), ema=ema)
            return flat([found[key] for key in sorted(found)])

        fit(config("whole"))
        run = TrainingStep.run

        def asked(self: TrainingStep, batch: Batch, number: int, stop: Callable[[], bool]) -> StepResult:
            return run(self, batch, number, lambda: number == 4 or stop())

        with patch.object(TrainingStep, "run", asked), suppress(Stopped):
            fit(config("stopped"))
            say.check("runs that go on after they were asked to stop", 1, 0)
        fit(config("stopped"), resume="auto")
        for ema in (False, True):
            what = "moving average" if ema else "weights"
            gap = off(weights("stopped", ema), weights("whole", ema))
            say.check(f"{what} of the resumed run", gap, 0.0 if device == "cpu" else 1e-3)


def draw_images(folder: Path, count: int) -> Path:
    """Fills a folder with smooth random JPEGs of two classes, and returns it."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((96 + i % 7, 80 + i % 5), Image.Resampling.BICUBIC).save(path, quality=92)
    return folder
