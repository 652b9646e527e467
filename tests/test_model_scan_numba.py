"""The compiled scan on a CPU: sizes and layouts of every kind, equal bits, and what happens where Numba is missing."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import HAS_NUMBA

from labeler.base.errors import BackendError
from model.ops import choose_backend, directional_scan, selective_scan
from model.ops.fused_cpu import machine

ROOT = Path(__file__).parents[1]
BOTH_WAYS = (False, True)
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")


def make(length: int, e: int, n: int, dtype: torch.dtype, k: int = 2, b: int = 1) -> list[torch.Tensor]:
    """Random arguments of `directional_scan`, u to delta_bias, with step sizes of trained models."""
    generator = torch.Generator().manual_seed(length + e)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a = -torch.exp(draw(k, e, n))
    made = [draw(k, b, length, e), draw(k, b, length, e) - 3, a, draw(k, b, length, n), draw(k, b, length, n)]
    return [x.to(dtype).requires_grad_() for x in (*made, draw(k, e), draw(k, e))]


def results(inputs: list[torch.Tensor], backend: str = "numba") -> list[torch.Tensor]:
    """The output and all gradients."""
    y = directional_scan(*inputs, True, BOTH_WAYS, backend)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, inputs, weight)]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], output: float, gradient: float) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = gradient if i else output
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max(), i


def digest(found: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in found)).hexdigest()


def own_process(code: str, **environment: str | None) -> subprocess.Popen:
    """Start a process with this file's functions at hand; None takes a variable away."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path[1:]])} | environment
    given = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, "-c", f"from test_model_scan_numba import *\n{code}"]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_numba
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 197, 577, 4096])
@pytest.mark.parametrize(("e", "n"), [(5, 3), (70, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_length_and_width_equals_float64(length, e, n, dtype):
    inputs = make(length, e, n, dtype)
    expected = results([x.detach().double().requires_grad_() for x in inputs], "cpu")
    assert_close(results(inputs), expected, *((1e-10, 1e-10) if dtype == torch.float64 else (2e-6, 1e-5)))


@needs_numba
def test_as_many_states_as_there_may_be():
    inputs = make(20, 130, 64, torch.float64, b=2)
    assert_close(results(inputs), results(inputs, "reference"), 1e-10, 1e-10)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in make(40, 20, 4, torch.float32)]
    found = results(inputs)
    assert {x.dtype for x in found} == {dtype}
    double = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(found, results(double, "cpu"), *[2 * torch.finfo(dtype).eps] * 2)


@needs_numba
def test_strides_change_nothing():
    """Tensors whose channels, steps or images do not lie one after the other give the same bits."""
    inputs = make(20, 48, 4, torch.float32, b=3)
    laid_out = []
    for x in inputs:
        turned = x.detach().transpose(0, -1).contiguous().transpose(0, -1)
        laid_out.append(torch.stack([turned, turned], -1)[..., 0].requires_grad_())
    assert not any(x.is_contiguous() for x in laid_out)
    assert digest(results(laid_out)) == digest(results(inputs))
    u, delta, a, b, c, d, bias = (x.detach() for x in inputs)
    rates = (b[0].mT, c[0].mT)
    y = selective_scan(u[0].mT, delta[0].mT, a[0], *rates, d[0], None, bias[0], True, backend="numba")
    expected = directional_scan(*(x[:1] for x in (u, delta, a, b, c, d, bias)), True, (False,), "numba")
    assert torch.equal(y.mT, expected[0])


@needs_numba
def test_bits_do_not_depend_on_threads_or_on_the_setting_for_denormals():
    inputs = make(33, 200, 5, torch.float32, b=3)
    before, found = torch.get_num_threads(), set()
    try:
        for threads, flushed in ((1, False), (2, False), (5, True), (2, True)):
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flushed)
            found.add(digest(results(inputs)))
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
    assert len(found) == 1


@needs_numba
def test_infinite_decays_and_inputs_stay_visible():
    """A state that grows beyond the range is infinite, as in the reference, not a number of some size."""
    inputs = [x.detach() for x in make(20, 3, 2, torch.float32)]
    inputs[2] = -inputs[2] * 1e4
    found, expected = (directional_scan(*inputs, True, BOTH_WAYS, backend) for backend in ("numba", "reference"))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not found.isfinite().all()


@needs_numba
def test_no_states_are_kept_where_no_gradient_is_wanted():
    operator, inputs = torch.ops.token_labeling.scan_numba, [x.detach() for x in make(40, 6, 4, torch.float64)]
    y, saved = operator(*inputs, True, [0, 1], False)
    whole, kept = operator(*inputs, True, [0, 1], True)
    assert torch.equal(y, whole)
    assert (saved.numel(), kept.shape[2]) == (0, 3)
    weight = torch.ones_like(y)
    backward = torch.ops.token_labeling.scan_numba_backward
    without, given = (backward(weight, *inputs, states, True, [0, 1]) for states in (saved, kept))
    assert digest(without) == digest(given)  # a graph traced for inference can still be trained
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x), torch.no_grad():
        directional_scan(*make(40, 6, 4, torch.float64), True, BOTH_WAYS, "numba")
    assert not sizes


