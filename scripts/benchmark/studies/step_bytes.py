"""The bytes that a training step on a GPU reads and writes, counted without one, on tensors that have no values.

    python -m scripts.benchmark.studies.step_bytes [--network demansia_tiny] [--plain] [--json]

Every operator counts with the bytes of all tensors that it is given and returns, views and empty tensors with none; of
an expanded tensor only what lies in memory counts. Operators that are Triton kernels here count likewise, and also what
they write for themselves and read again. Nothing is assumed to stay in a cache, and no operators are fused, so this is
what eager mode moves, and a lower bound of the step's time is this divided by the memory's rate. The tensors claim to
be on a CPU, since autograd asks a GPU for its stream. A CPU's autocast leaves more operators in bfloat16 than a GPU's,
so the plain mixer moves more than this says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import model  # noqa: F401
from model.mixers import create_mixer

NO_TRAFFIC = {
    *(f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")),
    *("aten::_unsafe_view", "prim::device"),
}


class CountBytes(TorchDispatchMode):
    """Sums up `moved`, operator -> bytes, of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and name not in NO_TRAFFIC:
            tensors = [x for x in _pytree.tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
            self.moved[name] += sum(map(in_memory, tensors)) + scratch(name, args)
        return found


def in_memory(x: torch.Tensor) -> int:
    """Bytes of a tensor's elements; a dimension of stride 0 has one."""
    return x.element_size() * math.prod(
        size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def scratch(name: str, args: Any) -> int:
    """What an operator writes for itself and reads again."""
    from model.ops import mixer_triton, scan_triton

    if name == "token_labeling::scan_triton_backward":
        _, u, _, A, B, *_ = args
        return 2 * scan_triton.share_bytes(u, A, B)
    if name == "token_labeling::conv_silu_triton_backward":
        _, x, taps, *_ = args
        return 2 * x.shape[0] * math.ceil(x.shape[1] / mixer_triton.SEGMENT) * taps.numel() * 4
    return 0


@contextlib.contextmanager
def as_on_a_gpu(plain: bool) -> Iterator[None]:
    """Choose the backends of a GPU, which is not there; `plain`: without the fused mixer."""
    fused = None if plain else "triton"
    with (
        mock.patch("model.ops.selective_scan.choose_backend", return_value="triton"),
        mock.patch("model.ops.mixer_parts._fused", return_value=fused),
    ):
        yield


def bytes_per_image(
    module: nn.Module, shape: tuple[int, ...], plain: bool = False, batch: int = 4
) -> dict[str, Counter[str]]:
    """Pass ("forward", "backward") -> operator -> bytes for each of the batch's images, under bfloat16 autocast.

    Args:
        module: built inside a FakeTensorMode.
        shape: of an input without its batch.
        plain: without the fused mixer.
        batch: images; the parameters' traffic is shared among them.
    """
    found = {}
    with as_on_a_gpu(plain):
        x = torch.empty(batch, *shape, requires_grad=True)
        with CountBytes() as forward, torch.autocast("cpu", torch.bfloat16):
            out = _pytree.tree_leaves(module(x))
        gradients = [torch.empty_like(one) for one in out]
        with CountBytes() as backward:
            torch.autograd.backward(out, gradients)
        for name, counted in (("forward", forward), ("backward", backward)):
            found[name] = Counter({op: round(count / batch) for op, count in counted.moved.items()})
    return found


def mixers(network: str = "demansia_tiny", plain: bool = False, batch: int = 256) -> dict[str, int]:
    """Pass -> bytes per image of all Mamba mixers of a network at its own size."""
    made = timm.create_model(network)
    width, depth = int(made.embed_dim), len(made.layers)
    length = made.pos_embed.shape[1]
    with FakeTensorMode():
        found = bytes_per_image(create_mixer("mamba", width), (length, width), plain, batch)
    return {name: depth * sum(counted.values()) for name, counted in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser("scripts.benchmark.studies.step_bytes", description=str(__doc__).splitlines()[0])
    parser.add_argument("--network", default="demansia_tiny", help="a Vision Mamba of ours (%(default)s)")
    parser.add_argument("--plain", action="store_true", help="without the fused mixer")
    parser.add_argument("--operators", action="store_true", help="list one mixer's operators, largest first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = mixers(options.network, options.plain)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"all mixers of {options.network}, an image:",
        *(f"{name} {count / 1e6:.0f} MB" for name, count in found.items()),
    )
    print(f"together {sum(found.values()) / 1e6:.0f} MB")
    if options.operators:
        with FakeTensorMode():
            mixer = create_mixer("mamba", timm.create_model(options.network).embed_dim)
            for name, counted in bytes_per_image(mixer, (197, mixer.out_proj.out_features), options.plain, 256).items():
                for op, count in counted.most_common(16):
                    print(f"{name:9}{count / 1e3:10,.0f} kB  {op}")


if __name__ == "__main__":
    main()
