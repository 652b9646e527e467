"""`doctor`: which parts of this machine can be used, and why others cannot.

Each check is independent: one that fails is reported in its own line. Heavy packages are only imported within a check.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from labeler.base.cores import usable_cores

Findings = dict[str, str]

# Module -> package to install.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "h5py": "h5py",
    "ray": "ray",
    "triton": "triton",
    "numba": "numba",
    "simplejpeg": "simplejpeg",
    "nvidia.dali": "nvidia-dali-cuda130",
}
OPTIONAL = {
    "tensorboard": ("tensorboard", "shows runs in a browser; pip install tensorboard"),
    "wandb": ("wandb", 'run.tracker="wandb"; pip install wandb'),
    "trackio": ("trackio", 'run.tracker="trackio"; pip install trackio'),
    "onnx": ("onnx", "exports models; pip install 'token-labeling[export]'"),
    "mamba_ssm": ("mamba-ssm", "one more scan backend, on a GPU; pip install 'token-labeling[mamba]'"),
}
SCANS = ("reference", "cpu", "numba", "triton", "mamba_ssm")
TOLERANCE = 1e-4  # relative, between the results of two scan backends in float32


def diagnose() -> dict[str, Findings]:
    """Run all checks.

    Returns:
        Section -> check -> finding, as text.
    """
    return {
        "machine": _all({"python": _python, "platform": platform.platform, "cores": _cores, "memory": _memory}),
        "packages": _each(_package, NEEDED),
        "gpus": _guarded_section("cuda", _gpus),
        "selective scan": _all({"auto": _automatic_scan}) | _each(_scan, SCANS),
        "image loading": _all(
            {"auto": _automatic_loader, "cpu": _cpu_loader, "pil": _pil_loader, "dali": _dali_loader}
        ),
        "optional": _each(_optional, OPTIONAL),
    }


def text(findings: dict[str, Findings]) -> str:
    """The findings of `diagnose` as text, one line for each check."""
    width = max(len(name) for checks in findings.values() for name in checks)
    lines = []
    for section, checks in findings.items():
        lines += [section, *(f"  {name:{width}}  {finding}" for name, finding in checks.items())]
    return "\n".join(lines)


def _all(checks: dict[str, Callable[[], str]]) -> Findings:
    return {name: _guarded(check) for name, check in checks.items()}


def _each(check: Callable[[str], str], names: Iterable[str]) -> Findings:
    return _all({name: partial(check, name) for name in names})


def _guarded(check: Callable[[], str]) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):
            return check()
    except (Exception, SystemExit) as error:  # whatever is broken on this machine
        return f"check failed: {_reason(error)}"


def _guarded_section(name: str, check: Callable[[], Findings]) -> Findings:
    try:
        with warnings.catch_warnings(action="ignore"):
            return check()
    except (Exception, SystemExit) as error:
        return {name: f"check failed: {_reason(error)}"}


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _cores() -> str:
    everywhere, ours = os.cpu_count() or 1, usable_cores()
    return f"{ours}" if ours == everywhere else f"{ours} of {everywhere} for this process"


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    if allowed.isdigit() and int(allowed) < total:
        return f"{int(allowed) / 2**30:.1f} GiB of {total / 2**30:.1f} GiB for this container"
    return f"{total / 2**30:.1f} GiB"


def _package(name: str) -> str:
    project = NEEDED[name]
    try:
        version = importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not version and (name == error.name or name.startswith(f"{error.name}.")):
            return f"not installed; pip install {project}"
        return f"{version}, cannot be imported ({_reason(error)})"
    except (Exception, SystemExit) as error:  # a build for another system fails in many ways
        return f"{version}, cannot be imported ({_reason(error)}); `pip install --force-reinstall {project}`"
    return str(getattr(module, "__version__", version or "unknown version"))


def _gpus() -> Findings:
    import torch

    if not torch.cuda.is_available():
        return {"cuda": f"off: {_why_no_cuda()}"}
    findings = {"cuda": f"on, {torch.version.cuda or torch.version.hip}"}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        findings[f"cuda:{i}"] = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return findings


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA; install the ordinary build: pip install torch"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs; unset it"
    try:
        torch.cuda.init()
    except Exception as error:
        return _reason(error).removeprefix("RuntimeError: ")
    return f"torch finds no GPU{'' if visible is None else f' (CUDA_VISIBLE_DEVICES={visible!r})'}"


def _scan_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _automatic_scan() -> str:
    from model.ops.selective_scan import VARIABLE, choose_backend

    named = f" ({VARIABLE} names it)" if os.environ.get(VARIABLE) else ""
    return choose_backend("auto", _scan_device()) + named


def _scan(name: str) -> str:
    """Run a small scan and compare it with the reference."""
    import torch

    from labeler.base.errors import BackendError
    from model.ops.selective_scan import choose_backend, directional_scan

    device = "cpu" if name in ("cpu", "numba") else _scan_device()
    try:
        choose_backend(name, device)
    except BackendError as error:
        return f"does not run: {error.problem.split(': ', 1)[-1]}"
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(1, 2, 20, n, generator=generator).to(device) for n in (8, 8, 4, 4))
    A = -torch.rand(1, 8, 4, generator=generator).to(device)
    y, expected = (
        directional_scan(u, delta, A, B, C, delta_softplus=True, backend=which) for which in (name, "reference")
    )
    off = float((y - expected).abs().max() / expected.abs().max())
    return "runs" if off < TOLERANCE else f"gives wrong results: off by {off:.1e}, expected less than {TOLERANCE:g}"


def _automatic_loader() -> str:
    from labeler.sources.decoding.create_decoder import automatic_decoder

    return automatic_decoder(_scan_device())


def _cpu_loader() -> str:
    from labeler.sources.decoding.jpeg_pixels import simplejpeg
    from pipeline.compiled.available import WITHOUT, kernels

    compiled = None if any(kernels(name) is None for name in WITHOUT) else kernels
    missing = [name for name, found in (("simplejpeg", simplejpeg()), ("numba", compiled)) if found is None]
    return "runs" + (f", slower than it could: {' and '.join(missing)} cannot be used" if missing else "")


def _pil_loader() -> str:
    import PIL

    import pipeline.backends.pil_backend  # noqa: F401

    return f"runs (Pillow {PIL.__version__})"


def _dali_loader() -> str:
    from labeler.sources.decoding.create_decoder import has_dali

    if not has_dali():
        return f"does not run: DALI is not installed; pip install {NEEDED['nvidia.dali']}, or data.backend=cpu"
    try:
        import pipeline.backends.dali_backend  # noqa: F401
    except Exception as error:
        return f"does not run: {_reason(error)}; set data.backend=cpu"
    return f"runs (on {'GPU' if _scan_device() == 'cuda' else 'CPU'})"


def _optional(name: str) -> str:
    project, use = OPTIONAL[name]
    try:
        return importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: {use}"
