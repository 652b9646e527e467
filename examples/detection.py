"""torchvision's Mask R-CNN on a feature pyramid of this package: one training step, and an evaluation.

python detection.py [NAME [WEIGHTS]]

NAME is a pyramid's name (demansia_pico_sfp, vim_tiny_sfp …), WEIGHTS a checkpoint of its backbone, trained with token
labels. The pictures are drawn: bright rectangles on noise.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import timm
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

import model  # noqa: F401  # registers the pyramids with timm
from model.checkpoints import read_state_dict

SIDE = 128


class Backbone(torch.nn.Module):
    """The four maps of a pyramid and, for large objects, one of stride 64, by name as torchvision wants them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.pyramid = timm.create_model(name, img_size=SIDE)
        self.out_channels = self.pyramid.out_channels

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        maps = self.pyramid(images)
        maps.append(torch.nn.functional.max_pool2d(maps[-1], 1, 2))
        return OrderedDict((str(i), one) for i, one in enumerate(maps))


def detector(name: str, weights: str | None = None) -> MaskRCNN:
    """A detector of one class beside the background, for images whose shorter side is SIDE pixels."""
    backbone = Backbone(name)
    if weights is not None:  # the heads of the trained network have no place here
        backbone.pyramid.backbone.load_state_dict(read_state_dict(weights), strict=False)
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 96, 128)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(backbone, num_classes=2, rpn_anchor_generator=anchors, min_size=SIDE, max_size=2 * SIDE)


def draw(count: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images [3, 128, 160] and their targets."""
    images, targets = [], []
    for i in range(count):
        image, mask = 0.3 * torch.rand(3, SIDE, SIDE + 32), torch.zeros(1, SIDE, SIDE + 32, dtype=torch.uint8)
        y, x = 10 + 7 * i % 40, 20 + 11 * i % 50
        image[:, y : y + 50, x : x + 60] += 0.6
        mask[:, y : y + 50, x : x + 60] = 1
        box = torch.tensor([[x, y, x + 60, y + 50]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask})
    return images, targets


def main() -> None:
    name, weights = (*sys.argv[1:], *("demansia_pico_sfp", None)[len(sys.argv) - 1 :])
    torch.manual_seed(0)
    net = detector(str(name), weights)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    losses = net.train()(*draw(2))
    total = sum(losses.values())
    total.backward()
    optimizer.step()
    print(f"loss {total.item():.3f}: " + ", ".join(f"{key} {value.item():.3f}" for key, value in losses.items()))
    with torch.no_grad():
        found = net.eval()(draw(1)[0])[0]
    print(f"{len(found['boxes'])} objects, masks {tuple(found['masks'].shape)}")


if __name__ == "__main__":
    main()
