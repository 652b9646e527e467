"""Token targets against the published code's numbers, and their axis order, which the published code has wrong.

Legend: B images; C classes; P palette size; H×W map grid; h×w token grid, T = h·w.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures import SOURCES, about, close, tensors
from torchvision.ops import roi_align

from labeler.store.score_maps import ScoreMaps
from pipeline.targets.crop_score_maps import crop_score_maps

CELLS = 18
TOLERANCE = 5e-6


def cases() -> list[str]:
    """Names of the fixture's tensors; "rounding" holds only for the published code's own order of operations."""
    return [name for name, case in about("token_targets")["cases"].items() if case["group"] != "rounding"]


def to_palette(raw: torch.Tensor, num_classes: int) -> ScoreMaps:
    """Maps [B, 2, 5, H, W] of the five best scores and their classes in each cell; all other scores are 0."""
    scores, ids = raw[:, 0].float(), raw[:, 1].long()
    found = [torch.unique(image) for image in ids]
    places = max(len(classes) for classes in found)
    classes = torch.full((len(raw), places), -1)
    planes = torch.zeros(len(raw), places, *raw.shape[3:])
    for b, image in enumerate(found):
        classes[b, : len(image)] = image
        planes[b, : len(image)] = ((ids[b] == image[:, None, None, None]) * scores[b]).sum(1)
    region = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(raw), 1)
    return ScoreMaps(classes, planes, torch.zeros(len(raw), *raw.shape[3:]), region, num_classes)


def published_boxes(coords: torch.Tensor) -> torch.Tensor:
    """Boxes that make the product show what the published code shows for coords [B, 4] (top, left, height, width).

    It takes (top, left) for (x, y), and a crop smaller than a map cell for a whole cell. The boxes are float32 as its
    own: a softmax over 1000 float32 scores shows more of a score's last bit than the tolerance allows.
    """
    top, left, height, width = coords.unbind(1)
    bottom, right = top + height.clamp(min=1 / CELLS), left + width.clamp(min=1 / CELLS)
    return torch.stack([left, top, right, bottom], 1)


def smoothed(p: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Class probabilities p [B, C, K] as the published code smooths them: they no longer add up to one."""
    off = smoothing / p.shape[1]
    return p * (1 - smoothing + off) + off


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("source", SOURCES)
def test_targets_are_the_published_codes_targets(name: str, source: str):
    case, published = about("token_targets", source)["cases"][name], tensors("token_targets", source)
    group, num_classes, grid = case["group"], case["num_classes"], (case["label_size"],) * 2
    smoothing, lam = case["smoothing"], case["lam"]
    maps = to_palette(published[f"in.{group}.maps"], num_classes)
    found = crop_score_maps(maps, published_boxes(published[f"in.{group}.coords"]), grid)
    assert found.token_scores.dtype == torch.float32

    off = smoothing / num_classes
    truth = torch.eye(num_classes)[published[f"in.{group}.gt"]] * (1 - smoothing) + off
    parts = [truth[..., None], smoothed(found.dense_cls(num_classes)[..., None], smoothing)]
    if grid != (1, 1):
        parts.append(smoothed(found.dense_tokens(num_classes).mT, smoothing))
    target = torch.cat(parts, 2)
    target = target * lam + target.flip(0) * (1 - lam)

    expected = published[name]
    assert target.shape == expected.shape == torch.Size(case["shape"])
    close(target, expected, 0.0, TOLERANCE)


def test_a_hot_spot_ends_in_the_token_that_shows_it_and_not_where_the_published_code_puts_it():
    published = tensors("token_targets")
    maps = to_palette(published["in.delta.maps"], 10)
    top, left, height, width = published["in.delta.coords"].double().unbind(1)
    box = torch.stack([top, left, top + height, left + width], 1)
    right = crop_score_maps(maps, box, (14, 14)).dense_tokens(10)
    wrong = crop_score_maps(maps, published_boxes(published["in.delta.coords"]), (14, 14)).dense_tokens(10)
    peaks = maps.scores.flatten(1).amax(1)
    shown = 0
    for b, cell in enumerate([(2, 13), (13, 2), (4, 15), (9, 9)]):
        place, *at = (maps.scores[b] == peaks[b]).nonzero()[0].tolist()
        assert tuple(at) == cell
        hot = maps.classes[b, place]
        start, end = box[b, :2], box[b, 2:]
        # Token in which the cell's centre lies, as a fraction of the crop times the tokens.
        token = ((torch.tensor(cell) + 0.5) / CELLS - start) / (end - start) * 14
        if not ((token >= 0) & (token < 14)).all():
            assert right[b, :, hot].max() < 0.2
            continue
        shown += 1
        row, column = token.floor().long().tolist()
        assert right[b, row * 14 + column, hot] > 0.9
        assert wrong[b, :, hot].max() < 0.2
    assert shown == 2


def test_rows_are_rows_and_columns_are_columns_of_a_map_that_is_not_square():
    """Rows 2 to 6 and columns 2 to 9 of 10×20 cells on 5×8 tokens: one cell per token."""
    scores = torch.zeros(1, 1, 10, 20)
    scores[0, 0, 6, 3] = 9.0
    maps = ScoreMaps(torch.tensor([[4]]), scores, torch.zeros(1, 10, 20), torch.tensor([[0.0, 0, 1, 1]]), 6)
    box = torch.tensor([[0.2, 0.1, 0.7, 0.5]], dtype=torch.float64)
    expected = torch.zeros(5, 8)
    expected[4, 1] = 9.0
    torch.testing.assert_close(crop_score_maps(maps, box, (5, 8)).token_scores.view(5, 8), expected)
    swapped = crop_score_maps(maps, box[:, [1, 0, 3, 2]], (5, 8)).token_scores
    assert swapped.abs().max() == 0  # that box shows rows 1 to 4


@pytest.mark.parametrize("cells", [(18, 18), (7, 19), (23, 5)])
@pytest.mark.parametrize("grid", [(14, 14), (1, 1), (3, 8), (9, 2)])
def test_in_float64_targets_are_those_of_torchvisions_roi_align_of_the_dense_map(
    cells: tuple[int, int], grid: tuple[int, int]
):
    n, palette, num_classes = 24, 4, 11
    rng = np.random.default_rng([*cells, *grid])
    classes = torch.from_numpy(np.stack([rng.permutation(num_classes)[:palette] for _ in range(n)]))
    scores, background = (torch.from_numpy(rng.normal(0, 4, (n, *k, *cells))) for k in ((palette,), ()))
    corners = np.sort(rng.random((n, 2, 2)), axis=1)  # start and end of each axis
    corners[0] = [[0, 0], [1, 1]]
    boxes = torch.from_numpy(corners.reshape(n, 4))
    region = torch.tensor([[0.0, 0, 1, 1]]).repeat(n, 1)
    found = crop_score_maps(ScoreMaps(classes, scores, background, region, num_classes), boxes, grid)

    dense = background[:, None].repeat(1, num_classes, 1, 1)
    dense.scatter_(1, classes[:, :, None, None].expand_as(scores), scores)
    side = torch.tensor([*cells, *cells])
    rois = torch.cat([torch.arange(n)[:, None], (boxes * side)[:, [1, 0, 3, 2]]], 1)
    tokens = roi_align(dense, rois, grid, aligned=True).flatten(2).softmax(1).mT
    whole = roi_align(dense, rois, 1, aligned=True).flatten(1).softmax(1)
    assert found.token_scores.dtype == torch.float64
    torch.testing.assert_close(found.dense_tokens(num_classes), tokens, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.dense_cls(num_classes), whole, rtol=0, atol=1e-12)
