"""Segmentation runs: what they learn, resume, predict and refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train.__main__
from labeler.base.errors import InputError
from model import token_label
from pipeline.batch import Batch
from pipeline.targets.token_targets import label_targets
from train.micro_batches import micro_batches
from train.optimization import LearningRate
from train.recipes.config import ModelConfig, ScheduleConfig, SegmentationConfig
from train.recipes.recipe import load_recipe
from train.segmentation.evaluate import Window, _starts, scores_of
from train.segmentation.loss import SegmentationLoss
from train.segmentation.network import SegmentationNetwork, build_segmentation
from train.segmentation.score import count_pixels, score_of

SIDE = 32
PICO = {"embed_dim": 32, "depth": 2}
SETTINGS = [
    "model.name=demansia_pico_sfp",
    "model.args={embed_dim=32, depth=2}",
    f"model.img_size={SIDE}",
    "model.num_classes=2",
    "segmentation.ignore_index=255",
    "segmentation.class_names=['dark', 'bright']",
    "schedule.warmup_epochs=0",
    "run.batch_size=4",
    "run.threads=1",
    "run.log_every=1",
    "run.progress=false",
    "run.device=cpu",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures with a dark and a bright area, whose masks are that; a corner is not labeled."""
    root = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((40, 52), np.uint8)
            y, x = generator.integers(8, 30, 2)
            mask[y:, x:] = 1
            noise = generator.integers(0, 60, (40, 52, 3))
            Image.fromarray((noise + 150 * mask[..., None]).astype(np.uint8)).save(
                root / split / "images" / f"{number}.jpg", quality=95
            )
            mask[:4, :4] = 255
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


def settings(scenes, out, *more):
    places = [
        f"data.images={scenes}/train/images",
        f"data.validation={scenes}/val/images",
        f"segmentation.masks={scenes}/train/masks",
        f"segmentation.validation_masks={scenes}/val/masks",
        f"run.out={out}",
    ]
    return [*places, *SETTINGS, *more]


def fit(scenes, out, *more, resume=()):
    assert train.__main__.main(["fit", "camvid", *settings(scenes, out, *more), *resume, "--json"]) == 0


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    fit(scenes, out, "schedule.steps=40", "optimizer.lr=3e-3", "ema.decay=0.9", "run.eval_every=5")
    return out


