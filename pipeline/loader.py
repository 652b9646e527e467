"""`create_loader`: batches of images with their label maps, cropped together, resumable at any batch.

Legend: B images; S input side; h×w token grid, T = h·w.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from labeler.base.errors import InputError
from labeler.base.one_thread import one_thread
from labeler.base.runtime import on_device, pick_device, rank_threads
from labeler.base.settings import names_that_affect
from labeler.base.version import __version__
from pipeline.augment.draws import DRAWS_VERSION, Draws, draw_batch
from pipeline.augment.erasing import erase
from pipeline.augment.mix import mix_pixels
from pipeline.augment.policy import Policy, create_policies
from pipeline.backends.backend import Prepared
from pipeline.backends.choose_backend import choose_backend
from pipeline.batch import Batch
from pipeline.config import LoaderConfig
from pipeline.loader_state import refuse_other_settings
from pipeline.order import EpochOrder
from pipeline.prefetcher import Prefetcher
from pipeline.samples import open_samples, scan_sizes
from pipeline.targets.crop_masks import crop_masks
from pipeline.targets.mask_files import MaskFolder, MaskSurvey, survey_masks
from pipeline.targets.row_reader import LabelRowReader
from pipeline.targets.token_targets import TokenTargets, label_targets


def create_loader(config: LoaderConfig, check: Callable[[int], None] | None = None) -> TokenLabelLoader:
    """Creates the loader of a configuration.

    Args:
        config: Settings of the loader.
        check: Called with the number of batches of an epoch, before any image is opened; it may raise an error.

    Returns:
        The loader.

    Raises:
        InputError: A setting or an image source cannot be used.
        MismatchError: Images, labels and settings do not belong together.
        IntegrityError: The store or an image is damaged.
    """
    return TokenLabelLoader(config, check=check)


class TokenLabelLoader:
    """Iterates from its current batch to the end of the epoch; the next iteration is the next epoch.

    In training, a new iteration after one that was left early, or ended by an error, continues with the next batch; an
    evaluation starts again. `state_dict()` has the position of the loader; a loader that loads it, in any process,
    yields the remaining batches bit for bit. With another number of ranks and as many images per step, each step has
    the same images, but other crops.

    Args:
        config: Settings of the loader.
        policies: Augmentation policies; None: those that the settings name.
        check: See `create_loader`.

    Attributes:
        config: Its settings.
        device: Device of the batches.
        samples: Its images with their label rows.
        num_classes: C, the classes of the labels and of the class head.
        class_names: One for each of them; empty if they are not known.
        aux_classes: Classes of the token targets; None: the same classes.
        mask_survey: What the masks hold; None: there are no masks.
        epoch: The current epoch.
    """

    def __init__(
        self,
        config: LoaderConfig,
        policies: tuple[Policy, ...] | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.threads = config.threads or rank_threads(config.world_size)
        if policies is None:
            policies = create_policies(config.auto_augment, config.color_jitter) if config.train else ()
        self.policies = policies
        backend = choose_backend(config, self.device)
        self.samples = open_samples(config)
        classes, store = self.samples.classes, self.samples.store
        self.num_classes, self.class_names = classes.count, classes.names
        own = store is not None and config.token_labels and classes.kind == "images"
        self.aux_classes = store.meta.num_classes if store is not None and own else None
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
        if check is not None:
            check(len(self.order))
        self.masks = None
        if config.masks is not None and config.num_classes is not None:
            self.masks = MaskFolder(config.masks, config.num_classes, config.ignore_index)
            keys = [self.samples.key(i) for i in range(len(self.samples))]
            self.masks.check_all_there(keys)
        if self.samples.store is None:
            sizes = scan_sizes(self.samples.source, config.orientation, config.threads, config.progress)
            self.samples = replace(self.samples, sizes=sizes)
        self.mask_survey: MaskSurvey | None = None
        if self.masks is not None:
            self.mask_survey = survey_masks(self.masks, keys, self.samples.sizes, config.threads, config.progress)
        self.row_reader = None
        if self.samples.store is not None and config.token_labels:
            self.row_reader = LabelRowReader(self.samples.store, self.device)
        # Its own stream, so that copies and waits of the next batch do not queue behind the training step; its small
        # kernels go first (a lower number), so that they do not wait for room beside the step's large ones.
        self._stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        self.backend = backend(
            config,
            self.samples.orientation,
            self.samples.digests is not None,
            bool(self.policies),
            self.device,
            self.threads,
        )
        self.epoch = 0
        self._batch = 0  # of the epoch: the next one
        self._loaded = False
        self._turn = 0  # counts iterations and changes of position

    def __len__(self) -> int:
        """Returns the number of batches of this rank in an epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if not self.config.train and not self._loaded:
            self._batch = 0  # an evaluation that was left early is useless: start again
        elif self._batch >= len(self):
            self.epoch, self._batch = self.epoch + 1, 0
        self._loaded, self._turn = False, self._turn + 1
        return self._iterate(self._turn, self.epoch, self._batch)

    def _iterate(self, turn: int, epoch: int, start: int) -> Iterator[Batch]:
        """Yields the rest of an epoch; `turn` identifies this iteration."""
        work = self._batches(epoch, start)
        # On a GPU, blocking copies run in their own thread.
        batches = Prefetcher(work, 1) if self.device.type == "cuda" else work
        try:
            for batch, ready in batches:
                self._refuse_moved(turn)
                if ready is not None:
                    self._hand_over(batch, ready)
                self._batch += 1
                yield batch
        finally:
            batches.close()
        self._refuse_moved(turn)
        self.epoch, self._batch = epoch + 1, 0

    def _refuse_moved(self, turn: int) -> None:
        """Raises InputError if the loader was moved during an iteration."""
        if turn != self._turn:
            raise InputError(
                "the loader was moved while this iterator was in use",
                got="another iteration, set_epoch or load_state_dict in the meantime",
                remedy="Use one iterator at a time, and move the loader between iterations only.",
            )

    def set_epoch(self, epoch: int) -> None:
        """Moves the loader to the first batch of another epoch; does nothing if it is in this epoch already.

        Args:
            epoch: Number of the epoch, from 0 on.

        Raises:
            InputError: The epoch is not a whole number, 0 or more.
        """
        if int(epoch) != epoch or epoch < 0:
            raise InputError("epoch must be a whole number, 0 or more", got=repr(epoch))
        if int(epoch) != self.epoch:
            self.epoch, self._batch, self._turn = int(epoch), 0, self._turn + 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the loader, in plain numbers and texts; it is the same on all ranks."""
        return {
            "epoch": self.epoch,
            "batch": self._batch,
            "images": len(self.samples),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the loader to a saved position.

        Args:
            state: What `state_dict()` returned. A setting that it lacks is newer than it, and counts as its default.

        Raises:
            InputError: It is not the state of a loader, or has an impossible position.
            MismatchError: It belongs to a loader with other images, labels or settings.
        """
        try:
            epoch, batch, settings = int(state["epoch"]), int(state["batch"]), dict(state["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("this is not the state of a loader", got=f"{type(error).__name__}: {error}") from None
        refuse_other_settings(self._settings(), settings, len(self.samples), state.get("images"))
        if not (epoch >= 0 and 0 <= batch <= len(self)):
            raise InputError(
                "the saved state has an impossible position",
                got=f"batch {batch}, epoch {epoch}",
                expected=f"0 to {len(self)}",
            )
        self.epoch, self._batch, self._loaded, self._turn = epoch, batch, True, self._turn + 1

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that a saved state must have in common with this loader."""
        names = names_that_affect(LoaderConfig, "values", "rounding")
        kept = {name: value for name, value in asdict(self.config).items() if name in names}
        where = {
            "backend": self.backend.name,
            "device": self.device.type,
            "version": f"{__version__}, draws {DRAWS_VERSION}",
        }
        kept |= {"policies": repr(self.policies), "fingerprint": self.samples.fingerprint}
        if self.mask_survey is not None:
            kept["masks"] = self.mask_survey.fingerprint
        return {**kept, **where}

    def _batches(self, epoch: int, start: int) -> Generator[tuple[Batch, torch.cuda.Event | None]]:
        """Yields the rest of an epoch, each batch with the CUDA event that marks the end of its work, or None."""
        pool = ThreadPoolExecutor(self.threads, "images")
        ahead = Prefetcher(self._prepare(epoch, start, pool), self.config.prefetch)
        decoded = self.backend.images(ahead)
        try:
            while True:
                with self._on_own_stream():
                    item = next(decoded, None)
                    if item is None:
                        return
                    batch, ready = self._finish(*item), None
                    if self._stream is not None:
                        ready = self._stream.record_event()
                yield batch, ready
        finally:
            ahead.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, epoch: int, start: int, pool: ThreadPoolExecutor) -> Generator[Prepared]:
        """Yields the batches with their files and label rows read and all random numbers drawn."""
        order = self.order.epoch(epoch)
        for batch in range(start, len(self)):
            chosen = self.order.batch(order, batch)
            parts = np.array_split(chosen, min(self.threads, len(chosen)))
            reading = [pool.submit(self._read, part.tolist()) for part in parts]
            sizes = self.samples.sizes[chosen]
            draws = draw_batch(self.config, self.policies, sizes, epoch, batch)
            stored = self.row_reader.read(self.samples.rows[chosen]) if self.row_reader else None
            keys = tuple(map(self.samples.key, chosen.tolist()))
            masks = None if self.masks is None else self._crop_masks(self.masks, keys, sizes, draws, pool)
            encoded = [data for part in reading for data in part.result()]
            yield Prepared(chosen, keys, sizes, encoded, draws, stored, masks)

    def _crop_masks(
        self, folder: MaskFolder, keys: Sequence[str], sizes: np.ndarray, draws: Draws, pool: ThreadPoolExecutor
    ) -> torch.Tensor:
        """Reads the masks of a batch and crops them as their images, uint8 [B, S, S]."""
        masks = list(pool.map(folder.read, keys, sizes))
        return crop_masks(masks, draws.views, self.config.image_size, folder.ignore_index)

    def _on_own_stream(self) -> AbstractContextManager:
        """Makes the loader's stream the current one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, batch: Batch, ready: torch.cuda.Event) -> None:
        """Makes the caller's stream wait for the batch, and tells the allocator that this stream uses it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for tensor in (batch.images, batch.labels, batch.masks, *batch.targets.tensors().values()):
            if tensor is not None:
                tensor.record_stream(current)

    def _read(self, indices: list[int]) -> list[bytes]:
        """Reads image files for the decoder."""
        samples = self.samples
        return [self.backend.encoded(samples.read(i), samples.key(i), samples.sizes[i]) for i in indices]

    def _finish(self, prepared: Prepared, images: torch.Tensor) -> Batch:
        """Erases and mixes pixels, and crops the labels."""
        config, draws = self.config, prepared.draws
        if draws.erased.any():
            generator = torch.Generator(self.device).manual_seed(draws.noise_seed)
            images = erase(images, draws.erased, config.erase_mode, generator)
        if draws.mix is not None and config.mix == "image":
            images = mix_pixels(images, draws.mix, config.patch)
        labels = on_device(self.samples.labels[prepared.samples], self.device)
        rows = self.samples.rows[prepared.samples]
        targets = self._targets(prepared, labels)
        masks = None if prepared.masks is None else on_device(prepared.masks, self.device)
        return Batch(images, targets, labels, draws.mix, prepared.keys, rows, draws.views, config.mix == "image", masks)

    def _targets(self, prepared: Prepared, labels: torch.Tensor) -> TokenTargets:
        """Returns the targets of a batch."""
        if self.row_reader is None or prepared.stored is None:
            return label_targets(labels, self.config.grid)
        with one_thread() if self.device.type == "cpu" else nullcontext():  # beside those that decode images
            return self.backend.targets(self.row_reader, prepared.stored, prepared.draws)
