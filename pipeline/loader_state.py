"""Whether a saved position of a loader belongs to a loader: the settings of both are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labeler.base.errors import MismatchError
from labeler.base.settings import settings_of
from labeler.store.plan import plain
from pipeline.config import LoaderConfig


def refuse_other_settings(
    ours: Mapping[str, Any], saved: Mapping[str, Any], images: int, saved_images: int | None
) -> None:
    """Compares a loader's settings with those of a saved position.

    Args:
        ours: Settings of the loader that affect its batches.
        saved: The same of the one that was saved. A setting that it lacks is newer than it, and counts as its default.
        images: Images of the loader.
        saved_images: Images of the one that was saved; None if that is not known.

    Raises:
        MismatchError: They would yield other batches.
    """
    saved = {one.name: one.default for one in settings_of(LoaderConfig) if one.name in ours} | dict(saved)
    different = [name for name in {**ours, **saved} if plain(ours.get(name)) != plain(saved.get(name))]
    if _images_per_step(ours) == _images_per_step(saved):  # of all ranks: the order is the same
        different = [name for name in different if name not in ("batch_size", "world_size")]
    if different:
        raise MismatchError(
            "the saved state belongs to another loader",
            got=_settings_text(saved, different, saved_images),
            expected=_settings_text(ours, different, images),
            remedy="Resume with the images, labels and settings that it was saved with.",
        )


def _images_per_step(settings: Mapping[str, Any]) -> Any:
    """Returns the images of all ranks in one step; None if the settings are damaged."""
    of_rank, ranks = settings.get("batch_size"), settings.get("world_size")
    return of_rank * ranks if isinstance(of_rank, int) and isinstance(ranks, int) else None


def _settings_text(settings: Mapping[str, Any], names: Sequence[str], images: int | None) -> str:
    """Describes settings by name; `images`: adds the number of images to their fingerprint."""
    parts = [f"{name} {_short(settings.get(name))}" for name in names]
    if "fingerprint" in names and images is not None:
        parts[names.index("fingerprint")] += f" of {images:,} images"
    return ", ".join(parts)


def _short(value: Any) -> str:
    """Returns a value as text, cut to a few characters."""
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
