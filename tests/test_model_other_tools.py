"""What other people's tools do to a model: other types, other parameters, transforms, traces, graphs and counters."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from fixtures import BACKENDS, BY_HAND, HAS_NUMBA
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import model
from labeler.base.errors import ModelError
from model.mixers import BidirectionalMamba
from model.ops import selective_scan
from model.summary import fvcore_handles, summarize

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 4, "embed_dim": 32, "depth": 3}
DEMANSIA2 = {"attention_layers": (1,), "attention_heads": 2, "attention_head_dim": 16, "rotary_dim": 8}
DEMANSIA2 |= {"head_dim": 16, "d_state": 16}
FAMILIES = {"demansia_tiny": {}, "demansia2_tiny": DEMANSIA2, "vim_tiny": {}, "lvvit_t": {"num_heads": 4}}
HALF = [torch.bfloat16, torch.float16]


def tiny(name: str = "demansia_tiny", **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **FAMILIES[name], **changes})


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def mean_square(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return sum(part.float().square().mean() for part in (out if isinstance(out, tuple) else (out,)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_near_float32(name, dtype, backend, images):
    """The same rounded weights in float32 tell what the arithmetic in half precision costs."""
    if name == "demansia2_tiny" and backend in ("reference", "triton"):
        pytest.skip("its scan has no such backend")
    changes = {} if name in ("lvvit_t", "demansia2_tiny") else {"backend": backend}
    if backend == "triton":  # its interpreter is slow
        changes |= {"img_size": 16, "depth": 1}
        images = images[:, :, :16, :16]
    half = tiny(name, **changes).to(dtype)
    wide = copy.deepcopy(half).float()
    images = images.to(dtype)
    limit = 8 * torch.finfo(dtype).eps
    assert relative(half.eval()(images), wide.eval()(images.float())) < limit
    gradients = []
    for net, given in ((half, images), (wide, images.float())):
        mean_square(net.train()(given)).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.995
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(half.eval()(images), wide.eval()(images.float())) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_may_be_another(name, dtype, images):
    torch.set_default_dtype(dtype)
    try:
        out = tiny(name).eval()(images.to(dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_step_sizes_are_not_rounded_to_half_precision():
    mixer = BidirectionalMamba(32).bfloat16()
    seen = []
    mixer.dt_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    mixer(torch.randn(1, 5, 32).bfloat16())
    assert seen[0].dtype == torch.float32


def test_tensors_stand_in_for_parameters(name, images):
    net = tiny(name).eval()
    others = {key: value + 0.1 for key, value in net.named_parameters()}
    found = functional_call(net, others, (images,))
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for key, value in changed.named_parameters():
            value.copy_(others[key])
    assert torch.allclose(found, changed(images), atol=1e-6)
    assert not torch.allclose(found, net(images), atol=1e-3)


def test_gradients_of_each_sample(name, images):
    """vmap over grad, as differential privacy and influence functions take them, against one image at a time."""
    net = tiny(name).eval()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return mean_square(functional_call(net, {**values, **buffers}, (image[None],)))

    every = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        net.zero_grad()
        mean_square(net(image[None])).backward()
        for key, parameter in net.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(every[key][i], parameter.grad, rtol=1e-4, atol=1e-6), key


def test_an_ensemble_in_one_call(images):
    nets = [tiny().eval(), tiny().eval()]
    with torch.no_grad():
        for value in nets[1].parameters():
            value.mul_(1.1)
    stacked, _ = torch.func.stack_module_state(nets)
    buffers = dict(nets[0].named_buffers())
    found = vmap(lambda values: functional_call(nets[0], {**values, **buffers}, (images,)))(stacked)
    for one, net in zip(found, nets, strict=True):
        assert torch.allclose(one, net(images), atol=1e-5)


def test_jacobians(images):
    net = tiny().eval()
    jacobian = jacrev(lambda image: net(image[None])[0])(images[0])
    image = images[:1].clone().requires_grad_()
    for c, logit in enumerate(net(image)[0]):
        (expected,) = torch.autograd.grad(logit, image, retain_graph=True)
        assert torch.allclose(jacobian[c], expected[0], rtol=1e-4, atol=1e-6)


def test_second_derivatives_name_the_backend_that_has_them(images):
    images.requires_grad_()
    (first,) = torch.autograd.grad(tiny().eval()(images).sum(), images, create_graph=True)
    with pytest.raises(ModelError, match='no second derivatives: expected a model with backend="reference"'):
        first.square().sum().backward()
    (first,) = torch.autograd.grad(tiny(backend="reference").eval()(images).sum(), images, create_graph=True)
    first.square().sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "part", ["A_log", "D_b", "conv1d.weight", "conv1d_b.bias", "dt_proj.weight", "x_proj_b.weight"]
)
def test_parametrizations_are_heard(part, images):
    class Doubled(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    net, expected = tiny().eval(), tiny().eval()
    path, _, attribute = f"layers.1.mixer.{part}".rpartition(".")
    parametrize.register_parametrization(net.get_submodule(path), attribute, Doubled())
    with torch.no_grad():
        expected.get_parameter(f"layers.1.mixer.{part}").mul_(2)
    assert torch.equal(net(images), expected(images))


@pytest.mark.parametrize(
    "part", ["in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"]
)
def test_every_part_of_the_mixer_is_called_so_that_hooks_and_adapters_work(part, images):
    net = tiny().eval()
    before = net(images)
    net.layers[0].mixer.get_submodule(part).register_forward_hook(lambda _, __, out: 0.5 * out)
    assert not torch.allclose(net(images), before, atol=1e-5)


def test_shapes_are_told_without_data(name):
    with torch.device("meta"):
        net = tiny(name).eval()
    assert net(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 4)


def test_an_exported_model_takes_any_batch(name, images):
    net = tiny(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (images,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 2, 5):
        some = torch.randn(count, 3, 32, 32)
        assert torch.allclose(exported(some), net(some), atol=1e-5)


def test_a_wrapped_backbone_exports_any_batch(images):
    net = model.token_label(timm.create_model("test_vit", num_classes=4, img_size=32), 4).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (images,), dynamic_shapes=({0: batch},)).module()
    some = torch.randn(5, 3, 32, 32)
    assert torch.allclose(exported(some), net(some), atol=1e-5)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_a_wrapped_backbone_without_positions_exports_any_size(backbone):
    net = model.token_label(backbone, 4).eval()
    shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes |= {side: 32 * torch.export.Dim(f"side{side}", min=2, max=16) for side in (2, 3)}
    exported = torch.export.export(net, (torch.randn(2, 3, 160, 160),), dynamic_shapes=(shapes,)).module()
    for size in ((96, 160), (224, 128)):
        some = torch.randn(3, 3, *size)
        assert torch.allclose(exported(some), net(some), atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_answers_alike(name, images, tmp_path):
    net = tiny(name).eval()
    traced = torch.jit.trace(net, images)
    traced.save(tmp_path / "net.pt")
    some = torch.randn(5, 3, 32, 32)
    assert torch.allclose(torch.jit.load(tmp_path / "net.pt")(some), net(some), atol=1e-5)


def test_other_batch_sizes_do_not_compile_anew(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tiny(name).eval(), backend=counter, fullgraph=True)
    with torch.no_grad():
        for count in (2, 3, 4, 5, 6):  # the second size makes it dynamic
            compiled(torch.randn(count, 3, 32, 32))
    assert counter.frame_count == 2


def test_mixing_compiles_once_whatever_the_box():
    """As masks: empty, thin and full boxes are no special case. The mask says the same as the box."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    net = tiny().train()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    images = torch.randn(4, 3, 32, 32)
    for y0, x0, y1, x1 in [
        (0, 0, 0, 0),
        (0, 0, 4, 4),
        (1, 1, 2, 2),
        (0, 3, 4, 4),
        (2, 0, 3, 4),
        (1, 2, 3, 4),
        (2, 2, 2, 2),
    ]:
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[y0:y1, x0:x1] = True
        found = compiled(images, mask)
        expected = net(images, SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1))
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    assert counter.frame_count == 1
    with pytest.raises(ModelError, match=r"got torch.bool \[5, 4\], expected torch.bool \[4, 4\]"):
        net(images, torch.zeros(5, 4, dtype=torch.bool))


