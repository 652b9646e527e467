"""Compiled and exported models give what eager ones give; a tiny one learns on every backend."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import BACKENDS, NUMBA

import model
from model.ops import scan_by_doubling, scan_reference

# What Triton's interpreter does in 6 seconds for 32 images; TINY takes it a minute.
TINIEST = {"img_size": 16, "depth": 1, "d_state": 4}
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 4, "embed_dim": 32, "depth": 2}
# A Mamba-2 mixer and one of attention.
DEMANSIA2 = {"head_dim": 16, "d_state": 16, "attention_layers": (1,), "attention_heads": 2}
DEMANSIA2 |= {"attention_head_dim": 16, "rotary_dim": 8}


def tiny(name: str = "demansia_tiny", **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **changes})


def test_the_exported_scan_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 5, 16, 17):
        u, delta = torch.randn(2, 2, 2, length, 3, generator=generator, dtype=torch.float64).unbind(0)
        b, c = torch.randn(2, 2, 2, length, 4, generator=generator, dtype=torch.float64).unbind(0)
        a = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
        d, bias = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).unbind(0)
        for rest in ((d, bias, True), (None, None, False)):
            arguments = (u, delta, a, b, c, *rest, (False, True))
            assert torch.allclose(scan_by_doubling(*arguments), scan_reference(*arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("demansia_tiny", {"backend": "reference"}, id="reference"),
        pytest.param("demansia_tiny", {"backend": "cpu"}, id="cpu"),
        pytest.param("demansia_tiny", {"mixer": "mamba3", "d_state": 8, "depth": 1}, id="mamba3"),
        pytest.param("demansia2_tiny", DEMANSIA2, id="demansia2"),
    ],
)
def test_a_compiled_model_trains_and_answers_as_the_eager_one(name, settings):
    net, images = tiny(name, **settings), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        net.train(training)
        results = []
        for run in (net, compiled):
            net.zero_grad()
            out = run(images)
            out = torch.cat([part.flatten() for part in (out if isinstance(out, tuple) else (out,))])
            out.square().sum().backward()
            results.append(
                (out.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
            )
        (eager, gradients), (found, compiled_gradients) = results
        assert torch.allclose(found, eager, atol=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(
            pytest.param("demansia_tiny", {"backend": backend, **(TINIEST if backend == "triton" else {})}, id=backend)
            for backend in BACKENDS
            if backend is not NUMBA
        ),
        pytest.param("demansia_tiny", {"backend": "numba"}, id="numba", marks=NUMBA.marks),
        pytest.param("lvvit_t", {"num_heads": 4}, id="lvvit"),
        pytest.param("demansia2_tiny", DEMANSIA2, id="demansia2"),
    ],
)
def test_a_tiny_model_learns_a_batch_by_heart(name, settings):
    """Both heads, to zero error."""
    net = tiny(name, **settings).train()
    generator = torch.Generator().manual_seed(0)
    count = 8 if settings.get("backend") == "triton" else 32
    images = torch.randn(count, 3, *net.img_size, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    token_labels = torch.randint(4, (count, math.prod(net.grid)), generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(150):
        cls, aux = net(images)
        loss = torch.nn.functional.cross_entropy(cls, labels)
        loss = loss + torch.nn.functional.cross_entropy(aux.flatten(0, 1), token_labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (cls.argmax(-1) == labels).all() and (aux.argmax(-1) == token_labels).all():
            break
    assert (cls.argmax(-1) == labels).all()
    assert (aux.argmax(-1) == token_labels).all()


def test_torch_export_gives_the_same_answers():
    net, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(net, (images,))
    assert torch.allclose(exported.module()(images), net(images), atol=1e-5)


@pytest.mark.parametrize("name", ["demansia_tiny", "demansia2_tiny", "lvvit_t", "vim_tiny", "test_convnext"])
def test_models_run_in_onnxruntime_with_any_batch(name, tmp_path: Path):
    """A wrapped backbone that knows no positions with any image, too."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[export]')")
    import onnxruntime

    torch.manual_seed(0)
    shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    others = [(1, 3, 224, 224), (3, 3, 224, 224)]
    if name == "test_convnext":
        net = model.token_label(name, 10).eval()
        shapes |= {side: 32 * torch.export.Dim(f"side{side}", min=2, max=16) for side in (2, 3)}
        others.append((2, 3, 96, 160))
    else:
        few: dict[str, Any] = {} if name == "lvvit_t" else {"depth": 3}
        if name == "demansia2_tiny":
            few["attention_layers"] = (1,)  # one layer of each kind, and one behind
        net = timm.create_model(name, **few).eval()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            net, (torch.randn(2, 3, 224, 224),), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(shapes,),
            optimize=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for shape in others:
        images = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert (torch.from_numpy(found) - net(images)).abs().max() < 1e-4
