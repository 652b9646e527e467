"""The project's errors: what was got, what was expected, and what to do, in one line each.

Every error that a user can cause or mend derives from `TokenLabelError`; the command lines print its text without a
stack trace and exit with `exit_status`.
"""

import difflib
import errno
import os
from collections.abc import Sequence


def told(error: BaseException) -> str:
    """What an error says, in plain words; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        why = "it is a folder" if error.errno == errno.EISDIR else error.strerror
        return why if error.filename is None else f"{why}: {os.fsdecode(error.filename)!r}"
    return str(error).strip() or type(error).__name__


def did_you_mean(name: str, known: Sequence[str], or_all: bool = False) -> str | None:
    """A remedy that asks for the nearest of the known names; `or_all`: where none is near, one that lists them."""
    found = difflib.get_close_matches(name, known, 1, 0.5)
    if found:
        return f"Did you mean {found[0]!r}?"
    return f"There is: {', '.join(known)}." if or_all and known else None


class TokenLabelError(Exception):
    """Base of all errors that the project raises on purpose.

    `problem` says what is wrong; `got`, `expected` and `remedy` are added to the message where they are given.
    """

    exit_status = 1

    def __init__(self, problem: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.problem, self.got, self.expected, self.remedy = problem, got, expected, remedy
        parts = [problem]
        if got is not None:
            text = told(got) if isinstance(got, Exception) else str(got)
            parts.append(text if ": got " in text else f"got {text}")  # an error inside of another tells it once
        if expected is not None:
            parts.append(f"expected {expected}")
        text = ", ".join([": ".join(parts[:2]), *parts[2:]])
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def __reduce__(self) -> tuple:
        # The default would call __init__ with the finished message alone and lose the parts on the way out of a worker.
        return _rebuild, (type(self), self.problem, self.got, self.expected, self.remedy)


class InputError(TokenLabelError):
    """Bad usage or unusable input: a wrong option, a missing folder, an unreadable list."""

    exit_status = 2


class TeacherError(InputError):
    """The teacher cannot be built, or cannot give a dense map."""


class ModelError(InputError, ValueError):
    """Bad usage of a model or of one of its operators: a wrong shape, name, type or file."""


class BackendError(ModelError, RuntimeError):
    """The backend of an operator that was asked for cannot run here or on these tensors."""


class MismatchError(InputError):
    """Two things that must belong together do not: store and images, store and settings, store and reader version."""


class IntegrityError(TokenLabelError):
    """Stored data is damaged, incomplete or not what its own records say."""

    exit_status = 4


class LabelingError(TokenLabelError):
    """A labeling run could not finish; everything committed is kept and the same command resumes."""

    exit_status = 1


def _rebuild(cls: type[TokenLabelError], problem: str, got: object, expected: object, remedy: str | None) -> Exception:
    return cls(problem, got=got, expected=expected, remedy=remedy)
