"""Files of weights as other trainers write them, for teachers and students alike; what asks for code is refused."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from labeler import InputError, TeacherConfig, create_teacher
from labeler.base.weight_files import read_weight_file, unwrapped
from model.checkpoints import read_state_dict


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=7)


def same(state: dict[str, torch.Tensor], net: nn.Module) -> bool:
    own = net.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)


def timms_own(net: nn.Module, folder: Path) -> Path:
    """What timm's train.py leaves: its arguments, an optimizer, numpy's number as the metric, averaged weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(model="test_resnet", data_dir=pathlib.Path("/data"), lr=0.1)
    ema = ModelEmaV3(net, decay=0.5)
    for tensor in ema.module.parameters():
        tensor.data += 1.0
    saver = CheckpointSaver(
        net, optimizer, args=arguments, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    return folder / "last.pth.tar"


def lightnings(net: nn.Module, folder: Path) -> Path:
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()} | {"loss.weight": torch.ones(7)}
    torch.save({"pytorch-lightning_version": "2.6.6", "epoch": 2, "state_dict": state}, folder / "last.ckpt")
    return folder / "last.ckpt"


def wrapped(net: nn.Module, folder: Path) -> Path:
    state = {f"module._orig_mod.model.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"model": state}, folder / "ddp.pth")
    return folder / "ddp.pth"


def bare(net: nn.Module, folder: Path) -> Path:
    torch.save(net.state_dict(), folder / "bare.pth")
    return folder / "bare.pth"


@pytest.mark.parametrize("write", [timms_own, lightnings, wrapped, bare])
def test_each_trainers_file_makes_a_teacher_and_begins_a_student(net, write, tmp_path):
    file = write(net, tmp_path)
    assert same(read_weight_file(file, ema=False).state, net)
    assert same(read_state_dict(file), net)
    config = TeacherConfig("test_resnet", checkpoint=str(file), ema=False)
    images = torch.rand(2, 3, 64, 64)
    expected = create_teacher(TeacherConfig("test_resnet", checkpoint=str(bare(net, tmp_path))))
    assert torch.equal(create_teacher(config).score_maps(images), expected.score_maps(images))


def test_averaged_weights_are_taken_where_there_are_some_unless_told(net, tmp_path):
    file = timms_own(net, tmp_path)
    chosen = read_weight_file(file)
    assert chosen.averaged
    assert chosen.settings.model == "test_resnet"
    first = next(iter(net.state_dict()))
    assert torch.allclose(chosen.state[first], net.state_dict()[first] + 1)
    digests = {
        create_teacher(TeacherConfig("test_resnet", checkpoint=str(file), ema=ema)).info.weights_sha256
        for ema in (None, True, False)
    }
    assert len(digests) == 2
    with pytest.raises(InputError, match=r"no averaged weights in .*\. Use the plain weights\."):
        read_weight_file(bare(net, tmp_path), ema=True)


@pytest.mark.parametrize("number", [np.float64(1.5), np.float32(2.5), np.int64(3), np.bool_(True)])
@pytest.mark.parametrize("home", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_of_old_and_new_numpy_are_read_as_plain_ones(number, home, tmp_path, net):
    torch.save({"model": net.state_dict(), "args": {"metric": number}}, tmp_path / "a.pth")
    if home.startswith("numpy.core"):  # as numpy before 2 wrote it
        content = (tmp_path / "a.pth").read_bytes()
        assert b"numpy._core" in content
        buffer = pickle.dumps({"model": {"w": torch.ones(2).tolist()}, "args": {"metric": number}}, protocol=2)
        assert home.encode() in buffer.replace(b"numpy._core", b"numpy.core")
    value = read_weight_file(tmp_path / "a.pth").settings["metric"]
    assert value == number.item()
    assert type(value) in (int, float, bool)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


class Bomb:
    """A numpy scalar of a terabyte, in a few bytes."""

    def __reduce__(self) -> Any:
        from numpy._core.multiarray import scalar

        return (scalar, (np.dtype("V1000000000"),))


def test_code_is_refused_and_a_scalar_takes_no_memory(net, tmp_path):
    torch.save({"model": net.state_dict(), "args": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"a pickle that asks for (posix|os|nt)\.mkdir, .*Nothing of it was run"):
        read_weight_file(tmp_path / "evil.pth")
    torch.save({"model": net.state_dict(), "args": Bomb()}, tmp_path / "bomb.pth")
    assert read_weight_file(tmp_path / "bomb.pth").settings is None
    assert not (tmp_path / "ran").exists()


def test_an_attribute_of_the_networks_own_is_not_taken_for_a_wrapper():
    """A network whose parts are called `model` and `head` keeps its names."""
    state = {"model.conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert unwrapped(state).keys() == state.keys()
    assert unwrapped({"model.net.w": torch.ones(1)}).keys() == {"w"}
    assert unwrapped({}) == {}


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {1: torch.ones(2)}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(InputError, match=r"holds no weights: got a \w+, expected a state dict"):
        read_weight_file(tmp_path / "empty.pth")


def test_tensors_that_show_more_than_the_file_stores_count_in_full(tmp_path, monkeypatch):
    """A few bytes can be shown as a large tensor: what is bounded is what the weights would take."""
    torch.save({"w": torch.zeros(1).expand(50_000)}, tmp_path / "thin.pth")
    assert read_weight_file(tmp_path / "thin.pth").state["w"].nbytes == 200_000
    monkeypatch.setattr("labeler.base.weight_files.MAX_BYTES", 100_000)
    with pytest.raises(InputError, match=r"too large: got 200,000 bytes of weights, expected at most 100,000"):
        read_weight_file(tmp_path / "thin.pth")
