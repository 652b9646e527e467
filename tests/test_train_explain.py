"""`explain`: pages and pictures of what a trained network does inside, and what it refuses.

Legend: S input side; h×w token grid.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from tiny_runs import tiny_config, tiny_data

import train
from labeler import InputError
from model.inside.look import look_inside
from model.inside.measures import LayerInside
from pipeline.batch_picture import FONT, GAP, LINE, MARGIN
from train.__main__ import main
from train.evaluation.predict import predict
from train.evaluation.single_images import load_image, normalized
from train.evaluation.validate import load_trained
from train.explain.explain import explain
from train.explain.quantities import Panel, quantities
from train.explain.sheets import SCALE, SIDE, _fitting, class_sheet, heat, map_sheet

LAYERS = 2
KEYS = {
    *("classes", "forget", "gate", "length", "length-normalized"),
    *(f"{part}-{direction}" for part in ("step", "weight", "contribution") for direction in ("forward", "backward")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    args = {"patch_size": 8, "embed_dim": 16, "depth": LAYERS, "d_state": 4}
    train.fit(tiny_config(*data, out, **{"model.args": args, "optimizer.lr": 0.01}))
    return out


@pytest.fixture
def photo(data, tmp_path) -> Path:
    path = tmp_path / "a photo <1>.png"
    shutil.copy(sorted(data[0].rglob("*.jpg"))[0], path.with_suffix(".jpg"))
    return path.with_suffix(".jpg")


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*.*")}


def test_a_page_and_its_pictures(run, photo, tmp_path, capsys):
    assert main(["explain", str(run), str(photo), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    page = tmp_path / "out/a photo <1>.html"
    assert printed == f"{photo}: {page}, and {len(KEYS)} pictures beside it\n"
    assert files(tmp_path / "out") == {page.name, *(f"a photo <1>/{key}.png" for key in KEYS)}
    html = page.read_text()
    assert "<h1>a photo &lt;1&gt;.jpg</h1>" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)  # self-contained
    held = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    written = [path.read_bytes() for path in page.with_suffix("").iterdir()]
    assert sorted(held) == sorted(written)
    assert all(Image.open(io.BytesIO(data)).size[0] >= SIDE for data in held)
    for text in ("Forget gate", "Step size: backward", "Contribution of each direction: forward", "−1 / log"):
        assert text in html
    assert html.count("<td>BidirectionalMamba</td>") == LAYERS
    assert html.count("<td>backward</td>") == LAYERS


def test_json_has_the_numbers_that_were_measured(run, photo, tmp_path, capsys):
    assert main(["explain", str(run), str(photo), "--out", str(tmp_path / "one.html"), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (told["image"], told["page"], told["problem"]) == (str(photo), str(tmp_path / "one.html"), None)
    assert {Path(path) for path in told["pictures"]} == {tmp_path / f"one/{key}.png" for key in KEYS}
    [expected] = predict(run, [photo], progress=False)
    assert [share["id"] for share in told["classes"]] == [share.id for share in expected.classes]
    probabilities = [share["probability"] for share in told["classes"]]
    assert probabilities == pytest.approx([share.probability for share in expected.classes], rel=1e-4)
    trained = load_trained(run)
    inside = look_inside(trained.net, normalized([load_image(photo, trained)], trained))
    for layer, measured in zip(told["layers"], inside.layers, strict=True):
        assert layer["name"] == measured.name
        assert layer["length"] == pytest.approx(float(measured.length.mean()), rel=1e-5)
        for one, direction in zip(layer["directions"], measured.directions, strict=True):
            assert one["kept"] == pytest.approx(direction.forget.mean, rel=1e-5)
            assert one["reach"] == pytest.approx(direction.forget.reach, rel=1e-4)
            assert one["step"] == pytest.approx(float(direction.step.mean()), rel=1e-5)
            assert sum(one["kept_histogram"]) == pytest.approx(1)
        assert sum(one["share"] for one in layer["directions"]) == pytest.approx(1)
    assert told["layers"][-1]["settled"] == 1


def test_images_of_the_same_name_get_pages_of_their_own(run, data, tmp_path):
    first, second = sorted(data[0].rglob("*.jpg"))[:2]
    for name, source in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "same.jpg")
    pages = [one.page for one in explain(run, [tmp_path / "a/same.jpg", tmp_path / "b/same.jpg"], tmp_path / "out")]
    assert pages == [str(tmp_path / "out/same.html"), str(tmp_path / "out/same-2.html")]
    assert (tmp_path / "out/same/gate.png").is_file()
    assert (tmp_path / "out/same-2/gate.png").is_file()


def test_a_map_is_drawn_token_by_token_beside_the_image():
    values = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    pixels = np.full((32, 32, 3), 77, np.uint8)
    sheet = np.asarray(map_sheet(pixels, [Panel("layers.0", values, 0.0, 1.0)]))
    top, left = MARGIN + LINE, MARGIN + SIDE + GAP
    assert (sheet[top : top + SIDE, MARGIN : MARGIN + SIDE] == 77).all()
    panel = sheet[top : top + SIDE, left : left + SIDE]
    half = SIDE // 2
    for (i, j), at in {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.25, (1, 1): 0.5}.items():
        cell = panel[i * half : (i + 1) * half, j * half : (j + 1) * half].reshape(-1, 3)
        expected = [np.interp(at, np.linspace(0, 1, len(SCALE)), SCALE[:, c]) for c in range(3)]
        assert (cell == np.round(expected)).all()


def test_the_scale_of_a_map_without_differences_is_its_middle():
    even = heat(np.full((2, 3), 4.0), 4.0, 4.0)
    assert (even == heat(np.array([[0.5]]), 0, 1)).all()
    assert (np.diff([c.sum() for c in SCALE]) > 0).all()  # from dark to bright


def test_directions_of_a_layer_share_the_scale_of_their_contributions(run, photo):
    trained = load_trained(run)
    inside = look_inside(trained.net, normalized([load_image(photo, trained)], trained))
    found = {one.key: one.panels for one in quantities(inside)}
    assert found.keys() == KEYS - {"classes", "forget"}
    pairs = zip(found["contribution-forward"], found["contribution-backward"], strict=True)
    for (one, other), layer in zip(pairs, inside.layers, strict=True):
        top = max(float(direction.contribution.max()) for direction in layer.directions)
        assert (one.low, one.high) == (other.low, other.high) == (0, top)
    assert all((panel.low, panel.high) == (panel.values.min(), panel.values.max()) for panel in found["gate"])


def test_networks_in_stages_show_what_they_have():
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = {"contribution-convolution", "length", "length-normalized"}
    expected = {
        "mila_nano": {"gate", "divided-attention", "undivided-attention", "contribution-attention"},
        "mambavision_nano": {"step-forward", "weight-forward", "contribution-forward", "contribution-mixer"},
    }
    for name, own in expected.items():
        inside = look_inside(timm.create_model(name, num_classes=5, img_size=64), images)
        found = {one.key: [panel.layer for panel in one.panels] for one in quantities(inside)}
        assert found.keys() == own | both
        assert found["length"] == [layer.name for layer in inside.layers]
        sheet = class_sheet(np.zeros((64, 64, 3), np.uint8), inside.layers, str)
        shown = sum(layer.classes is not None for layer in inside.layers)
        assert 0 < shown < len(inside.layers)
        assert sheet.width == 2 * MARGIN + (1 + shown) * (SIDE + GAP) - GAP


def test_classes_have_one_color_in_all_layers_and_the_last_layer_s_are_named_first():
    def layer(classes: list[list[int]]) -> LayerInside:
        even = torch.ones(2, 2)
        return LayerInside("layer", "Mixer", None, (), even, even, torch.tensor(classes), even, 0.5)

    asked: list[int] = []

    def name(number: int) -> str:
        asked.append(number)
        return f"class {number}"

    gray = np.full((32, 32, 3), 100, np.uint8)
    sheet = np.asarray(class_sheet(gray, [layer([[30, 30], [30, 10]]), layer([[10, 10], [10, 20]])], name))
    assert asked == [10, 20, 30]
    half, top = SIDE // 2, MARGIN + LINE
    lefts = (MARGIN + i * (SIDE + GAP) for i in (1, 2))
    panels = (sheet[top : top + SIDE, left : left + SIDE] for left in lefts)
    first, last = (panel[half // 2 :: half, half // 2 :: half] for panel in panels)
    assert (first[1, 1] == last[0, 0]).all()  # class 10
    assert len({tuple(color) for color in (first[0, 0], last[0, 0], last[1, 1])}) == 3


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["explain", *map(str, arguments), "--quiet"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    return error[0]


def test_what_is_not_there_is_refused_in_one_line(run, photo, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "nowhere" in refusal(capsys, tmp_path / "nowhere", photo, *out)
    assert refusal(capsys, run, tmp_path / "no.jpg", *out) == (
        f"error: the image '{tmp_path / 'no.jpg'}' cannot be read: got No such file or directory"
    )
    assert refusal(capsys, run, photo, photo, "--out", tmp_path / "one.html") == (
        f"error: a page is about one image: got 2 images for '{tmp_path / 'one.html'}'. Give --out a folder."
    )
    assert not (tmp_path / "out").exists()


def test_pages_among_the_images_are_refused(run, photo, tmp_path, capsys):
    assert "pictures would be written among the images" in refusal(capsys, run, tmp_path, "--out", tmp_path / "out")
    odd = shutil.copy(photo, tmp_path / "photo.html")
    assert "pictures would be written among the images" in refusal(capsys, run, odd, "--out", odd)
    (tmp_path / "out/gate").mkdir(parents=True)
    inner = shutil.copy(photo, tmp_path / "out/gate/gate.jpg")
    assert "pictures would be written among the images" in refusal(capsys, run, inner, "--out", tmp_path / "out")


def test_a_model_without_such_parts_is_refused(data, photo, tmp_path, capsys):
    settings = {"model.name": "resnet10t", "model.args": {}, "model.img_size": 64, "schedule.steps": 1}
    train.fit(tiny_config(data[0], None, tmp_path / "run", **settings))
    capsys.readouterr()
    error = refusal(capsys, tmp_path / "run", photo, "--out", tmp_path / "out")
    assert "cannot be explained: this model has no parts to look into: got ResNet, " in error
    assert error.endswith("expected DeMansia, DeMansia-2, Vim, MILA or MambaVision")


def test_an_image_that_cannot_be_decoded_is_left_out(run, photo, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:200])
    assert main(["explain", str(run), str(broken), str(photo), "--out", str(tmp_path / "out"), "--quiet"]) == 3
    told = capsys.readouterr()
    assert told.out.startswith(f"{photo}: ")
    assert told.err.splitlines()[0].startswith(f"{broken}: left out, ")
    assert told.err.splitlines()[-1] == "1 of 2 images were left out"
    assert not (tmp_path / "out/broken.html").exists()


def test_a_page_that_cannot_be_written_is_told(run, photo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: got Not a directory"):
        list(explain(run, [photo], tmp_path / "file"))


def test_a_name_that_is_too_long_loses_its_beginning_where_its_end_tells_it_apart():
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert _fitting(draw, "layers.0 forward", from_end=True) == "layers.0 forward"
    name = "levels.1.blocks.0 forward"
    short = _fitting(draw, name, from_end=True)
    assert short[0] == "…"
    assert name.endswith(short[1:])
    assert len(short) > len("blocks.0 forward")
    assert name.startswith(_fitting(draw, name))
    assert max(draw.textlength(text, FONT) for text in (short, _fitting(draw, name))) <= SIDE
