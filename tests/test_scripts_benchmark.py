"""The benchmark's own promises: sides alternate, ratios are of neighbours, memory is counted, tables are generated."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from fixtures import HAS_NUMBA

import model
from scripts.benchmark import __main__ as command_line
from scripts.benchmark.inputs.stock_model import our_scan, plain_scan, stock_model
from scripts.benchmark.measure import Case, Options, in_own_process, take_turns
from scripts.benchmark.suites import labeler_suite, loader_suite, loss_suite, model_suite, train_suite
from scripts.benchmark.table import number, render, text

ROOT = Path(__file__).parents[1]


def test_sides_take_turns_after_a_warm_up():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in ("ours", "rival")}
    found = take_turns(sides, rounds=3)
    assert calls == ["ours", "rival"] * 4
    assert found == {"ours": [3.0, 5.0, 7.0], "rival": [4.0, 6.0, 8.0]}


def test_ratios_are_formed_within_a_round_and_say_better():
    values = {"ours": [1.0, 10.0, 2.0], "rival": [3.0, 20.0, 10.0]}
    assert Case("", "ms", values).advantage("rival") == [2.0, 3.0, 5.0]
    assert Case("", "images/s", values, more_is_better=True).advantage("rival") == [0.2, pytest.approx(1 / 3), 0.5]


def test_extra_memory_is_that_of_the_call(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    megabytes = in_own_process("test_scripts_benchmark:memory_of_a_call", 100)
    assert megabytes == pytest.approx(100, abs=3)


def memory_of_a_call(megabytes: int) -> float:
    from scripts.benchmark.measure import extra_memory

    def call() -> torch.Tensor:
        torch.ones(megabytes * 250_000 // 2)  # freed again, and hence room for what follows
        return torch.ones(megabytes * 250_000)

    torch.ones(50_000_000)  # 200 MB, gone before the call: they must not hide it
    return extra_memory(call)


def test_a_side_that_fails_in_its_own_process_is_an_error(capfd):
    with pytest.raises(RuntimeError, match=r"measure:spread ended with 1: ValueError$"):
        in_own_process("scripts.benchmark.measure:spread", [])
    assert "empty" in capfd.readouterr().err


def test_the_stock_network_is_the_same_function():
    """Else its time would say nothing."""
    torch.manual_seed(0)
    net = timm.create_model("demansia_tiny", depth=2, img_size=64, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    ours, stock = net(images), stock_model(net)(images)
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-5)


def test_the_stock_scan_has_the_same_gradients():
    torch.manual_seed(0)
    shapes = (2, 6, 9), (2, 6, 9), (6, 4), (2, 4, 9), (2, 4, 9), (6,), (6,)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    inputs[2] = (-torch.rand(6, 4) - 0.1).requires_grad_()
    pairs = []
    for scan in (plain_scan, model.ops.selective_scan):
        y = scan(*inputs[:6], delta_bias=inputs[6], delta_softplus=True)
        pairs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for plain, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_a_slow_scan_is_refused(monkeypatch):
    """A published figure is never that of the reference, whatever the environment names."""
    monkeypatch.delenv("TOKEN_LABELING_SCAN", raising=False)
    assert our_scan("cpu") == f"backend: {'numba' if HAS_NUMBA else 'cpu'}"
    for named in ("reference", "mamba_ssm", "no-such"):
        monkeypatch.setenv("TOKEN_LABELING_SCAN", named)
        with pytest.raises(SystemExit) as stopped:
            our_scan("cpu")
        assert named in str(stopped.value)
        assert "TOKEN_LABELING_SCAN" in str(stopped.value)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.01234, "0.0123"), (5, "5.00"), (46.04, "46.0"), (99.96, "100"), (2190.4, "2,190")]
)
def test_numbers_have_three_digits_that_count(value, shown):
    assert number(value) == shown


def test_exponents_name_the_resolutions_of_a_side_that_ends_early():
    points = {"ours": [(512, 1.0), (768, 2.0), (1024, 4.0)], "rival": [(512, 1.0), (768, 2.0)], "third": [(512, 1.0)]}
    told = "ours with T to the power of 1.20, rival with T to the power of 0.85 (between 512 and 768)"
    assert model_suite.exponents(points) == f"between the two largest: {told}"
    assert model_suite.exponents({"ours": [(512, 1.0)]}) == ""


def test_a_growth_tells_of_the_figures_that_it_lacks(monkeypatch, tmp_path):
    def measured(function, name, side, device):
        if (name, side) == (model_suite.UNFUSED, 384):
            raise RuntimeError("measure_growth ended with -9")
        return [1.0, 2.0]

    monkeypatch.setattr(model_suite, "in_own_process", measured)
    for growth in model_suite.growths(options(tmp_path)):
        assert f"; no figure for {model_suite.UNFUSED} at 384: measure_growth ended with -9; " in growth.note
        assert [len(line) for line in growth.points.values()] == [2, 2, 1]


def options(scratch: Path, device: str = "cpu") -> Options:
    return Options(device, quick=True, images=scratch, scratch=scratch, cores=2)


def test_without_ray_labeling_in_this_process_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(labeler_suite, "find_spec", lambda name: None)
    monkeypatch.setattr(labeler_suite.photographs, "about", lambda *arguments: tmp_path)
    times = {labeler_suite.CODING: [1.0], labeler_suite.PASS: [2.0]}
    monkeypatch.setattr(labeler_suite, "in_own_process", lambda name, *_: times if "coding" in name else 1.0)
    found = labeler_suite.run(options(tmp_path))
    assert [case.ours for case in found.cases] == ["labeler, in this process", labeler_suite.CODING]
    assert found.left_out == {"labeling with resnet18 at 224 px, 2 Ray workers": "Ray is not installed"}


def test_without_dali_the_loader_is_left_out_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(loader_suite, "has_dali", lambda: False)
    monkeypatch.delattr(loader_suite, "_prepare")
    assert loader_suite.run(options(tmp_path, "cuda")).left_out == {"all cases": "DALI is not installed"}


def test_both_backends_of_the_loader_are_measured_on_a_cpu(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(loader_suite, "_prepare", lambda _: loader_suite.Material("images", "store", "labels"))
    monkeypatch.setattr(loader_suite, "in_own_process", lambda *work, **how: asked.append(how.get("backend")) or 1.0)
    for dali in (True, False):
        monkeypatch.setattr(loader_suite, "has_dali", lambda dali=dali: dali)
        found = loader_suite.run(options(tmp_path))
        assert found.cases[0].ours == "loader"
        assert (
            (loader_suite.BY_DALI in found.cases[0].values) == (loader_suite.BY_DALI in found.growths[0].points) == dali
        )
        assert (loader_suite.BY_DALI in found.left_out) != dali
        assert ("dali" in asked, "auto" in asked) == (dali, True)
        asked.clear()


def test_steps_are_kept_where_training_from_end_to_end_fails(monkeypatch, tmp_path, capsys):
    def fails(*arguments):
        raise RuntimeError("fit_rate ended with 1: ImportError")

    monkeypatch.setattr(train_suite, "about", lambda *arguments: tmp_path)
    monkeypatch.setattr(train_suite, "own", fails)
    name = "training end to end, 224², B 8"
    assert train_suite.end_to_end(options(tmp_path), 8).left_out == {name: "fit_rate ended with 1: ImportError"}
    monkeypatch.setattr(train_suite, "has_dali", lambda: False)
    assert train_suite.end_to_end(options(tmp_path, "cuda"), 8).left_out == {name: "DALI is not installed"}


def test_a_side_without_memory_leaves_the_others():
    def too_large():
        raise torch.OutOfMemoryError

    fitting, missing = train_suite.that_fit({"ours": int, "rival": too_large, "other": int}, "cpu")
    assert list(fitting) == ["ours", "other"]
    assert missing == ["no figure for rival: the GPU is out of memory"]


def test_with_ready_targets_the_loss_builds_none(monkeypatch):
    inputs, mix = loss_suite.Inputs(2, "cpu"), loss_suite.MIXES["mixed"]
    ready, (loss, gradients) = inputs.batch(mix), inputs.run(loss_suite.OURS, mix)
    monkeypatch.delattr(loss_suite.SyntheticLabels, "batch")
    torch.testing.assert_close(inputs.run(loss_suite.OURS, mix, ready), (loss, gradients))


def test_the_documents_table_is_the_results(tmp_path):
    """docs/benchmarks.md is generated from benchmarks/, never typed."""
    render(ROOT / "benchmarks", tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    for picture in tmp_path.glob("*.png"):
        assert (ROOT / "docs" / picture.name).exists()


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_quick_suite_from_the_command_line_writes_nothing(tmp_path):
    done = run("targets", "--quick", "--json", "--out", str(tmp_path / "out"), "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    suite = json.loads(done.stdout)["suites"]["targets"]
    assert suite["quick"]
    assert suite["versions"]["torch"] == torch.__version__.split("+")[0]
    for case in suite["cases"]:
        assert len(case["values"]) == (3 if "rows" in case["name"] else 2)
        assert all(value > 0 for values in case["values"].values() for value in values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        ["stores"],
        ["loader", "--images", "no-such-folder"],
        ["scan", "--device", "cuda"],
        ["store", "--checkpoint", "no-such-file"],
        ["store", "--rows", "1"],
    ],
)
def test_bad_usage_is_refused_before_any_work(wrong):
    if "cuda" in wrong and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(*wrong)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("scripts.benchmark: error:")


def suite_result(seconds: int) -> dict:
    case = {"name": "reading", "unit": "ms", "values": {"ours": [1.0], "rival": [3.0]}, "sought": {"rival": 5}}
    case |= {"more_is_better": False, "note": ""}
    about = {"date": "2026-01-01", "seconds": seconds, "versions": {}, "device": "cpu", "quick": False}
    return {**about, "photographs": "drawn", "cases": [case], "growths": []}


def test_curves_are_drawn_beside_the_growths(tmp_path):
    curves = {"name": "a", "x": "bytes", "y": "KL", "lines": {"in cells": [[2, 1], [1, 2]]}}
    suite = suite_result(1) | {"curves": [curves | {"marks": {"in cells, prototype": [[1, 1]]}}]}
    found = {"machine": {"name": "this", "what": "this", "device": "cpu"}, "suites": {"store": suite}}
    (tmp_path / "this.json").write_text(json.dumps(found))
    render(tmp_path, tmp_path)
    assert (tmp_path / "benchmarks-this-store-curves.png").read_bytes().startswith(b"\x89PNG")
    assert "(benchmarks-this-store-curves.png)" in (tmp_path / "benchmarks.md").read_text()


def test_options_of_the_store_are_named_without_paths():
    given = argparse.Namespace(teacher="tf_efficientnet_lite2", checkpoint=Path("/home/me/my.safetensors"), rows=1000)
    assert command_line.asked(given) == "--teacher tf_efficientnet_lite2 --checkpoint FILE --rows 1000"
    usual = argparse.Namespace(teacher=Options.teacher, checkpoint=None, rows=Options.rows)
    assert command_line.asked(usual) == ""


def main_with(monkeypatch, tmp_path: Path, measured, *arguments: str) -> int:
    monkeypatch.setattr(command_line, "measured", measured)
    folders = ["--out", str(tmp_path / "deep" / "out"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", ["scripts.benchmark", *arguments, *folders])
    return command_line.main()


def seconds_kept(tmp_path: Path) -> dict[str, int]:
    (file,) = (tmp_path / "deep" / "out").glob("*.json")
    return {name: suite["seconds"] for name, suite in json.loads(file.read_text())["suites"].items()}


def test_a_suite_that_is_run_again_takes_the_place_of_what_it_found_before(monkeypatch, tmp_path, capsys):
    assert main_with(monkeypatch, tmp_path, lambda suite, options: suite_result(1), "scan", "store") == 0
    assert main_with(monkeypatch, tmp_path, lambda suite, options: suite_result(2), "scan") == 0
    assert seconds_kept(tmp_path) == {"store": 1, "scan": 2}
    assert "≥ 5: **not met**" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "ours is better by 3.00" in capsys.readouterr().out


def test_what_was_left_out_is_told_with_its_reason(tmp_path):
    suites = {"store": suite_result(1), "loader": suite_result(1) | {"left_out": {"all cases": "no DALI"}}}
    found = {"machine": {"name": "this", "what": "this", "device": "cpu"}, "suites": suites}
    (tmp_path / "this.json").write_text(json.dumps(found))
    render(tmp_path, tmp_path)
    for told in (text(found), (tmp_path / "benchmarks.md").read_text()):
        assert told.count("not measured: all cases: no DALI") == 1


@pytest.mark.parametrize("named", [[], ["store", "scan"]])
def test_the_store_is_measured_with_a_gpu_only_if_named(monkeypatch, tmp_path, named, capsys):
    suites = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "describe", lambda device: {"name": "this", "what": "this", "device": device})
    measured = lambda suite, options: suites.append(suite) or suite_result(1)  # noqa: E731
    assert main_with(monkeypatch, tmp_path, measured, *named, "--device", "cuda", "--quick") == 0
    assert suites == (named or ["labeler", "loader", "targets", "loss", "scan", "model", "train"])


def test_suites_beside_one_that_fails_are_kept(monkeypatch, tmp_path, capsys):
    def measured(suite, options):
        if suite == "scan":
            raise RuntimeError("no memory")
        return suite_result(1)

    assert main_with(monkeypatch, tmp_path, measured, "scan", "store") == 1
    assert seconds_kept(tmp_path) == {"store": 1}
    assert "scan failed: no memory" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch, tmp_path):
    def measured(suite, options):
        if suite == "scan":
            raise KeyboardInterrupt
        return suite_result(1)

    assert main_with(monkeypatch, tmp_path, measured, "store", "scan", "loss") == 130
    assert seconds_kept(tmp_path) == {"store": 1}
