"""Images in any container, here or behind a URL: report, picture of a batch, an epoch, an evaluation, predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from containers import write_list, write_parquet, write_tars
from remote_servers import flaky_server, needs_http, needs_s3, s3_service
from tiny_runs import tiny_config, tiny_data

from labeler import LabelerConfig, LabelStore, TeacherConfig, label_images
from labeler.__main__ import main as labeler_main
from labeler.checks.verify import verify_store
from pipeline.__main__ import main as pipeline_main
from train import fit
from train.evaluation.predict import ClassShare, predict
from train.evaluation.validate import validate

KINDS = {
    "folder": "images",
    "list": "images/list.csv",
    "tar shards": "tars/part-{000..001}.tar",
    "parquet": "parquet/train.parquet",
}
PLACES = ["here", pytest.param("http", marks=needs_http), pytest.param("s3", marks=needs_s3)]
COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in four containers, their label store, and a run that learned from both."""
    root = tmp_path_factory.mktemp("data")
    images, store = tiny_data(root, COUNT)
    write_list(images, "list.csv")
    write_tars(images, root / "tars")
    write_parquet(images, root / "parquet" / "train.parquet")
    fit(tiny_config(images, store, root / "run", **{"schedule.steps": 3}))
    return root


@pytest.fixture(params=PLACES)
def place(request, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the containers lie."""
    monkeypatch.setenv("TOKEN_LABELING_CACHE", str(tmp_path / "cache"))
    if request.param == "here":
        yield str(data)
    elif request.param == "http":
        with flaky_server(data) as server:
            yield server.url
    else:
        with s3_service(monkeypatch) as bucket:
            import fsspec

            fsspec.filesystem("s3").put(f"{data}/", f"{bucket}/data", recursive=True)
            yield f"{bucket}/data"


def answers(run: Path, images: str | Path) -> list[tuple[str, tuple[ClassShare, ...]]]:
    """Name and classes of each image."""
    found = predict(run, [images], batch_size=4, device="cpu", threads=1, progress=False)
    return [(one.image.rpartition("/")[2], one.classes) for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_container_anywhere(data, place, kind, tmp_path):
    if kind == "folder" and place.startswith("http"):
        pytest.skip("a web server does not list folders")
    images = f"{place}/{KINDS[kind]}"
    config = LabelerConfig(
        TeacherConfig("tiny:colour_teacher"), shard_size=4, batch_size=4, decoder="pil", threads=1, progress=False
    )
    store = tmp_path / "labels"
    label_images(images, store, config)
    own, labels = LabelStore(data / "labels"), LabelStore(store)
    assert labels.keys == own.keys
    np.testing.assert_array_equal(labels.column("checksum"), own.column("checksum"))
    checked = verify_store(store, images, relabel=3, trusted=True)
    assert (checked.problems, checked.relabeled) == ((), 3)

    page, picture = str(tmp_path / "report.html"), str(tmp_path / "batch.png")
    assert labeler_main(["report", str(store), "--images", images, "--out", page, "--quiet"]) == 0
    assert (tmp_path / "report.html").read_text().count('<img src="data:image/jpeg') >= COUNT
    small = ["--image-size", "32", "--patch", "8", "--count", "4", "--backend", "pil"]
    assert pipeline_main(["view", images, "--store", str(store), "--out", picture, *small]) == 0

    epoch = {"schedule.steps": 3, "data.validation": images}
    assert fit(tiny_config(images, store, tmp_path / "run", **epoch)).steps == 3
    found, expected = (validate(data / "run", one, device="cpu", progress=False) for one in (images, data / "images"))
    assert found == expected
    assert answers(data / "run", images) == answers(data / "run", data / "images")
