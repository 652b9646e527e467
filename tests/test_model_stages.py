"""timm's whole interface and token labels for a network of stages, MILA: what a user of timm tries first must work.

Legend: B images; C classes; D width of the last stage; h×w token grid, T = h·w.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from tiny_runs import tiny_config, tiny_data

import model
import train
from labeler.base.errors import ModelError
from model.summary import summarize
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from pipeline.targets.token_targets import TokenTargets
from train.loss.token_label_loss import TokenLabelLoss

MICRO = {"img_size": 64, "num_classes": 7, "embed_dim": 32, "depths": (1, 1, 2, 1)}
WIDE = 32 * 2**3


def micro(**changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("mila_tiny", **{**MICRO, **changes})


def images(n: int = 2, height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1))


def flat(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in (outputs if isinstance(outputs, tuple) else (outputs,))])


def test_training_gives_both_heads_and_evaluation_one_answer():
    net = micro()
    cls, aux = net.train()(images(height=96))
    assert (cls.shape, aux.shape) == ((2, 7), (2, 3 * 2, 7))
    net.eval()
    cls, aux = net.token_logits(net.forward_features(images()))
    assert torch.equal(net(images()), cls + 0.5 * aux.amax(1))
    assert torch.equal(net.score_maps(images()).flatten(2).mT, aux)
    assert micro(aux_head=False).train()(images()).shape == (2, 7)
    with pytest.raises(ModelError, match="no auxiliary head"):
        micro(aux_head=False).score_maps(images())


def test_features_then_head_is_the_model():
    net = micro().eval()
    features = net.forward_features(images())
    assert features.shape == (2, 2, 2, WIDE)
    assert torch.equal(net.forward_head(features), net(images()))
    assert torch.equal(net.forward_head(features, pre_logits=True), features.mean((1, 2)))
    assert net.num_features == net.head_hidden_size == WIDE
    unpooled = micro(global_pool="").eval()
    unpooled.load_state_dict(net.state_dict())
    assert torch.equal(unpooled(images()), net.head(features))


def test_classifiers_are_reset_together():
    net = micro()
    assert net.get_classifier().out_features == 7
    net.reset_classifier(5, aux_classes=9)
    assert [part.shape for part in net(images())] == [(2, 5), (2, 4, 9)]
    assert net.eval()(images()).shape == (2, 5)
    net.reset_classifier(0)
    assert torch.equal(net(images()), net.forward_features(images()).mean((1, 2)))
    assert isinstance(micro(num_classes=0).get_classifier(), torch.nn.Identity)


def test_token_label_builds_it_with_its_own_token_head():
    net = model.token_label("mila_nano", 5, img_size=64, aux_classes=9)
    assert type(net).__name__ == "Mila"
    assert [part.shape for part in net.train()(images())] == [(2, 5), (2, 16, 9)]
    with pytest.raises(ModelError, match="aux_head=True"):
        model.token_label("mila_nano", 5, aux_head=False)


def test_intermediates_are_maps_of_the_stages():
    net = micro().eval()
    last, found = net.forward_intermediates(images(2, 96, 64), norm=True)
    assert [tuple(part.shape) for part in found] == [(2, 32 * 2**i, 24 // 2**i, 16 // 2**i) for i in range(4)]
    assert torch.equal(last, net.forward_features(images(2, 96, 64)))
    assert torch.equal(found[-1].permute(0, 2, 3, 1), last)
    for form, shape in (("NHWC", (2, 16, 16, 32)), ("NLC", (2, 256, 32))):
        arguments = {"indices": [0], "output_fmt": form, "intermediates_only": True}
        assert net.forward_intermediates(images(), **arguments)[0].shape == shape
    with pytest.raises(ModelError, match=r"unknown output_fmt: got 'NCL', expected one of NCHW, NHWC, NLC"):
        net.forward_intermediates(images(), output_fmt="NCL")
    assert torch.equal(net.forward_intermediates(images(), [0])[0], net.forward_features(images()))  # all stages run


def test_the_pyramid_has_the_strides_of_its_name():
    """Also for an image of another size and shape than the model was built for."""
    pyramid = micro(features_only=True).eval()
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [32, 64, 128, 256]
    maps = pyramid(images(1, 96, 160))
    assert [tuple(m.shape) for m in maps] == [(1, 32 * 2**i, 24 // 2**i, 40 // 2**i) for i in range(4)]
    few = micro(features_only=True, out_indices=(0, 1)).eval()
    assert [m.shape[2] for m in few(images())] == [16, 8]
    assert len(few.model.layers) == 2
    assert few.model.layers[1].downsample is None
    full = micro().eval()
    few.model.load_state_dict({k: v for k, v in full.state_dict().items() if k in few.model.state_dict()})
    for one, other in zip(few(images()), full.forward_intermediates(images(), [0, 1])[1], strict=True):
        assert torch.equal(one, other)
    seen = []
    full.get_submodule(full.feature_info[1]["module"]).register_forward_hook(lambda _, __, out: seen.append(out))
    full(images())
    assert torch.equal(seen[0].permute(0, 3, 1, 2), few(images())[1])


@pytest.mark.parametrize("as_mask", [False, True])
def test_a_mix_box_swaps_the_tokens_inside_it_where_they_are_sixteen_pixels(as_mask):
    net = micro(img_size=(96, 64)).eval()
    seen = []
    for i in (2, 3):
        net.layers[i - 1].register_forward_hook(lambda _, __, out: seen.append(out))
    net.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    box = SimpleNamespace(y0=1, x0=0, y1=3, x1=1)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[1:3, :1] = True
    net.forward_features(images(3, 96, 64))
    plain, seen[:] = seen[:2], []
    features = net.forward_features(images(3, 96, 64), mask if as_mask else box)
    assert torch.equal(seen[0], plain[0])  # the first two stages see unmixed images
    inside = torch.zeros(6, 4, 1, dtype=torch.bool)
    inside[2:6, 0:2] = True
    assert torch.equal(seen[1], torch.where(inside, plain[0].flip(0), plain[0]))
    assert features.shape == (3, 3, 2, WIDE)
    one = images(1, 96, 64)
    assert torch.equal(net.forward_features(one, box), net.forward_features(one))
    with pytest.raises(ModelError, match=r"does not lie inside the grid: got .* expected a box on 3×2 tokens"):
        net(images(3, 96, 64), SimpleNamespace(y0=0, x0=0, y1=4, x1=1))


def test_small_tokens_are_mixed_in_front_of_the_last_stage():
    net = timm.create_model("mila_nano", patch_size=2, img_size=32, num_classes=3).eval()
    assert (net.grid, net.stride) == ((4, 4), 8)
    seen = []
    net.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for mix in (None, SimpleNamespace(y0=0, x0=0, y1=1, x1=4)):
        net(images(2, 32, 32), mix)
    assert torch.equal(seen[1][:, :1], seen[0][:, :1].flip(0))
    assert torch.equal(seen[1][:, 1:], seen[0][:, 1:])


def test_a_step_with_token_labels_moves_every_parameter():
    net = micro(drop_path_rate=0.1, img_size=64).train()
    random = torch.Generator().manual_seed(2)
    scores = [torch.randn(shape, generator=random) for shape in ((2, 3, 4), (2, 4), (2, 3), (2,))]
    targets = TokenTargets(torch.tensor([[0, 1, 2], [4, 5, 6]]), *scores)
    batch = Batch(images(), targets, torch.tensor([0, 4]), MixBox(0, 0, 1, 2, 0.5))
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05)
    criterion, losses = TokenLabelLoss(), []
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for _ in range(5):
        loss = criterion(net(batch.images, batch.token_mix), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not [name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])]


def test_decay_spares_norms_and_biases_and_layers_have_their_own_rates():
    net = micro()
    assert net.no_weight_decay() == set()
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for key, parameter in net.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), key
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    parts = (
        "patch_embed.conv1.conv", "layers.0.blocks.0.norm1", "layers.0.downsample.conv.0.conv",
        "layers.2.blocks.0.norm1", "layers.2.blocks.1.norm1", "layers.3.blocks.0.norm1",
    )  # fmt: skip
    order = [scale[id(net.get_submodule(part).weight)] for part in parts]
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    assert scale[id(net.head.weight)] == scale[id(net.aux_head.weight)] == 1.0
    coarse = {re for re, _ in net.group_matcher(coarse=True)["blocks"]}
    assert coarse == {r"^layers\.(\d+)", r"^norm"}


def test_checkpointing_changes_nothing_but_memory():
    gradients = []
    for enable in (False, True):
        net, runs = micro().train(), []
        net.layers[2].blocks[1].attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        net.set_grad_checkpointing(enable)
        flat(net(images())).square().sum().backward()
        gradients.append(net.patch_embed.conv1.conv.weight.grad)
        assert len(runs) == 1 + enable
        with torch.no_grad():
            net(images())
        assert len(runs) == 2 + enable
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_drop_path_rates_rise_linearly_to_the_last_block():
    net = micro(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in net.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    dropped = micro(drop_path_rate=0.3, drop_rate=0.1, in_chans=1).train()
    assert torch.isfinite(flat(dropped(images(channels=1)))).all()


def test_timm_saves_and_loads_it_at_another_resolution(tmp_path: Path):
    first = micro().eval()
    timm.models.save_for_hf(first, tmp_path)
    settings = {key: value for key, value in MICRO.items() if key != "num_classes"}
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **{**settings, "img_size": (96, 64)}).eval()
    assert torch.equal(larger(images(1, 96, 64)), first(images(1, 96, 64)))
    assert larger.grid == (3, 2)


@pytest.mark.parametrize("bad", [(2, 4, 64, 64), (2, 3, 65, 65), (2, 3, 64, 80), (3, 64, 64), (2, 3, 0, 32)])
def test_images_that_do_not_fit_are_refused(bad):
    with pytest.raises(ModelError, match=r"got .*expected (\[B, 3, height, width\]|multiples of 32)"):
        micro()(torch.zeros(bad))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 65}, "got 65×65 pixels, expected multiples of 32"),
        ({"embed_dim": 34}, "got width 34 with num_heads=1, expected a multiple of num_heads and of 4"),
        ({"embed_dim": 24}, "got width 24 with num_heads=0"),
        ({"num_heads": (1, 2, 3, 8)}, "got width 128 with num_heads=3, expected a multiple of num_heads and of 4"),
        ({"num_heads": (1, 2)}, r"got \(1, 1, 2, 1\) and \(1, 2\)"),
        ({"depths": (1, 0)}, "must be of each stage"),
        ({"global_pool": "token"}, "got global_pool='token', expected \"avg\""),
        ({"patch_size": 8}, "got patch_size=8, expected 4 or 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, message):
    with pytest.raises(ModelError, match=message) as caught:
        micro(**settings)
    assert "\n" not in str(caught.value)


def test_nan_images_give_nan_and_no_silence():
    broken = images()
    broken[0, 0, 3, 3] = torch.nan
    out = micro().eval()(broken)
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(dtype):
    net = micro().eval()
    expected = net.forward_features(images())
    with torch.autocast("cpu", dtype):
        found = net.forward_features(images())
    whole = net.to(dtype).forward_features(images().to(dtype))
    for features in (found, whole):
        assert (features.float() - expected).norm() / expected.norm() < 0.05


def test_the_summary_counts_all_of_it():
    cost = summarize("mila_nano", (64,)).costs[0]
    assert cost.tokens == 16
    assert "other" not in cost.macs
    with torch.device("meta"):
        net = timm.create_model("mila_tiny", aux_head=False).eval()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 224, 224, device="meta"))
    assert 4.1e9 < counter.get_total_flops() / 2 < 4.3e9  # published: 4.2 G


def test_a_compiled_model_trains_and_answers_as_the_eager_one():
    net, mask = micro(depths=(1, 1)), torch.zeros(8, 8, dtype=torch.bool)
    mask[:3] = True
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        net.train(training)
        results = []
        for run in (net, compiled):
            net.zero_grad()
            out = flat(run(images(), mask))
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_traced_model_trains_and_answers_as_the_plain_one():
    net = micro().train()
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(flat(traced(images())), flat(net(images())))
    net.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images(1, 96, 64)), net(images(1, 96, 64)))


def test_it_runs_in_onnxruntime_with_any_batch_and_any_image(tmp_path: Path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[export]')")
    import onnxruntime

    net = micro(depths=(1, 1)).eval()
    shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes |= {side: 8 * torch.export.Dim(f"side{side}", min=4, max=64) for side in (2, 3)}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            net, (images(2, 96, 96),), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(shapes,),
            optimize=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for shape in ((1, 64, 64), (3, 96, 160)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(*shape).numpy()})
        assert (torch.from_numpy(found) - net(images(*shape))).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mila_nano", "mambavision_nano"])
def test_a_run_trains_it_and_another_begins_with_its_weights_at_another_resolution(name, tmp_path: Path):
    images, store = tiny_data(tmp_path)
    settings = {
        "model.name": name, "model.args": {"embed_dim": 32, "patch_size": 2}, "model.drop_path_rate": 0.1,
        "augment.mix": "token", "schedule.steps": 3, "ema.decay": 0.9,
    }  # fmt: skip
    train.fit(tiny_config(images, store, tmp_path / "run", **settings, **{"data.validation": str(images)}))
    larger = {**settings, "model.img_size": 64, "model.weights": str(tmp_path / "run"), "schedule.steps": 1}
    summary = train.fit(tiny_config(images, store, tmp_path / "next", **larger))
    assert summary.steps == 1
