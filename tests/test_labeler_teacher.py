"""The teacher: names, weights, preprocessing, flips, and files that want to run code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from labeler.base.errors import InputError, MismatchError, TeacherError
from labeler.base.runtime import pick_device, pick_precision
from labeler.config import LabelerConfig
from labeler.make_plan import make_plan
from labeler.run import _with_autocast
from labeler.sources.folder_source import find_images
from labeler.store.score_code import Encoding
from labeler.teacher import weights as checkpoints
from labeler.teacher.create_teacher import LoadedTeacher, create_teacher
from labeler.teacher.teacher_config import TeacherConfig
from labeler.teacher.weights import weights_sha256
from labeler.worker import LabelingJob, ShardLabeler


def random_teacher(name: str = "test_resnet", **settings: Any) -> LoadedTeacher:
    return create_teacher(TeacherConfig(name, random_weights=True, **{"input_size": 64, **settings}))


def refusal(name: str = "test_resnet", device: str = "cpu", **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        create_teacher(TeacherConfig(name, **settings), device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(size: int = 64, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def trained() -> nn.Module:
    """A network with five classes and weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return timm.create_model("test_resnet", num_classes=5)


def test_info_is_complete_and_plain() -> None:
    info = random_teacher("timm:test_resnet", num_classes=5, flip=True).info
    read = json.loads(json.dumps(dataclasses.asdict(info)))
    assert (read["name"], read["num_classes"], read["input_size"], read["grid"]) == ("timm:test_resnet", 5, 64, [2, 2])
    assert (read["mean"], read["std"]) == ([0.5] * 3, [0.5] * 3)
    assert (read["interpolation"], read["crop_pct"]) == ("bilinear", 0.95)
    assert (read["autocast"], read["flip"]) == ("float32", True)
    assert read["self_test"].startswith("mean of the map equals the model output, max difference")
    assert len(read["weights_sha256"]) == 64