def test_a_run_learns_its_masks_and_says_how_well(run, capsys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert last["miou"] > 0.6
    assert last["pixel_accuracy"] > 0.8
    assert json.loads((run / "summary.json").read_text())["measure"] == "miou"
    assert "mean IoU" in (run / "metrics.csv").read_text() or "miou" in (run / "metrics.csv").read_text()
    assert not (run / "timm").exists()


def test_validate_gives_the_same_score_and_each_class(run, scenes, capsys):
    command = [
        "validate",
        str(run),
        "--images",
        f"{scenes}/val/images",
        "--masks",
        f"{scenes}/val/masks",
        "--device",
        "cpu",
    ]
    assert train.__main__.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["miou"] == pytest.approx(max(max(r["miou"], r["ema_miou"]) for r in rows if r["kind"] == "eval"))
    assert train.__main__.main([*command, "--per-class"]) == 0
    out = capsys.readouterr().out
    assert "mean IoU" in out
    assert "bright" in out


def test_predict_writes_masks_and_pictures_and_leaves_out_what_is_no_image(run, scenes, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"none")
    image = scenes / "val" / "images" / "0.jpg"
    command = [
        "predict",
        str(run),
        str(image),
        str(tmp_path / "bad.jpg"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert train.__main__.main([*command, "--json"]) == train.__main__.LEFT_OUT
    first, bad = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["problem"]
    mask = np.asarray(Image.open(tmp_path / "out" / "0.mask.png"))
    assert mask.shape == (40, 52)
    assert first["shares"]["bright"] == pytest.approx((mask == 1).mean(), abs=1e-6)
    true = np.asarray(Image.open(scenes / "val" / "masks" / "0.png"))
    assert (mask == true)[true != 255].mean() > 0.8
    assert Image.open(tmp_path / "out" / "0.overlay.png").width > 2 * 52


def test_a_stopped_run_goes_on_bit_for_bit(scenes, tmp_path):
    more = ("ema.decay=0.9", "segmentation.auxiliary=0.4", "augment.auto_augment=rand-m9-n2", "augment.erase_prob=0.5")
    fit(scenes, tmp_path / "whole", *more, "schedule.steps=7", "run.save_every=4", "run.keep=9", "data.validation=none")
    half = tmp_path / "whole" / "checkpoints" / "step-00000004"
    fit(
        scenes, tmp_path / "again", *more, "schedule.steps=7", "data.validation=none", resume=("--resume", str(half))
    )  # fmt: skip
    for name in ("weights", "ema"):
        one, other = (
            load_file(tmp_path / run / "checkpoints" / "step-00000007" / f"{name}.safetensors")
            for run in ("whole", "again")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_backbone_begins_with_the_weights_of_a_token_labeled_run(scenes, tmp_path):
    torch.manual_seed(0)
    plain = token_label("demansia_pico", 5, img_size=64, **PICO)
    nn.init.normal_(plain.pos_embed)
    path = tmp_path / "plain.safetensors"
    from safetensors.torch import save_file

    save_file(plain.state_dict(), str(path))
    config = ModelConfig(name="demansia_pico_sfp", img_size=SIDE, num_classes=2, args=PICO, weights=str(path))
    net = build_segmentation(config, SegmentationConfig())
    own = net.backbone.backbone.state_dict()
    key = "layers.0.mixer.in_proj.weight"
    key = key if key in own else next(name for name in own if name.endswith("in_proj.weight"))
    assert torch.equal(own[key], plain.state_dict()[key])
    other = config.model_copy(update={"args": {"embed_dim": 48, "depth": 2}})
    with pytest.raises(InputError, match="do not fit"):
        build_segmentation(other, SegmentationConfig())


def test_the_loss_is_that_of_labeled_pixels_and_parts_add_up():
    torch.manual_seed(0)
    scores, masks = torch.randn(6, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (6, 8, 8)).to(torch.uint8)
    masks[0] = 255
    batch = Batch(torch.zeros(6, 3, 8, 8), label_targets(torch.full((6,), -1), 1), torch.full((6,), -1), masks=masks)
    loss = SegmentationLoss(255)
    p = scores.log_softmax(1)
    known = masks != 255
    plain = -sum(p[b, int(masks[b, y, x]), y, x] for b, y, x in known.nonzero().tolist()) / masks.numel()
    torch.testing.assert_close(loss(scores, batch), plain)
    parts = micro_batches(batch, 2)
    starts = range(0, 6, 2)
    total = sum(loss(scores[i : i + 2], part) / 3 for i, part in zip(starts, parts, strict=True))
    torch.testing.assert_close(total, plain)
    both = SegmentationLoss(255, auxiliary=0.4)((scores, scores), batch)
    torch.testing.assert_close(both, 1.4 * plain)
    with pytest.raises(InputError, match="no masks"):
        loss(scores, Batch(torch.zeros(6, 3, 8, 8), batch.targets, batch.labels))


def test_mean_iou_leaves_out_classes_that_do_not_occur():
    mask = torch.tensor([[0, 0, 1, 255]])
    table = count_pixels(torch.tensor([[0, 1, 1, 2]]), mask, 4, 255).numpy()
    score = score_of(table, 1)
    assert score.iou[:2] == (0.5, 0.5)
    assert all(math.isnan(iou) for iou in score.iou[2:])
    assert score.miou == 0.5
    assert score.pixel_accuracy == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="no pixel"):
        score_of(np.zeros((4, 4), np.int64), 1)


def test_a_sliding_window_covers_the_image_and_gives_what_a_local_network_gives_at_once():
    net = nn.Conv2d(3, 2, 1).eval()  # sees a pixel alone: where windows overlap, all of them agree
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3)).astype(np.uint8)
    transform = {"mean": [0.5] * 3, "std": [0.2] * 3}
    cpu = torch.device("cpu")
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.2
    wanted = net(image[None])[0]
    slid = scores_of(net, pixels, transform, Window(32, sliding=True), cpu)
    torch.testing.assert_close(slid, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert _starts(100, 32, 2 / 3)[-1] == 100 - 32
    assert _starts(32, 32, 0.5) == [0]
    assert scores_of(net, pixels[:20, :20], transform, Window(32, sliding=True), cpu).shape == (2, 20, 20)
    assert scores_of(net, pixels, transform, Window(32), cpu).shape == (2, 70, 100)


@pytest.mark.parametrize("decoder", ["FPN", "UPerNet", "Segformer", "DeepLabV3Plus"])
def test_other_decoders_and_backbones_are_built(decoder):
    config = ModelConfig(name="resnet10t", img_size=SIDE, num_classes=3)
    net = SegmentationNetwork(config, SegmentationConfig(decoder=decoder)).eval()
    assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_layer_decay_knows_the_layers_of_a_pyramid(scenes, tmp_path):
    config = load_recipe("camvid", settings(scenes, tmp_path, "optimizer.layer_decay=0.5"))
    net = SegmentationNetwork(config.model, config.segmentation)
    from train.optimization import build_optimizer

    groups = build_optimizer(net, config.optimizer).param_groups
    scales = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert scales[id(net.model.segmentation_head[0].weight)] == 1
    assert scales[id(net.backbone.backbone.pos_embed)] < 0.5
    flat = SegmentationNetwork(config.model.model_copy(update={"name": "resnet10t", "args": {}}), config.segmentation)
    with pytest.raises(InputError, match="does not accept these settings"):
        build_optimizer(flat, config.optimizer)


def test_a_poly_schedule_is_a_power_of_what_is_left():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 2.0)
    schedule = ScheduleConfig(kind="poly", power=0.9, steps=100, min_lr=0.5, warmup_epochs=1, warmup_lr=0.1)
    rate = LearningRate(optimizer, schedule, epoch_steps=10)
    assert rate.set(0) == pytest.approx(0.1)
    assert rate.set(50) == pytest.approx(0.5 + 1.5 * 0.5**0.9)
    assert rate.set(100) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["segmentation.masks=none"], "segmentation.masks is missing"),
        (["segmentation.validation_masks=none"], "segmentation.validation_masks is missing"),
        (["segmentation.class_names=['one']"], "1 names for 2 classes"),
        (["augment.mix=token"], "augment.mix=token is not for"),
        (["lora.rank=4"], "lora.rank is not for"),
        (["model.name=demansia_pico", "run.out={out}"], "model.name=demansia_pico_sfp"),
    ],
)
def test_what_a_segmentation_run_cannot_have_is_refused(scenes, tmp_path, capsys, more, words):
    more = [text.format(out=tmp_path) for text in more]
    assert train.__main__.main(["fit", "camvid", *settings(scenes, tmp_path / "run", *more)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def changed(scenes, folder, split, change):
    """A copy of a split's masks; `change`: name -> mask."""
    folder.mkdir()
    for path in (scenes / split / "masks").iterdir():
        mask = change.get(path.name, np.asarray(Image.open(path)))
        if mask is not None:
            Image.fromarray(mask).save(folder / path.name)
    return folder


EMPTY = np.full((40, 52), 255, np.uint8)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"1.png": None}, 2, "images have no mask in"),
        ({"1.png": EMPTY[:9]}, 4, "1.png' does not fit its image: got 9×52 pixels, expected 40×52"),
        ({"1.png": EMPTY - 250}, 4, "1.png' names an unknown class: got 5, expected 0 to 1, or 255"),
        ({f"{i}.png": EMPTY for i in range(12)}, 2, "has a class: got only 255"),
    ],
)
def test_bad_masks_end_the_command_before_the_first_step(scenes, tmp_path, capsys, split, change, status, words):
    name = "masks" if split == "train" else "validation_masks"
    more = (f"segmentation.{name}={changed(scenes, tmp_path / 'masks', split, change)}", "schedule.steps=1")
    assert train.__main__.main(["fit", "camvid", *settings(scenes, tmp_path / "run", *more)]) == status
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_masks_without_a_labeled_pixel_and_absent_classes_are_told_once(scenes, tmp_path, caplog):
    masks = changed(scenes, tmp_path / "masks", "train", {"3.png": EMPTY})
    names = "segmentation.class_names=['dark', 'bright', 'loud']"
    more = (f"segmentation.masks={masks}", "schedule.steps=6", "model.num_classes=3", names, "run.eval_every=1")
    with caplog.at_level("WARNING"):
        fit(scenes, tmp_path / "run", *more)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"no pixel of the masks in {masks} has class loud",
        f"1 of the masks in {masks} have no labeled pixel: '3.jpg'",
        f"no pixel of the masks in {scenes}/val/masks has class loud",
    ]


