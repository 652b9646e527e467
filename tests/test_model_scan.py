"""The selective scan: the backends that run on any CPU against the fixture and against the plain loop over time."""

from __future__ import annotations

import importlib
import itertools
import logging
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from fixtures import BACKENDS, BY_HAND, HAS_NUMBA, NUMBA, SOURCES, Sample, about, close, tensors

from labeler.base.errors import BackendError, ModelError
from model.ops import directional_scan, scan_reference, selective_scan
from model.ops.scan_cpu import flushed_denormals

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BOTH = ("reference", "cpu", NUMBA)
F64 = torch.float64
BOTH_WAYS = (False, True)


def make(k=2, b=2, length=7, e=6, n=4, dtype=F64, d=True, bias=True, grad=True, scale=1.0):
    """Random arguments of `directional_scan`, u to delta_bias."""
    generator = torch.Generator().manual_seed(length + e)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    a = -torch.exp(draw(k, e, n).double()).to(dtype)
    made = [draw(k, b, length, e), scale * draw(k, b, length, e), a, draw(k, b, length, n), draw(k, b, length, n)]
    made += [draw(k, e) if d else None, draw(k, e) if bias else None]
    return [x if x is None else x.requires_grad_(grad) for x in made]


def gradients(y: torch.Tensor, inputs: list) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad(y, [x for x in inputs if x is not None], weight))


def assert_same(got: list, expected: list, tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("source", SOURCES)
def test_equals_the_fixture(backend, dtype, source):
    if backend == "triton" and dtype == F64:
        pytest.skip("the kernels reckon in float32")
    found, cases = tensors("selective_scan", source), about("selective_scan", source)["cases"]
    assert len(cases) == {"slim": 19, "full": 20}[source]
    for case, facts in cases.items():
        if backend == "triton" and facts["L"] > 64:
            continue  # a minute each in the interpreter; test_model_scan_triton has such lengths against float64
        given = {n: found[f"{case}.{n}"].to(dtype, copy=True) for n in NAMES if f"{case}.{n}" in found}
        for x in given.values():
            x.requires_grad_()
        out = selective_scan(**given, delta_softplus=facts["delta_softplus"], backend=backend)
        out.backward(found[f"{case}.grad_out"].to(dtype))
        for name, got in {"out": out, **{f"grad_{n}": x.grad for n, x in given.items()}}.items():
            expected = found[f"{case}.{name}"]
            if dtype == torch.float32:
                close(got, expected, 2e-6 if name == "out" else 1e-5)
                continue
            close(got, expected, 1e-10, 1e-12)
            if isinstance(expected, Sample):
                got, expected = got.flatten()[:: expected.step], expected.values
            assert ((got - expected).abs() <= 1e-10 * expected.abs() + 1e-12).all(), (case, name)  # each by itself


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (1, 3), (2, 1), (3, 1), (8, 1), (17, 1), (17, 3), (197, 1)])
def test_a_backward_pass_by_hand_equals_autograd(length, batch, backend):
    inputs = make(b=batch, length=length)
    got, expected = (directional_scan(*inputs, True, BOTH_WAYS, which) for which in (backend, "reference"))
    assert_same([got, *gradients(got, inputs)], [expected, *gradients(expected, inputs)])


def test_steps_are_taken_as_they_are_and_forwards_unless_told_otherwise():
    inputs = make(k=1, grad=False)
    expected = scan_reference(*inputs, False, (False,))
    assert_same([directional_scan(*inputs), scan_reference(*inputs)], [expected] * 2)
    u, delta, a, b, c, *_ = inputs
    mamba = selective_scan(u[0].mT, delta[0].mT, a[0], b[0].mT, c[0].mT)
    assert_same([mamba.mT], [scan_reference(u, delta, a, b, c, None, None, False, (False,))[0]])


@pytest.mark.parametrize("backend", BOTH)
def test_directions_are_independent_and_reverse_is_a_flip(backend):
    inputs = make(k=2)
    y = directional_scan(*inputs, True, BOTH_WAYS, backend)
    for k, backwards in enumerate(BOTH_WAYS):
        one = [x[k : k + 1] for x in inputs]
        alone = directional_scan(*one, True, (backwards,), backend)
        over_time = [x.flip(2) if i in (0, 1, 3, 4) and backwards else x for i, x in enumerate(one)]
        flipped = directional_scan(*over_time, True, (False,), backend)
        assert_same([alone, flipped.flip(2) if backwards else flipped], [y[k : k + 1]] * 2)


