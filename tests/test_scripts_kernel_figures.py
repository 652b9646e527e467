"""Every Triton kernel compiles for GPUs that are not here, through Triton's own specialisation of a launch.

The interpreter is Python and takes what the compiler refuses. Triton decides when it is first imported whether kernels
are interpreted: everything runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.benchmark.studies.kernel_figures import BINARIES
from scripts.benchmark.studies.step_bytes import bytes_per_image, in_memory, mixers

ROOT = Path(__file__).parents[1]
BOTH = (False, True)
# `python -m scripts.benchmark.studies.kernel_figures --all` compiles every combination.
VARIANTS = [("bfloat16", 90, BOTH), ("float32", 80, BOTH[:1]), ("float32", 100, BOTH[1:])]


def in_a_process(code: str) -> str:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is not installed")
    if missing := [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not has(Path(triton.origin), name)]:
        pytest.skip(f"this build of Triton comes without {missing[0]}")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = "import json, torch\nfrom scripts.benchmark.studies import kernel_figures\n" + code
    done = subprocess.run([sys.executable, "-c", lines], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def has(triton: Path, name: str) -> bool:
    return (triton.parent / BINARIES / name).exists()


@pytest.mark.parametrize(("dtype", "architecture", "flags"), VARIANTS)
def test_each_optional_pointer_absent_and_present_compiles(dtype, architecture, flags):
    printed = in_a_process(f"print(kernel_figures.compile_all(torch.{dtype}, {architecture}, {flags}))")
    assert int(printed) == len(flags) ** 2 * (2 + 2) + 4


def test_figures_of_the_scan_are_those_that_the_documentation_tells():
    code = """
for kernel in kernel_figures.compiled(lambda: kernel_figures.scans(torch.bfloat16, True, True), 90).values():
    print(json.dumps(kernel_figures.figures(kernel)))
"""
    forward, backward = map(json.loads, in_a_process(code).splitlines())
    assert max(forward["registers"], backward["registers"]) <= 255
    assert forward["spills"] == 0
    assert backward["spills"] <= 128
    # Before lanes lay along the channels and loads came first: 101 and 417.
    assert 50 < forward["tenths per update"] < 90
    assert 250 < backward["tenths per update"] < 385


def test_the_mixers_of_a_step_move_little_memory():
    """Tensors without values; the plain mixer is what ran before."""
    fused, plain = mixers(batch=64), mixers(plain=True, batch=64)
    assert sum(fused.values()) < 300e6
    assert sum(plain.values()) > 500e6
    assert fused.keys() == {"forward", "backward"}


def test_bytes_are_those_of_what_an_operator_reads_and_writes():
    assert in_memory(torch.empty(3, 5).expand(7, 3, 5)) == 60
    assert in_memory(torch.empty(0, 4)) == 0
    found = bytes_per_image(torch.nn.Tanh(), (10,), plain=True, batch=2)
    assert found["forward"] == {"aten::tanh": 80}
    assert found["backward"] == {"aten::tanh_backward": 120}
