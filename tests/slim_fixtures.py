"""Cuts the numbers in `../shared/fixtures` down to those in `tests/fixtures`: `python tests/slim_fixtures.py`.

Inputs and weights stay whole, so that a test's own outputs are held against the reference implementation's numbers at
the same tolerance as ever; of outputs and gradients of more than `WHOLE` values a sample stays (see `fixtures.py`).
Most weights and images are a seed's draws: where one is found, the draw is kept in their place. Each file is read back,
and every tensor that stays whole must be the original one, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixtures import FULL, SLIM, Sample, drawn, predicted, uniforms, unpack
from safetensors.torch import load_file

WHOLE = 128  # values; a tensor with no more stays whole
SAMPLED = {"token_targets": 1500}  # values of a sample; 48 elsewhere
DRAWN = 9000  # values; smaller tensors are not looked for among the draws
STREAM = 1_250_000  # draws of a seed that are searched
LINEAR = 0.02  # standard deviation of a linear layer's initial weights
TINY = 1e-5  # what rounding leaves of a tensor when its draws are taken away
# The seeds: of a model's initial weights and its images, and of the noise that was added to the weights.
SEEDS = {
    "demansia_micro": (20240601, 11),
    "vim_micro": (20240602, 12),
    "demansia2_micro": (20240606, 17),
    "lvvit_micro": (20240603, 13),
    "mila_micro": (20240604, 15),
    "mambavision_micro": (20240605, 16),
    "bimamba_mixer": (31,),
    "token_targets": (99,),
    "selective_scan": (),
}
# Those whose weights are kept as draws alone, without what rounding left: fewer bytes, and 1e-6 from the original.
ROUNDED = {"mila_micro": 500, "mambavision_micro": 500}  # values; smaller tensors are not looked for among the draws
PRESET = 9 | lzma.PRESET_EXTREME
KEYS = "keys"  # the names and shapes of full-size models, beside the fixtures
MODELS = ("demansia", "demansia2", "vim", "lvvit", "mlla", "mamba_vision")  # whose names and shapes are kept


def kept(fixture: str, name: str) -> str:
    """What stays of a tensor: "whole", "sample" or "" (no test asks for it)."""
    first, last = name.split(".")[0], name.split(".")[-1]
    if fixture == "selective_scan":
        if last == "last_state" or ".L256." in name:  # L = 197 is long enough
            return ""
        return "sample" if last == "out" or (last.startswith("grad_") and last != "grad_out") else "whole"
    if ".rounding." in name or first in ("hard", "target_map", "trap") or name == "loss.values":
        return ""
    inputs = first in ("sd", "x", "x_pad", "x3", "g", "gamma", "in", "target", "labels") or name in {
        "loss.output", "loss.aux", "loss.target", "loss.target_hard", "mixer.u",
    }  # fmt: skip
    return "whole" if inputs else "sample"


def normal_start(values: np.ndarray, seed: int) -> int | None:
    """Where in a seed's draws a tensor's normal part begins: the place of best correlation, if it is beyond chance."""
    u, blocks = uniforms(seed, 0, STREAM), 32
    one, other = u[:-8], u[8:]
    radius, angle = np.sqrt(-2 * np.log1p(-one)), 2 * np.pi * other
    halves = radius * np.cos(angle), radius * np.sin(angle)
    places = len(one) - 16 * blocks
    score = np.zeros(places)
    for i, value in enumerate(values[: 16 * blocks] / np.linalg.norm(values[: 16 * blocks])):
        block, j = divmod(i, 16)
        start = 16 * block + j % 8
        score += value * halves[j // 8][start : start + places]
    best = int(score.argmax())
    return best if score[best] > 8 else None


def found_in(fractions: np.ndarray, seed: int) -> int | None:
    """Where in a seed's draws these come after each other."""
    u = uniforms(seed, 0, STREAM)
    places = np.flatnonzero(np.abs(u - fractions[0]) < 1e-4)
    places = places[places + 8 < len(u)]
    near = [p for p in places if np.abs(u[p : p + 8] - fractions[:8]).max() < 1e-4]
    return int(near[0]) if near else None


def noise_of(values: np.ndarray, fan_in: int, seeds: tuple[int, ...]) -> dict[str, Any] | None:
    """The normal part of a tensor, which is the whole or the larger part."""
    for seed in reversed(seeds):
        start = normal_start(values, seed)
        if start is not None:
            term = {"kind": "normal", "seed": seed, "start": start, "scale": 1.0}
            noise = drawn(term, len(values))
            fitted = round(float(values @ noise / (noise @ noise)), 3)
            return term | {"scale": 0.6 * fan_in**-0.5 if seed == seeds[-1] != seeds[0] else fitted}
    return None