@pytest.mark.parametrize("backend", BOTH)
def test_groups_share_b_and_c(backend):
    b, e, n, g, length = 2, 6, 4, 3, 5
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, b, e, length, dtype=F64)
    a, (grouped_b, grouped_c) = -torch.rand(e, n, dtype=F64), torch.randn(2, b, g, n, length, dtype=F64)
    got = selective_scan(u, delta, a, grouped_b, grouped_c, z=z, delta_softplus=True, reverse=True, backend=backend)
    for channel in range(e):
        own, group = slice(channel, channel + 1), channel // (e // g)
        args = (u[:, own], delta[:, own], a[own], grouped_b[:, group], grouped_c[:, group], None, z[:, own])
        assert_same([got[:, own]], [selective_scan(*args, delta_softplus=True, reverse=True, backend="reference")])


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize(("d", "bias", "softplus"), itertools.product((True, False), repeat=3))
def test_gradcheck(d, bias, softplus, backend):
    length = {"cpu": 10, "numba": 18}[backend]  # more than one chunk
    inputs = make(b=1, length=length, e=2, n=2, d=d, bias=bias)
    for step in (inputs[1], inputs[6]) if bias else inputs[1:2]:
        step.data.abs_()  # with negative steps the states grow beyond what finite differences can tell
    assert torch.autograd.gradcheck(lambda *given: directional_scan(*given, softplus, BOTH_WAYS, backend), inputs)


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e2, 1e4])
def test_large_and_tiny_steps(dtype, tolerance, scale, backend):
    """Also against the loop: dt A far below what exp can hold, and states that have died out."""
    inputs = make(length=20, dtype=dtype, scale=scale)
    double = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = directional_scan(*inputs, True, BOTH_WAYS, backend), scan_reference(*double, True, BOTH_WAYS)
    assert_same([got, *gradients(got, inputs)], [expected, *gradients(expected, double)], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 1], ids=["u", "delta"])
def test_a_nan_stays_visible(backend, place):
    """From its step on, in its channel; nowhere else."""
    inputs = make(length=20, dtype=torch.float32, grad=False)
    inputs[place][:, 0, 3, 0] = float("nan")
    broken = directional_scan(*inputs, True, BOTH_WAYS, backend).isnan()
    assert broken[0, 0, :, 0].tolist() == [t >= 3 for t in range(20)]
    assert broken[1, 0, :, 0].tolist() == [t <= 3 for t in range(20)]
    assert broken.sum() == 17 + 4


@pytest.mark.parametrize("backend", BOTH)
def test_half_precision_keeps_a_wide_state(backend):
    half = make(length=40, dtype=torch.bfloat16)
    for i in (1, 2, 5, 6):  # as under autocast: step sizes and parameters stay float32
        half[i] = half[i].detach().float().requires_grad_()
    double = [x.detach().double().requires_grad_() for x in half]
    y, expected = directional_scan(*half, True, BOTH_WAYS, backend), scan_reference(*double, True, BOTH_WAYS)
    found = gradients(y, half)
    assert [y.dtype, *(x.dtype for x in found)] == [torch.bfloat16, *(x.dtype for x in half)]
    assert_same([y, *found], [expected, *gradients(expected, double)], 2**-7)


@pytest.mark.parametrize("backend", BY_HAND)
def test_gradients_only_where_wanted(backend):
    inputs = make(grad=False)
    assert not directional_scan(*inputs, True, BOTH_WAYS, backend).requires_grad
    inputs[3].requires_grad_()
    directional_scan(*inputs, True, BOTH_WAYS, backend).sum().backward()
    assert [x.grad is not None for x in inputs] == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("backend", BY_HAND)
