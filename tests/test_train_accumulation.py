"""Micro-batches and ranks: their gradient is the whole batch's, and images that mix stay together.

Legend: B images of a batch.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from tiny import make_images
from tiny_runs import tiny_config

from labeler import LabelerConfig, TeacherConfig, label_images
from model.token_heads import TokenLabelHeads
from pipeline import Batch, LoaderConfig, create_loader
from pipeline.augment.mix import MixBox
from train import TokenLabelLoss, fit
from train.micro_batches import micro_batches
from train.network import build_network, train_mode
from train.ranks.distributed import Ranks, joined_ranks
from train.ranks.launch import free_port
from train.recipes.config import ModelConfig
from train.record.checkpoint import read_weights
from train.record.checkpoint_folders import newest_checkpoint
from train.task import TokenLabelTask, TrainingStep

MODEL = ModelConfig(
    name="demansia_nano",
    img_size=32,
    num_classes=6,
    args={"patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4},
    freeze_statistics=True,
)
GRID = (4, 4)
ALONE = Ranks(0, 1, torch.device("cpu"))
# In float64; sums over images in another order differ by a few roundings of 1e-16, made larger by cancellation.
TOLERANCE = 1e-10
Gradient = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sixteen images and their labels."""
    folder = tmp_path_factory.mktemp("accumulation")
    images, teacher = make_images(folder / "images", 16), TeacherConfig("tiny:colour_teacher")
    label_images(images, folder / "labels", LabelerConfig(teacher, decoder="pil", threads=1, progress=False))
    return images, folder / "labels"


def load_batch(data: tuple[Path, Path], size: int, mix: str) -> Batch:
    images, store = map(str, data)
    config = LoaderConfig(
        images, store, batch_size=size, image_size=32, grid=GRID, mix=mix, seed=1, scale=(0.5, 1.0),
        backend="pil", device="cpu", threads=1, progress=False,
    )  # fmt: skip
    loader = create_loader(config)
    while True:  # until a box neither holds nothing nor everything
        for batch in loader:
            if batch.mix is None or 0.2 < batch.mix.lam < 0.9:
                return replace(batch, images=batch.images.double())


def network(batch: Batch) -> TokenLabelHeads:
    """In float64, with statistics of these images and not the untrained ones."""
    torch.manual_seed(0)
    net = build_network(MODEL).double().train()
    with torch.no_grad():
        net(batch.images)
    return net


