"""Interrupted and resumed, alone and among ranks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import tally
from tiny import make_images

from labeler import InputError, LabelerConfig, MismatchError, TeacherConfig, label_images
from pipeline import Batch, LoaderConfig, create_loader
from pipeline.order import EpochOrder

NEW_PROCESS = """
import json, sys
sys.path.insert(0, {tests!r})
from test_pipeline_resume import digests_after
print(json.dumps(digests_after(json.loads(sys.argv[1]), json.loads(sys.argv[2]))))
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    """Fifty images in batches of four, with everything random switched on."""
    folder = tmp_path_factory.mktemp("resume")
    images = make_images(folder / "images", 50)
    teacher = TeacherConfig("tiny:colour_teacher")
    label_images(images, folder / "labels", LabelerConfig(teacher, shard_size=8, decoder="pil", progress=False))
    return LoaderConfig(
        str(images), str(folder / "labels"), batch_size=4, image_size=64, grid=(8, 8), threads=2, seed=11,
        auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5, mix="token", device="cpu",
    )  # fmt: skip


def digest(batch: Batch) -> str:
    """Of every bit of a batch."""
    parts = [batch.images, batch.labels, *batch.targets.tensors().values()]
    content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    return hashlib.sha256(content + repr((batch.mix, batch.keys)).encode()).hexdigest()


def digests_after(config: dict, state: dict) -> list[str]:
    """The rest of an epoch and the next one whole, in whatever process this runs."""
    torch.set_num_threads(1)
    loader = create_loader(LoaderConfig(**{**config, "grid": tuple(config["grid"])}))
    loader.load_state_dict(state)
    return [digest(batch) for _ in range(2) for batch in loader]


@pytest.mark.parametrize("backend", ["dali", "cpu", "pil"])
def test_a_new_process_yields_the_remaining_batches_bit_for_bit(settings, backend):
    config = replace(settings, backend=backend)
    loader = create_loader(config)
    undisturbed = [digest(batch) for _ in range(2) for batch in loader]
    stop = int(np.random.default_rng(5 + len(backend)).integers(1, len(loader)))

    interrupted = create_loader(config)
    iterator = iter(interrupted)
    first = [digest(next(iterator)) for _ in range(stop)]
    state = json.dumps(interrupted.state_dict())  # plain: it survives any format
    assert json.loads(state)["batch"] == stop
    iterator.close()

    script = NEW_PROCESS.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(asdict(config)), state], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rest = json.loads(done.stdout.splitlines()[-1])
    assert first + rest == undisturbed
    assert len(rest) == 2 * len(loader) - stop


def test_every_place_of_an_epoch_can_be_resumed(settings):
    loader = create_loader(settings)
    states, digests = [loader.state_dict()], []
    for batch in loader:
        digests.append(digest(batch))
        states.append(loader.state_dict())
    following = digest(next(iter(loader)))
    assert len(states) == len(loader) + 1
    for done, state in enumerate(states):
        resumed = create_loader(settings)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        expected = digests[done] if done < len(digests) else following
        assert digest(next(iter(resumed))) == expected


@pytest.mark.fault(31)
def test_a_state_needs_the_same_images_labels_and_settings(settings, tmp_path):
    state = create_loader(settings).state_dict()
    other_images = make_images(tmp_path / "images", 49)
    teacher = TeacherConfig("tiny:colour_teacher")
    label_images(other_images, tmp_path / "fewer", LabelerConfig(teacher, decoder="pil", progress=False))
    label_images(settings.images, tmp_path / "flip", LabelerConfig(replace(teacher, flip=True), progress=False))
    others = {
        "batch_size": replace(settings, batch_size=5),
        "world_size": replace(settings, world_size=2),
        "seed": replace(settings, seed=12),
        "auto_augment": replace(settings, auto_augment="3a"),
        "backend": replace(settings, backend="pil"),
        "token_labels": replace(settings, token_labels=False, class_folders={f"class{i}": i for i in range(3)}),
        "fingerprint": replace(settings, images=str(other_images), store=str(tmp_path / "fewer")),
        "fingerprint ": replace(settings, store=str(tmp_path / "flip")),
    }
    for name, config in others.items():
        with pytest.raises(MismatchError, match=name.strip()) as caught:
            create_loader(config).load_state_dict(state)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("got") == 1
    tally(31, injected=1)


