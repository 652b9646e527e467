"""Published checkpoints: each kind of file gives the published outputs, and a bad file a refusal, its code unrun."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixtures import close, state, tensors
from safetensors.torch import save_file

from labeler.base.errors import ModelError
from model import checkpoints
from model.backbones.demansia import DeMansia
from model.backbones.lvvit import LVViT
from model.backbones.vim import Vim
from model.checkpoints import load_reference_checkpoint

VIM_NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def lvvit(**settings: Any) -> LVViT:
    return LVViT(**{"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10, **settings})


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def lightning(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What Lightning puts beside the weights."""
    return {
        "epoch": 3,
        "global_step": 7,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": collections.OrderedDict(weights),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "runs"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "config",
        "hyper_parameters": {"dtype": torch.float32, "device": torch.device("cpu"), "img_size": (64, 64)},
    }


def script(**settings: Any) -> argparse.Namespace:
    return argparse.Namespace(model=VIM_NAME, input_size=64, lr=1e-3, **settings)


@pytest.mark.parametrize("given", [False, True])
def test_demansia_as_lightning_saves_it(tmp_path, given):
    found = tensors("demansia_micro")
    path = saved(tmp_path / "DeMansia.ckpt", lightning(state(found)))
    own = DeMansia(img_size=64, embed_dim=32, depth=4, num_classes=10) if given else None
    net = load_reference_checkpoint(path, own)
    assert isinstance(net, DeMansia)
    assert not net.training
    assert own is None or net is own
    close(net(found["x"]), found["eval.out"], 1e-5)


@pytest.mark.parametrize("form", ["beside", "second file", "itself"])
def test_averaged_weights(tmp_path, form):
    found = tensors("demansia_micro")
    average, plain = state(found), {key: 0 * value for key, value in state(found).items()}
    path = saved(tmp_path / "last.ckpt", lightning(plain))
    if form == "beside":
        saved(path, {**lightning(plain), "state_dict_ema": average})
    else:
        second = saved(tmp_path / "last-EMA.ckpt", lightning(average))
        path = second if form == "itself" else path
    close(load_reference_checkpoint(path, ema=True)(found["x"]), found["eval.out"], 1e-5)
    if form != "itself":
        assert not load_reference_checkpoint(path)(found["x"]).any()


def test_missing_averaged_weights_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", lightning(state(tensors("demansia_micro"))))
    with pytest.raises(ModelError, match=r"no averaged weights.*a-EMA\.ckpt"):
        load_reference_checkpoint(path, ema=True)


def test_vim_with_the_settings_of_its_script(tmp_path):
    found = tensors("vim_micro")
    content = {
        "model": state(found),
        "args": script(output_dir=pathlib.Path("runs")),
        "epoch": 1,
        "scaler": {"scale": 1.0},
    }
    net = load_reference_checkpoint(saved(tmp_path / "vim.pth", content))
    assert isinstance(net, Vim)
    close(net(found["x"]), found["eval.out"], 1e-5)
    content["args"].model = VIM_NAME.replace("_div2", "")
    net = load_reference_checkpoint(saved(tmp_path / "vim.pth", content))
    close(net(found["x"]), found["variant.no_divide.out"], 1e-5)


def test_vim_with_overlapping_patches_is_refused(tmp_path):
    content = {"model": state(tensors("vim_micro")), "args": argparse.Namespace(input_size=40)}
    with pytest.raises(ModelError, match=r"17 positions for 40 pixels; overlapping patches are not supported"):
        load_reference_checkpoint(saved(tmp_path / "vim.pth", content))


def bare_vim(img_size: int) -> Vim:
    torch.manual_seed(0)
    return Vim(img_size=img_size, embed_dim=8, depth=1, stem="patch", aux_head=False, num_classes=3)


@pytest.mark.parametrize(("img_size", "overlapping"), [(432, 224), (752, 384)])
def test_vim_that_may_overlap_needs_its_model(tmp_path, img_size, overlapping):
    """27×27 positions are those of 432 pixels, and of the published stride of 8 on 224; only the user knows."""
    first = bare_vim(img_size)
    path = saved(tmp_path / "vim.pth", first.state_dict())
    side = img_size // 16
    with pytest.raises(ModelError, match="does not say whether its patches overlap") as refusal:
        load_reference_checkpoint(path)
    for part in (f"got {side}×{side} positions", f"model= (built with img_size={img_size})", f"{overlapping} pixels"):
        assert part in str(refusal.value)
    net = load_reference_checkpoint(path, bare_vim(img_size))
    assert torch.equal(net.pos_embed, first.pos_embed)
    settings = argparse.Namespace(model=VIM_NAME, input_size=img_size)
    net = load_reference_checkpoint(saved(path, {"model": first.state_dict(), "args": settings}))
    assert net.img_size == (img_size, img_size)


@pytest.mark.parametrize("img_size", [16, 48, 224, 240, 336, 384, 512])
def test_vim_of_likely_images_needs_no_model(tmp_path, img_size):
    net = load_reference_checkpoint(saved(tmp_path / "vim.pth", bare_vim(img_size).state_dict()))
    assert net.img_size == (img_size, img_size)


def test_demansia_never_overlaps(tmp_path):
    first = DeMansia(img_size=432, embed_dim=8, depth=1, num_classes=3)
    assert load_reference_checkpoint(saved(tmp_path / "a.ckpt", first.state_dict())).img_size == (432, 432)


