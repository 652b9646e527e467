"""TokenLabeling's own files: imported bit for bit, or refused one by one with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import encoded, make_images, picture

from labeler import InputError, LabelStore, MismatchError, import_token_label_files
from labeler.checks.verify import verify_store
from labeler.published_maps import read_map
from labeler.sources.image_source import BadImage

CLASSES, GRID = 50, 6


def token_label_map(seed: int, classes: int = CLASSES, first: int | None = None) -> torch.Tensor:
    """[2, 5, H, W] float16 as the reference writes it; `first`: a class that leads in every cell."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(classes, GRID, GRID, generator=generator)
    if first is not None:
        logits[first] += 20
    values, ids = logits.topk(5, dim=0)
    return torch.stack([values.half(), ids.half()])


def dense_reference(stored: torch.Tensor, classes: int = CLASSES) -> np.ndarray:
    """[C, H, W]: the stored logits in their places, 0 elsewhere, then softmax."""
    logits = torch.zeros(classes, GRID, GRID, dtype=torch.float64)
    logits.scatter_(0, stored[1].long(), stored[0].double())
    return logits.softmax(0).numpy()


@pytest.fixture
def files(images: Path, tmp_path: Path) -> Path:
    root = tmp_path / "maps"
    for i, path in enumerate(sorted(images.rglob("*.jpg"))):
        target = (root / path.relative_to(images)).with_suffix(".pt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(token_label_map(i), target)
    return root


def import_all(files: Path, images: Path, store: Path, **options: object):
    return import_token_label_files(files, images, store, num_classes=CLASSES, progress=False, **options)


def test_every_logit_of_every_cell_is_kept_exactly(files, images, tmp_path):
    summary = import_all(files, images, tmp_path / "labels")
    assert (summary.rows, summary.quarantined, summary.grid) == (12, 0, (GRID, GRID))
    labels = LabelStore(tmp_path / "labels")
    assert labels.meta.score_kind == "logit"
    maps = labels.read(range(12))
    assert (maps.background == 0).all()
    for row, key in enumerate(labels.keys):
        stored = torch.load((files / key).with_suffix(".pt"), weights_only=True)
        logits = np.zeros((CLASSES, GRID, GRID), np.float16)
        np.put_along_axis(logits, stored[1].long().numpy(), stored[0].numpy(), axis=0)
        used = maps.classes[row] >= 0
        np.testing.assert_array_equal(maps.scores[row][used].astype(np.float16), logits[maps.classes[row][used]])
        outside = np.setdiff1d(np.arange(CLASSES), maps.classes[row][used])
        assert (logits[outside] == 0).all()
        np.testing.assert_allclose(maps.dense()[row], dense_reference(stored), atol=5e-6)
    assert verify_store(tmp_path / "labels", images).problems == ()


def test_an_import_resumes_and_refuses_other_images(files, images, tmp_path):
    import_all(files, images, tmp_path / "labels")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "labels").glob("shard-*")}
    import_all(files, images, tmp_path / "labels")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "labels").glob("shard-*")} == before
    (images / "class0" / "more.jpg").write_bytes(encoded(picture(3)))
    with pytest.raises(MismatchError, match="not those of the store"):
        import_all(files, images, tmp_path / "labels")


def test_names_cut_at_the_first_dot_are_found_where_they_are_unique(tmp_path):
    images, files = tmp_path / "images" / "a", tmp_path / "maps" / "a"
    images.mkdir(parents=True)
    files.mkdir(parents=True)
    for name in ("one.two.jpg", "same.x.jpg", "same.y.jpg"):
        (images / name).write_bytes(encoded(picture(1)))
    torch.save(token_label_map(0), files / "one.pt")
    torch.save(token_label_map(1), files / "same.pt")
    import_all(files.parent, images.parent, tmp_path / "labels")
    labels = LabelStore(tmp_path / "labels")
    assert labels.keys == ["a/one.two.jpg"]
    assert all("could be the map of 2 images" in entry["reason"] for entry in labels.quarantine)


class Canary:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


def test_bad_maps_are_named_and_run_no_code(files, images, tmp_path):
    keys = sorted(path.relative_to(images) for path in images.rglob("*.jpg"))
    bad = [(files / key).with_suffix(".pt") for key in keys[:8]]
    good = token_label_map(0)
    torch.save(Canary(tmp_path / "ran"), bad[0])
    bad[1].write_bytes(bad[1].read_bytes()[:200])
    torch.save(good[[1, 0]], bad[2])
    torch.save(good[:, :, :3], bad[3])
    torch.save(torch.full_like(good, float("nan")), bad[4])
    torch.save(torch.stack([good[0], torch.zeros_like(good[1])]), bad[5])
    torch.save({"map": good}, bad[6])
    bad[7].unlink()
    summary = import_all(files, images, tmp_path / "labels")
    assert (summary.rows, summary.quarantined) == (4, 8)
    reasons = {entry["key"]: entry["reason"] for entry in LabelStore(tmp_path / "labels").quarantine}
    words = [
        "cannot be read",
        "cannot be read",
        "swapped",
        "grid",
        "not finite",
        "twice",
        "expected a tensor",
        "no map",
    ]
    for key, word in zip(keys[:8], words, strict=True):
        assert word in reasons[key.as_posix()]
    assert not (tmp_path / "ran").exists()


def test_agreement_with_the_folders_is_told_and_its_absence_warned_of(tmp_path, caplog):
    images, files = make_images(tmp_path / "images", 40, classes=5), tmp_path / "maps"
    for shift in (0, 1):
        for path in images.rglob("*.jpg"):
            target = (files / path.relative_to(images)).with_suffix(".pt")
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(token_label_map(0, 5, first=(int(path.parent.name[5:]) + shift) % 5), target)
        caplog.clear()
        summary = import_token_label_files(files, images, tmp_path / str(shift), num_classes=5, progress=False)
        assert summary.agreement == 1 - shift
        assert ("only 0.0 %" in caplog.text) == bool(shift)


def test_oversized_files_and_foreign_folders_are_refused(images, tmp_path):
    huge = tmp_path / "huge.pt"
    huge.write_bytes(b"")
    with open(huge, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadImage, match="larger than any label map"):
        read_map(huge, CLASSES)
    expanded = tmp_path / "expanded.pt"
    torch.save(torch.zeros(1).expand(2, 5, 100_000, 100_000), expanded)
    with pytest.raises(BadImage, match="tensors of 400,000,000,000 bytes in a file of"):
        read_map(expanded, CLASSES)
    with pytest.raises(InputError, match="no map below"):
        import_all(tmp_path, images, tmp_path / "labels")
    with pytest.raises(InputError, match="not a folder"):
        import_all(tmp_path / "absent", images, tmp_path / "labels")


def test_the_region_of_the_teachers_crop_can_be_given(files, images, tmp_path):
    import_all(files, images, tmp_path / "labels", view="center", crop_pct=0.9)
    labels = LabelStore(tmp_path / "labels")
    (height, width), (y0, x0, y1, x1) = labels.column("image_size")[0], labels.column("region")[0]
    np.testing.assert_allclose([(y1 - y0) * height, (x1 - x0) * width], 0.9 * min(height, width), rtol=1e-5)