def test_a_refusal_over_images_says_how_many_there_were_and_are(tmp_path):
    """A fingerprint alone tells nobody that an image is gone."""
    plain = LoaderConfig(str(make_images(tmp_path, 12)), token_labels=False, batch_size=4, grid=(2, 2), progress=False)
    state = create_loader(plain).state_dict()
    next(tmp_path.rglob("*.*g")).unlink()
    with pytest.raises(
        MismatchError, match=r"got fingerprint \w+… of 12 images, expected fingerprint \w+… of 11 images"
    ):
        create_loader(plain).load_state_dict(state)
    state.pop("images")  # as older states are
    with pytest.raises(MismatchError, match=r"got fingerprint \w+…, expected fingerprint \w+… of 11 images"):
        create_loader(plain).load_state_dict(state)


def test_what_does_not_change_a_batch_does_not_refuse_a_state(settings, tmp_path):
    state = create_loader(settings).state_dict()
    moved = tmp_path / "moved"
    Path(moved).symlink_to(settings.images)
    config = replace(settings, images=str(moved), threads=1, cache="ram", prefetch=4)
    loader = create_loader(config)
    loader.load_state_dict(state)
    assert digest(next(iter(loader))) == digest(next(iter(create_loader(settings))))


def test_a_state_of_a_version_that_lacked_a_setting_goes_on_where_that_has_its_default(settings):
    state = create_loader(settings).state_dict()
    del state["settings"]["ignore_index"]
    create_loader(settings).load_state_dict(state)
    with pytest.raises(MismatchError, match="got ignore_index 255, expected ignore_index 11"):
        create_loader(replace(settings, ignore_index=11)).load_state_dict(state)


@pytest.mark.parametrize(
    "state", [{}, {"epoch": 0}, {"epoch": "x", "batch": 0, "settings": {}}, {"epoch": 0, "batch": 0, "settings": 5}]
)
def test_what_is_not_a_state_is_refused(settings, state):
    with pytest.raises(InputError):
        create_loader(settings).load_state_dict(state)


def test_a_place_outside_the_epoch_is_refused(settings):
    loader = create_loader(settings)
    for place in ({"batch": 13}, {"batch": -1}, {"epoch": -1}):
        with pytest.raises(InputError, match="an impossible position"):
            loader.load_state_dict({**loader.state_dict(), **place})


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_without_overlap(settings, world_size):
    """In training the documented remainder, 50 mod 4·W, is left out; another epoch leaves out others."""
    left_out = []
    for epoch in range(2):
        seen: Counter = Counter()
        for rank in range(world_size):
            loader = create_loader(replace(settings, rank=rank, world_size=world_size))
            loader.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == len(loader) == 50 // (4 * world_size)
            assert all(len(batch) == 4 for batch in batches)
            seen.update(key for batch in batches for key in batch.keys)
        assert set(seen.values()) == {1}
        assert len(seen) == 50 - 50 % (4 * world_size)
        left_out.append({key for key in map(loader.samples.key, range(50)) if key not in seen})
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_evaluate_every_image_exactly_once(settings, world_size):
    seen: Counter = Counter()
    for rank in range(world_size):
        loader = create_loader(replace(settings, mix="none", train=False, rank=rank, world_size=world_size))
        batches = list(loader)
        assert len(batches) == len(loader)
        seen.update(key for batch in batches for key in batch.keys)
    assert len(seen) == 50
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("samples", [1, 3, 4, 7, 8, 9, 24, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_order_covers_everything_for_any_count(samples, world_size):
    for shuffle in (True, False):
        shares = []
        for rank in range(world_size):
            order = EpochOrder(samples, 4, rank, world_size, shuffle, seed=3)
            epoch = order.epoch(1)
            assert sorted(epoch) == list(range(samples))
            batches = [order.batch(epoch, b) for b in range(len(order))]
            assert all(len(batch) == 4 if shuffle else len(batch) > 0 for batch in batches)
            shares.append(batches)
        seen = [sample for batches in shares for batch in batches for sample in batch]
        assert len(seen) == len(set(seen)) == (samples - samples % (4 * world_size) if shuffle else samples)
        if shuffle:
            assert len({len(batches) for batches in shares}) == 1
