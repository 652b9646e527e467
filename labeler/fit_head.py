"""`fit_head`: a linear head for the images' own classes, fitted to a frozen network and kept with the store.

Legend: N images, C classes, D feature width.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labeler.base.cores import usable_cores
from labeler.base.errors import MismatchError, TeacherError
from labeler.base.whole_files import publish_exclusively, replace_file
from labeler.config import LabelerConfig
from labeler.sources.class_sample import choose_images, own_classes, split
from labeler.sources.image_source import ImageSource
from labeler.store.plan import HEAD_FILE, Plan, plain
from labeler.store.shard_markers import check_head
from labeler.store.shard_writer import folder_error, open_folder

if TYPE_CHECKING:
    from torch import Tensor

    from labeler.teacher.create_teacher import LoadedTeacher
    from labeler.teacher.linear_head import HeadFit, LinearHead

WAY_FROM_CHANCE = 0.2  # of the lowest accuracy that is accepted, unless a setting says another
DEVIATIONS = 2  # standard errors by which the accuracy must be above chance


def with_head(
    config: LabelerConfig, images: ImageSource, store: Path, device: str, begun: Plan | None
) -> tuple[LabelerConfig, HeadFit | None]:
    """Fits the head of a run, or finds the one that is kept with its store.

    Args:
        config: Settings of the run.
        images: All images.
        store: The store's folder.
        device: Device of the network.
        begun: The store's plan, if it has one.

    Returns:
        (settings whose teacher has the head, how well it does); the settings as they were and None without `fit_head`.

    Raises:
        InputError: There are too few images or folders to fit a head.
        TeacherError: A linear head cannot be the network's classifier, or it is less accurate than is accepted.
        MismatchError: The store was begun with other settings.
        IntegrityError: The head of the store is not as it was.
    """
    if begun is not None and config.fit_head != (begun.head is not None):
        raise MismatchError(
            f"the store {str(store)!r} was begun with another head",
            got="`fit_head`" if config.fit_head else "the teacher's own head",
            expected="`fit_head`, and the head that is kept with the store" if begun.head else "the teacher's own head",
            remedy="Use the settings that it was begun with, or another `store`.",
        )
    if not config.fit_head:
        return config, None
    path = (store / HEAD_FILE).absolute()
    if begun is not None:
        fit = _kept(path, begun, config.head_images)
    else:
        fit = _fitted(path, config, images, device)
        _tell(fit, config)
        _refuse_inaccurate(fit, config)
    return replace(config, teacher=replace(config.teacher, head=str(path))), fit


def _kept(path: Path, begun: Plan, most_images: int) -> HeadFit:
    """Returns how well the head does that the store was begun with."""
    from labeler.teacher.linear_head import read_head

    check_head(path.parent, begun)
    head, _ = read_head(path)
    if head.fitted_with["most_images"] != most_images:
        raise MismatchError(
            "the head of the store was fitted on another number of images", got=f"`head_images={most_images}`",
            expected=head.fitted_with["most_images"],
            remedy="Use the settings that the store was begun with, or another `store`.",
        )  # fmt: skip
    return head.fit


def _fitted(path: Path, config: LabelerConfig, images: ImageSource, device: str) -> HeadFit:
    """Returns how well the head does that an earlier run left in the folder, or that is fitted now and kept there."""
    import torch

    from labeler.teacher.create_teacher import create_frozen
    from labeler.teacher.linear_head import read_head

    open_folder(path.parent, keep_head=True)
    classes = own_classes(images)
    chosen = choose_images(images, classes, config.head_images)
    torch.set_num_threads(config.threads or usable_cores())
    network = create_frozen(config.teacher, device)
    fitted_with = _settings(network, config, images)
    left = read_head(path)[0] if path.exists() else None
    if left is not None and (left.features_sha256, left.fitted_with) == (network.info.weights_sha256, fitted_with):
        return left.fit
    head = fit_head(network, config, images, classes, chosen)
    try:
        # Of two runs that start together, the head of the first is the head of both.
        if left is not None:
            replace_file(path, head.to_bytes())
        else:
            publish_exclusively(path, head.to_bytes())
    except OSError as error:
        raise folder_error(path.parent, error) from None
    return read_head(path)[0].fit


def _settings(network: LoadedTeacher, config: LabelerConfig, images: ImageSource) -> dict[str, Any]:
    """Returns what decides a head's values beside the network's weights, as JSON gives it back."""
    info = network.info
    return {
        "dataset_fingerprint": images.fingerprint,
        "most_images": config.head_images,
        "input_size": info.input_size,
        "mean": plain(info.mean),
        "std": plain(info.std),
        "interpolation": info.interpolation,
        "autocast": info.autocast,
        "view": config.teacher.view,
        "orientation": config.orientation,
        "min_side": config.min_side,
        "max_pixels": config.max_pixels,
    }


def fit_head(
    network: LoadedTeacher, config: LabelerConfig, images: ImageSource, classes: tuple[str, ...], chosen: dict[int, int]
) -> LinearHead:
    """Computes the features of the chosen images, fits a head to four fifths of each class, and tests it on the rest.

    Args:
        network: What gives features [B, D, 1, 1].
        config: Settings of the run.
        images: All images.
        classes: Names of the classes.
        chosen: Position of an image -> class id.

    Returns:
        The head.

    Raises:
        InputError: Fewer than two images of a class can be read.
    """
    import torch

    from labeler.teacher.fit_linear import fit_linear
    from labeler.teacher.linear_head import HeadFit, LinearHead

    features, read = features_of(network, config, images, sorted(chosen))
    rows = {position: row for row, position in enumerate(read)}
    fitted, held = split([position for position in chosen if position in rows], chosen, classes)
    ids = {name: torch.tensor([chosen[i] for i in some]) for name, some in (("fitted", fitted), ("held", held))}
    x, held_x = features[[rows[i] for i in fitted]], features[[rows[i] for i in held]]
    fit = fit_linear(x, ids["fitted"], held_x, ids["held"], len(classes))
    result = HeadFit(
        accuracy=fit.accuracy,
        standard_error=math.sqrt(fit.accuracy * (1 - fit.accuracy) / len(held)),
        chance=int(torch.bincount(ids["held"]).max()) / len(held),
        held_out=len(held),
        fitted=len(fitted),
        skipped=len(chosen) - len(read),
        cross_entropy=fit.cross_entropy,
        l2=fit.l2,
    )
    fitted_with = _settings(network, config, images)
    return LinearHead(fit.weight, fit.bias, classes, network.info.weights_sha256, fitted_with, result)


def features_of(
    network: LoadedTeacher, config: LabelerConfig, images: ImageSource, positions: list[int]
) -> tuple[Tensor, list[int]]:
    """Computes the features of images, without those that cannot be read.

    Returns:
        (float32 features [N, D] on the CPU, the positions of the N images).
    """
    import torch
    from tqdm import tqdm

    from labeler.worker import ShardTask, decoder_for, load_batches

    task = ShardTask(0, images.part(positions), (-1,) * len(positions))
    decoder = decoder_for(network, config, str(network.device), config.threads or usable_cores())
    features = torch.empty(len(positions), network.info.num_classes)
    read: list[int] = []
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(positions), unit="img", desc="features", disable=not config.progress, mininterval=interval
    ) as bar:
        for batch in load_batches(task, decoder, config.batch_size, config.min_side, config.max_pixels):
            if batch.positions:
                some = network.label(batch.decoded.pixels).flatten(1).cpu()
                finite = some.isfinite().all(1)
                kept = np.array(batch.positions)[finite.numpy()].tolist()
                features[len(read) : len(read) + len(kept)] = some[finite]
                read += [positions[index] for index in kept]
            bar.update(len(batch.positions) + len(batch.failures))
    return features[: len(read)], read


def lowest_accuracy(fit: HeadFit) -> float:
    """Returns the lowest accuracy that is accepted by default.

    A fifth of the way from chance to 1: labels below it say little that an image's class does not. And two standard
    errors of guessing above chance: with few held-out images a useless head can be right often by luck.
    """
    luck = math.sqrt(fit.chance * (1 - fit.chance) / fit.held_out)
    return max(fit.chance + WAY_FROM_CHANCE * (1 - fit.chance), fit.chance + DEVIATIONS * luck)


def _refuse_inaccurate(fit: HeadFit, config: LabelerConfig) -> None:
    """Raises TeacherError if the accuracy is lower than is accepted."""
    lowest = lowest_accuracy(fit) if config.head_accuracy is None else config.head_accuracy
    if fit.accuracy < lowest:
        raise TeacherError(
            f"the head fitted to the features of {config.teacher.name} is not accurate enough to label with",
            got=f"{fit.accuracy:.1%} ± {fit.standard_error:.1%} of {fit.held_out:,} held-out images right",
            expected=f"at least {lowest:.1%} (chance is {fit.chance:.1%})",
            remedy="Choose another teacher, a larger `input_size` or more images; or accept this head, which is kept, "
            f"with `head_accuracy={math.floor(1000 * fit.accuracy) / 1000:g}`.",
        )  # fmt: skip


def _tell(fit: HeadFit, config: LabelerConfig) -> None:
    """Prints how well the head does, before the labeling that may take hours."""
    if config.progress:
        print(fit.text(), file=sys.stderr, flush=True)