def test_an_images_loss_is_0_where_nothing_is_labeled():
    labels = torch.full((2,), -1)
    masks = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    batch = Batch(torch.zeros(2, 3, 4, 4), label_targets(labels, 1), labels, masks=masks)
    assert float(SegmentationLoss(255)(torch.randn(2, 3, 4, 4), batch)) == 0.0


def test_a_run_does_not_go_on_with_other_masks(scenes, tmp_path, capsys):
    fit(scenes, tmp_path / "run", "schedule.steps=3", "schedule.kind=constant", "augment.scale=[0.5, 1.0]")
    other = np.asarray(Image.open(scenes / "train" / "masks" / "0.png")).copy()
    other[20, 20] = 1 - other[20, 20]
    masks = changed(scenes, tmp_path / "masks", "train", {"0.png": other})
    more = (f"segmentation.masks={masks}", "schedule.steps=6", "schedule.kind=constant", "augment.scale=[0.5, 1.0]")
    command = ["fit", "camvid", *settings(scenes, tmp_path / "run", *more), "--resume", "auto"]
    assert train.__main__.main(command) == 2
    assert "got masks" in capsys.readouterr().err


def test_each_classs_iou_is_among_the_metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert last["miou"] == pytest.approx((last["iou/dark"] + last["iou/bright"]) / 2)


