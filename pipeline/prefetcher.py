"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Iterator[T]):
    """Runs an iterator in its own thread, a few items ahead of the consumer.

    An exception of the iterator is raised in its place, after the items before it.

    Args:
        items: The iterator.
        depth: Most items ahead.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Puts all items, then the exception or the end, into the queue."""
        last: object = _END
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: object) -> bool:
        """Waits for room in the queue. Returns False if the consumer has stopped."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        item = self._ready.get()
        if item is _END or isinstance(item, BaseException):
            self._ready.put(item)  # for the next call
            raise item if isinstance(item, BaseException) else StopIteration
        return item

    def close(self) -> None:
        """Stops the thread, without waiting for it: a garbage-collected generator may call this from any thread.

        A consumer that waits in another thread comes to the end.
        """
        self._stopped.set()
        with suppress(queue.Full):  # then it is not waiting
            self._ready.put_nowait(_END)