def test_label_normalises_pixels_and_keeps_their_place() -> None:
    teacher = random_teacher(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = pixels().permute(0, 3, 1, 2) / 255
    normalised = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    maps = teacher.label(pixels())
    assert (maps.dtype, maps.shape) == (torch.float32, (2, 1000, 2, 2))
    torch.testing.assert_close(maps, teacher.score_maps(normalised))
    with pytest.raises(TeacherError, match=r"expected uint8 \[B, 64, 64, 3\]"):
        teacher.label(pixels(32))


def test_flip_averages_the_logits_of_both_passes() -> None:
    plain, flipped = random_teacher("test_vit", flip=False), random_teacher("test_vit")  # flipped by default
    images = torch.randn(2, 3, 64, 64)
    mirrored = plain.score_maps(torch.flip(images, [3]))
    expected = (plain.score_maps(images) + torch.flip(mirrored, [3])) / 2
    torch.testing.assert_close(flipped.score_maps(images), expected)
    assert not torch.allclose(expected, plain.score_maps(images), atol=1e-3)
    assert plain.info.weights_sha256 == flipped.info.weights_sha256


def test_a_teacher_in_float32_warns_of_nothing(recwarn) -> None:
    """torch warns where autocast is entered with float32."""
    random_teacher("test_vit").score_maps(torch.zeros(1, 3, 64, 64))
    assert not [str(one.message) for one in recwarn if "autocast" in str(one.message)]


def test_autocast_returns_float32_near_the_exact_scores() -> None:
    exact, rounded = random_teacher("test_vit"), random_teacher("test_vit", autocast="bfloat16")
    assert rounded.info.autocast == "bfloat16"
    maps, reference = rounded.label(pixels()), exact.label(pixels())
    assert maps.dtype == torch.float32
    assert 0 < (maps - reference).abs().max() < 0.1 * reference.abs().max()


V100, T4, A100, H100 = (7, 0), (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("capability", "precision"), zip((V100, T4, A100, H100), ["float16"] * 2 + ["bfloat16"] * 2, strict=True)
)
def test_a_gpu_without_bf16_of_its_own_computes_in_fp16_and_the_plan_says_so(
    monkeypatch, images, capability, precision
):
    """torch calls bf16 supported on all of them: it emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    config = LabelerConfig(TeacherConfig("tiny:colour_teacher"))
    assert pick_precision("auto", torch.device("cuda:0")) == precision
    settled = _with_autocast(config, "cuda:0", elsewhere=False)
    info = create_teacher(settled.teacher, "cpu").info
    plan = make_plan(find_images(images), info, settled, Encoding(), None)
    assert plan.meta.teacher["autocast"] == precision
    for asked in ("float32", "bfloat16", "float16"):  # as it was asked for
        assert pick_precision(asked, torch.device("cuda:0")) == asked
    assert pick_precision("auto", torch.device("cpu")) == "float32"
    assert _with_autocast(config, "cuda", elsewhere=True).teacher.autocast == "bfloat16"  # nobody asked those GPUs


def test_a_worker_whose_gpu_computes_otherwise_than_the_plan_refuses(monkeypatch, images, tmp_path):
    config = LabelerConfig(TeacherConfig("tiny:colour_teacher"))
    settled = _with_autocast(config, "cuda", elsewhere=True)
    plan = make_plan(find_images(images), create_teacher(settled.teacher).info, settled, Encoding(), None)
    monkeypatch.setattr(
        "labeler.teacher.create_teacher.pick_precision",
        lambda choice, device: "float16" if choice == "auto" else choice,
    )
    with pytest.raises(MismatchError, match="another precision than the run: got float16, expected bfloat16"):
        ShardLabeler(LabelingJob(tmp_path, plan, config, "cpu"), 1)


def test_compile_wraps_the_features_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    assert random_teacher(compile=True).info.notes == ()
    assert len(compiled) == 1
    assert "not compiled" in random_teacher("torchvision:resnet18", compile=True).info.notes[0]


# Names and where the preprocessing comes from.


def test_preprocessing_is_the_models_own() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("mobilenetv3_small_050"))
    info = random_teacher("mobilenetv3_small_050", input_size=None).info
    assert (3, info.input_size, info.input_size) == config["input_size"]
    assert (info.mean, info.std, info.crop_pct) == (config["mean"], config["std"], config["crop_pct"])
    assert info.interpolation == config["interpolation"]
    view = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    info = random_teacher("torchvision:mobilenet_v3_small", input_size=None).info
    assert (info.mean, info.std, info.interpolation) == (tuple(view.mean), tuple(view.std), view.interpolation.value)
    assert (info.input_size, info.crop_pct) == (view.crop_size[0], view.crop_size[0] / view.resize_size[0])


def test_input_size_reaches_architectures_that_are_built_for_one() -> None:
    assert random_teacher("deit_tiny_patch16_224", input_size=96).info.grid == (6, 6)
    assert random_teacher("test_resnet", input_size=96).info.grid == (3, 3)


def test_unknown_names_are_answered_with_near_ones() -> None:
    assert "resnet18" in refusal("rsnet18")
    assert "resnet18.a1_in1k" in refusal("resnet18.a1in1k")
    assert "resnet18" in refusal("torchvision:resnt18")
    assert "No module named 'nowhere'" in refusal("nowhere:teacher")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of a user in it."""
    (tmp_path / "my_teachers.py").write_text(
        "from torch import nn\n"
        "def plain():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))\n"
        "def described():\n"
        "    model = plain()\n"
        "    model.default_cfg = dict(input_size=(3, 32, 32), mean=(.1, .2, .3), std=(1, 1, 1), crop_pct=1.0)\n"
        "    return model\n"
        "def broken():\n"
        "    raise ValueError('no such thing\\nand more')\n"
        "def wrong():\n"
        "    return 'a network'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_function_of_the_current_folder_makes_a_teacher() -> None:
    teacher = create_teacher(TeacherConfig("my_teachers:plain"))
    assert (teacher.info.num_classes, teacher.info.input_size, teacher.info.grid) == (6, 224, (28, 28))
    assert "does not define its preprocessing" in teacher.info.notes[0]
    assert teacher.label(pixels(224)).shape == (2, 6, 28, 28)
    described = create_teacher(TeacherConfig("my_teachers:described")).info
    assert (described.input_size, described.mean, described.crop_pct) == (32, (0.1, 0.2, 0.3), 1.0)
    assert described.notes == ()
    assert "ValueError: no such thing" in refusal("my_teachers:broken")
    assert "does not return a network: got str" in refusal("my_teachers:wrong")
    assert "has no attribute 'absent'" in refusal("my_teachers:absent")
    assert "another number of classes: got 6, expected 9" in refusal("my_teachers:plain", num_classes=9)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "the device is not known" in refusal(device="gpu", random_weights=True)
    assert "there is no GPU" in refusal(device=f"cuda:{torch.cuda.device_count()}", random_weights=True)


# Weights.


def test_digest_follows_the_weights_and_nothing_else(trained: nn.Module) -> None:
    before = weights_sha256(trained)
    trained.bn1.num_batches_tracked += 1
    assert weights_sha256(trained.to(memory_format=torch.channels_last)) == before
    trained.bn1.running_mean[0] += 1e-3
    moved = weights_sha256(trained)
    assert moved != before
    with torch.no_grad():
        trained.fc.weight[-1, -1] += 1e-6
    assert weights_sha256(trained) != moved
    assert weights_sha256(nn.Linear(2, 3).half()) != weights_sha256(nn.Linear(2, 3))


@pytest.mark.usefixtures("folder")
def test_random_weights_are_the_same_everywhere_and_leave_the_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    of_timm = random_teacher().info.weights_sha256
    assert torch.equal(torch.rand(3), expected)
    assert random_teacher().info.weights_sha256 == of_timm
    # Another process, which starts in half the time without timm.
    code = (
        "import torch; torch.manual_seed(11)\n"
        "from labeler import TeacherConfig, create_teacher\n"
        "print(create_teacher(TeacherConfig('my_teachers:plain')).info.weights_sha256)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == [create_teacher(TeacherConfig("my_teachers:plain")).info.weights_sha256]


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    return {"epoch": 3, "args": {"lr": 0.1}, "state_dict": wrong, "state_dict_ema": parallel}


@pytest.mark.parametrize("form", ["safetensors", "plain", "model", "wrapped", "compiled"])
def test_forms_of_checkpoints(form: str, trained: nn.Module, tmp_path: Path) -> None:
    state, file = trained.state_dict(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        forms: dict[str, Any] = {
            "plain": state,
            "model": {"model": state, "optimizer": {"step": 1}},
            "wrapped": wrapped(state),
            "compiled": {"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        }
        torch.save(forms[form], file)
    info = create_teacher(TeacherConfig("test_resnet", checkpoint=str(file), input_size=64)).info
    assert info.weights_sha256 == weights_sha256(trained)
    assert info.num_classes == 5


def test_checkpoint_tells_the_classes_of_other_libraries_too(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), file)
    config = TeacherConfig("torchvision:squeezenet1_1", checkpoint=str(file), input_size=64)
    assert create_teacher(config).info.num_classes == 4


@pytest.mark.usefixtures("folder")
def test_checkpoint_for_a_function(tmp_path: Path) -> None:
    create_teacher(TeacherConfig("my_teachers:plain"))
    model = sys.modules["my_teachers"].plain()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    config = TeacherConfig("my_teachers:plain", checkpoint=str(tmp_path / "w.pth"))
    assert create_teacher(config).info.weights_sha256 == weights_sha256(model)


def test_checkpoint_of_another_input_size_is_resampled(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=5).state_dict(), file)
    info = create_teacher(TeacherConfig("deit_tiny_patch16_224", checkpoint=str(file), input_size=96)).info
    assert (info.grid, info.num_classes) == ((6, 6), 5)


def test_checkpoint_that_does_not_fit_is_told_apart(trained: nn.Module, tmp_path: Path) -> None:
    file, state = tmp_path / "w.pth", trained.state_dict()
    del state["conv1.0.weight"]
    state["extra.weight"], state["fc.bias"] = torch.zeros(2), torch.zeros(6)
    torch.save(state, file)
    told = refusal(checkpoint=str(file))
    assert "1 missing (conv1" in told
    assert "1 unknown (extra.weight" in told
    assert "1 of another shape (fc.bias [6] for [5]" in told
    for name, content in (("no", None), ("list", [1, 2]), ("empty", {}), ("counted", {1: torch.zeros(2)})):
        torch.save(content, tmp_path / f"{name}.pth")
        assert "holds no weights" in refusal(checkpoint=str(tmp_path / f"{name}.pth"))
    (tmp_path / "noise.pth").write_bytes(b"\x00\x01 not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    assert "not a file of plain weights" in refusal(checkpoint=str(tmp_path / "noise.pth"))
    assert "not a file of plain weights" in refusal(checkpoint=str(tmp_path / "noise.safetensors"))
    assert "no such checkpoint" in refusal(checkpoint=str(tmp_path / "absent.pth"))


def test_size_of_a_checkpoint_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "w.pth")
    monkeypatch.setattr("labeler.base.weight_files.MAX_BYTES", 10)
    assert "too large" in refusal(checkpoint=str(tmp_path / "w.pth"))


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("form", ["torch", "pickle", "safetensors"])
def test_a_pickle_that_wants_to_run_code_is_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    victim, file = tmp_path / "victim", tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    content = {"state_dict": {"fc.weight": torch.zeros(2)}, "extra": Canary(victim)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file)
    assert "not a file of plain weights" in refusal(checkpoint=str(file))
    assert not victim.exists()
    pickle.loads(pickle.dumps(Canary(victim)))
    assert victim.exists(), "the canary is alive"


def test_fetched_weights_may_not_run_code_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision loads what it fetched with weights_only=False."""
    victim, weights = tmp_path / "victim", torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save({"features": Canary(victim)}, tmp_path / "checkpoints" / Path(weights.url).name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    assert "no pretrained weights for squeezenet1_1" in refusal("torchvision:squeezenet1_1")
    assert not victim.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("the network is unreachable\nreally")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    told = refusal(name)
    assert f"no pretrained weights for {name.split(':')[-1]} could be fetched" in told
    assert told.endswith("Give `checkpoint=FILE`, or `random_weights` to try out the tool.")


def test_pretrained_head_of_another_size_is_refused_before_any_download() -> None:
    assert "got `num_classes=10`, expected 1000" in refusal("resnet18", num_classes=10)
    assert "got `num_classes=10`, expected 1000" in refusal("torchvision:resnet18", num_classes=10)
    assert "published without a classification head" in refusal("vit_small_patch14_dinov2")
