"""`create_loader`: images and label maps, cropped together, as batches that can be resumed anywhere.

Legend: B images; S input side; h×w token grid, T = h·w.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from labeler import __version__
from labeler.errors import InputError, MismatchError
from labeler.plan import plain
from pipeline.ahead import Ahead
from pipeline.augment_policy import Policy, create_policies
from pipeline.backend import LoaderBackend, Prepared
from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from pipeline.draws import draw_batch
from pipeline.erasing import erase
from pipeline.label_rows import LabelRows
from pipeline.mix import mix_pixels
from pipeline.order import EpochOrder
from pipeline.samples import open_samples
from pipeline.targets import TokenTargets, label_targets

log = logging.getLogger("pipeline")

# Settings that change how fast batches come, or where from, but not what is in them; `fingerprint` has their content.
NOT_IN_STATE = frozenset(
    {
        "images", "store", "image_list", "class_folders", "rank", "device", "threads", "cache", "prefetch",
        "hw_decoder_load", "progress",
    }
)  # fmt: skip


def create_loader(config: LoaderConfig) -> TokenLabelLoader:
    """The loader of a configuration.

    Raises InputError, MismatchError or IntegrityError where images, labels and settings do not fit together.
    """
    return TokenLabelLoader(config)


class TokenLabelLoader:
    """Iterates over the batches of one epoch; the next iteration is the next epoch.

    An iteration that is left early and begun again begins its epoch again. `state_dict()` tells the place after the
    batch that came last; a loader that loads it, in any process, yields the remaining batches bit for bit.
    """

    def __init__(self, config: LoaderConfig, policies: tuple[Policy, ...] | None = None) -> None:
        """`policies` take the place of those that the configuration names."""
        self.config = config
        self.device = _device(config.device)
        self.threads = config.threads or max(1, _cores() // config.world_size)
        if policies is None:
            policies = create_policies(config.auto_augment, config.color_jitter) if config.train else ()
        self.policies = policies
        self.samples = open_samples(config)
        self.num_classes = self.samples.num_classes
        groups = self.samples.source.groups
        self.order = EpochOrder(
            len(self.samples),
            config.batch_size,
            config.rank,
            config.world_size,
            config.train,
            config.seed,
            None if groups is None else groups[self.samples.positions],
            config.shuffle_window,
        )
        if config.train and not len(self.order):
            raise InputError(
                "there are fewer images than one batch of all ranks",
                got=f"{len(self.samples)} images",
                expected=f"{self.order.step} or more",
                remedy="Use a smaller batch.",
            )
        self.rows = None
        if self.samples.store is not None and config.token_labels:
            self.rows = LabelRows(self.samples.store, self.device)
        # Its own stream: copies and small waits of the next batch do not queue behind the training step.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.backend = _create_backend(config, self.samples.orientation, bool(self.policies), self.device, self.threads)
        self.epoch = 0
        self._batch = 0  # of the epoch, the next to come
        self._resume_at = 0

    def __len__(self) -> int:
        """Batches in an epoch of this rank."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        start, self._resume_at = self._resume_at, 0
        if start >= len(self) > 0:
            self.epoch, start = self.epoch + 1, 0
        self._batch = start
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = Ahead(self._prepare(self.epoch, start, pool), self.config.prefetch)
            try:
                shown = self.backend.images(ahead)
                while True:
                    with self._on_own_stream():
                        item = next(shown, None)
                        if item is None:
                            break
                        batch = self._finish(*item)
                    self._hand_over(batch)
                    self._batch += 1
                    yield batch
            finally:
                ahead.close()
        self.epoch, self._batch = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its first batch."""
        self.epoch, self._batch, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers and texts, equal on all ranks."""
        return {"epoch": self.epoch, "batch": self._batch, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that `state` was taken at. Raises MismatchError where it belongs to another loader."""
        try:
            epoch, batch, settings = int(state["epoch"]), int(state["batch"]), dict(state["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("this is not the state of a loader", got=f"{type(error).__name__}: {error}") from None
        ours = self._settings()
        different = [name for name in {**ours, **settings} if plain(ours.get(name)) != plain(settings.get(name))]
        if different:
            raise MismatchError(
                "the saved state belongs to another loader",
                got=", ".join(f"{name} {_short(settings.get(name))}" for name in different),
                expected=", ".join(f"{name} {_short(ours.get(name))}" for name in different),
                remedy="Resume with the images, labels and settings that it was saved with.",
            )
        if not (epoch >= 0 and 0 <= batch <= len(self)):
            raise InputError(
                "the saved state has no such place", got=f"batch {batch}, epoch {epoch}", expected=f"0 to {len(self)}"
            )
        self.epoch, self._batch, self._resume_at = epoch, batch, batch

    def _settings(self) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(self.config).items() if name not in NOT_IN_STATE}
        where = {"backend": self.backend.name, "device": self.device.type, "version": __version__}
        return {**kept, **where, "policies": repr(self.policies), "fingerprint": self.samples.fingerprint}

    def _prepare(self, epoch: int, start: int, pool: ThreadPoolExecutor) -> Iterator[Prepared]:
        order = self.order.epoch(epoch)
        for batch in range(start, len(self)):
            chosen = self.order.batch(order, batch)
            parts = np.array_split(chosen, min(self.threads, len(chosen)))
            reading = [pool.submit(self._read, part.tolist()) for part in parts]
            draws = draw_batch(self.config, self.policies, self.samples.sizes[chosen], epoch, batch)
            rows = self.rows.read(self.samples.rows[chosen]) if self.rows else None
            keys = tuple(map(self.samples.key, chosen.tolist()))
            encoded = [data for part in reading for data in part.result()]
            yield Prepared(chosen, keys, encoded, draws, rows)

    def _on_own_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, batch: Batch) -> None:
        """Let the stream of the caller wait for the batch, and the allocator know who uses it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in (batch.images, batch.labels, *vars(batch.targets).values()):
                tensor.record_stream(current)

    def _read(self, samples: list[int]) -> list[bytes]:
        return [self.samples.read(sample) for sample in samples]

    def _finish(self, prepared: Prepared, images: torch.Tensor) -> Batch:
        """Erase and mix; crop the labels."""
        config, draws = self.config, prepared.draws
        if draws.erased.any():
            generator = torch.Generator(self.device).manual_seed(draws.noise_seed)
            images = erase(images, draws.erased, config.erase_mode, generator)
        mixed_pixels = draws.mix is not None and config.mix == "image"
        if draws.mix is not None and mixed_pixels:
            images = mix_pixels(images, draws.mix, config.patch)
        labels = torch.from_numpy(self.samples.labels[prepared.samples]).to(self.device)
        rows = self.samples.rows[prepared.samples]
        targets = self._targets(prepared, labels)
        return Batch(images, targets, labels, draws.mix, prepared.keys, rows, draws.views, mixed_pixels)

    def _targets(self, prepared: Prepared, labels: torch.Tensor) -> TokenTargets:
        if self.rows is None or prepared.rows is None:
            return label_targets(labels, self.config.grid[0] * self.config.grid[1])
        return self.backend.targets(self.rows.decode(prepared.rows), prepared.draws)


def _create_backend(
    config: LoaderConfig, orientation: str, augments: bool, device: torch.device, threads: int
) -> LoaderBackend:
    name = config.backend
    if name == "auto":
        has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
        name = "dali" if has_dali else "reference"
    if name == "reference":
        from pipeline.reference_loader import ReferenceBackend

        return ReferenceBackend(config, orientation, augments, device, threads)
    try:
        from pipeline.dali_loader import DaliBackend
    except ImportError as error:
        raise InputError(
            "DALI cannot be imported", got=str(error), remedy='Install it, or use backend="reference".'
        ) from None
    return DaliBackend(config, orientation, augments, device, threads)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU for torch here", got=f"device {name!r}", remedy='Use device="cpu".')
    return device


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