def gradient(
    net: TokenLabelHeads, batch: Batch, micro_batch: int | None = None, ranks: Ranks = ALONE, frozen: bool = True
) -> Gradient:
    """Of one training step on the batch; the network is left as it was."""
    net = copy.deepcopy(net)
    train_mode(net, MODEL.model_copy(update={"freeze_statistics": frozen}))
    task = TokenLabelTask(net, TokenLabelLoss(grid=GRID), ranks.device)
    if ranks.world_size > 1:
        whole = micro_batch is None or micro_batch >= len(batch)
        task.prepare_distributed(gradient_as_bucket_view=True, static_graph=whole)  # as `fit` does
    step = TrainingStep(task, torch.optim.SGD(net.parameters(), 0.1), ranks, micro_batch=micro_batch)
    assert step.run(batch, 0).done
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def difference(found: Gradient, expected: Gradient) -> float:
    """The largest relative difference of any parameter's gradient, by norms."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
        if expected[name].norm() > 0
    )


@pytest.mark.parametrize("mix", ["none", "token", "image"])
@pytest.mark.parametrize("size", [16, 13])
def test_micro_batches_give_the_gradient_of_the_whole_batch(data, size, mix):
    batch = load_batch(data, size, mix)
    net = network(batch)
    expected = gradient(net, batch)
    assert sum(float(value.norm()) > 0 for value in expected.values()) == len(expected)
    for parts, micro_batch in ((2, 8), (3, 6), (4, 4)):
        assert len(micro_batches(batch, micro_batch)) == parts
        assert difference(gradient(net, batch, micro_batch), expected) < TOLERANCE
    # What the whole batch's statistics would have given is another gradient: freezing them is what makes these equal.
    alive = gradient(net, batch, frozen=False)
    assert difference(gradient(net, batch, 4, frozen=False), alive) > 1e-2


def test_a_compiled_task_makes_one_graph_for_all_boxes(data):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    batch, counter = load_batch(data, 8, "token"), CompileCounter()
    net = network(batch)
    eager, compiled = (TokenLabelTask(copy.deepcopy(net), TokenLabelLoss(grid=GRID), ALONE.device) for _ in range(2))
    compiled.compile(backend=counter)
    for box in (batch.mix, MixBox(0, 0, 0, 0, 1.0), MixBox(0, 1, 4, 2, 0.75), MixBox(0, 0, 4, 4, 0.0)):
        mixed = replace(batch, mix=box)
        assert float(compiled(mixed)["loss"]) == pytest.approx(float(eager(mixed)["loss"]), rel=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mix", ["token", "image"])
def test_a_split_that_parts_the_pairs_gives_another_gradient(data, mix, monkeypatch):
    """Consecutive images, as accumulation usually takes them: each part would mix among itself."""
    batch = load_batch(data, 16, mix)
    net = network(batch)
    unmixed = replace(batch, mix=None)

    def consecutive(whole: Batch, size: int | None) -> list[Batch]:
        return [replace(part, mix=whole.mix) for part in micro_batches(unmixed, size)]

    expected = gradient(net, batch)
    monkeypatch.setattr("train.task.micro_batches", consecutive)
    assert difference(gradient(net, batch, 16), expected) < TOLERANCE  # one part: the same
    assert difference(gradient(net, batch, 8), expected) > 1e-2


def places(batch: Batch, limit: int) -> list[list[int]]:
    """Of the images of each part, in the whole batch."""
    named = replace(batch, keys=tuple(str(i) for i in range(len(batch))))
    return [[int(key) for key in part.keys] for part in micro_batches(named, limit)]


def test_parts_hold_each_image_once_and_its_partner_at_the_mirrored_place(data):
    for size in range(1, 17):
        batch = load_batch(data, size, "token")
        assert batch.mix is not None
        for limit in (2, 4, 6, 16):
            parts = places(batch, limit)
            assert sorted(chain(*parts)) == list(range(size))
            for part in parts:
                assert len(part) <= limit
                assert [size - 1 - i for i in part] == part[::-1]


def test_without_mixing_parts_may_be_of_any_length(data):
    batch = load_batch(data, 16, "none")
    for limit in (1, 2, 3, 5, 16):
        parts = places(batch, limit)
        assert list(chain(*parts)) == list(range(16))
        assert max(map(len, parts)) <= limit


def test_a_part_keeps_what_belongs_to_its_images(data):
    batch = load_batch(data, 13, "token")
    seen = set()
    for part in micro_batches(batch, 4):
        for i, key in enumerate(part.keys):
            b = batch.keys.index(key)
            seen.add(b)
            assert torch.equal(part.images[i], batch.images[b])
            assert torch.equal(part.targets.token_scores[i], batch.targets.token_scores[b])
            assert torch.equal(part.targets.classes[i], batch.targets.classes[b])
            assert (part.labels[i], part.rows[i]) == (batch.labels[b], batch.rows[b])
            assert (part.views.boxes[i] == batch.views.boxes[b]).all()
        assert (part.mix, part.mixed_pixels) == (batch.mix, batch.mixed_pixels)
    assert seen == set(range(13))


def test_a_run_in_micro_batches_has_the_weights_of_one_without(data, tmp_path):
    """Three steps of SGD in float32: roundings of 1e-7 a step, seen against the way that the weights went."""
    found = {}
    for name, settings in (("whole", {}), ("parts", {"run.micro_batch": 2})):
        settings = {"model.freeze_statistics": True, "augment.mix": "token", "schedule.steps": 3, **settings}
        settings |= {"optimizer.name": "sgd", "optimizer.lr": 0.1, "run.batch_size": 8, "model.num_classes": 6}
        config = tiny_config(*data, tmp_path / name, **settings)
        torch.manual_seed(config.run.seed)
        start = dict(build_network(config.model).named_parameters())
        fit(config)
        checkpoint = newest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        weights = read_weights(*checkpoint)
        found[name] = torch.cat([(weights[key].double() - start[key].detach()).flatten() for key in start])
    whole, parts = found["whole"], found["parts"]
    assert whole.norm() > 0.01
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def step_of_a_rank(folder: Path) -> tuple[Gradient, Gradient]:
    """The rank's step on its part of the batch in `folder`: in one go, and in micro-batches."""
    batch = pickle.loads((folder / "batch").read_bytes())
    net = network(batch)
    with joined_ranks("cpu") as ranks:
        share = micro_batches(batch, len(batch) // ranks.world_size)[ranks.rank]
        return gradient(net, share, ranks=ranks), gradient(net, share, 2, ranks)


def test_two_ranks_give_the_gradient_of_one_with_twice_the_batch(data, tmp_path, monkeypatch):
    """This process and another one, over gloo; each rank's images mix among themselves, as they do in training."""
    batch = load_batch(data, 16, "token")
    (tmp_path / "batch").write_bytes(pickle.dumps(batch))
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    here = Path(__file__).parent
    code = (
        "import sys, pathlib, pickle, test_train_accumulation as t; print('ready', flush=True); "
        "folder = pathlib.Path(sys.argv[1]); (folder / 'other').write_bytes(pickle.dumps(t.step_of_a_rank(folder)))"
    )
    path = os.pathsep.join([str(here), str(here.parent)])
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **settings, "RANK": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for name, value in {**settings, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        found = step_of_a_rank(tmp_path)
    assert other.returncode == 0
    expected = gradient(network(batch), batch)
    for mine, its in zip(found, pickle.loads((tmp_path / "other").read_bytes()), strict=True):
        assert difference(mine, expected) < TOLERANCE
        assert difference(its, expected) < TOLERANCE
    # One rank's part alone would have been another gradient.
    assert difference(gradient(network(batch), micro_batches(batch, 8)[0]), expected) > 1e-2


class Twins(Ranks):
    """Two ranks with the same batch, of which this process plays both."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


def test_the_loss_of_a_step_is_the_mean_over_ranks(data):
    batch = load_batch(data, 8, "none")
    losses = []
    for ranks in (ALONE, Twins(0, 2, torch.device("cpu"))):
        net = network(batch)
        task = TokenLabelTask(net, TokenLabelLoss(grid=GRID), ranks.device)
        result = TrainingStep(task, torch.optim.SGD(net.parameters(), 0.1), ranks).run(batch, 0)
        assert not result.stop  # nobody asked
        losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_dropped_paths_are_drawn_from_seed_step_and_rank_as_they_have_been(data):
    """A run that is resumed by a newer release drops the same paths."""
    net = network(load_batch(data, 2, "none"))
    task = TokenLabelTask(net, TokenLabelLoss(grid=GRID), ALONE.device)
    seeds = []
    for seed, step, rank in ((0, 0, 0), (5, 7, 0), (5, 8, 0), (5, 7, 1)):
        ranks = Ranks(rank, 2, ALONE.device)
        TrainingStep(task, torch.optim.SGD(net.parameters(), 0.1), ranks, seed=seed)._seed(step)
        seeds.append(torch.initial_seed())
    assert seeds == [
        3386346889158018743,
        301772622511519502,
        8577174352396164056,
        5633980960073112543,
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_whose_loss_is_not_finite_is_left_out_and_says_so(data, bad):
    batch = load_batch(data, 4, "none")
    net = network(batch)
    before = copy.deepcopy(net.state_dict())
    task = TokenLabelTask(net, TokenLabelLoss(grid=GRID), ALONE.device)
    step = TrainingStep(task, torch.optim.SGD(net.parameters(), 0.1), ALONE)
    result = step.run(replace(batch, images=torch.full_like(batch.images, bad)), 0)
    assert (result.done, math.isfinite(result.loss)) == (False, False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert step.run(batch, 1).done
