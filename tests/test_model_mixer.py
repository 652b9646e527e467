"""The bidirectional mixer against the published one, and what must hold for any mixer."""

from __future__ import annotations

import pytest
import timm
import torch
from fixtures import BACKENDS, HAS_NUMBA, SOURCES, close, state, tensors
from timm.models import register_model

from labeler.base.errors import ModelError
from model import create_mixer, register_mixer
from model.backbones.demansia import DeMansia
from model.mixers import BidirectionalMamba, Mixer
from model.summary import summarize


def mixer_of(found: dict[str, torch.Tensor], **settings: object) -> BidirectionalMamba:
    mixer = BidirectionalMamba(24, **settings)
    one_way = settings.get("directions") == "forward"
    mixer.load_state_dict({k: v for k, v in state(found).items() if not (one_way and "_b" in k.split(".")[0])})
    return mixer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 197])
@pytest.mark.parametrize("source", SOURCES)
def test_outputs_are_the_published_ones(backend, length, source):
    found = tensors("bimamba_mixer", source)
    for halve in (False, True):
        mixer = mixer_of(found, halve=halve, backend=backend)
        close(mixer(found[f"x.L{length}"]), found[f"v2.div{int(halve)}.L{length}.out"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [3, 17])
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_are_the_published_ones(backend, length, source):
    found = tensors("bimamba_mixer", source)
    mixer = mixer_of(found, backend=backend)
    x = found[f"x.L{length}"].clone().requires_grad_()
    (mixer(x) * found[f"g.L{length}"]).sum().backward()
    close(x.grad, found[f"v2.div1.L{length}.grad_x"], 5e-5)
    for name, parameter in mixer.named_parameters():
        close(parameter.grad, found[f"v2.div1.L{length}.grad.{name}"], 5e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_one_direction_and_layer_scale_are_the_published_ones(source):
    found = tensors("bimamba_mixer", source)
    one_way = mixer_of(found, directions="forward")
    for length in (3, 17):
        close(one_way(found[f"x.L{length}"]), found[f"none.L{length}.out"], 1e-5)
    scaled = BidirectionalMamba(24, layer_scale=1.0)
    scaled.load_state_dict({**state(found), "gamma": found["gamma"]})
    close(scaled(found["x.L17"]), found["v2.div1.gamma.L17.out"], 1e-5)


def test_swapped_directions_turn_the_sequence_around():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(16).double()
    turned = BidirectionalMamba(16).double()
    parameters = mixer.state_dict()
    for name, value in list(parameters.items()):
        if name.startswith(("conv1d.", "x_proj.", "dt_proj.")):
            other = name.replace(".", "_b.", 1)
            parameters[name], parameters[other] = parameters[other], value
    parameters["A_log"], parameters["A_b_log"] = parameters["A_b_log"], parameters["A_log"]
    parameters["D"], parameters["D_b"] = parameters["D_b"], parameters["D"]
    turned.load_state_dict(parameters)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(turned(x.flip(1)).flip(1), mixer(x), 1e-12)


def test_every_token_hears_from_every_other():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(8)
    x = torch.randn(1, 7, 8, requires_grad=True)
    for place in range(7):
        (gradient,) = torch.autograd.grad(mixer(x)[0, place].square().sum(), x)
        assert (gradient[0].abs().sum(1) > 0).all()


def test_projections_are_called_as_modules():
    """So that LoRA, which wraps them, is not ignored in silence."""
    mixer = BidirectionalMamba(16)
    called = []
    names = [name for name, module in mixer.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    mixer(torch.randn(1, 5, 16))
    assert sorted(called) == sorted(names)
    assert len(names) == 6


def test_bfloat16_autocast_keeps_the_step_sizes():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(32)
    x = torch.randn(2, 33, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x)
    expected = mixer(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_step_sizes_begin_between_their_bounds():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(BidirectionalMamba(256).dt_proj.bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1
    assert 0.005 < steps.median() < 0.02  # even in the logarithm


@register_mixer("mean of the sequence")
class Mean(torch.nn.Module):
    """The least that a block needs of a mixer."""

    def __init__(self, width: int, gain: float = 1.0, **_: object) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((1, width), gain))
        self.out_proj = torch.nn.Linear(width, width)
        torch.nn.init.ones_(self.out_proj.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out_proj((hidden + hidden.mean(1, keepdim=True)) * self.gain)

    def no_weight_decay(self) -> set[str]:
        return {"gain"}

    def macs_per_token(self) -> dict[str, int]:
        return {"mean": self.gain.numel()}


def test_a_mixer_of_ones_own_works_in_a_model_by_its_name():
    settings = {"img_size": 32, "embed_dim": 8, "depth": 4, "num_classes": 3}
    net = timm.create_model("demansia_nano", mixer="mean of the sequence", mixer_options={"gain": 2.0}, **settings)
    assert all(type(layer.mixer) is Mean and layer.mixer.gain[0, 0] == 2 for layer in net.layers)
    assert torch.equal(net.layers[0].mixer.out_proj.weight, torch.full((8, 8), 0.5))  # 1 / √4
    assert net.no_weight_decay() == {"pos_embed", "cls_token", *(f"layers.{i}.mixer.gain" for i in range(4))}
    cls, aux = net.train()(torch.randn(2, 3, 32, 32))
    (cls.sum() + aux.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_a_mixer_tells_the_summary_what_counters_do_not_see():
    """Each block runs on T + 1 tokens; the linear layer is counted where it runs, in the blocks."""

    @register_model
    def mean_mixers(pretrained: bool = False, **kwargs: object) -> DeMansia:
        fixed = {"mixer": "mean of the sequence", "embed_dim": 8, "depth": 4}
        return DeMansia(**{**fixed, **{key: kwargs[key] for key in ("img_size", "num_classes") if key in kwargs}})

    macs = summarize("mean_mixers", (32,), 3).costs[0].macs
    assert macs["mean"] == 4 * (4 + 1) * 8
    assert macs["layers"] == 4 * (4 + 1) * 8 * 8


def test_the_scan_is_counted_alike_on_any_backend(monkeypatch):
    """A loop of plain operators does the same multiply-adds as the operator that flop counters know."""
    costs = []
    for backend in ("cpu", "reference", *(["numba"] if HAS_NUMBA else [])):
        monkeypatch.setenv("TOKEN_LABELING_SCAN", backend)
        costs.append(summarize("demansia_nano", (32,)).costs[0].macs)
    assert all(cost == costs[0] for cost in costs)
    assert costs[0]["scan"] == 12 * (4 + 1) * 2 * 256 * 16 * 3  # layers, tokens, directions, E, N


def test_mixers_are_built_by_name_and_width():
    mixer = create_mixer("mamba", 24, d_state=4, directions="forward")
    assert isinstance(mixer, Mixer)
    assert isinstance(mixer, BidirectionalMamba)
    assert mixer.A_log.shape == (48, 4)
    assert mixer.no_weight_decay() == {"A_log", "D"}
    for build in (lambda: create_mixer("mambo", 24), lambda: timm.create_model("vim_tiny", depth=1, mixer="mambo")):
        with pytest.raises(ModelError, match=r"unknown mixer: got 'mambo'\. Did you mean 'mamba'\?"):
            build()
