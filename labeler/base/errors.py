"""The project's errors. Each says in one line what was got, what was expected, and what to do.

Every error that a user can cause or fix derives from `TokenLabelError`; the command lines print its text without a
stack trace and exit with `exit_status`.
"""

import difflib
import errno
import os
from collections.abc import Sequence


def error_text(error: BaseException) -> str:
    """Returns the message of an error in plain words, or the name of its type if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        reason = "it is a folder" if error.errno == errno.EISDIR else error.strerror
        return reason if error.filename is None else f"{reason}: {os.fsdecode(error.filename)!r}"
    return str(error).strip() or type(error).__name__


def did_you_mean(name: str, known: Sequence[str], or_all: bool = False) -> str | None:
    """Returns a remedy that suggests a known name.

    Args:
        name: The name that is not known.
        known: The names that are.
        or_all: List all known names where none is similar.

    Returns:
        The remedy; None where no name is similar and `or_all` is false.
    """
    matches = difflib.get_close_matches(name, known, 1, 0.5)
    if matches:
        return f"Did you mean {matches[0]!r}?"
    return f"Choose from: {', '.join(known)}." if or_all and known else None


class TokenLabelError(Exception):
    """Base of all errors that the project raises on purpose.

    The message is "PROBLEM: got GOT, expected EXPECTED. REMEDY", without the parts that are None.

    Attributes:
        problem: What is wrong.
        got: What was found; an exception stands for its message.
        expected: What should have been there.
        remedy: What the user can do, as a sentence.
        exit_status: Exit status of a command that ends with this error.
    """

    exit_status = 1

    def __init__(self, problem: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.problem, self.got, self.expected, self.remedy = problem, got, expected, remedy
        parts = [problem]
        if got is not None:
            text = error_text(got) if isinstance(got, Exception) else str(got)
            parts.append(text if ": got " in text else f"got {text}")  # a nested error may say it already
        if expected is not None:
            parts.append(f"expected {expected}")
        text = ", ".join([": ".join(parts[:2]), *parts[2:]])
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def __reduce__(self) -> tuple:
        # The default would call __init__ with the finished message alone: an error from a worker would lose its parts.
        return _rebuild, (type(self), self.problem, self.got, self.expected, self.remedy)


class InputError(TokenLabelError):
    """Bad usage or unusable input: a wrong option, a missing folder, an unreadable list."""

    exit_status = 2


class TeacherError(InputError):
    """The teacher cannot be built, or cannot produce a dense map."""


class ModelError(InputError, ValueError):
    """Bad usage of a model or of one of its operators: a wrong shape, name, type or file."""


class BackendError(ModelError, RuntimeError):
    """The requested backend of an operator cannot run on this machine or on these tensors."""


class MismatchError(InputError):
    """Two things do not belong together: store and images, store and settings, or store and reader version."""


class IntegrityError(TokenLabelError):
    """Stored data is damaged, incomplete, or differs from its own records."""

    exit_status = 4


class RemoteError(TokenLabelError):
    """A service could not be reached, or keeps giving wrong answers. What was transferred is kept."""

    exit_status = 1


class LabelingError(TokenLabelError):
    """A labeling run could not finish. Committed shards are kept, and the same command resumes the run."""

    exit_status = 1


def _rebuild(cls: type[TokenLabelError], problem: str, got: object, expected: object, remedy: str | None) -> Exception:
    return cls(problem, got=got, expected=expected, remedy=remedy)
