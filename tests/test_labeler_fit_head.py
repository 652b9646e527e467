"""Heads that are fitted to frozen networks: how well, for which networks, kept with the store, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from labeling_runs import content, equal, in_child, state, wait_for_markers
from PIL import Image
from torch import nn

import labeler.fit_head
from labeler import (
    InputError,
    IntegrityError,
    LabelerConfig,
    LabelStore,
    MismatchError,
    TeacherConfig,
    TeacherError,
    create_teacher,
    label_images,
)
from labeler.__main__ import main
from labeler.checks.verify import verify_store
from labeler.fit_head import lowest_accuracy
from labeler.share.pull_store import pull_store
from labeler.share.push_store import push_store
from labeler.sources.class_sample import choose_images
from labeler.sources.open_source import open_source
from labeler.store.plan import HEAD_FILE
from labeler.teacher.create_teacher import create_frozen
from labeler.teacher.fit_linear import STRENGTHS, _Problem, evaluate, fit_linear
from labeler.teacher.linear_head import HeadFit, read_head

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
WORK = {"decoder": "pil", "threads": 1, "progress": False, "batch_size": 8, "shard_size": 8}


def make_coloured(root: Path, count: int = 12, mixed: bool = False) -> Path:
    """`count` noisy images in each of the folders blue, green and red; `mixed`: of any colour in any folder."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shown = list(COLOURS.values())[random.integers(3)] if mixed else colour
            pixels = np.clip(np.array(shown) + random.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coloured(tmp_path_factory.mktemp("coloured"))


def config_of(name: str = "test_resnet", size: int | None = 64, **settings: object) -> LabelerConfig:
    teacher = TeacherConfig(name, random_weights=not name.startswith(__name__), input_size=size)
    return LabelerConfig(teacher, **{"fit_head": True, **WORK, **settings})


@pytest.fixture(scope="module")
def labeled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of these images, not to be changed."""
    store = tmp_path_factory.mktemp("labeled") / "labels"
    label_images(images, store, config_of())
    return store


def copied(store: Path, to: Path) -> Path:
    to.mkdir()
    for file in store.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def never(*_: object, **__: object) -> None:
    raise AssertionError("a head was fitted again")


# Fitting


def blobs(count: int, width: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different scales, one of them constant, of four classes that overlap."""
    centres = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, (count,), generator=generator)
    x = centres[ids] + torch.randn(count, width, generator=generator)
    x = x * torch.logspace(-2, 2, width) + 7
    x[:, 2] = 3.0
    return x, ids


def objective(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, l2: float) -> torch.Tensor:
    """Mean cross-entropy and l2/2·‖W‖², W for standardized features."""
    std = x.double().std(0, correction=0)
    return nn.functional.cross_entropy(x.double() @ weight.T + bias, y) + l2 / 2 * (weight * std).square().sum()


def test_the_fit_is_the_minimum_of_its_objective():
    x, y = blobs(300)
    fit = fit_linear(x, y, *blobs(200, seed=2), 4)
    std = x.double().std(0, correction=0).clamp(min=1e-9)
    z = (x.double() - x.double().mean(0)) / std
    z[:, 2] = 0
    weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    plain = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        plain.zero_grad()
        loss = nn.functional.cross_entropy(z @ weight.T + bias, y) + fit.l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    plain.step(closure)
    least = float(closure().detach())
    found = float(objective(fit.weight.double(), fit.bias.double(), x, y, fit.l2))
    assert least <= found + 1e-9
    assert found <= least + 1e-5
    assert not fit.weight[:, 2].any(), "a constant feature tells nothing"


def test_the_strength_is_the_best_for_the_held_out_images():
    (x, y), (held_x, held_y) = blobs(60, 24), blobs(400, 24, seed=2)
    fit = fit_linear(x, y, held_x, held_y, 4)
    assert fit.l2 in STRENGTHS
    assert fit.l2 not in (STRENGTHS[0], STRENGTHS[-1])
    measured = evaluate(fit.weight, fit.bias, held_x, held_y)
    assert measured == pytest.approx((fit.cross_entropy, fit.accuracy))
    assert fit.accuracy > 0.5
    for l2 in (10 * fit.l2, fit.l2 / 10):
        other = _Problem(x, y, 4).solve(l2)
        assert evaluate(*other, held_x, held_y)[0] > fit.cross_entropy


