"""A recipe's loaders: training batches on the network's token grid, and evaluation images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from labeler.base.errors import InputError, IntegrityError
from labeler.sources.class_names import with_the_rest_of_imagenet
from model.token_heads import TokenLabelHeads
from pipeline import LoaderConfig, TokenLabelLoader, create_loader
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.targets.mask_files import MaskFolder
from train.optimization import refuse_too_few_steps
from train.ranks.distributed import Ranks
from train.recipes.config import TrainConfig
from train.segmentation.evaluate import MaskedImages, Window


def training_loader(
    config: TrainConfig, net: TokenLabelHeads, ranks: Ranks, classes: str | None = None
) -> TokenLabelLoader:
    """Create the loader of training batches.

    Args:
        config: the recipe.
        net: the network, for its token grid.
        ranks: the ranks that train together.
        classes: "teacher" or "images", as a checkpoint records it; None: as the recipe says.

    Returns:
        The loader of this rank's part of each batch.

    Raises:
        InputError: images, labels or settings cannot be used.
        MismatchError: images, labels and network do not fit each other.
        IntegrityError: the label store is damaged.
    """
    augment, data = config.augment, config.data

    def check(epoch_steps: int) -> None:
        refuse_too_few_steps(config.schedule, epoch_steps)

    mean, std = _color_stats(config, net)
    return create_loader(
        LoaderConfig(
            images=data.images,
            store=data.store,
            token_labels=data.token_labels,
            image_list=data.image_list,
            classes="none" if config.segments else classes or data.classes,
            num_classes=config.model.num_classes,
            batch_size=images_per_rank(config, ranks.world_size),
            image_size=config.model.img_size,
            grid=_grid(net),
            seed=config.run.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            mix="none" if config.segments else _mix(augment.mix, net),
            masks=config.segmentation.masks if config.segments else None,
            ignore_index=config.segmentation.ignore_index,
            mean=mean,
            std=std,
            device=str(ranks.device),
            threads=data.threads,
            backend=data.backend,
            cache=data.cache,
            prefetch=data.prefetch,
            progress=ranks.first and config.run.progress,
            **augment.model_dump(exclude={"mix", "mean", "std", "crop_pct", "crop_mode"}),
        ),
        check,
    )


def images_per_rank(config: TrainConfig, ranks: int) -> int:
    """Images of one rank per step. Raises InputError if the batch does not divide among the ranks."""
    share, rest = divmod(config.run.batch_size, ranks)
    if rest:
        raise InputError(
            "run.batch_size does not divide among the ranks", got=f"{config.run.batch_size} on {ranks}",
            remedy=f"Use {share * ranks or ranks}, or another number of ranks.",
        )  # fmt: skip
    return share


def validation_loader(
    config: TrainConfig, net: TokenLabelHeads, ranks: Ranks, training: TokenLabelLoader, folders: Mapping[str, int]
) -> TokenLabelLoader | MaskedImages | None:
    """Create the loader of the images of `data.validation`; of a segmentation run, its images and masks.

    Args:
        config: the recipe.
        net: the network, for its token grid.
        ranks: the ranks that train together.
        training: the loader of training batches.
        folders: folder or label -> class id, as in training.

    Returns:
        The loader; None: the recipe has no validation images.

    Raises:
        InputError: the images cannot be used.
    """
    if config.data.validation is None:
        return None
    if config.segments:
        return masked_images(config, transform_of(config, net, training.samples.orientation))
    with blamed_on("data.validation"):
        return evaluation_loader(
            config.data.validation,
            image_size=config.model.img_size,
            grid=_grid(net),
            num_classes=training.num_classes,
            class_folders=folders or None,
            transform=transform_of(config, net, training.samples.orientation),
            ranks=ranks,
            batch_size=config.run.micro_batch or training.config.batch_size,
            backend=config.data.backend,
            threads=config.data.threads,
            progress=training.config.progress,
        )


def masked_images(config: TrainConfig, transform: Mapping[str, Any]) -> MaskedImages:
    """The validation images of a segmentation run with their masks. Raises InputError if one has no mask."""
    settings, images = config.segmentation, config.data.validation
    assert images is not None
    assert settings.validation_masks is not None
    assert config.model.num_classes is not None
    window = Window(config.model.img_size, settings.evaluation == "sliding", settings.window_step)
    with blamed_on("data.validation"):
        masks = MaskFolder(settings.validation_masks, config.model.num_classes, settings.ignore_index)
        return MaskedImages(images, masks, transform, window)


@contextmanager
def blamed_on(setting: str) -> Iterator[None]:
    """Add the name of a setting to errors of images and stores."""
    try:
        yield
    except (InputError, IntegrityError) as error:
        problem = f"{setting}: {error.problem}"
        raise type(error)(problem, got=error.got, expected=error.expected, remedy=error.remedy) from None


def evaluation_loader(
    images: str,
    *,
    image_size: int,
    grid: tuple[int, int],
    num_classes: int,
    class_folders: Mapping[str, int] | None,
    transform: Mapping[str, Any],
    ranks: Ranks,
    batch_size: int,
    backend: str = "auto",
    threads: int | None = None,
    progress: bool = True,
    classes: str = "teacher",
) -> TokenLabelLoader:
    """Create a loader that yields every image once, resized and cropped as timm does.

    Args:
        images: folder of images, or .tar file.
        image_size: side of the square input in pixels.
        grid: h, w of the token grid.
        num_classes: number of classes.
        class_folders: folder or label -> class id, as in training; if they are ImageNet's, its other folders are known
            too. None: all folders, sorted.
        transform: from `transform_of`.
        ranks: the ranks that share the images.
        batch_size: images of one rank at a time.
        backend: as in `pipeline.LoaderConfig`, as for the arguments below.
        threads: CPU threads that decode.
        progress: show progress.
        classes: "none": any images, whose classes are not known.

    Returns:
        The loader.

    Raises:
        InputError: the images cannot be used.
    """
    if class_folders is not None:
        class_folders = with_the_rest_of_imagenet(class_folders, num_classes)
    return create_loader(
        LoaderConfig(
            images=images,
            classes=classes,
            token_labels=False,
            train=False,
            image_size=image_size,
            grid=grid,
            num_classes=num_classes,
            class_folders=class_folders,
            mean=tuple(transform["mean"]),
            std=tuple(transform["std"]),
            crop_pct=transform["crop_pct"],
            crop_mode=transform["crop_mode"],
            orientation=transform["orientation"],
            batch_size=batch_size,
            interpolation="bicubic",
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=str(ranks.device),
            backend=backend,
            threads=threads,
            progress=progress,
        )
    )


def transform_of(config: TrainConfig, net: TokenLabelHeads, orientation: str) -> dict[str, Any]:
    """The preprocessing of evaluation images.

    Args:
        config: the recipe.
        net: the network, for its usual mean and std.
        orientation: how training images are oriented.

    Returns:
        mean, std, crop_pct, crop_mode and orientation.
    """
    mean, std = _color_stats(config, net)
    crop = {"crop_pct": config.augment.crop_pct, "crop_mode": config.augment.crop_mode}
    return {"mean": list(mean), "std": list(std), "orientation": orientation, **crop}


def class_folders(loader: TokenLabelLoader) -> dict[str, int]:
    """Folder or label -> class id of the training images; empty if they have neither."""
    samples = loader.samples
    if samples.classes.folders:
        return dict(samples.classes.folders)
    keys = map(samples.key, range(len(samples)))
    return {key.split("/", 1)[0]: int(c) for key, c in zip(keys, samples.labels, strict=True) if "/" in key and c >= 0}


def _grid(net: Any) -> tuple[int, int]:
    return int(net.grid[0]), int(net.grid[1])


def _mix(wanted: str, net: Any) -> str:
    """How batches are mixed, as a wrapped backbone may be unable to mix tokens."""
    mixes_tokens = getattr(net, "mix_scale", True) is not None
    if wanted == "token" and not mixes_tokens:
        raise InputError("this model cannot mix tokens", got='augment.mix="token"', expected='"image" or "auto"')
    return ("token" if mixes_tokens else "image") if wanted == "auto" else wanted


def _color_stats(config: TrainConfig, net: Any) -> tuple[Any, Any]:
    """Mean and standard deviation for the normalization of images."""
    usual = getattr(net, "pretrained_cfg", None) or {}
    return (
        config.augment.mean or tuple(usual.get("mean", IMAGENET_MEAN)),
        config.augment.std or tuple(usual.get("std", IMAGENET_STD)),
    )
