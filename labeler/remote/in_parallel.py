"""One action on many items, by several threads that do not outlive an interrupted process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(action: Callable[[T], R], items: Sequence[T], workers: int = 4) -> list[R]:
    """Returns `action` of each item, by several threads. After an error no further item is begun.

    The threads do not keep a process alive that a signal ends: a service that does not answer would for minutes.
    """
    done: dict[int, R] = {}
    errors: list[BaseException] = []
    left, lock = iter(enumerate(items)), Lock()

    def work() -> None:
        while not errors:
            with lock:
                number, item = next(left, (-1, None))
            if number < 0:
                return
            try:
                done[number] = action(item)  # type: ignore[arg-type]
            except BaseException as error:
                errors.append(error)

    threads = [Thread(target=work, daemon=True) for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        raise
    if errors:
        raise errors[0]
    return [done[number] for number in range(len(items))]
