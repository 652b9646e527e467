"""What a failed request means: not there, no permission, refused, or worth another try.

The drivers of fsspec raise errors of many libraries. They are told apart by the HTTP status that they carry, and by the
library that they come from.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from labeler.base.errors import InputError, RemoteError, TokenLabelError, error_text

T = TypeVar("T")
log = logging.getLogger("labeler")

NOT_THERE = (404, 410)
NO_PERMISSION = (401, 403)
CHANGED = 412
TRY_AGAIN = (408, 425, 429)  # and every 5xx
# Libraries whose errors without a status are those of a connection.
NETWORKS = {"aiohttp", "botocore", "httpx", "httpx2", "httpcore", "requests", "urllib3", "gcsfs", "azure"}
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EISDIR, errno.ENOTDIR)
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "LocalTokenNotFoundError",
}
NO_ADDRESS = {"HfUriError", "HFValidationError"}


class NotThere(InputError):
    """There is no file or folder at a URL."""


class TryAgain(Exception):
    """An answer that is wrong in a way that another try may cure; its text says what was got."""


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        tries: Most tries of one request.
        seconds: Time after which no further try begins.
        first: Seconds before the second try; each later wait is twice as long.
        longest: Longest wait in seconds.
    """

    tries: int = 6
    seconds: float = 180.0
    first: float = 0.5
    longest: float = 20.0


def retried(url: str, action: Callable[[], T], patience: Patience) -> T:
    """Returns `action()`, tried again after dropped connections, time-outs, answers 5xx and `TryAgain`.

    Args:
        url: What is asked for, for messages.
        action: The request.
        patience: How long to try.

    Returns:
        What `action` returned.

    Raises:
        NotThere: There is nothing at the URL.
        InputError: The service gives no permission, or refuses the request.
        RemoteError: Every try failed.
    """
    started, wait = time.monotonic(), patience.first
    for number in range(1, patience.tries + 1):
        try:
            return action()
        except Exception as error:
            reason = _worth_another_try(url, error)
        pause = wait * random.uniform(0.5, 1.0)  # many readers that failed together shall not come back together
        if number == patience.tries or time.monotonic() - started + pause > patience.seconds:
            break
        log.warning("%s: %s; try %d of %d in %.1f s", url, reason, number + 1, patience.tries, pause)
        time.sleep(pause)
        wait = min(2 * wait, patience.longest)
    raise RemoteError(
        f"{url} cannot be reached", got=f"{reason} in each of {number} tries",
        remedy="Everything that was transferred is kept; run the command again when the service answers.",
    )  # fmt: skip


def _worth_another_try(url: str, error: Exception) -> str:
    """Returns what a passing failure was, in words; raises the error that says what any other failure means."""
    if isinstance(error, TokenLabelError):
        raise error
    if isinstance(error, TryAgain):
        return str(error)
    status = None
    for one in _chain(error):  # the first that tells anything
        if (status := _status(one)) is not None:
            break
        if _is_network(one):
            return _short(one)
    if status is not None and (status in TRY_AGAIN or status >= 500):
        return f"answer {status}"
    if status in NOT_THERE:
        raise NotThere(f"{url} is not there", remedy="Check the address.") from error
    names = {type(one).__name__ for one in _chain(error)}
    if status in NO_PERMISSION or isinstance(error, PermissionError) or names & NO_CREDENTIALS:
        raise InputError(
            f"there is no permission for {url}", got=_short(error),
            remedy="Log in to the service, or give its credentials in the way that its driver reads them.",
        ) from error  # fmt: skip
    if names & NO_ADDRESS:
        raise InputError(
            f"{url} is no address", got=_short(error), expected="hf://datasets/USER/NAME, and perhaps a folder in it"
        ) from error
    if status == CHANGED:
        raise RemoteError(f"{url} has changed while it was read", remedy="Start again.") from error
    if status is not None and status >= 400:
        raise InputError(f"{url} is refused by its service", got=_short(error)) from error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise NotThere(f"{url} is not there", remedy="Check the address.") from error
    if isinstance(error, NotImplementedError):
        raise InputError(f"{url} can only be read", remedy="Choose a service that files can be sent to.") from error
    if isinstance(error, OSError) and error.errno not in LOCAL:
        return _short(error)
    raise error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: some drivers raise FileNotFoundError whatever their library said."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Any) -> int | None:
    """Returns the HTTP status that an error carries; None if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = getattr(response, "status_code", response)
    for found in (getattr(error, "status", None), code, getattr(error, "code", None)):
        if isinstance(found, int | str) and str(found).isdigit() and 300 <= int(found) < 600:
            return int(found)
    return None


def _is_network(error: BaseException) -> bool:
    """Whether an error is one of the connection."""
    if isinstance(error, ConnectionError | TimeoutError | EOFError):
        return True
    return type(error).__module__.split(".")[0] in NETWORKS


def _short(error: BaseException) -> str:
    """Returns an error's message in one line."""
    text = " ".join(error_text(error).split())
    text = text if text != type(error).__name__ else f"a {text}"
    return text if len(text) <= 200 else text[:197] + "…"