def test_another_run_with_other_classes_begins_with_all_but_the_last_layer(scenes, run, tmp_path):
    more = (f"model.weights={run}", "model.num_classes=5", "segmentation.class_names=none", "schedule.steps=1")
    config = load_recipe("camvid", settings(scenes, tmp_path / "run", *more))
    net = build_segmentation(config.model, config.segmentation)
    begun = build_segmentation(config.model.model_copy(update={"num_classes": 2}), config.segmentation).state_dict()
    other = {key for key, value in net.state_dict().items() if not torch.equal(value, begun[key])}
    assert other == {"model.segmentation_head.0.weight", "model.segmentation_head.0.bias"}
    fit(scenes, tmp_path / "run", *more)
    more = (*more, "segmentation.decoder_args={decoder_channels=[16, 16, 8, 8, 8]}", "run.out=" + str(tmp_path / "no"))
    config = load_recipe("camvid", settings(scenes, tmp_path, *more))
    with pytest.raises(InputError, match="of another shape"):
        build_segmentation(config.model, config.segmentation)


def test_the_decoders_own_arguments_make_it_smaller():
    config = ModelConfig(name="demansia_pico_sfp", img_size=SIDE, num_classes=3, args=PICO)
    usual = SegmentationNetwork(config, SegmentationConfig())
    small = SegmentationNetwork(config, SegmentationConfig(decoder_args={"decoder_channels": [16, 16, 8, 8, 8]}))
    assert len(small.backbone.backbone.layers) == 2
    sizes = [sum(p.numel() for p in net.model.decoder.parameters()) for net in (usual, small)]
    assert sizes[1] < sizes[0] / 10


def test_micro_batches_of_masks_may_be_odd(scenes, tmp_path):
    load_recipe("camvid", settings(scenes, tmp_path, "run.micro_batch=3", "augment.mix=auto"))


def test_validate_writes_each_class_and_refuses_what_it_would_ignore(run, scenes, tmp_path, capsys):
    command = ["validate", str(run), "--images", f"{scenes}/val/images", "--masks", f"{scenes}/val/masks"]
    assert train.__main__.main([*command, "--out", str(tmp_path / "a.csv")]) == 0
    rows = (tmp_path / "a.csv").read_text().splitlines()
    assert rows[0] == "name,iou,pixels"
    assert {row.split(",")[0] for row in rows[1:]} == {"dark", "bright"}
    assert train.__main__.main([*command, "--out", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["names"] == ["dark", "bright"]
    capsys.readouterr()
    for option in (["--confusions", "3"], ["--img-size", "64"], ["--matrix", str(tmp_path / "m.csv")]):
        assert train.__main__.main([*command, *option]) == 2
        assert f"{option[0]} is for classifiers" in capsys.readouterr().err


def test_commands_for_classifiers_refuse_a_segmentation_run(run, scenes, capsys):
    for command in (["validate", str(run), "--images", f"{scenes}/val/images"], ["export", str(run), "--images", "x"]):
        assert train.__main__.main(command) == 2
        assert "for classifiers" in capsys.readouterr().err


def test_without_the_library_of_decoders_one_line_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match=r"token-labeling\[segmentation\]"):
        SegmentationNetwork(ModelConfig(name="resnet10t", img_size=SIDE, num_classes=3), SegmentationConfig())
