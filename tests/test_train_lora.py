"""LoRA through the recipe: layers with adapters, what is trained and kept, resuming, merging, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import outcome, tiny_config, tiny_data

from labeler.base.errors import InputError, IntegrityError
from model import token_label
from train import fit
from train.adapters.lora import add_adapters, target_layers
from train.evaluation.predict import predict
from train.evaluation.validate import load_trained, validate
from train.recipes.config import LoraConfig
from train.recipes.recipe import load_recipe, to_toml
from train.record.adapter_weights import merge_adapters, split_weights
from train.record.checkpoint import check_checkpoint
from train.record.checkpoint_folders import checkpoints

PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
DEMANSIA2 = {**PATCHES, "attention_layers": (1,), "attention_heads": 1, "attention_head_dim": 16, "rotary_dim": 8}
DEMANSIA2 |= {"head_dim": 16, "d_state": 8}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "demansia_tiny": (PATCHES, {"in_proj", "out_proj"}),
    "demansia2_tiny": (DEMANSIA2, {"in_proj", "out_proj", "out_proj_b"}),
    "vim_tiny": (PATCHES, {"in_proj", "out_proj"}),
    "lvvit_t": ({**PATCHES, "num_heads": 2}, {"qkv", "proj"}),
    "mila_nano": ({"img_size": 32, "patch_size": 2}, {"in_proj", "act_proj", "out_proj", "qk"}),
    "mambavision_nano": ({"img_size": 32, "patch_size": 2}, {"in_proj", "out_proj", "qkv", "proj"}),
    "test_vit": ({"img_size": 32}, {"qkv", "proj"}),
}
ALL_OF_MAMBA = ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"]

needs_peft = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("peft"), reason="peft is not installed (the extra lora)"
)


def lora(**values: Any) -> LoraConfig:
    return LoraConfig.model_validate({"rank": 2, **values}, strict=False)


def adapted(name: str, targets: list[str] | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    net = token_label(name, 5, **FAMILIES[name][0])
    add_adapters(net, lora(targets=targets and tuple(targets)), name)
    return net


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    fit(tiny_config(*data, out))
    return out


@pytest.fixture(scope="module")
def run(data, pretrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    fit(lora_config(data, pretrained, out))
    return out


def lora_config(data: tuple[Path, Path], pretrained: Path, out: Path, **changes: Any) -> Any:
    settings = {"model.weights": str(pretrained), "lora.rank": 2, "optimizer.lr": 0.05, "ema.decay": 0.5}
    settings |= {"data.validation": str(data[0]), "run.save_every": 2}
    return tiny_config(*data, out, **{**settings, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_its_projections(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    net.aux_head = getattr(net, "aux_head", None)
    layers = target_layers(net, None, name)
    assert {path.rpartition(".")[2] for path in layers} == FAMILIES[name][1]


@needs_peft
@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_takes_part_and_merges_into_its_weight(name):
    """A mixer that reads a weight without calling its layer would leave the adapter out, in silence."""
    torch.manual_seed(1)
    targets = [*ALL_OF_MAMBA] if name in ("demansia_tiny", "vim_tiny") else None
    net, images = adapted(name, targets), torch.randn(4, 3, 32, 32)
    plain = token_label(name, 5, **FAMILIES[name][0])
    before = merge_adapters(net.state_dict(), 1.0)
    plain.load_state_dict(before)
    assert torch.equal(net.eval()(images), plain.eval()(images)), "adapters begin with no effect"
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if ".lora_B." in path:
                parameter.normal_(std=0.3)
    net.train()
    out = net(images)
    sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    learned = {path: p for path, p in net.named_parameters() if p.requires_grad}
    still = [path for path, p in learned.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still, f"no gradient reaches {still[:3]}"
    assert all(".lora_" in path or "head" in path or ".fc." in path for path in learned)
    assert not [path for path, p in net.named_parameters() if not p.requires_grad and p.grad is not None]
    net.eval()
    plain.load_state_dict(merge_adapters(net.state_dict(), 1.0))
    assert torch.allclose(plain(images), net(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(images), net(images) * 0 + _answer(plain, before, images), atol=1e-3)


def _answer(net: torch.nn.Module, state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    now = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    out = net(images)
    net.load_state_dict(now)
    return out


@needs_peft
def test_merging_is_pefts():
    from peft.tuners.lora import Linear

    net = adapted("demansia_tiny", ALL_OF_MAMBA)
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if ".lora_" in path:
                parameter.normal_()
    ours = merge_adapters(net.state_dict(), 1.0)
    layers = {path: module for path, module in net.named_modules() if isinstance(module, Linear)}
    assert len(layers) == 12
    for path, layer in layers.items():
        layer.merge()
        assert torch.allclose(layer.base_layer.weight, ours[f"{path}.weight"], rtol=1e-5, atol=1e-5), path


@needs_peft
def test_checkpoints_hold_adapters_and_heads_alone(run, pretrained):
    folder = checkpoints(run)[0]
    info = check_checkpoint(folder)
    from safetensors.torch import load_file

    for name in ("weights.safetensors", "ema.safetensors"):
        kept = load_file(folder / name)
        assert all(".lora_" in key or "head." in key for key in kept)
        assert sum(".lora_A." in key for key in kept) == 2  # of one layer
    base = load_file(run / "base.safetensors")
    assert not any("lora" in key or "head" in key for key in base)
    frozen = load_file(checkpoints(pretrained)[0] / "weights.safetensors")
    assert all(torch.equal(frozen[key.replace(".base_layer.", ".")], value) for key, value in base.items())
    assert info.files["weights.safetensors"].size < 0.3 * (run / "base.safetensors").stat().st_size
    state = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    learned = [value for key, value in load_file(folder / "weights.safetensors").items()]
    assert len(state) == len(learned), "frozen weights have no optimizer state"


@needs_peft
def test_a_run_with_adapters_is_used_as_any_other_and_without_peft(run, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in recorded if row["kind"] == "eval"][-1]
    for ema, name in ((False, "top1"), (True, "ema_top1")):
        assert validate(checkpoints(run)[0], data[0], ema=ema, progress=False).top1 == pytest.approx(last[name])
    assert len(list(predict(run, [data[0]], progress=False))) == 12
    trained = load_trained(run)
    assert not any("lora" in key for key in trained.net.state_dict())
    net = timm.create_model(f"local-dir:{run / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(net(images), trained.net(images), atol=1e-6)


@needs_peft
def test_a_later_run_begins_with_the_merged_weights(run, data, tmp_path):
    fit(tiny_config(*data, tmp_path / "later", **{"model.weights": str(run), "schedule.steps": 1}))
    assert load_trained(tmp_path / "later").net.num_classes == 6


@needs_peft
def test_resumes_bit_for_bit(data, pretrained, run, tmp_path):
    cut = tmp_path / "cut"
    fit(lora_config(data, pretrained, cut))
    for folder in [*checkpoints(cut)[:1], *checkpoints(cut, "best")]:
        shutil.rmtree(folder)
    (cut / "summary.json").unlink()
    digest = (cut / "base.safetensors").read_bytes()
    fit(lora_config(data, pretrained, cut), resume="auto")
    assert outcome(cut)["last"] == outcome(run)["last"]
    assert (cut / "base.safetensors").read_bytes() == digest
    moved = tmp_path / "elsewhere"
    fit(lora_config(data, pretrained, moved), resume=checkpoints(run)[1])
    assert outcome(moved)["last"] == outcome(run)["last"]
    assert (moved / "base.safetensors").read_bytes() == digest


@needs_peft
def test_frozen_statistics_stay(data, tmp_path):
    first = tmp_path / "first"
    timm_net = {"model.name": "test_resnet", "model.args": {}, "model.img_size": 64}
    fit(tiny_config(*data, first, **timm_net))
    changes = {**timm_net, "lora.targets": ["conv1"]}
    with pytest.raises(InputError, match="names no linear layer"):
        fit(lora_config(data, first, tmp_path / "second", **changes))
    net = adapted("demansia_tiny")
    _, frozen = split_weights(net, net.state_dict())
    assert any("running_mean" in key for key in frozen)
    from train.network import train_mode
    from train.recipes.config import ModelConfig

    train_mode(net, ModelConfig(name="demansia_tiny"))
    before = {key: value.clone() for key, value in frozen.items()}
    net(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in split_weights(net, net.state_dict())[1].items())


@needs_peft
def test_a_missing_or_damaged_base_is_an_error(run, tmp_path):
    copied = tmp_path / "checkpoints" / "step-00000006"
    shutil.copytree(checkpoints(run)[0], copied)
    with pytest.raises(IntegrityError, match=r"base\.safetensors is missing\. A checkpoint of adapters needs it"):
        load_trained(copied)
    data = bytearray((run / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "base.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"base\.safetensors is damaged"):
        load_trained(copied)


REFUSALS = {
    "no rank 0": (["lora.rank=0"], "lora.rank"),
    "random": (["lora.rank=4"], "set model.weights, or model.args.pretrained=true"),
    "heads": (["lora.rank=4", "model.train=heads", "model.weights=x"], "model.train=heads trains no adapters"),
    "no targets": (["lora.rank=4", "lora.targets=[]"], "lora.targets"),
    "typo": (["lora.ranks=4"], "lora.ranks"),
}


@pytest.mark.parametrize("overrides", REFUSALS)
def test_settings_that_cannot_be_are_refused_by_name(overrides, tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text(to_toml(tiny_config(tmp_path, None, tmp_path / "run")))
    given, text = REFUSALS[overrides]
    with pytest.raises(InputError) as refusal:
        load_recipe(recipe, given)
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


TARGETS = {
    "A_log": "got 'A_log', a parameter, expected one of in_proj, x_proj, dt_proj",
    "conv1d": "got 'conv1d', of type Conv1d",
    "head": "got 'head', a head, which is trained whole",
    "in_prj": "Did you mean 'in_proj'?",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_no_linear_layer_is_refused(target):
    net = token_label("demansia_tiny", 5, **PATCHES)
    with pytest.raises(InputError) as refusal:
        add_adapters(net, lora(targets=(target,)), "demansia_tiny")
    assert TARGETS[target] in str(refusal.value)
    assert all(p.requires_grad for p in net.parameters())


def test_a_network_without_usual_projections_names_its_layers():
    with pytest.raises(InputError, match=r"no usual layers for adapters are known for 'test_resnet'.*Set lora.targets"):
        add_adapters(token_label("test_resnet", 5), lora(), "test_resnet")


def test_without_peft_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    net = token_label("demansia_tiny", 5, **PATCHES)
    with pytest.raises(InputError, match=r"lora.rank needs peft.*pip install 'token-labeling\[lora\]'"):
        add_adapters(net, lora(), "demansia_tiny")
