"""A description of the machine that does not identify its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from labeler.base.cores import usable_cores

PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "ray", "h5py", "triton", "mamba-ssm")


def describe(device: str) -> dict[str, str]:
    """Returns the machine's `name` for its file of results, `what` it is in words, and the `device`."""
    cores = usable_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    processor = _processor()
    what, short = f"{processor}, {cores} cores, {memory:.0f} GB", f"{processor} {cores} cores"
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_properties(0)
        what, short = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB; {what}", f"{gpu.name} {short}"
    return {"name": re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-"), "what": what, "device": device}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|CPU|@.*", " ", name).split())