@pytest.mark.parametrize("backend", BY_HAND)
def test_scans_are_counted(backend):
    """Per step, channel and state six operations forwards, twelve backwards."""
    k, b, length, e, n = 2, 3, 17, 64, 16
    net = BidirectionalMamba(32, backend=backend)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(b, length, 32)).sum().backward()
    found = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert found[f"token_labeling.scan_{backend}"] == 6 * k * b * length * e * n
    assert found[f"token_labeling.scan_{backend}_backward"] == 12 * k * b * length * e * n


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_counters_and_the_summary_agree():
    cost = summarize("demansia_nano", (64,)).costs[0]
    net, image = timm.create_model("demansia_nano", img_size=64).eval(), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        net(image)
    assert sum(cost.macs.values()) == counter.get_total_flops() // 2
    graph, _ = torch.jit._get_trace_graph(net, (image,))
    handles = fvcore_handles()
    nodes = [node for node in graph.nodes() if node.kind() in handles]
    assert len(nodes) == 12
    assert sum(handles[node.kind()](list(node.inputs()), []) for node in nodes) == cost.macs["scan"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore_agrees_with_the_summary():
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    cost = summarize("demansia_nano", (64,)).costs[0]
    net = timm.create_model("demansia_nano", img_size=64).eval()
    found = fvcore.FlopCountAnalysis(net, torch.randn(1, 3, 64, 64)).set_op_handle(**fvcore_handles()).by_operator()
    assert found["conv"] + found["linear"] + found["scan_numba" if HAS_NUMBA else "scan_cpu"] == sum(cost.macs.values())


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_features_are_the_blocks_outputs_however_they_are_taken(name, feature_cls, images):
    changes = {"features_only": True, "out_indices": (0, 2), "feature_cls": feature_cls}
    if feature_cls == "hook":
        taken = tiny(name, **changes).eval()(images)
    else:
        from timm.models._features_fx import create_feature_extractor

        net = tiny(name).eval()
        nodes = {f"{net.BLOCKS}.0": "first", f"{net.BLOCKS}.2": "last"}
        taken = list(create_feature_extractor(net, nodes)(images).values())
    found = (
        tiny(name)
        .eval()
        .forward_intermediates(
            images, indices=[0, 2], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    )
    place = tiny(name).cls_position(17)
    for one, (tokens, prefix) in zip(taken, found, strict=True):
        expected = torch.cat([tokens[:, :place], prefix, tokens[:, place:]], 1)
        assert torch.allclose(one, expected, atol=1e-6)


def test_intermediates_are_what_is_added_up(images):
    """Each is the one before plus what the mixer gives for its norm."""
    net = tiny("vim_tiny").eval()
    before, after = net.forward_intermediates(images, indices=[0, 1], output_fmt="NLC", return_prefix_tokens=True)[1]
    whole = [torch.cat([tokens[:, :8], cls, tokens[:, 8:]], 1) for tokens, cls in (before, after)]
    layer = net.layers[1]
    assert torch.allclose(whole[1], whole[0] + layer.mixer(layer.norm(whole[0])), atol=1e-6)


def test_pooling_is_what_was_asked_for(name, images):
    net = tiny(name).eval()
    features = net.forward_features(images)
    place = net.cls_position(17)
    others = torch.cat([features[:, :place], features[:, place + 1 :]], 1)
    expected = {"token": features[:, place], "avg": others.mean(1), "": features}
    for pool, pooled in expected.items():
        net.reset_classifier(0, pool)
        assert torch.allclose(net(images), pooled, atol=1e-6)
        again = tiny(name, num_classes=0, global_pool=pool).eval()
        assert again(images).shape == pooled.shape
    net.reset_classifier(7, "avg")
    assert net(images).shape == (3, 7)
    with pytest.raises(ModelError, match="unknown pooling: got global_pool='nonsense', expected \"token\""):
        net.reset_classifier(7, "nonsense")
    with pytest.raises(ModelError, match="unknown pooling"):
        tiny(name, global_pool="nonsense")


def test_an_unknown_argument_is_the_models(name):
    with pytest.raises(TypeError, match=r"(VisionMamba|LVViT|DeMansia|Vim)\.__init__\(\) got an unexpected .*'depht'"):
        tiny(name, depht=3)


def test_one_tensor_in_training_without_the_head_on_tokens(images):
    out = tiny(aux_head=False).train()(images)
    assert out.shape == (3, 4)


@pytest.mark.parametrize("name", ["demansia_nano", "demansia2_tiny", "vim_tiny", "lvvit_t"])
def test_timms_checks_of_traced_models(name):
    """timm's tests trace each model with torch.fx, forwards and backwards, and compare every value."""
    from timm.models import get_notrace_functions, get_notrace_modules
    from timm.models._features_fx import create_feature_extractor
    from torchvision.models.feature_extraction import get_graph_node_names

    changes = {"aux_head": False, "img_size": 64, "depth": 2}
    net = timm.create_model(name, **changes).eval()
    tracer = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    train_nodes, eval_nodes = get_graph_node_names(net, tracer_kwargs={**tracer, "param_shapes_constant": True})
    assert train_nodes[-1] == eval_nodes[-1]
    image = torch.randn(2, 3, 64, 64)
    traced = create_feature_extractor(net, [eval_nodes[-1]])
    assert torch.equal(traced(image)[eval_nodes[-1]], net(image))
    traced.train()(image)[eval_nodes[-1]].mean().backward()
    assert all(value.grad is not None for value in traced.parameters())


def gated(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A gated scan in half precision, and in float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    u, delta, z = torch.randn(3, 2, 4, 64, generator=generator).to(dtype).unbind()
    b, c = torch.randn(2, 2, 8, 64, generator=generator).to(dtype).unbind()
    a, d = -torch.rand(4, 8, generator=generator), torch.randn(4, generator=generator)
    given = (u, delta, a, b, c, d, z)
    found = selective_scan(*given, delta_softplus=True, backend=backend)
    exact = selective_scan(*(x.double() for x in given), delta_softplus=True, backend="reference")
    return found, exact


@pytest.mark.parametrize("backend", [*BY_HAND, "reference"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_gated_scan_is_rounded_once(dtype, backend):
    found, exact = gated(dtype, backend)
    assert found.dtype == dtype
    # Half a unit in the last place: the result alone was rounded.
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-6).all()