def test_an_empty_batch_gives_an_empty_result(backend):
    inputs = make(b=0)
    y = directional_scan(*inputs, True, BOTH_WAYS, backend)
    assert y.shape == inputs[0].shape
    assert all(x.abs().sum() == 0 for x in gradients(y, inputs))


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("flushed", [True, False])
def test_denormals_count_as_zero_and_are_as_before_afterwards(flushed, backend):
    torch.set_flush_denormal(flushed)
    try:
        with flushed_denormals():
            assert torch.tensor(1e-38) * 0.5 == 0
        directional_scan(*make(), True, BOTH_WAYS, backend).sum().backward()
        assert (torch.tensor(1e-38) * 0.5 == 0) == flushed
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": torch.zeros(2, 2, 7)}, "shape of u .* got \\[2, 2, 7\\], expected \\[K, B, L, E\\]"),
        ({"B": torch.zeros(2, 2, 7, 5)}, "shape of B .* expected \\[K = 2, B = 2, L = 7, N = 4\\]"),
        ({"D": torch.zeros(6)}, "shape of D"),
        ({"delta": torch.zeros(2, 2, 7, 6, dtype=torch.int64)}, "type of delta .* floating"),
        ({"C": torch.zeros(2, 2, 7, 4, device="meta")}, "C is on another device"),
        ({"A": None}, "A is not a tensor"),
        ({"reverse": (True,)}, "reverse does not fit"),
        (
            {"backend": "cuda"},
            "unknown scan backend: got 'cuda', expected one of reference, cpu, numba, triton, mamba_ssm",
        ),
    ],
)
def test_errors_of_use(change, words):
    given = dict(zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), make(grad=False), strict=True))
    with pytest.raises(ModelError, match=words) as caught:
        directional_scan(**{**given, "reverse": BOTH_WAYS, **change})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_errors_of_use_in_the_layout_of_mamba():
    u, a = torch.zeros(1, 6, 5), torch.zeros(6, 4)
    with pytest.raises(ModelError, match="multiple of the groups"):
        selective_scan(u, u, a, *torch.zeros(2, 1, 4, 4, 5))
    with pytest.raises(ModelError, match="shape of z"):
        selective_scan(u, u, a, *torch.zeros(2, 1, 4, 5), z=u[..., 1:])


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_a_forced_backend_that_cannot_run_says_why(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TOKEN_LABELING_SCAN", backend)
    with pytest.raises(BackendError, match=f"{backend}.* named by TOKEN_LABELING_SCAN, cannot run.*reference"):
        directional_scan(*make(dtype=torch.float32), True, BOTH_WAYS)
    monkeypatch.delenv("TOKEN_LABELING_SCAN")
    with pytest.raises(BackendError, match=f"{backend}.* cannot run.*(GPU|CUDA|imported|installed).*reference"):
        directional_scan(*make(dtype=torch.float32), True, BOTH_WAYS, backend)
    with pytest.raises(BackendError, match="float64"):
        directional_scan(*make(), True, BOTH_WAYS, backend)


def test_tritons_kernels_run_on_a_gpu_or_interpreted_on_a_cpu(monkeypatch):
    module = importlib.import_module("model.ops.selective_scan")
    kernels = SimpleNamespace(is_available=lambda: (True, None))
    monkeypatch.setattr(module, "_triton", lambda: kernels)
    for interpreted, device, runs in (
        ("0", "cuda", True),
        ("0", "cpu", False),
        ("1", "cpu", True),
        ("1", "mps", False),
    ):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        assert (module._obstacle("triton", device, False) is None) == runs
    kernels.is_available = lambda: (False, "no such thing")
    assert module._obstacle("triton", "cuda", False) == "no such thing"


def test_mamba_ssm_is_called_in_its_own_layout_and_order(monkeypatch):
    """The library needs a GPU; in its place stands our scan, which takes the same arguments, for outputs alone."""
    module = importlib.import_module("model.ops.selective_scan")

    def theirs(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert all(x.is_contiguous() for x in (u, delta, A, B, C, D, delta_bias) if x is not None)
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "backend": "reference"}
        return selective_scan(u, delta, A, B, C, D, z, **options)

    monkeypatch.setattr(module, "_mamba_ssm", lambda: theirs)
    for options, softplus in (({}, True), ({"d": False}, True), ({"bias": False}, False)):
        inputs = make(dtype=torch.float32, grad=False, scale=0.01, **options)
        found = module._scan_mamba_ssm(*inputs, softplus, BOTH_WAYS)
        assert_same([found], [scan_reference(*inputs, softplus, BOTH_WAYS)], 1e-6)


def test_the_environment_variable_overrides_auto(monkeypatch, caplog):
    from model.ops.selective_scan import _announced, choose_backend

    _announced.clear()
    caplog.set_level(logging.INFO)
    own = "numba" if HAS_NUMBA else "cpu"
    assert choose_backend("auto", "cpu") == choose_backend("auto", "cpu") == own
    monkeypatch.setenv("TOKEN_LABELING_SCAN", "reference")
    assert choose_backend("auto", "cpu") == "reference"
    assert choose_backend("cpu", "cpu") == "cpu"
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith(f"selective scan on cpu: backend {own}, chosen because the tensors are on a CPU")
    assert said[1:2] == ["selective scan on cpu: backend reference, named by TOKEN_LABELING_SCAN"]
    monkeypatch.setenv("TOKEN_LABELING_SCAN", "fast")
    with pytest.raises(ModelError, match="TOKEN_LABELING_SCAN: got 'fast'"):
        directional_scan(*make(), True, BOTH_WAYS)


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, backend):
    if compiler == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    inputs = make(length=20)
    compiled = torch.compile(directional_scan, fullgraph=True, backend=compiler)
    y, expected = (scan(*inputs, True, BOTH_WAYS, backend) for scan in (compiled, directional_scan))
    assert_same([y, *gradients(y, inputs)], [expected, *gradients(expected, inputs)], 1e-12)