EIGHT = """
torch.set_num_threads(1)
assert machine.is_available()[0]  # imports Numba; nothing is compiled yet
children = []
for _ in range(8):
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, digest(results(make(33, 40, 4, torch.float32))).encode())
        os._exit(0)
    os.close(writer)
    children.append(reader)
print(*(os.read(reader, 64).decode() for reader in children))
"""


@needs_numba
def test_eight_processes_at_first_use_and_one_that_reads_the_cache_give_the_same_bits(tmp_path):
    process = own_process(EIGHT, NUMBA_CACHE_DIR=str(tmp_path))
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    (folder,) = tmp_path.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb*")}
    assert len(written) == 4  # an index and machine code for each of two kernels
    code = "print(digest(results(make(33, 40, 4, torch.float32))))"
    code += "\nkernels = [machine.kernel('scan', f'{way}_float32') for way in ('forward', 'backward')]"
    code += "\nassert all(one._compiled._cache_hits for one in kernels)"
    process = own_process(code, NUMBA_CACHE_DIR=str(tmp_path))
    later, errors = process.communicate()
    assert process.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb*")} == written
    assert told.split() == [later.strip()] * 8 == [digest(results(make(33, 40, 4, torch.float32)))] * 8


@needs_numba
def test_a_cache_that_cannot_be_written_costs_one_line_and_the_same_bits(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    code = "logging.basicConfig(format='%(message)s')\n"
    code += "print(digest([directional_scan(*make(20, 6, 4, torch.float32), True, BOTH_WAYS)]))"
    process = own_process(code, NUMBA_CACHE_DIR=str(tmp_path / "file/cache"))
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.count("compiled anew by every process") == 1
    assert "NUMBA_CACHE_DIR names another folder" in errors
    assert told == digest(results(make(20, 6, 4, torch.float32))[:1]) + "\n"


def test_machine_code_lies_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert machine.cache_folder.__wrapped__().parent == tmp_path / "cache/token-labeling/numba"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    named = machine.cache_folder.__wrapped__()
    assert named.parent == tmp_path / "named"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert machine.cache_folder.__wrapped__() != named


@pytest.fixture
def anew():
    """Numba is looked for anew, before and after."""
    machine.is_available.cache_clear()
    yield
    machine.is_available.cache_clear()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "numba is not installed; pip install numba"),
        ("0.58.1", "numba 0.58.1 is too old; pip install 'numba>="),
        ("0.99.0", "numba 0.99.0 cannot be imported (ImportError: Numba needs NumPy"),
    ],
)
def test_without_a_numba_that_works_the_scan_is_torchs(anew, monkeypatch, caplog, version, words):
    def broken(_: str) -> None:
        raise ImportError("Numba needs NumPy 9.9 or less")

    def version_of(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(machine, "_import", broken)
    monkeypatch.delenv("TOKEN_LABELING_SCAN", raising=False)
    importlib.import_module("model.ops.selective_scan")._announced.clear()
    caplog.set_level(logging.INFO)
    assert choose_backend("auto", "cpu") == choose_backend("auto", "cpu") == "cpu"
    (said,) = [record.getMessage() for record in caplog.records]
    assert words in said
    with pytest.raises(BackendError, match=r"numba.*cannot run.*reference") as caught:
        choose_backend("numba", "cpu")
    assert words in str(caught.value)
    monkeypatch.setenv("TOKEN_LABELING_SCAN", "numba")
    with pytest.raises(BackendError, match="named by TOKEN_LABELING_SCAN, cannot run"):
        choose_backend("auto", "cpu")


def test_importing_the_models_does_not_import_numba():
    code = "import model, sys; assert not {'numba', 'llvmlite'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
