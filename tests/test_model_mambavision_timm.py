"""timm's whole interface and token labels for MambaVision: what a user of timm tries first must work.

Legend: B images; C classes; D width of the last level; h×w token grid, T = h·w.
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

import model
from labeler.base.errors import ModelError
from model.summary import summarize
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from pipeline.targets.token_targets import TokenTargets
from train.loss.token_label_loss import TokenLabelLoss

MICRO = {
    "img_size": 64, "num_classes": 7, "embed_dim": 16, "stem_width": 8, "depths": (1, 1, 3, 2),
    "num_heads": (1, 1, 2, 4),
}  # fmt: skip
WIDE = 16 * 2**3


def micro(**changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("mambavision_tiny", **{**MICRO, **changes})


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


def test_features_then_head_is_the_model():
    net = micro().eval()
    features = net.forward_features(images())
    assert features.shape == (2, WIDE, 2, 2)
    assert torch.equal(net.forward_head(features), net(images()))
    assert torch.equal(net.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert net.num_features == net.head_hidden_size == WIDE
    unpooled = micro(global_pool="").eval()
    unpooled.load_state_dict(net.state_dict())
    assert torch.equal(unpooled(images()), net.head(features.permute(0, 2, 3, 1)))
    assert torch.equal(micro(global_pool="", num_classes=0).eval()(images()), features)


def test_classifiers_are_reset_together_and_may_have_other_classes():
    net = micro()
    net.reset_classifier(5, aux_classes=9)
    assert net.get_classifier().out_features == net.num_classes == 5
    assert [part.shape[-1] for part in net(images())] == [5, 9]
    net.reset_classifier(0)
    assert net.eval()(images()).shape == (2, WIDE)
    cls, aux = model.token_label("mambavision_nano", 5, img_size=64, aux_classes=9).train()(images())
    assert (cls.shape, aux.shape) == ((2, 5), (2, 16, 9))


def test_the_pyramid_has_the_strides_of_its_name():
    """Also for an image of another size and shape than the model was built for."""
    pyramid = micro(features_only=True).eval()
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [16, 32, 64, 128]
    maps = pyramid(images(1, 96, 160))
    assert [tuple(m.shape) for m in maps] == [(1, 16 * 2**i, 24 // 2**i, 40 // 2**i) for i in range(4)]
    few = micro(features_only=True, out_indices=(0, 2)).eval()
    assert [m.shape[2] for m in few(images())] == [16, 4]
    assert len(few.model.levels) == 3
    assert few.model.levels[2].downsample is None
    full = micro().eval()
    few.model.load_state_dict({k: v for k, v in full.state_dict().items() if k in few.model.state_dict()})
    for one, other in zip(few(images()), full.forward_intermediates(images(), [0, 2])[1], strict=True):
        assert torch.equal(one, other)


def test_intermediates_are_maps_of_the_levels():
    net = micro().eval()
    last, found = net.forward_intermediates(images(), indices=[1, 3], norm=True)
    assert torch.equal(last, net.forward_features(images()))
    assert torch.equal(found[1], last)
    for form, shape in (("NCHW", (2, 16, 16, 16)), ("NHWC", (2, 16, 16, 16)), ("NLC", (2, 256, 16))):
        arguments = {"indices": [0], "output_fmt": form, "intermediates_only": True, "stop_early": True}
        assert net.forward_intermediates(images(), **arguments)[0].shape == shape
    with pytest.raises(ModelError, match="unknown output_fmt: got 'NCL'"):
        net.forward_intermediates(images(), output_fmt="NCL")


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (50, 33), (7, 1)])
def test_images_of_any_size_are_taken(size):
    """Maps are padded to whole windows, and sides of tokens rounded up."""
    net = micro().eval()
    grid = (-(-size[0] // 32), -(-size[1] // 32))
    assert net.score_maps(images(2, *size)).shape == (2, 7, *grid)
    assert [level.window for level in net.levels] == [None, None, (4, 4), (2, 2)]
    net.set_input_size(size)
    sixteenths = (-(-size[0] // 16), -(-size[1] // 16))
    assert [level.window for level in net.levels] == [None, None, sixteenths, grid]
    assert net.grid == grid
    assert torch.isfinite(net(images(2, *size))).all()


def test_given_windows_stay():
    net = micro(window_size=(8, 8, 14, 7))
    net.set_input_size((96, 64))
    assert [level.window for level in net.levels[2:]] == [(14, 14), (7, 7)]


@pytest.mark.parametrize("as_mask", [False, True])
def test_a_mix_box_swaps_the_tokens_inside_it_where_they_are_sixteen_pixels(as_mask):
    net = micro(img_size=(96, 64)).eval()
    seen = []
    net.levels[1].register_forward_hook(lambda _, __, out: seen.append(out))
    net.levels[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    box = SimpleNamespace(y0=1, x0=0, y1=3, x1=1)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[1:3, :1] = True
    net.forward_features(images(3, 96, 64))
    plain, seen[:] = seen[0], []
    net.forward_features(images(3, 96, 64), mask if as_mask else box)
    assert torch.equal(seen[0], plain)  # the convolutions of the first two levels see unmixed images
    inside = torch.zeros(6, 4, dtype=torch.bool)
    inside[2:6, 0:2] = True
    assert torch.equal(seen[1], torch.where(inside, plain.flip(0), plain))
    odd = net.forward_features(images(2, 80, 50), SimpleNamespace(y0=0, x0=0, y1=3, x1=2))  # a whole image, rounded up
    assert torch.allclose(odd, net.forward_features(images(2, 80, 50)).flip(0), atol=1e-6)
    with pytest.raises(ModelError, match=r"does not lie inside the grid: got .* expected a box on 3×2 tokens"):
        net(images(3, 96, 64), SimpleNamespace(y0=0, x0=0, y1=4, x1=1))


def test_a_step_with_token_labels_moves_every_parameter():
    net = micro(drop_path_rate=0.1, layer_scale=0.1).train()
    random = torch.Generator().manual_seed(2)
    scores = [torch.randn(shape, generator=random) for shape in ((2, 3, 4), (2, 4), (2, 3), (2,))]
    targets = TokenTargets(torch.tensor([[0, 1, 2], [4, 5, 6]]), *scores)
    batch = Batch(images(), targets, torch.tensor([0, 4]), MixBox(0, 0, 1, 2, 0.5))
    optimizer = create_optimizer_v2(net, "lamb", lr=5e-3, weight_decay=0.05)
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


def test_decay_spares_what_is_marked_and_blocks_have_their_own_rates():
    net = micro()
    spared = net.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in spared} == {"A_log", "D"}
    assert len(spared) == 2 * 3
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for key, parameter in net.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and key not in spared), key
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-3, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [f"levels.{i}.blocks.{j}.norm1" for i, depth in enumerate(MICRO["depths"]) for j in range(depth)]
    order = [scale[id(net.get_submodule(part).weight)] for part in ("patch_embed.conv_down.0", *blocks)]
    assert order == [0.5**i for i in range(len(order), 0, -1)]
    assert scale[id(net.levels[2].downsample.reduction[0].weight)] == scale[id(net.levels[2].blocks[2].norm1.weight)]
    assert scale[id(net.head.weight)] == scale[id(net.aux_head.weight)] == 1.0
    coarse = {re for re, _ in net.group_matcher(coarse=True)["blocks"]}
    assert coarse == {r"^levels\.(\d+)", r"^norm"}


def test_checkpointing_runs_blocks_twice():
    for enable in (False, True):
        net, runs = micro().train(), []
        net.levels[2].blocks[1].mixer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        net.set_grad_checkpointing(enable)
        flat(net(images())).square().sum().backward()
        assert len(runs) == 1 + enable


def test_drop_path_rates_rise_linearly_to_the_last_block():
    net = micro(drop_path_rate=0.6)
    rates = [block.drop_path.drop_prob for level in net.levels for block in level.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(7)])
    dropped = micro(drop_path_rate=0.3, drop_rate=0.1, in_chans=1).train()
    assert torch.isfinite(flat(dropped(images(channels=1)))).all()


def test_timm_saves_and_loads_it_at_another_resolution(tmp_path: Path):
    first = micro(window_size=(8, 8, 4, 2)).eval()
    timm.models.save_for_hf(first, tmp_path)
    settings = {key: value for key, value in MICRO.items() if key != "num_classes"}
    changed = {**settings, "img_size": (96, 64), "window_size": (8, 8, 4, 2)}
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changed).eval()
    assert torch.equal(larger(images(1, 96, 64)), first(images(1, 96, 64)))
    assert larger.grid == (3, 2)


@pytest.mark.parametrize("bad", [(2, 4, 64, 64), (3, 64, 64), (2, 3, 0, 32)])
def test_images_that_do_not_fit_are_refused(bad):
    with pytest.raises(ModelError, match=r"got .*expected"):
        micro()(torch.zeros(bad))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 0}, "got 0×0 pixels"),
        ({"embed_dim": 5, "depths": (1, 1), "num_heads": (1, 1)}, "inner width 5, expected .* an even width"),
        ({"num_heads": (1, 1, 3, 4)}, "got width 64, num_heads 3"),
        ({"num_heads": (1, 2)}, r"got depths=\(1, 1, 3, 2\), num_heads=\(1, 2\)"),
        ({"window_size": (14, 7)}, r"window_size=\(14, 7\), expected as many of each"),
        ({"depths": (2,), "num_heads": (1,)}, "for 2 levels or more"),
        ({"depths": (1, 0, 1, 1)}, "each at least 1"),
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


def test_the_summary_counts_the_scans_too():
    cost = summarize("mambavision_nano", (64,)).costs[0]
    assert cost.tokens == 16
    assert "other" not in cost.macs
    assert cost.macs["scan"] > 0
    with torch.device("meta"):
        net = timm.create_model("mambavision_tiny", aux_head=False, backend="reference").eval()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 224, 224, device="meta"))
    assert 4.4e9 < counter.get_total_flops() / 2 < 4.7e9  # published: 4.4 G


def test_a_compiled_model_trains_and_answers_as_the_eager_one():
    """Decomposed as for Inductor: undecomposed, torch mistakes the strides of batch norm's gradient on a CPU."""
    net, mask = micro(depths=(1, 2, 2), num_heads=(1, 1, 2), backend="cpu"), torch.zeros(4, 4, dtype=torch.bool)
    mask[:3] = True
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager_decomp_partition")
    for training in (True, False):
        net.train(training)
        results = []
        for run in (net, compiled):
            net.zero_grad()
            out = flat(run(images(), mask))
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_traced_model_trains_and_answers_as_the_plain_one():
    net = micro().train()
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(flat(traced(images())), flat(net(images())))
    net.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images(1, 96, 50)), net(images(1, 96, 50)))


def test_it_runs_in_onnxruntime_with_any_batch_and_any_image(tmp_path: Path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[export]')")
    import onnxruntime

    net = micro(depths=(1, 2, 2), num_heads=(1, 1, 2), window_size=(8, 4, 2)).eval()
    shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes |= {side: torch.export.Dim(f"side{side}", min=32, max=512) for side in (2, 3)}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            net, (images(2, 96, 90),), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(shapes,),
            optimize=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for shape in ((1, 64, 64), (3, 97, 160)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(*shape).numpy()})
        assert (torch.from_numpy(found) - net(images(*shape))).abs().max() < 1e-4
