"""The card that goes with a store: a README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from labeler.store.plan import Plan
from labeler.store.shard_markers import Marker

SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)  # fmt: skip

CARD_TEXT = """\
---
pretty_name: {title}
task_categories:
- image-classification
tags:
- token-labeling
- knowledge-distillation
- dense-labels
size_categories:
- {size}
viewer: false
# license: choose one, see https://huggingface.co/docs/hub/repositories-licenses
---

# {heading}

For each image, the classes that a teacher network sees, and where: a map of class scores that a training run crops
together with the image. The images are not in here; each row has its image's name, size and digest.

| | |
|---|---|
{table}

## Read it

```python
from labeler import LabelStore  # pip install token-labeling

with LabelStore({url}) as store:
    maps = store.read([0, 1])  # or store.read([store.row_of("folder/name.jpg")])
    print(store.keys[:2], maps.dense().shape)  # probabilities [N, C, H, W]
```

`token-labeling pull {shell_url} labels` fetches the whole store, with every digest checked, and
`token-labeling verify labels --images IMAGES` compares it with the images. It is plain HDF5: `labels.h5` is a view over
all shards.

## Licence

Not chosen yet: add `license:` to the head of this file, and say here what may be done with these labels. The images and
the teacher's weights have licences of their own.
"""


def card_of(plan: Plan, markers: Sequence[Marker], url: str) -> str:
    """Returns the card of a store.

    Args:
        plan: The store's plan.
        markers: The markers of all shards.
        url: Where the store lies, for the text.

    Returns:
        Markdown with YAML front matter; the licence is left to the user.
    """
    meta = plan.meta
    rows, size = sum(marker.rows for marker in markers), sum(marker.size for marker in markers)
    teacher = _plain(meta.teacher.get("name", "unknown"))
    title = f"Token labels of {rows:,} images by {teacher}"
    kl = sum(marker.stats.get("kl", 0.0) for marker in markers) / max(1, rows)
    lines = {
        "images": f"{rows:,} with labels, {meta.num_images - rows:,} that could not be labeled",
        "classes": f"{meta.num_classes:,}",
        "teacher": f"`{teacher}`",
        "its weights": f"sha256 `{_plain(meta.teacher.get('weights_sha256', 'unknown'))}`",
        "its input": f"{_plain(meta.teacher.get('input_size', 'unknown'))} pixels",
        "maps": f"{meta.grid[0]}×{meta.grid[1]} cells; {meta.palette} classes with a plane and {meta.tail} in a tail",
        "scores": f"{meta.score_kind}, {meta.precision}; KL from the teacher {kl:.4f} nats",
        "size": f"{size:,} bytes in {len(markers)} shards, {size / max(1, rows):,.0f} bytes per image",
        "fingerprint of the images": f"`{_plain(meta.dataset_fingerprint)}`",
        "format": f"{_plain(meta.format)} {_plain(meta.format_version)}, by {_plain(meta.writer)}",
    }
    return CARD_TEXT.format(
        title=json.dumps(title),
        size=next((name for limit, name in SIZES if rows < limit), "n>100M"),
        heading=title,
        table="\n".join(f"| {name} | {value} |" for name, value in lines.items()),
        url=json.dumps(url),
        shell_url=_plain(url),
    )


def _plain(value: Any) -> str:
    """Returns a text from a store without what Markdown, or a table in it, would read as more than text."""
    return "".join(c for c in str(value) if c.isprintable() and c not in "`|<>[]{}$\\!*#")[:200]
