"""MambaVision against the published one: outputs, intermediates, gradients, names, counts and checkpoints.

Legend: B images; C width; L sequence length; h×w grid of a level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import BY_HAND, SOURCES, close, keys, state, tensors
from safetensors.torch import save_file
from torch.nn import functional as F

from labeler.base.errors import ModelError
from model import load_reference_checkpoint
from model.backbones.hierarchical.mambavision import NAMES, SIZES
from model.backbones.hierarchical.mambavision_layers import from_windows, to_windows
from model.backbones.hierarchical.mambavision_model import MambaVision
from model.mixers import Mixer
from model.mixers.mambavision import MambaVisionMixer

MICRO = {
    "img_size": 64, "num_classes": 10, "embed_dim": 16, "stem_width": 8, "depths": (1, 1, 3, 2),
    "num_heads": (2, 2, 2, 4), "window_size": (8, 8, 4, 2), "aux_head": False,
}  # fmt: skip
COUNTS = {
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
}
ROUNDED = {"mambavision_large2": 241.5e6, "mambavision_large3": 739.6e6}  # as their authors give them


def micro(found: dict[str, torch.Tensor], **settings: Any) -> MambaVision:
    net = MambaVision(**{**MICRO, **settings})
    net.load_state_dict(state(found))
    return net


def steps_of(net: MambaVision, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By their names in the fixture: what the stem, the levels and the first mixer give, and what that mixer gets."""
    seen: dict[str, torch.Tensor] = {}
    first = "levels.2.blocks.0.mixer"
    for name in ("patch_embed", first, *(f"levels.{i}" for i in range(4))):

        def keep(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            if name == first:
                seen[f"mid.{name}.in"], seen[f"mid.{name}.out"] = inputs[0], output
            else:
                seen[f"mid.{name}"] = output

        net.get_submodule(name).register_forward_hook(keep)
    net(x)
    return seen


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(source):
    """`x_pad` is of 96×80 pixels, whose maps are padded to whole windows."""
    found = tensors("mambavision_micro", source)
    net = micro(found).eval()
    close(net(found["x"]), found["eval.out"], 1e-5)
    close(net(found["x_pad"]), found["eval.out_pad"], 1e-5)
    seen = steps_of(net, found["x"])
    assert seen.keys() == {name for name in found if name.startswith("mid.")}
    for name, value in seen.items():
        close(value, found[name], 1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_in_float64_is_the_published_one(source):
    found = tensors("mambavision_micro", source)
    net = micro(found).eval().double()
    tolerance = 1e-12 if source == "full" else 1e-5  # the slim weights are the published ones to rounding
    for name, expected in (("x", "eval.out_f64"), ("x_pad", "eval.out_pad_f64")):
        close(net(found[name].double()), found[expected], tolerance)


@pytest.mark.parametrize("name", ["eval_small", "eval_smallvar"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilons_are_the_published_ones(name, source):
    found = tensors("mambavision_micro", source)
    net = micro(found).eval()
    with torch.no_grad():
        if name == "eval_small":
            net.levels[1].downsample.reduction[0].weight.mul_(0.005)
        else:
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_var.mul_(1e-3)
                    module.weight.mul_(0.03)
    close(net(found["x"]), found[f"{name}.out"], 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradients_are_the_published_ones(checkpointing, source):
    found = tensors("mambavision_micro", source)
    net = micro(found).train()
    net.set_grad_checkpointing(checkpointing)
    x = found["x"].clone().requires_grad_()
    logits = net(x)
    loss = F.cross_entropy(logits, found["labels"])
    close(logits, found["train.out"], 1e-5)
    close(loss, found["train.loss"], 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5, 1e-8)
    checked = [name for name in found if name.startswith("grad.") and name != "grad.x"]
    assert len(checked) == 50
    for name in checked:
        close(net.get_parameter(name.removeprefix("grad.")).grad, found[name], 5e-5, 1e-8)


@pytest.mark.parametrize("mistake", ["bias once", "causal", "attention first", "gate"])
def test_the_numbers_see_a_mistake(mistake, monkeypatch):
    """What is easily got wrong changes the output by more than the tolerance."""
    found = tensors("mambavision_micro")
    net = micro(found).eval()
    mixer = net.levels[2].blocks[0].mixer
    if mistake == "bias once":
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, MambaVisionMixer):
                    module.dt_proj.bias.mul_(0.5)
    elif mistake == "causal":
        for conv in (mixer.conv1d_x, mixer.conv1d_z):
            conv.register_forward_pre_hook(lambda _, inputs: F.pad(inputs[0], (1, 0))[..., :-1])
    elif mistake == "gate":
        mixer.out_proj.register_forward_pre_hook(lambda _, inputs: inputs[0] * inputs[0].roll(32, -1))
    else:
        net.levels[2].blocks = torch.nn.ModuleList([net.levels[2].blocks[i] for i in (2, 0, 1)])
    expected = found["eval.out"]
    assert (net(found["x"]) - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_counts_are_the_published_ones(name):
    with torch.device("meta"):
        net = timm.create_model(name, aux_head=False)
        plain = timm.create_model(name)
    assert plain.state_dict().keys() - net.state_dict().keys() == {"aux_head.weight", "aux_head.bias"}
    count = sum(parameter.numel() for parameter in net.parameters())
    if name in COUNTS:
        assert count == COUNTS[name]
    elif name in ROUNDED:
        assert abs(count - ROUNDED[name]) <= 0.06e6
    scaled = {key.rsplit(".", 1)[1] for key in net.state_dict() if "gamma" in key}
    assert scaled == ({"gamma_1", "gamma_2"} if name.split("_")[1][:4] in ("base", "larg") else set())
    attention = [[hasattr(block.mixer, "qkv") for block in level.blocks] for level in net.levels[-2:]]
    assert [sum(one) for one in attention] == [depth // 2 for depth in SIZES[name]["depths"][-2:]]
    assert all(one == sorted(one) for one in attention)  # the last ones


def test_keys_and_windows_of_the_tiny_one_are_the_published_ones():
    expected = keys("mamba_vision_T")
    with torch.device("meta"):
        net = timm.create_model("mambavision_tiny", aux_head=False)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
    assert net.no_weight_decay() == set(expected["flag_no_weight_decay"])
    assert [level.window for level in net.levels[2:]] == [(side, side) for side in expected["window_size"][2:]]


def test_initial_weights_spread_as_the_published_ones():
    expected = keys("mamba_vision_T")["init_mean_std_min_max_seed0"]
    torch.manual_seed(0)
    net = timm.create_model("mambavision_tiny", aux_head=False)
    assert expected.keys() == dict(net.named_parameters()).keys()
    for key, parameter in net.named_parameters():
        mean, std, *_ = expected[key]
        few = 4 * std / parameter.numel() ** 0.5  # what the mean of that many draws may differ by
        assert abs(float(parameter.detach().mean()) - mean) < 3e-3 + 2 * few, key
        assert abs(float(parameter.detach().std(correction=0)) - std) < 0.1 * std + 2 * few + 1e-6, key


def plain_mixer(mixer: MambaVisionMixer, hidden: torch.Tensor) -> torch.Tensor:
    """The mixer step by step: hidden [B, L, C] -> [B, L, C]."""
    rank, state_size = mixer.dt_rank, mixer.d_state
    x, z = (hidden @ mixer.in_proj.weight.T).chunk(2, -1)
    outs = []
    for half, conv in ((x, mixer.conv1d_x), (z, mixer.conv1d_z)):
        padded, taps = F.pad(half, (0, 0, 1, 1)), conv.weight[:, 0].T
        outs.append(F.silu(sum(padded[:, i : i + half.shape[1]] * taps[i] for i in range(3))))
    x, z = outs
    step, b, c = (x @ mixer.x_proj.weight.T).split([rank, state_size, state_size], -1)
    delta = F.softplus(step @ mixer.dt_proj.weight.T + 2 * mixer.dt_proj.bias)
    a, held, ys = -mixer.A_log.exp(), x.new_zeros(len(x), x.shape[2], state_size), []
    for i in range(x.shape[1]):
        held = (delta[:, i, :, None] * a).exp() * held + (delta[:, i] * x[:, i])[..., None] * b[:, i, None]
        ys.append((held * c[:, i, None]).sum(-1) + mixer.D * x[:, i])
    return torch.cat([torch.stack(ys, 1), z], -1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("backend", ["reference", *BY_HAND])
def test_the_mixer_is_its_recurrence(length, backend):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(8, backend=backend).double()
    torch.nn.init.normal_(mixer.dt_proj.bias)
    assert isinstance(mixer, Mixer)
    made, results = torch.randn(3, length, 8, dtype=torch.float64), []
    for run in (mixer, lambda hidden: plain_mixer(mixer, hidden)):
        mixer.zero_grad()
        hidden = made.clone().requires_grad_()
        out = run(hidden)
        out.square().sum().backward()
        results.append([out, hidden.grad, *(parameter.grad.clone() for parameter in mixer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_the_mixer_is_differentiated_rightly_and_takes_even_widths_alone():
    torch.manual_seed(0)
    mixer = MambaVisionMixer(4, d_state=2).double()
    assert torch.autograd.gradcheck(mixer, (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),))
    for wrong, message in (({"d_conv": 4}, "got d_conv=4"), ({"d_model": 5}, "inner width 5")):
        with pytest.raises(ModelError, match=message):
            MambaVisionMixer(**{"d_model": 4, **wrong})


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 5), (7, 7)])
def test_windows_are_whole_in_order_and_padded_below_and_to_the_right(window):
    x = torch.arange(1.0, 2 * 3 * 4 * 5 + 1).view(2, 3, 4, 5)
    cut = to_windows(x, window)
    down, across = -(-4 // window[0]), -(-5 // window[1])
    assert cut.shape == (2 * down * across, window[0] * window[1], 3)
    padded = F.pad(x, (0, across * window[1] - 5, 0, down * window[0] - 4))
    rows = [part.split(window[1], 3) for part in padded.split(window[0], 2)]
    expected = torch.stack([part.flatten(2).mT for row in rows for part in row], 1).flatten(0, 1)
    assert torch.equal(cut, expected)
    assert torch.equal(from_windows(cut, window, x), x)


def published(net: MambaVision, form: str, folder: Path) -> Path:
    """A file as the authors' script, or their hub's library, writes it."""
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    if form == "pth.tar":
        torch.save({"state_dict": weights, "epoch": 309, "arch": "mamba_vision_T"}, folder / "net.pth.tar")
        return folder / "net.pth.tar"
    save_file({f"model.{key}": value for key, value in weights.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("form", ["pth.tar", "safetensors"])
def test_a_published_file_finds_its_model(form, tmp_path):
    torch.manual_seed(0)
    first = timm.create_model("mambavision_nano", num_classes=5, in_chans=1, aux_head=False, layer_scale=0.5).eval()
    path, x = published(first, form, tmp_path), torch.randn(2, 1, 64, 48)
    net = load_reference_checkpoint(path)
    assert isinstance(net, MambaVision)
    assert (net.aux_head, net.num_classes, net.in_chans) == (None, 5, 1)
    assert torch.equal(net(x), first(x))


def test_a_published_file_loads_into_a_model_for_other_images(tmp_path):
    torch.manual_seed(0)
    first = timm.create_model("mambavision_nano", num_classes=5, aux_head=False).eval()
    path = published(first, "pth.tar", tmp_path)
    net = timm.create_model("mambavision_nano", num_classes=5, aux_head=False, img_size=(96, 64))
    x = torch.randn(2, 3, 96, 64)
    first.set_input_size((96, 64))
    assert torch.equal(load_reference_checkpoint(path, net)(x), first(x))


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    torch.save(MambaVision(**MICRO).state_dict(), tmp_path / "micro.pth")
    message = r"no known MambaVision size, so its num_heads are unknown: got width 16.*pass model="
    with pytest.raises(ModelError, match=message):
        load_reference_checkpoint(tmp_path / "micro.pth")
    first = timm.create_model("mambavision_nano", num_classes=5, aux_head=False)
    path = published(first, "safetensors", tmp_path)
    with pytest.raises(
        ModelError, match=r"does not fit MambaVision: got 2 missing \(aux_head\.weight, aux_head\.bias\)"
    ):
        load_reference_checkpoint(path, timm.create_model("mambavision_nano", num_classes=5))
