"""DeMansia against the published one: outputs, intermediates, gradients, names and counts.

Legend: B images; C classes; T tokens; L = T + 1.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from fixtures import BACKENDS, SOURCES, close, keys, state, tensors

import model  # noqa: F401  (registers the names)
from model.backbones.demansia import DeMansia

GRID = (4, 4)


def micro(found: dict[str, torch.Tensor], **settings: object) -> DeMansia:
    net = DeMansia(img_size=64, embed_dim=32, depth=4, num_classes=10, **settings)
    net.load_state_dict(state(found))
    return net


def box_of(found: dict[str, torch.Tensor], name: str) -> tuple[SimpleNamespace, torch.Tensor]:
    """(the mix box, bool [T]: the tokens inside)."""
    y0, x0, y1, x1 = found[f"train.{name}.box"].tolist()
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1), inside.flatten()


def swapped_back(aux: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The published model gives the logits of mixed tokens back to the image that they came from; ours does not."""
    return torch.where(inside[:, None], aux.flip(0), aux)


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_is_the_published_one(backend, dtype, source):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels reckon in float32")
    found = tensors("demansia_micro", source)
    net = micro(found, backend=backend).eval().to(dtype)
    x = found["x"].to(dtype)

    def check(value: torch.Tensor, name: str) -> None:
        if dtype == torch.float64 and f"{name}_f64" in found:
            close(value, found[f"{name}_f64"], 1e-12)
        else:
            close(value, found[name], 1e-5)

    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    sums: list[torch.Tensor] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0]))
        layer.mixer.register_forward_hook(lambda _, __, output: steps.append((output, sums[-1])))
    check(net(x), "eval.out")
    check(net.forward_features(x), "mid.features")
    check(net.patch_embed(x), "mid.patch_embed")
    for i, (hidden, residual) in enumerate(steps[: len(net.layers)]):
        check(hidden, f"mid.layers.{i}.hidden")
        check(residual, f"mid.layers.{i}.residual")
    net.aux_weight = 0.0
    check(net(x), "eval.out_no_token_labeling")


@pytest.mark.parametrize("source", SOURCES)
def test_intermediates_are_the_published_residuals(source):
    """What a layer leaves, its own output added, is what the published code has before the next layer's is."""
    found = tensors("demansia_micro", source)
    net = micro(found).eval()
    last, steps = net.forward_intermediates(found["x"], [0, 1, 2], return_prefix_tokens=True, output_fmt="NLC")
    close(last, found["mid.features"], 1e-5)
    for i, (tokens, prefix) in enumerate(steps):
        whole = torch.cat([tokens[:, :8], prefix, tokens[:, 8:]], 1)  # the class token is in the middle
        close(whole, found[f"mid.layers.{i + 1}.residual"], 1e-5)
    maps = net.forward_intermediates(found["x"], [1], intermediates_only=True)[0]
    assert torch.equal(maps.flatten(2).mT, steps[1][0])


