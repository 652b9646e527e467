"""The shape of the project: imports run downwards without circles, rooms are small, heavy libraries stay."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("labeler", "pipeline", "model", "train")
OURS = {*PACKAGES, "scripts", "tests", "examples"}
# Rooms and packages, with those that they may import beside themselves. `labeler/` itself is the run and its commands.
GROUND = {"labeler/base", "labeler/remote"}
BELOW = {
    "labeler/base": set(),
    "labeler/remote": {"labeler/base"},
    "labeler/sources": GROUND,
    "labeler/store": {*GROUND, "labeler/sources"},
    "labeler/share": {*GROUND, "labeler/sources", "labeler/store"},
    "labeler/teacher": {"labeler/base"},
    "labeler": {*GROUND, "labeler/sources", "labeler/store", "labeler/share", "labeler/teacher"},
    "labeler/report": {"labeler", *GROUND, "labeler/sources", "labeler/store", "labeler/teacher"},
    "pipeline": {"labeler", *GROUND, "labeler/sources", "labeler/store", "labeler/report"},
    "model": {"labeler/base"},
    "train": {"pipeline", "model", "labeler", *GROUND, "labeler/sources", "labeler/store", "labeler/report"},
}
ONE_FILE = {
    "fsspec": {"labeler/remote/file_systems.py"},
    "pyarrow": {"labeler/sources/parquet_source.py"},
    "ray": {"labeler/ray_executor.py"},
    "nvidia": {"labeler/sources/decoding/decode_dali.py", "pipeline/backends/dali_backend.py"},
    "simplejpeg": {"labeler/sources/decoding/jpeg_pixels.py"},
    "peft": {"train/adapters/lora.py"},
    "segmentation_models_pytorch": {"train/segmentation/network.py"},
    "onnxruntime": {"train/export/onnx_file.py"},
    "executorch": {"train/export/executorch_file.py"},
    "triton": {
        "model/ops/scan_triton_kernels.py",
        "model/ops/scan_triton.py",
        "model/ops/mixer_triton_kernels.py",
        "train/loss/loss_triton.py",
    },
}
ROOMS = {"h5py": {"labeler/store/hdf5"}, "numba": {"model/ops/fused_cpu", "pipeline/compiled"}}
MOST_FILES = 14


@functools.cache
def files() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted names of all our modules."""
    named = {}
    for path in files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


@functools.cache
def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names of all modules that a file imports; without `everywhere` only when it is itself imported."""
    known, found = modules(), set()
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else _at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known.keys()) or {node.module}
    return found


def _at_import(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported; what stands under TYPE_CHECKING or in functions does not."""
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def room_of(module: str) -> str | None:
    """The room or package of one of our modules; None for others'."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return "scripts" if parts[0] in OURS else None
    inner = "/".join(parts[:2])
    return inner if inner in BELOW else parts[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards_only(path):
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    command = path.name == "__main__.py"  # commands stand above all rooms of their package
    allowed = {own, *BELOW[own]} | ({room for room in BELOW if room.startswith(own)} if command else set())
    found = {module: room_of(module) for module in imports(path)}
    upwards = {module for module, room in found.items() if room is not None and room not in allowed}
    lazy = {"labeler": {"labeler"}}  # names of the package are fetched when they are used
    assert not upwards - lazy.get(own, set()), f"{path.relative_to(ROOT)} imports {upwards}"


def test_no_two_files_import_each_other():
    graph = {module: imports(path) & modules().keys() - {module} for module, path in modules().items()}
    graph = {module: {one for one in found if one.count(".")} for module, found in graph.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("library", ONE_FILE)
def test_a_heavy_library_stays_in_its_file(library):
    found = {
        str(path.relative_to(ROOT)) for path in files() if library in {module.split(".")[0] for module in imports(path)}
    }
    assert found <= ONE_FILE[library]
    assert found & ONE_FILE[library]


@pytest.mark.parametrize("library", ROOMS)
def test_a_heavy_library_stays_in_its_rooms(library):
    found = {
        str(path.parent.relative_to(ROOT))
        for path in files()
        if library in {module.split(".")[0] for module in imports(path)}
    }
    assert found == ROOMS[library]


def test_a_folder_holds_few_files_and_says_what_it_is_for():
    for folder in {path.parent for path in (*files(), *(ROOT / "scripts").rglob("*.py"))}:
        count = sum(path.is_file() and path.name != "py.typed" for path in folder.iterdir())
        assert count <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {count} files"
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{folder} does not say"


def test_no_file_shadows_a_package():
    names = {f"{package}.py" for package in PACKAGES}
    assert not [path for package in OURS for path in (ROOT / package).rglob("*.py") if path.name in names]
