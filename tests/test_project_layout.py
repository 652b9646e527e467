"""The shape of the project: imports run downwards, heavy libraries stay in their files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "labeler": {"labeler"},
    "pipeline": {"pipeline", "labeler"},
    "model": {"model"},
    "train": {"train", "pipeline", "labeler", "model"},
}
OURS = {*BELOW, "scripts", "tests"}
ONE_FILE = {
    "h5py": {"labeler/store/shard_file.py"},
    "ray": {"labeler/executor.py"},
    "nvidia": {"labeler/sources/decode_dali.py", "pipeline/dali_loader.py"},
    "triton": {"model/ops/scan_triton_kernels.py", "model/ops/scan_triton.py", "train/loss/loss_triton.py"},
}


def imports(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_downwards_only(package):
    for path in (ROOT / package).rglob("*.py"):
        upwards = (imports(path) & OURS) - BELOW[package]
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


@pytest.mark.parametrize("library", ONE_FILE)
def test_a_heavy_library_stays_in_its_file(library):
    found = {
        str(path.relative_to(ROOT))
        for package in BELOW
        for path in (ROOT / package).rglob("*.py")
        if library in imports(path)
    }
    assert found <= ONE_FILE[library]
    assert found & ONE_FILE[library]


def test_no_file_shadows_a_package():
    names = {f"{package}.py" for package in BELOW}
    assert not [path for package in OURS for path in (ROOT / package).rglob("*.py") if path.name in names]