@pytest.mark.parametrize("name", ["eval_small", "eval_smallvar"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_epsilons_are_the_published_ones(name, source):
    found = tensors("demansia_micro", source)
    net = micro(found).eval()
    with torch.no_grad():
        if name == "eval_small":
            for tensor in (net.patch_embed.proj.weight, net.patch_embed.proj.bias, net.pos_embed, net.cls_token):
                tensor.mul_(0.005)
        else:
            for key, tensor in net.named_buffers():
                if key.endswith("running_var"):
                    tensor.mul_(1e-3)
    close(net(found["x"]), found[f"{name}.out"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["box_a", "box_empty", "box_full"])
@pytest.mark.parametrize("source", SOURCES)
def test_training_outputs_are_the_published_ones(backend, name, source):
    found = tensors("demansia_micro", source)
    net = micro(found, backend=backend).train()
    mix, inside = box_of(found, name)
    cls, aux = net(found["x"], mix)
    close(cls, found[f"train.{name}.x_cls"], 1e-5)
    close(swapped_back(aux, inside), found[f"train.{name}.x_aux"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_gradients_and_statistics_are_the_published_ones(backend, source):
    found = tensors("demansia_micro", source)
    net = micro(found, backend=backend).train()
    mix, inside = box_of(found, "box_a")
    x = found["x"].clone().requires_grad_()
    cls, aux = net(x, mix)
    aux, target, lam = swapped_back(aux, inside), found["target"], 1 - inside.float().mean()
    own, partner = target[..., 1], target[..., 1].flip(0)
    loss = lam * soft_cross_entropy(cls, own) + (1 - lam) * soft_cross_entropy(cls, partner)
    loss = loss + soft_cross_entropy(aux, target[..., 2:].mT)
    close(loss, found["train.box_a.loss"], 1e-5)
    loss.backward()
    close(x.grad, found["grad.x"], 5e-5)
    for name, parameter in net.named_parameters():
        close(parameter.grad, found[f"grad.{name}"], 5e-5, 1e-8)
    for name, buffer in net.named_buffers():
        close(buffer.float(), found[f"bnafter.{name}"].float(), 1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_an_odd_batch_is_mixed_as_published(source):
    found = tensors("demansia_micro", source)
    net = micro(found).train()
    mix, inside = box_of(found, "box_a")
    cls, aux = net(found["x3"], mix)
    close(cls, found["train3.box_a.x_cls"], 1e-5)
    close(swapped_back(aux, inside), found["train3.box_a.x_aux"], 1e-5)


@pytest.mark.parametrize("name", ["demansia_tiny", "demansia_small"])
def test_names_shapes_counts_and_marks_are_the_published_ones(name):
    expected = keys(name)
    net = timm.create_model(name, drop_path_rate=0.1)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict_shapes"]
    assert sum(p.numel() for p in net.parameters()) == expected["total_params"]
    assert net.no_weight_decay() == {*expected["flag_no_weight_decay"], "pos_embed", "cls_token"}
    rates = [0.0] + [layer.drop_path.drop_prob for layer in net.layers]  # what a layer gives enters the next one
    published = expected["drop_path_prob_applied_at_entry_of_layer_i_then_final_norm"]
    assert rates == pytest.approx(published, abs=1e-7)
    assert net.cls_position(expected["token_count"]) == expected["cls_position"]


@pytest.mark.parametrize(
    ("name", "width", "depth", "side"),
    [
        ("pico", 64, 12, 224),
        ("nano", 128, 12, 224),
        ("tiny", 192, 24, 224),
        ("small", 384, 24, 384),
        ("medium", 576, 24, 224),
        ("base", 768, 24, 224),
        ("large", 960, 24, 224),
    ],
)
def test_names_stand_for_their_sizes(name, width, depth, side):
    with torch.device("meta"):
        net = timm.create_model(f"demansia_{name}")
    assert (net.embed_dim, len(net.layers), net.img_size) == (width, depth, (side, side))


@pytest.mark.parametrize(("name", "neighbor"), [("medium", "lvvit_m"), ("base", "vim_base"), ("large", "lvvit_l")])
def test_our_own_sizes_are_near_published_ones(name, neighbor):
    """Of other families, so that the two can be compared: at most a twentieth apart in parameters."""
    with torch.device("meta"):
        ours, theirs = (
            sum(p.numel() for p in timm.create_model(one).parameters()) for one in (f"demansia_{name}", neighbor)
        )
    assert ours / theirs == pytest.approx(1, abs=0.05)


def test_it_begins_where_the_published_one_begins():
    """Standard deviation, and range of what is drawn within bounds, of every parameter."""
    torch.manual_seed(0)
    net = timm.create_model("demansia_tiny")
    for name, (_, std, low, high) in keys("demansia_tiny")["init_mean_std_min_max_seed0"].items():
        if "running" in name:
            continue
        parameter = net.get_parameter(name).detach()
        assert parameter.std().item() == pytest.approx(std, rel=0.12, abs=1e-6), name
        margin = 0.3 * (high - low) + 1e-6
        assert low - margin <= parameter.min() <= parameter.max() <= high + margin, name
