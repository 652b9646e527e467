"""A timm backbone, trained with token labels in a plain loop.

python train_timm_backbone.py IMAGES STORE [NAME [STEPS]]

NAME is any timm backbone with a feature map (resnet50, convnext_tiny, vit_small_patch16_224 …).
Without them it is a resnet18, for 20 steps.
"""

from __future__ import annotations

import sys

import torch

from labeler import LabelStore
from model import token_label
from pipeline import LoaderConfig, create_loader
from train import TokenLabelLoss

SIZE, BATCH = 128, 4


def main() -> None:
    if len(sys.argv) not in (3, 4, 5):
        raise SystemExit(__doc__)
    images, store, name, steps = (*sys.argv[1:], *("resnet18", "20")[len(sys.argv) - 3 :])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The backbone keeps its class head, and gets one more that answers for each place of its feature map.
    net = token_label(name, num_classes=LabelStore(store).meta.num_classes, img_size=SIZE).to(device)
    config = LoaderConfig(images, store, batch_size=BATCH, image_size=SIZE, grid=net.grid, device=device)
    loader = create_loader(config)
    criterion = TokenLabelLoss(dense_weight=1.0, cls_weight=1.0, smoothing=0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    step = 0
    while step < int(steps):
        for batch in loader:  # one epoch: image and label map are cropped and mirrored together
            loss = criterion(net(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step} loss {loss.item():.4f}")
            if step == int(steps):
                break
    net.eval()  # from here on it gives class logits [B, C] alone, as any classifier
    torch.save(net.state_dict(), "backbone.pt")


if __name__ == "__main__":
    main()
