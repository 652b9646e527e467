"""The published numbers that tests compare with.

Two sources: "slim", cut down by `slim_fixtures.py` and kept in `tests/fixtures`, is always at hand; "full", all
numbers, lies beside the project or not at all. Inputs and weights are the same in both, bit for bit. Of a long output
or gradient the slim source keeps every n-th value, the norm and a weighted sum of the whole: a `Sample`, which `close`
knows.

A slim file is an xz of one line of JSON and the bytes of all tensors, the bytes of one significance together. A tensor
that its makers drew from a seed is kept as what was drawn, and as the differences of its bits from what is drawn here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import lzma
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED

SLIM, FULL = Path(__file__).parent / "fixtures", SHARED / "fixtures"
# Triton's interpreter is chosen before triton is imported: `tests/interpreter.py` does so in its own process.
HAS_NUMBA = importlib.util.find_spec("numba") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUMBA = pytest.param("numba", marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed"))
BACKENDS = ("reference", "cpu", NUMBA, *(("triton",) if INTERPRETED else ()))
BY_HAND = ("cpu", NUMBA)  # those on a CPU whose backward pass is not autograd's
AT_HAND = ("slim", "full") if FULL.is_dir() else ("slim",)
SOURCES = AT_HAND[-1:] if INTERPRETED else AT_HAND  # in the interpreter once: it takes minutes


@dataclasses.dataclass
class Sample:
    """Of a tensor of `shape`: every `step`-th value, its largest magnitude, its norm, and a sum that sees the order."""

    shape: torch.Size
    step: int
    values: torch.Tensor
    peak: float
    norm: float
    weighted: float

    @classmethod
    def of(cls, tensor: torch.Tensor, count: int) -> Sample:
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // count) | 1  # odd: even ones would see the same column of every row
        wide = flat.double()
        weighted = float(wide @ (1 + 0.5 * torch.arange(len(flat), dtype=torch.float64).cos()))
        return cls(tensor.shape, step, flat[::step].clone(), float(wide.abs().max()), float(wide.norm()), weighted)


def close(found: torch.Tensor, expected: torch.Tensor | Sample, tolerance: float, absolute: float = 0.0) -> None:
    """max|difference| ≤ tolerance · max|expected| + absolute; of a sample also the norm and the weighted sum."""
    assert found.shape == expected.shape
    if isinstance(expected, Sample):
        own = Sample.of(found, len(expected.values))
        own.values = found.detach().flatten()[:: expected.step]
        allowed = tolerance * expected.norm + absolute * math.sqrt(found.numel())
        assert abs(own.norm - expected.norm) <= allowed, f"norm {own.norm} for {expected.norm}"
        assert abs(own.weighted - expected.weighted) <= allowed, f"sum {own.weighted} for {expected.weighted}"
        limit, difference = tolerance * expected.peak + absolute, (own.values - expected.values).abs().max()
    else:
        limit = tolerance * float(expected.detach().abs().max()) + absolute
        difference = (found - expected).detach().abs().max()
    assert difference <= limit, f"{difference:.2e} > {limit:.2e}"


def uniforms(seed: int, start: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): what torch's float32 generator gives after `start` draws from a seed."""
    words = np.frombuffer(np.random.RandomState(seed).bytes(4 * (start + count)), "<u4")[start:]
    return (words & 0xFFFFFF) * 2.0**-24


def drawn(term: dict[str, Any], count: int) -> np.ndarray:
    """float64 [count] of one kind of draw, as torch makes it on a CPU: 16 normal values of 16 uniform ones."""
    u, scale = uniforms(term["seed"], term["start"], count), term["scale"]
    if term["kind"] == "uniform":
        return scale * (2 * u - 1)
    if term["kind"] in ("within two deviations", "inverted"):  # normal, by the inverse of the distribution function
        inside = 1.0 if term["kind"] == "inverted" else math.erf(math.sqrt(2))  # erf(±√2) = ±0.954: the mass between
        bounded = torch.from_numpy((2 * inside * u - inside).astype(np.float32)).double()
        return scale * math.sqrt(2) * torch.erfinv(bounded).numpy()
    one, other = u.reshape(-1, 2, 8).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-one)), 2 * np.pi * other
    return scale * np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


def predicted(terms: list[dict[str, Any]], count: int) -> np.ndarray:
    """uint32 [count]: the bits of float32 values drawn as `terms` say, which are right up to rounding."""
    return sum(drawn(term, count) for term in terms).astype("<f4").view("<u4")


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor | Sample]]:
    """(what is said about a slim file, its tensors and samples)."""
    line, _, content = lzma.decompress(path.read_bytes()).partition(b"\n")
    about, start, found = json.loads(line), 0, {}
    for name, facts in about.pop("tensors").items():
        kept, shape = facts.get("kept", facts["shape"]), torch.Size(facts["shape"])
        dtype = np.dtype(facts["dtype"])
        planes = np.frombuffer(content, np.uint8, math.prod(kept) * dtype.itemsize, start)
        start += planes.size
        values = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
        if "terms" in facts:
            bits = predicted(facts["terms"], math.prod(shape))
            values = (values.view("<u4") + bits if len(values) else bits).view("<f4")
        tensor = torch.from_numpy(values.copy())
        found[name] = Sample(shape, values=tensor, **facts["sample"]) if "sample" in facts else tensor.view(shape)
        if "wide" in facts:
            found[name] = tensor.double().view(shape)
    return about, found


@functools.cache
def load(name: str, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if source == "slim":
        return unpack(SLIM / f"{name}.xz")
    from safetensors.torch import load_file

    return json.loads((FULL / f"{name}.json").read_text()), load_file(FULL / f"{name}.safetensors")


def tensors(name: str, source: str = "slim") -> dict[str, Any]:
    """Tensors and samples of a fixture by name; a tensor is a copy, which a test may change."""
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in load(name, source)[1].items()}


def about(name: str, source: str = "slim") -> dict[str, Any]:
    return load(name, source)[0]


@functools.cache
def all_keys() -> dict[str, Any]:
    return json.loads(lzma.decompress((SLIM / "keys.json.xz").read_bytes()))


def keys(name: str) -> dict[str, Any]:
    """Names and shapes of a full-size model; these files are kept whole."""
    return all_keys()[name]


def state(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a fixture."""
    return {name[3:]: value for name, value in found.items() if name.startswith("sd.")}
