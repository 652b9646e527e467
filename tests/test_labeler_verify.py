"""`verify` against images and the teacher: what is sound is called so, and mistakes of use are no damage."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ColourTeacher, encoded, picture

from labeler import IntegrityError, LabelStore, TeacherConfig, label_images
from labeler.__main__ import main
from labeler.base.whole_files import read_sealed, sealed
from labeler.checks.relabel import teacher_kl, teacher_of
from labeler.checks.verify import verify_store
from labeler.store.shard_markers import read_marker


def test_images_of_a_list_need_no_known_suffix(images, tmp_path, config):
    (images / "class0" / "img000.jpg").rename(images / "class0" / "img000.jfif")
    (tmp_path / "list.txt").write_text("class0/img000.jfif\nclass1/img001.jpg\n")
    label_images(images, tmp_path / "labels", dataclasses.replace(config, image_list=str(tmp_path / "list.txt")))
    found = verify_store(tmp_path / "labels", images)
    assert (found.problems, found.images_checked) == ((), 2)
    (images / "class0" / "img000.jfif").write_bytes(encoded(picture(5)))
    (problem,) = verify_store(tmp_path / "labels", images).problems
    assert "class0/img000.jfif" in problem


class Wavering(ColourTeacher):
    """Sure of itself in every cell, of another class in each: no palette of three holds that."""

    def score_maps(self, images: torch.Tensor) -> torch.Tensor:
        maps = super().score_maps(images)
        halved = images.std((1, 2, 3)) > 0.9
        order = torch.arange(16).view(4, 4) % 6
        maps[halved] = 20 * torch.nn.functional.one_hot(order, 6).permute(2, 0, 1).float()
        return maps


def wavering_teacher() -> torch.nn.Module:
    return Wavering()


def test_a_row_is_held_against_what_coding_its_own_map_costs(images, tmp_path, config):
    halves = Image.new("RGB", (40, 40))
    halves.paste((255, 255, 255), (0, 0, 20, 40))
    (images / "class0" / "img000.jpg").write_bytes(encoded(halves, quality=95))
    teacher = TeacherConfig("test_labeler_verify:wavering_teacher")
    summary = label_images(images, tmp_path / "labels", dataclasses.replace(config, teacher=teacher, palette=3))
    store = LabelStore(tmp_path / "labels")
    parts = store, np.arange(12), images, *teacher_of(store, "cpu")
    kl = teacher_kl(*parts)[:, 0]
    assert kl[0] > 5 * kl.mean() + 0.05, "this row is meant to cost far more than the others"
    found = verify_store(store.path, images, relabel=12, device="cpu")
    assert found.problems == ()
    assert found.relabel_kl == pytest.approx(summary.kl, abs=1e-3)
    # Maps of other images are told all the same.
    files = sorted(images.rglob("*.jpg"))
    data = [path.read_bytes() for path in files]
    for path, another in zip(files, [*data[1:], data[0]], strict=True):
        path.write_bytes(another)
    found_kl, anew = teacher_kl(*parts).T
    assert (found_kl > 1.5 * anew + 0.05).all()


def test_a_device_that_is_not_there_is_bad_usage_and_no_damage(images, store, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    command = ["verify", str(store), "--images", str(images), "--relabel", "1", "--quiet"]
    assert main([*command, "--device", "cuda"]) == 2
    assert "there is no GPU 0 for torch here: got device cuda, 0 GPUs" in capsys.readouterr().err


def test_markers_of_a_later_minor_version_are_read(store):
    path = sorted(store.glob("shard-*.json"))[0]
    before = read_marker(store, 0, 3)
    path.write_bytes(sealed({**read_sealed(path), "colour": "blue"}))
    assert read_marker(store, 0, 3) == before
    record = read_sealed(path)
    del record["rows"]
    path.write_bytes(sealed(record))
    with pytest.raises(IntegrityError, match="rows"):
        read_marker(store, 0, 3)


@pytest.mark.parametrize("entry", ["size", "rows"])
def test_a_marker_with_counts_that_no_shard_has_is_damaged(store, entry):
    """The bounds themselves: 0 and 2⁴⁰ − 1 may be, −1 and 2⁴⁰ may not."""
    path = sorted(store.glob("shard-*.json"))[0]
    record = read_sealed(path)
    for count in (0, 2**40 - 1):
        path.write_bytes(sealed({**record, entry: count}))
        assert getattr(read_marker(store, 0, 3), entry) == count
    for count in (-1, 2**40):
        path.write_bytes(sealed({**record, entry: count}))
        with pytest.raises(IntegrityError, match=f"{entry} {count}: that no marker has"):
            read_marker(store, 0, 3)


@pytest.mark.parametrize(
    "arguments", [["report", "--sample", "0"], ["report", "--sample", "-1"], ["verify", "--relabel", "-1"]]
)
def test_counts_below_the_least_are_bad_usage(images, store, tmp_path, arguments):
    name, *option = arguments
    more = ["--images", str(images), *(["--out", str(tmp_path / "r.html")] if name == "report" else [])]
    with pytest.raises(SystemExit) as exit:
        main([name, str(store), *more, *option])
    assert exit.value.code == 2


def test_quiet_is_quiet(images, tmp_path, capfd):
    (tmp_path / "maps").mkdir()
    for path in images.rglob("*.jpg"):
        target = (tmp_path / "maps" / path.relative_to(images)).with_suffix(".pt")
        target.parent.mkdir(exist_ok=True)
        ids = torch.arange(5.0)[:, None, None].expand(5, 4, 4)
        torch.save(torch.stack([torch.randn(5, 4, 4), ids]).half(), target)
    command = ["import-token-labels", str(tmp_path / "maps"), "--images", str(images), "--store"]
    assert main([*command, str(tmp_path / "loud"), "--json"]) == 0
    assert "import" in capfd.readouterr().err
    assert main([*command, str(tmp_path / "quiet"), "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(out)["rows"] == 12