@pytest.mark.parametrize("form", ["plain", "module.", "safetensors", "model_ema"])
def test_lvvit_in_every_form(tmp_path, form):
    found = tensors("lvvit_micro")
    weights, path = state(found), tmp_path / "lvvit.pth.tar"
    if form == "safetensors":
        save_file(weights, path := tmp_path / "lvvit.safetensors")
    elif form == "plain":
        saved(path, weights)
    elif form == "module.":
        saved(path, {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "args": script(), "version": 2})
    else:
        saved(path, {"state_dict": {"unfit": torch.zeros(1)}, "model_ema": weights})
    net = load_reference_checkpoint(path, lvvit(), ema=form == "model_ema")
    close(net(found["x"]), found["eval.out"], 1e-5)


@pytest.mark.parametrize("name", ["lvvit_t", "demansia_tiny", "demansia_pico", "vim_tiny", "vim_pico"])
def test_family_size_and_classes_are_told_by_the_shapes(tmp_path, name):
    torch.manual_seed(0)
    first = timm.create_model(name, num_classes=7, img_size=32, in_chans=1).eval()
    net = load_reference_checkpoint(saved(tmp_path / "a.pth", {"state_dict": first.state_dict()}))
    assert type(net) is type(first)
    assert net.pretrained_cfg["architecture"] == name
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(net(x), first(x))


def test_an_unpublished_lvvit_needs_its_model(tmp_path):
    path = saved(tmp_path / "a.pth.tar", state(tensors("lvvit_micro")))
    with pytest.raises(ModelError, match=r"num_heads and skip_lam are unknown: got width 48, 3 blocks.*pass model="):
        load_reference_checkpoint(path)


@pytest.mark.parametrize("size", [(96, 32), (128, 128)])
def test_positions_are_resized_to_the_models_resolution(tmp_path, size):
    found = tensors("lvvit_micro")
    path = saved(tmp_path / "a.pth.tar", state(found))
    net = load_reference_checkpoint(path, lvvit(img_size=size))
    same = load_reference_checkpoint(path, lvvit())
    same.set_input_size(size)
    x = torch.randn(1, 3, *size)
    assert torch.equal(net(x), same(x))
    assert torch.equal(net.pos_embed[:, :1], found["sd.pos_embed"][:, :1])


def test_what_does_not_fit_is_counted_and_named(tmp_path):
    weights = state(tensors("lvvit_micro"))
    del weights["norm.weight"], weights["norm.bias"]
    weights |= {f"more.{i}": torch.zeros(1) for i in range(5)}
    path = saved(tmp_path / "a.pth.tar", weights)
    with pytest.raises(ModelError) as refusal:
        load_reference_checkpoint(path, lvvit(num_classes=11))
    told = str(refusal.value)
    assert "2 missing (norm.weight, norm.bias)" in told
    assert "5 unexpected (more.0, more.1, more.2, …)" in told
    assert "4 of another shape (head.weight [10, 48] for [11, 48], " in told
    with pytest.raises(ModelError, match="does not fit Vim"):
        load_reference_checkpoint(path, Vim(img_size=64, embed_dim=32, depth=1, stem="patch", aux_head=False))
    with pytest.raises(ModelError, match="no known family"):
        load_reference_checkpoint(saved(path, {"conv.weight": torch.zeros(3)}))


@pytest.mark.parametrize("given", [False, True])
def test_weights_that_are_not_finite_are_refused(tmp_path, given):
    weights = bare_vim(32).state_dict()
    own = bare_vim(64) if given else None
    before = {key: value.clone() for key, value in own.state_dict().items()} if own else {}
    weights["layers.0.mixer.D"][0] = torch.nan
    path = saved(tmp_path / "a.pth", weights)
    with pytest.raises(ModelError, match=r"not finite: got NaN or infinity in 1 tensors \(layers\.0\.mixer\.D\)"):
        load_reference_checkpoint(path, own)
    assert all(torch.equal(value, before[key]) for key, value in (own.state_dict() if own else {}).items())
    weights["pos_embed"][0, 1, 0] = torch.inf
    weights["head.bias"][0] = -torch.inf
    weights["norm_f.weight"] = torch.full([8], 1e300, dtype=torch.float64)  # finite there, not in the model
    with pytest.raises(ModelError, match=r"in 4 tensors \((\w|\.|, )+, …\)"):
        load_reference_checkpoint(saved(path, weights), own)


@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight", "layers.0.mixer.A_log", "norm_f.weight"])
def test_shapes_that_make_no_model_are_refused(tmp_path, key):
    weights = state(tensors("demansia_micro"))
    for value in (torch.zeros(()), torch.zeros(1, 17, 0), torch.zeros(1).expand(1, 17, 1 << 20)):
        with pytest.raises(ModelError):
            load_reference_checkpoint(saved(tmp_path / "a.ckpt", {**weights, key: value}))
    del weights[key]
    with pytest.raises(ModelError):
        load_reference_checkpoint(saved(tmp_path / "a.ckpt", weights))


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, environment, zipped):
    if environment:
        monkeypatch.setenv(environment, "1")
    mark, path = tmp_path / "canary", tmp_path / "bad.ckpt"
    content = {**lightning(state(tensors("demansia_micro"))), "hyper_parameters": Canary(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"asks for (posix|os).system.*Nothing of it was run"):
        load_reference_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the canary is alive
    assert mark.exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none.pth", Path(os.devnull)):
        with pytest.raises(ModelError, match="no such checkpoint"):
            load_reference_checkpoint(path)
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ModelError, match="not a file of plain weights"):
            load_reference_checkpoint(tmp_path / name)
    with pytest.raises(ModelError, match="holds no weights"):
        load_reference_checkpoint(saved(tmp_path / "a.pth", [1, 2]))
    path = saved(tmp_path / "a.pth", state(tensors("vim_micro")))
    monkeypatch.setattr(checkpoints, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ModelError, match="too large"):
        load_reference_checkpoint(path)
