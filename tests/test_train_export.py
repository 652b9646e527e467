"""`export`: the file answers as the run on real images, in any batch; int8; what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config, tiny_data

from labeler.base.errors import InputError, IntegrityError
from train import fit
from train.__main__ import main
from train.evaluation.predict import predict
from train.evaluation.single_images import load_image
from train.evaluation.validate import load_trained
from train.export import export as export_file
from train.export.compare import compare
from train.export.export import export
from train.export.program import trace

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed (the extra export)")
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(tiny_config(*data, out, **{"optimizer.lr": 0.01, "schedule.steps": 20}))
    return out


FORMATS = [
    pytest.param("onnx", None, marks=needs_onnx),
    pytest.param("onnx", "dynamic", marks=needs_onnx),
    pytest.param("onnx", "static", marks=needs_onnx),
    pytest.param("torch-export", None),
    pytest.param("executorch", None, marks=needs_executorch),
]


@pytest.mark.parametrize(("format", "int8"), FORMATS)
def test_the_file_answers_as_the_run(run, data, tmp_path, format, int8):
    suffix = export_file.FORMATS[format][0]
    done = export(run, [data[0]], out=tmp_path / f"a{suffix}", format=format, int8=int8, count=13)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"a{suffix}.json"]
    assert done.comparison.images == 13
    assert done.comparison.relative_difference < (1e-5 if int8 is None else 0.2)
    assert done.comparison.agreement >= (1.0 if int8 is None else 0.5)
    if int8 is not None:
        import onnx

        weights = onnx.load(tmp_path / "a.onnx").graph.initializer
        assert any(one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2 for one in weights)
    assert done.comparison.run_top1 is not None
    assert min(done.file_ms, done.run_ms) > 0
    described = json.loads((tmp_path / f"a{suffix}.json").read_text())
    assert described["input"]["shape"] == [1 if format == "executorch" else "batch", 3, 32, 32]
    assert described["export"]["size"] == (tmp_path / f"a{suffix}").stat().st_size
    assert len(described["classes"]) == described["output"]["shape"][1] == 6


@needs_onnx
def test_the_file_alone_answers_as_predict_does(run, data, tmp_path):
    """In a user's own code, with what the .json beside the file says."""
    import onnxruntime

    export(run, [data[0]], out=tmp_path / "a.onnx", count=2)
    how = json.loads((tmp_path / "a.onnx.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    mean, std = (np.array(how["transform"][name], dtype=np.float32) for name in ("mean", "std"))
    for expected in predict(run, [data[0]], progress=False):
        pixels = load_image(expected.image, load_trained(run))
        images = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]
        (logits,) = session.run(["logits"], {"images": images})
        shares = np.exp(logits[0]) / np.exp(logits[0]).sum()
        for one in expected.classes:
            assert how["classes"][one.id] == one.name
            assert shares[one.id] == pytest.approx(one.probability, abs=1e-5)


def test_a_network_with_another_backend_of_its_scan_is_exported_too(data, tmp_path):
    """Whose operators are ours, and not in other runtimes."""
    args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4, "backend": "cpu"}
    fit(tiny_config(*data, tmp_path / "run", **{"model.args": args, "schedule.steps": 1}))
    trained = load_trained(tmp_path / "run")
    program = trace(trained.net, (32, 32))
    assert not [node.name for node in program.graph.nodes if "token_labeling" in str(node.target)]
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(program.module()(images), trained.net(images), atol=1e-5)


def test_a_file_that_answers_otherwise_is_no_result(run, data, tmp_path, monkeypatch):
    def other(path: Path) -> Any:
        net = load_trained(run).net
        return lambda images: net(images) * 1.01

    monkeypatch.setattr(export_file, "load_program", other)
    with pytest.raises(IntegrityError, match="the exported file answers otherwise than the run: got a largest"):
        export(run, [data[0]], out=tmp_path / "a.pt2", format="torch-export", count=4)
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_left_out_and_classes_that_are_unknown_are_not_compared(run, data, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    first = next(path for path in data[0].rglob("*") if path.is_file())
    (tmp_path / "images" / "good.png").write_bytes(first.read_bytes())
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    done = export(run, [tmp_path / "images"], out=tmp_path / "a.pt2", format="torch-export")
    assert (done.comparison.images, done.comparison.top1) == (1, None)
    assert "bad.png is left out: " in caplog.text


def test_differences_and_accuracies_are_counted():
    batches = [torch.zeros(1, 3, 2, 2), torch.ones(2, 3, 2, 2)]
    own = {0.0: torch.tensor([4.0, 0.0]), 1.0: torch.tensor([1.0, 2.0])}
    other = {0.0: torch.tensor([4.0, 0.5]), 1.0: torch.tensor([3.0, 2.0])}

    def answers(table: dict[float, torch.Tensor]) -> Any:
        return lambda images: torch.stack([table[float(image.mean())] for image in images])

    found = compare(answers(other), answers(own), batches, [0, 1, 0])
    assert (found.images, found.largest_difference, found.relative_difference) == (3, 2.0, 0.5)
    assert (found.agreement, found.top1, found.run_top1) == pytest.approx((1 / 3, 2 / 3, 2 / 3))


REFUSALS: dict[str, tuple[list[str], int, str]] = {
    "no images": ([], 2, "the following arguments are required: --images"),
    "absent images": (["--images", "nowhere"], 2, "'nowhere' cannot be read"),
    "absent run": (["--images", "IMAGES", "--checkpoint", "nowhere"], 2, "nowhere"),
    "format": (["--images", "IMAGES", "--format", "tflite"], 2, "invalid choice: 'tflite'"),
    "int8": (["--images", "IMAGES", "--format", "torch-export", "--int8", "static"], 2, "int8 is for ONNX files"),
    "count": (["--images", "IMAGES", "--count", "0"], 2, "expected a whole number of 1 or more"),
    "suffix": (["--images", "IMAGES", "--format", "torch-export", "--out", "a.onnx"], 2, "expected NAME.pt2"),
    "folder": (
        ["--images", "IMAGES", "--format", "torch-export", "--out", "no/a.pt2"],
        2,
        "the folder of --out does not exist: got 'no'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_exported_is_refused_in_one_line(case, run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, status, text = REFUSALS[case]
    arguments = [str(data[0]) if one == "IMAGES" else one for one in arguments]
    checkpoint = str(run)
    if "--checkpoint" in arguments:
        checkpoint = arguments.pop()
        arguments.remove("--checkpoint")
    try:
        found = main(["export", checkpoint, *arguments])
    except SystemExit as end:
        found = end.code
    shown = capsys.readouterr().err.strip()
    assert found == status
    assert text in shown
    assert len(shown.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "package", "remedy"),
    [("onnx", "onnxruntime", r"'token-labeling\[export\]'"), ("executorch", "executorch", "executorch")],
)
def test_a_missing_package_is_named(format, package, remedy, run, data, monkeypatch):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"format {format} needs {package}, which cannot.*pip install {remedy}$"):
        export(run, [data[0]], format=format)


def test_the_command_prints_what_it_did(run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["export", str(run), "--images", str(data[0]), "--format", "torch-export", "--count", "3"]
    assert main([*given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["file"], printed["comparison"]["images"]) == ("run.pt2", 3)
    assert main(given) == 0
    assert "in torch" in capsys.readouterr().out
