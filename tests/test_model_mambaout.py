"""timm's MambaOut, each of its five sizes, through `token_label`: Mamba's block without its scan, with token labels.

Legend: B images; C classes; D width of the features; h×w token grid, T = h·w.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from labeler.base.errors import ModelError
from model import token_label
from pipeline.augment.mix import MixBox
from pipeline.batch import Batch
from pipeline.targets.token_targets import TokenTargets
from train.loss.token_label_loss import TokenLabelLoss

PARAMETERS = {  # in millions, as published
    "mambaout_femto": 7.3,
    "mambaout_kobe": 9.1,
    "mambaout_tiny": 26.5,
    "mambaout_small": 48.5,
    "mambaout_base": 84.8,
}
SHALLOW = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def small(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return token_label(name, 7, img_size=64, **{**SHALLOW, **changes})


@pytest.mark.parametrize("name", PARAMETERS)
def test_whole_networks_have_the_published_size_and_a_token_head(name):
    with torch.device("meta"):
        net = token_label(name)
        cls, aux = net.train()(torch.zeros(2, 3, 224, 224))
    assert net.grid == (7, 7)
    assert (cls.shape, aux.shape) == ((2, 1000), (2, 49, 1000))
    own = sum(parameter.numel() for parameter in net.backbone.parameters())
    assert round(own / 1e6, 1) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_step_with_token_labels_reaches_every_parameter(name):
    net = small(name).train()
    random = torch.Generator().manual_seed(2)
    scores = [torch.randn(shape, generator=random) for shape in ((2, 3, 4), (2, 4), (2, 3), (2,))]
    targets = TokenTargets(torch.tensor([[0, 1, 2], [4, 5, 6]]), *scores)
    images = torch.randn(2, 3, 64, 64, generator=random)
    batch = Batch(images, targets, torch.tensor([0, 4]))
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = TokenLabelLoss()(net(images), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("name", PARAMETERS)
def test_evaluation_adds_half_of_the_best_token_on_any_image(name):
    net = small(name).eval()
    for size in ((64, 64), (96, 160)):
        images = torch.randn(2, 3, *size)
        maps = net.score_maps(images)
        assert maps.shape == (2, 7, size[0] // 32, size[1] // 32)
        plain = net.backbone(images)
        torch.testing.assert_close(net(images), plain + 0.5 * maps.amax((2, 3)))


def test_its_stem_is_no_grid_so_pixels_are_mixed_instead():
    net = small("mambaout_femto").train()
    assert net.mix_scale is None
    with pytest.raises(ModelError, match=r'cannot mix tokens of a 2×2 grid: got a mix box.*mix="image"'):
        net(torch.randn(2, 3, 64, 64), MixBox(0, 0, 1, 2, 0.5))
