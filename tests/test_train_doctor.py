"""`doctor`: what it tells of a machine, and that nothing broken keeps it from telling the rest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import HAS_NUMBA

from labeler.base.cores import usable_cores
from train import doctor
from train.__main__ import main

# As `model.ops` has a function of this name.
selective_scan: Any = importlib.import_module("model.ops.selective_scan")
ROOT = Path(__file__).parents[1]
SECTIONS = ["machine", "packages", "gpus", "selective scan", "image loading", "optional"]


def test_it_tells_of_the_machine_and_every_part(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == SECTIONS
    assert found["machine"]["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["machine"]["cores"].split()[0] == str(usable_cores())
    assert float(found["machine"]["memory"].split()[0]) > 0.5
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["timm"] == version("timm")
    assert found["packages"]["h5py"] == version("h5py")
    assert list(found["packages"]) == [
        "torch",
        "torchvision",
        "timm",
        "h5py",
        "ray",
        "triton",
        "numba",
        "simplejpeg",
        "nvidia.dali",
    ]
    scan = found["selective scan"]
    assert set(scan) == {"auto", *selective_scan.BACKENDS}
    assert scan["reference"] == scan["cpu"] == "runs"
    assert scan["numba"] == ("runs" if HAS_NUMBA else "does not run: numba is not installed; pip install numba")
    assert found["image loading"]["pil"].startswith("runs")
    assert found["image loading"]["cpu"].startswith("runs")
    if not torch.cuda.is_available():
        assert found["image loading"]["auto"] == "cpu"
        assert scan["auto"] == ("numba" if scan["numba"] == "runs" else "cpu")
        assert scan["triton"].startswith("does not run: ")
        assert scan["mamba_ssm"].startswith("does not run: ")
        assert found["gpus"]["cuda"].startswith("off: ")
    for name, told in found["optional"].items():
        try:
            assert told == version(doctor.OPTIONAL[name][0])
        except PackageNotFoundError:
            assert "pip install" in told
    assert doctor.text(found).count("\n") == sum(map(len, found.values())) + len(SECTIONS) - 1


def test_it_speaks_though_torch_itself_is_broken(tmp_path):
    """In its own process, where `import torch` fails as with a missing library."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "train", "doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "cannot be imported (OSError: libtorch_cpu.so: undefined symbol)" in lines["torch"]
    assert version("h5py") in lines["h5py"]
    assert "check failed: OSError: libtorch_cpu.so" in lines["cuda"]
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == SECTIONS


def test_each_check_that_fails_is_one_line_and_the_others_go_on(monkeypatch):
    def failing(*_: object, **__: object) -> str:
        raise RuntimeError("first line\nsecond line")

    for name in ("_cores", "_memory", "_automatic_loader", "_gpus", "_scan"):
        monkeypatch.setattr(doctor, name, failing)
    found = doctor.diagnose()
    told = "check failed: RuntimeError: first line"
    assert found["gpus"] == {"cuda": told}
    assert found["machine"]["cores"] == found["machine"]["memory"] == found["image loading"]["auto"] == told
    own = "numba" if HAS_NUMBA else "cpu"
    assert set(found["selective scan"].values()) == {own if not torch.cuda.is_available() else "triton", told}
    assert found["machine"]["python"].startswith("3.")


def test_a_package_that_is_missing_or_broken_is_told_apart(monkeypatch):
    monkeypatch.setitem(doctor.NEEDED, "no_such_package_here", "no-such-package-here")
    assert doctor._package("no_such_package_here") == "not installed; pip install no-such-package-here"
    real = importlib.import_module

    def import_module(name: str) -> object:
        if name == "h5py":
            raise ImportError("libhdf5.so.310: cannot open shared object file")
        if name == "timm":
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = doctor._package("h5py")
    assert found.startswith(f"{version('h5py')}, cannot be imported (ImportError: libhdf5.so.310: ")
    assert "No module named 'yaml'" in doctor._package("timm")


def test_a_scan_that_computes_wrongly_does_not_run(monkeypatch):
    """What only looks as if it ran: one backend's results are off by a hundredth."""
    real = selective_scan.scan_cpu
    monkeypatch.setattr(selective_scan, "scan_cpu", lambda *given: 1.01 * real(*given))
    assert doctor._scan("cpu").startswith("gives wrong results: off by 1.0e-02")
    assert doctor._scan("reference") == "runs"


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_the_reason_why_cuda_is_off(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpus() == {"cuda": f"off: CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs; unset it"}


def test_other_reasons_why_cuda_is_off(monkeypatch):
    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert doctor._gpus() == {"cuda": "off: Found no NVIDIA driver on your system."}
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert doctor._gpus() == {"cuda": "off: torch finds no GPU"}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in doctor._gpus()["cuda"]