def initial_of(values: np.ndarray, fan_in: int, seed: int) -> dict[str, Any] | None:
    """The initial weights: uniform within 1/√fan_in, normal within two deviations, or normal of deviation 0.02."""
    bound, spread = fan_in**-0.5, fan_in**-0.5 / 0.87962566103423978  # that of the normal before it is cut
    normal = torch.special.erf(torch.from_numpy(values[:8] / spread / 2**0.5)).numpy() / math.erf(2**0.5)
    small = torch.special.erf(torch.from_numpy(values[:8] / LINEAR / 2**0.5)).numpy()
    kinds = (
        ("uniform", bound, values[:8] / bound),
        ("within two deviations", spread, normal),
        ("inverted", LINEAR, small),
    )
    for kind, scale, place in kinds:
        start = found_in((place + 1) / 2, seed)
        if start is not None:
            return {"kind": kind, "seed": seed, "start": start, "scale": scale}
    return None


def as_draws(tensor: torch.Tensor, seeds: tuple[int, ...], least: int = DRAWN) -> list[dict[str, Any]] | None:
    """The draws whose sum a tensor of at least `least` values is, to rounding; none where they are not found."""
    if not seeds or not tensor.is_floating_point() or tensor.numel() < least:
        return None
    values, fan_in, terms = tensor.double().flatten().numpy(), tensor[0].numel(), []
    if noise := noise_of(values, fan_in, seeds):
        terms.append(noise)
        values = values - drawn(noise, len(values))
    if np.abs(values).max() > TINY and (initial := initial_of(values, fan_in, seeds[0])):
        terms.append(initial)
        values = values - drawn(initial, len(values))
    return terms if np.abs(values).max() < TINY else None


def pack(fixture: str) -> bytes:
    """A slim file: one line of JSON, then the bytes of all tensors, compressed."""
    about = json.loads((FULL / f"{fixture}.json").read_text())
    slim = {key: about[key] for key in ("what", "source", "config", "fields", "loss_table") if key in about}
    if fixture in ROUNDED:
        slim["rounded"] = TINY
    if "cases" in about:
        slim["cases"] = {name: case for name, case in about["cases"].items() if kept(fixture, f"{name}.out")}
    if fixture == "token_targets":
        slim["measured"] = {"loss_grad_row": about["measured"]["loss_grad_row"]}
    facts: dict[str, Any] = {}
    content = []
    for name, tensor in load_file(FULL / f"{fixture}.safetensors").items():
        form = kept(fixture, name)
        if not form:
            continue
        fact = facts[name] = {"shape": list(tensor.shape)}
        if form == "sample" and tensor.numel() > WHOLE:
            sample = Sample.of(tensor, SAMPLED.get(fixture, 48))
            fact["sample"] = {key: getattr(sample, key) for key in ("step", "peak", "norm", "weighted")}
            tensor, fact["kept"] = sample.values, list(sample.values.shape)
        elif tensor.dtype == torch.float64 and torch.equal(tensor.float().double(), tensor):
            tensor, fact["wide"] = tensor.float(), True
        values = tensor.contiguous().numpy().reshape(-1)
        fact["dtype"] = values.dtype.str
        terms = as_draws(tensor, SEEDS[fixture], ROUNDED.get(fixture, DRAWN)) if form == "whole" else None
        if terms:
            fact["terms"] = terms
            values = values.view("<u4") - predicted(terms, len(values))
            if fixture in ROUNDED:
                fact["kept"], values = [0], values[:0]
        print(f"{name:50} {len(values):8} {'drawn' if terms else form}")
        content.append(values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes())
    return lzma.compress(json.dumps(slim | {"tensors": facts}).encode() + b"\n" + b"".join(content), preset=PRESET)


def check(fixture: str, path: Path) -> None:
    """What stays whole is bit for bit the original, or where draws stand for it, that to rounding."""
    original = load_file(FULL / f"{fixture}.safetensors")
    for name, value in unpack(path)[1].items():
        if not isinstance(value, Sample):
            torch.testing.assert_close(value, original[name], rtol=0, atol=TINY if fixture in ROUNDED else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    every = [*SEEDS, KEYS]
    parser.add_argument("fixtures", nargs="*", choices=every, default=every, metavar="NAME", help="default: all")
    names = parser.parse_args().fixtures
    for fixture in names:
        if fixture == KEYS:
            continue
        path = SLIM / f"{fixture}.xz"
        path.write_bytes(pack(fixture))
        check(fixture, path)
        print(f"{fixture}: {path.stat().st_size:,} bytes\n")
    if KEYS in names:
        files = sorted(path for model in MODELS for path in FULL.glob(f"{model}_*.keys.json"))
        content = {path.name.removesuffix(".keys.json"): json.loads(path.read_text()) for path in files}
        (SLIM / "keys.json.xz").write_bytes(lzma.compress(json.dumps(content).encode(), preset=PRESET))


if __name__ == "__main__":
    main()