@pytest.mark.parametrize("backend", BOTH)
def test_export(backend):
    scan = torch.nn.Module()
    scan.forward = lambda *inputs: directional_scan(*inputs, True, BOTH_WAYS, backend)
    inputs = tuple(make(grad=False))
    assert_same([torch.export.export(scan, inputs).module()(*inputs)], [scan(*inputs)])


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("options", [{}, {"d": False, "bias": False}, {"dtype": torch.float32, "grad": False}])
def test_the_operators_keep_torchs_rules(options, backend):
    inputs = make(length=10, e=3, n=2, **options)
    forward, backward = (getattr(torch.ops.token_labeling, f"scan_{backend}{way}") for way in ("", "_backward"))
    torch.library.opcheck(forward, (*inputs, True, [False, True]))
    y, saved = forward(*inputs, True, [False, True])
    plain = [None if x is None else x.detach() for x in (torch.ones_like(y), *inputs, saved)]
    torch.library.opcheck(forward, (*plain[1:-1], True, [False, True], False))
    torch.library.opcheck(backward, (*plain, True, [False, True]))


def mamba_loop(u, delta, A, B, C):
    """[B, E, L] by the definition, one step at a time, with rates of every form; and the state after the last step."""
    batch, width, length = u.shape

    def at(x: torch.Tensor, t: int) -> torch.Tensor:
        """[B, E, N]"""
        if x.dim() == 2:
            return x.expand(batch, -1, -1)
        x = x if x.dim() == 4 else x.unsqueeze(1)
        return x[..., t].repeat_interleave(width // x.shape[1], 1)

    h, outputs = torch.zeros(batch, *A.shape, dtype=u.dtype), []
    for t in range(length):
        dt = delta[..., t, None]
        h = torch.exp(dt * A) * h + dt * at(B, t) * u[..., t, None]
        outputs.append((h * at(C, t)).sum(-1))
    return torch.stack(outputs, -1), h


FORMS = {"variable": (2, 4, 9), "groups": (2, 3, 4, 9), "constant": (6, 4)}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("form_b", "form_c"), list(itertools.product(FORMS, FORMS)))
def test_rates_of_every_form_and_the_last_state(form_b, form_c, reverse, backend):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).requires_grad_()

    u, delta = draw(2, 6, 9), torch.rand(2, 6, 9, generator=generator, dtype=F64).requires_grad_()
    a = (-torch.rand(6, 4, generator=generator, dtype=F64)).requires_grad_()
    b, c = draw(*FORMS[form_b]), draw(*FORMS[form_c])
    inputs = [u, delta, a, b, c]
    y, state = selective_scan(*inputs, reverse=reverse, backend=backend, return_last_state=True)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1) if reverse and x.shape[-1] == 9 else x

    expected, last = mamba_loop(*(turned(x) for x in inputs))
    assert_same([y, state], [turned(expected), last])
    found, wanted = (
        torch.autograd.grad((out * weight).sum() + end.square().sum(), inputs)
        for weight in [torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)]
        for out, end in [(y, state), (turned(expected), last)]
    )
    assert_same(list(found), list(wanted))


OF_EACH_SAMPLE = {  # the dimension of the samples in u, delta, A, B, C, D, delta_bias
    "all": (0, 0, 0, 0, 0, 0, 0),
    "no parameters": (0, 0, None, 0, 0, None, None),
    "anywhere": (1, 2, 0, 3, 0, 1, 0),
    "one": (None, 0, None, None, None, None, None),
}


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("name", OF_EACH_SAMPLE)
def test_scans_are_mapped_over_samples(name, backend):
    """vmap, of the outputs and of the gradients, against one sample at a time."""
    per_sample, generator = OF_EACH_SAMPLE[name], torch.Generator().manual_seed(0)
    inputs = []
    for x, dim in zip(make(length=10, e=3, n=2, grad=False), per_sample, strict=True):
        factors = 1 + torch.rand(3, generator=generator, dtype=F64)
        inputs.append(x if dim is None else torch.stack([x * factor for factor in factors], dim))

    def scan(*given: torch.Tensor) -> torch.Tensor:
        return directional_scan(*given, True, BOTH_WAYS, backend)

    def squared(*given: torch.Tensor) -> torch.Tensor:
        return scan(*given).square().sum()

    found = torch.vmap(scan, per_sample)(*inputs)
    every = torch.vmap(torch.func.grad(squared, tuple(range(7))), per_sample)(*inputs)
    for i in range(3):
        one = [x if dim is None else x.select(dim, i).clone() for x, dim in zip(inputs, per_sample, strict=True)]
        one = [x.detach().requires_grad_() for x in one]
        assert_same([found[i]], [scan(*one)])
        assert_same([gradient[i] for gradient in every], list(torch.autograd.grad(squared(*one), one)))