def test_equal_features_give_the_same_head_bit_for_bit():
    x, y = blobs(300)
    first, second = (fit_linear(x.clone(), y, *blobs(50, seed=2), 4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


# Which images


def test_images_are_shared_out_equally_and_new_ones_leave_the_others_alone(tmp_path):
    root = make_coloured(tmp_path / "a", 9)
    for i in range(6):
        (root / "blue" / f"{i:03d}.png").unlink()
    images = open_source(root)
    classes = ("blue", "green", "red")
    chosen = choose_images(images, classes, 13)
    assert np.bincount(list(chosen.values())).tolist() == [3, 5, 5]
    assert all(images.keys[i].startswith(classes[id_]) for i, id_ in chosen.items())
    everything = choose_images(images, classes, 1000)
    assert len(everything) == 21
    before = [images.keys[i] for i in everything]
    assert before != sorted(before), "files of one origin often have neighbouring names"
    (root / "green" / "new.png").write_bytes((root / "green" / "000.png").read_bytes())
    more = open_source(root)
    after = [more.keys[i] for i in choose_images(more, classes, 1000)]
    assert [key for key in after if key != "green/new.png"] == before


def test_unreadable_images_are_counted_and_do_not_stop_the_fit(tmp_path):
    root = make_coloured(tmp_path / "images")
    for name in ("blue/001.png", "red/005.png"):
        (root / name).write_bytes(b"not an image")
    summary = label_images(root, tmp_path / "labels", config_of())
    assert summary.head is not None
    assert (summary.head.skipped, summary.head.fitted + summary.head.held_out) == (2, 34)
    assert (summary.rows, summary.quarantined) == (34, 2)


def test_a_class_of_one_image_is_refused_and_few_are_warned_of(tmp_path, caplog):
    root = make_coloured(tmp_path / "images", 5)
    label_images(root, tmp_path / "labels", config_of())
    assert "3 of the 3 classes have fewer than 10 images" in caplog.text
    for i in range(1, 5):
        (root / "green" / f"{i:03d}.png").unlink()
    with pytest.raises(InputError, match=r"two images of each class or more.*'green': got 1 that can be read"):
        label_images(root, tmp_path / "other", config_of())
    with pytest.raises(InputError, match=r"got `head_images=5`, expected at least 6 for 3 classes"):
        label_images(root, tmp_path / "other", config_of(head_images=5))


def test_images_without_folders_are_refused_and_their_folders_are_the_classes(tmp_path, images):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(InputError, match=r"two classes or more.*got 0 folders"):
        label_images(tmp_path / "flat", tmp_path / "labels", config_of())
    with pytest.raises(InputError, match="the classes of a fitted head are the images' own"):
        config_of(class_names="names.txt")


def test_labels_of_a_list_are_classes_as_folders_are(tmp_path):
    """Under other names, in another order: the head is for what the list says."""
    root = make_coloured(tmp_path / "images")
    words = {"blue": "sea", "green": "wood", "red": "brick"}
    lines = [f"{folder}/{i:03d}.png,{words[folder]}" for folder in words for i in range(12)]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    summary = label_images(root / "list.csv", tmp_path / "labels", config_of())
    store = LabelStore(tmp_path / "labels")
    assert store.meta.class_names == ("brick", "sea", "wood")
    assert summary.known == 36
    assert summary.agreement is not None
    assert summary.agreement > 0.9


# Networks


def attention_pooled() -> nn.Module:
    """As SigLIP: no class token, no classifier, and tokens pooled by attention."""
    return timm.create_model("test_vit", class_token=False, global_pool="map", num_classes=0)


def makes_its_own_maps() -> nn.Module:
    model = timm.create_model("test_resnet")
    model.score_maps = lambda images: images
    return model


def distilled() -> nn.Module:
    """Two heads, on two tokens."""
    return timm.create_model("deit_tiny_distilled_patch16_224", depth=1)


class NoTimm(nn.Module):
    """A network without timm's methods."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_resnet", 64), ("test_efficientnet", 64), ("test_vit", None), (f"{__name__}:attention_pooled", None)],
)
def test_the_mean_of_a_map_is_the_head_on_the_pooled_features(images, tmp_path, name, size):
    """Also where the network's own pooling is by class token or attention: it is the mean of the patches then."""
    config = config_of(name, size)
    label_images(images, tmp_path / "labels", config)
    head, _ = read_head(tmp_path / "labels" / HEAD_FILE)
    settings = dataclasses.replace(config.teacher, head=str(tmp_path / "labels" / HEAD_FILE), flip=False)
    teacher, frozen = create_teacher(settings), create_frozen(config.teacher)
    assert teacher.info.self_test.startswith("mean of the map equals the model output")
    assert teacher.class_names == tuple(COLOURS)
    side = teacher.info.input_size
    pixels = torch.randint(256, (3, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = frozen.label(pixels).flatten(1)
    maps = teacher.label(pixels)
    assert maps.shape[1] == 3
    assert maps.shape[2] > 1
    torch.testing.assert_close(maps.mean((2, 3)), features @ head.weight.T + head.bias, rtol=1e-4, atol=1e-4)


def test_weights_without_a_classifier_do(images, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = timm.create_model("test_vit", num_classes=0)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "features.safetensors")
    teacher = TeacherConfig("test_vit", checkpoint=str(tmp_path / "features.safetensors"))
    with pytest.raises(TeacherError, match="does not fit the model"):
        create_teacher(teacher)
    summary = label_images(images, tmp_path / "labels", LabelerConfig(teacher, fit_head=True, **WORK))
    assert summary.head is not None
    assert summary.head.accuracy > 0.6
    with pytest.raises(TeacherError, match=r"has no classification head.*fit one with `fit_head`"):
        create_teacher(TeacherConfig(f"{__name__}:attention_pooled"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("distilled", "expected a classifier that is one linear layer on the pooled features"),
        ("makes_its_own_maps", "got a network that makes its own score maps"),
        ("NoTimm", "got a network without forward_features, expected a timm network"),
    ],
)
def test_networks_that_take_no_linear_head_are_refused_before_any_work(images, tmp_path, name, words, monkeypatch):
    monkeypatch.setattr(labeler.fit_head, "features_of", never)
    with pytest.raises(TeacherError, match=words):
        label_images(images, tmp_path / "labels", config_of(f"{__name__}:{name}"))


# The store


def test_the_labels_are_those_of_the_folders_and_the_plan_knows_the_head(images, labeled):
    store = LabelStore(labeled)
    assert store.meta.class_names == tuple(COLOURS)
    assert store.plan.class_folders == {"blue": 0, "green": 1, "red": 2}
    head, digest = read_head(labeled / HEAD_FILE)
    recorded = store.meta.teacher["head"]
    assert (recorded["sha256"], recorded["accuracy"]) == (digest, head.fit.accuracy)
    assert head.fit.accuracy > 0.8
    n = head.fit.held_out
    assert head.fit.standard_error == pytest.approx((head.fit.accuracy * (1 - head.fit.accuracy) / n) ** 0.5)
    maps = store.read(np.arange(len(store))).to_torch().dense().mean((2, 3))
    right = maps.argmax(1).numpy() == np.array([list(COLOURS).index(key.split("/")[0]) for key in store.keys])
    assert right.mean() > 0.9
    result = verify_store(labeled, images, 5)
    assert (result.problems, result.relabeled) == ((), 5)


def test_a_second_run_reads_the_head_that_is_kept(images, labeled, tmp_path, monkeypatch):
    store = copied(labeled, tmp_path / "labels")
    before = state(store, "*")
    monkeypatch.setattr(labeler.fit_head, "fit_head", never)
    summary = label_images(images, store, config_of())
    assert summary.labeled_now == 0
    assert summary.head == read_head(labeled / HEAD_FILE)[0].fit
    assert state(store, HEAD_FILE).items() <= before.items()


def test_a_run_that_was_killed_after_the_fit_goes_on_with_its_head(images, labeled, tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / HEAD_FILE).write_bytes((labeled / HEAD_FILE).read_bytes())
    monkeypatch.setattr(labeler.fit_head, "fit_head", never)
    label_images(images, tmp_path / "labels", config_of())
    assert equal(tmp_path / "labels", labeled)


def test_a_head_that_was_left_by_other_settings_is_fitted_anew(images, labeled, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / HEAD_FILE).write_bytes((labeled / HEAD_FILE).read_bytes())
    label_images(images, tmp_path / "labels", config_of(size=96))
    assert read_head(tmp_path / "labels" / HEAD_FILE)[0].fitted_with["input_size"] == 96


def test_kills_at_any_moment_end_with_the_store_of_an_undisturbed_run(images, labeled, tmp_path):
    store = tmp_path / "labels"
    for committed in (0, 2, 3):
        child = in_child(lambda: label_images(images, store, config_of(batch_size=1)))
        wait_for_markers(store, committed, child.is_alive)
        child.kill()
        child.join()
    label_images(images, store, config_of())
    assert [file[9] for file in content(store)] == [file[9] for file in content(labeled)]
    assert equal(store, labeled)
    assert (store / HEAD_FILE).read_bytes() == (labeled / HEAD_FILE).read_bytes()


@pytest.mark.parametrize("damage", ["gone", "other", "flipped"])
def test_a_store_whose_head_is_not_as_it_was_is_refused(images, labeled, tmp_path, damage):
    store = copied(labeled, tmp_path / "labels")
    data = bytearray((store / HEAD_FILE).read_bytes())
    if damage == "gone":
        (store / HEAD_FILE).unlink()
    elif damage == "other":
        head, _ = read_head(store / HEAD_FILE)
        (store / HEAD_FILE).write_bytes(dataclasses.replace(head, bias=head.bias + 1).to_bytes())
    else:
        data[-1] ^= 1
        (store / HEAD_FILE).write_bytes(data)
    with pytest.raises(IntegrityError, match=r"head\.safetensors.*Restore it from a copy, or label into a new folder"):
        label_images(images, store, config_of())
    assert any(HEAD_FILE in problem for problem in verify_store(store).problems)


def test_a_store_goes_on_only_with_the_head_that_it_was_begun_with(images, labeled, tmp_path):
    store = copied(labeled, tmp_path / "labels")
    with pytest.raises(MismatchError, match=r"another head.*got the teacher's own head, expected `fit_head`"):
        label_images(images, store, config_of(fit_head=False))
    with pytest.raises(MismatchError, match=r"another number of images.*got `head_images=30`, expected 20000"):
        label_images(images, store, config_of(head_images=30))
    with pytest.raises(MismatchError, match=r"head was fitted for another network than teacher test_efficientnet"):
        label_images(images, store, config_of("test_efficientnet"))
    label_images(images, tmp_path / "own", config_of(fit_head=False))
    with pytest.raises(MismatchError, match=r"got `fit_head`, expected the teacher's own head"):
        label_images(images, tmp_path / "own", config_of())


def test_the_head_travels_with_its_store(images, labeled, tmp_path):
    """Also of a store that is read where it is, its teacher can be built again."""
    url = f"file://{tmp_path / 'there'}"
    push_store(labeled, url)
    pull_store(url, tmp_path / "back")
    assert (tmp_path / "back" / HEAD_FILE).read_bytes() == (labeled / HEAD_FILE).read_bytes()
    assert equal(tmp_path / "back", labeled)
    result = verify_store(url, images, 2, trusted=True)
    assert (result.problems, result.relabeled) == ((), 2)
    (tmp_path / "back" / HEAD_FILE).unlink()
    with pytest.raises(IntegrityError, match=r"head\.safetensors' is damaged: got no such file"):
        push_store(tmp_path / "back", f"file://{tmp_path / 'elsewhere'}")
    pull_store(url, tmp_path / "back")
    assert (tmp_path / "back" / HEAD_FILE).exists()


def test_what_is_no_head_is_refused_and_left_alone(images, tmp_path):
    store = tmp_path / "labels"
    store.mkdir()
    safetensors.torch.save_file({"mine": torch.ones(3)}, store / HEAD_FILE)
    before = (store / HEAD_FILE).read_bytes()
    with pytest.raises(TeacherError, match="is not a linear head"):
        label_images(images, store, config_of())
    with pytest.raises(InputError, match=r"not empty and not a label store: got head\.safetensors"):
        label_images(images, store, config_of(fit_head=False))
    assert (store / HEAD_FILE).read_bytes() == before


def test_workers_on_ray_find_the_head_in_the_store(images, labeled, tmp_path, local_ray):
    label_images(images, tmp_path / "ray", config_of(workers=2))
    assert equal(tmp_path / "ray", labeled)


# Accuracy


def fit_of(accuracy: float, chance: float, held_out: int) -> HeadFit:
    return HeadFit(accuracy, 0.0, chance, held_out, 4 * held_out, 0, 1.0, 0.1)


def test_the_lowest_accuracy_is_a_fifth_of_the_way_from_chance_and_above_luck():
    assert lowest_accuracy(fit_of(0.5, 0.01, 2000)) == pytest.approx(0.208)
    assert lowest_accuracy(fit_of(0.5, 0.5, 2000)) == pytest.approx(0.6)
    assert lowest_accuracy(fit_of(0.5, 0.5, 4)) == 1.0  # two standard errors of four coin throws


def test_an_inaccurate_head_is_refused_before_labeling_and_kept(tmp_path, monkeypatch):
    root = make_coloured(tmp_path / "images", 30, mixed=True)
    with pytest.raises(TeacherError, match=r"not accurate enough.*expected at least [45]\d\.\d% \(chance is 33\.3%\)"):
        label_images(root, tmp_path / "labels", config_of())
    assert [file.name for file in (tmp_path / "labels").iterdir()] == [HEAD_FILE]
    monkeypatch.setattr(labeler.fit_head, "fit_head", never)
    summary = label_images(root, tmp_path / "labels", config_of(head_accuracy=0.0))
    assert summary.head is not None
    assert summary.rows == 90
    # The store is begun: what was accepted once is not asked again.
    assert label_images(root, tmp_path / "labels", config_of()).labeled_now == 0


def test_the_command_tells_the_accuracy_first_and_json_has_it(images, tmp_path, capsys):
    flags = ["--teacher", "test_resnet", "--random-weights", "--input-size", "64", "--fit-head", "--decoder", "pil"]
    assert main(["label", str(images), "--store", str(tmp_path / "labels"), *flags, "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    head = json.loads(out)["head"]
    assert 0.8 < head["accuracy"] <= 1
    assert 0 <= head["standard_error"] < 0.2
    assert head["held_out"] == 6
    assert "of 6 held-out images right (chance 33.3%)" in err.split("label:")[0]
