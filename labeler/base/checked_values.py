"""Checks that settings share."""

from __future__ import annotations

from labeler.base.errors import InputError


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} is not known", got=repr(value), expected=" or ".join(allowed))


def positive(option: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InputError(f"{option} must be a positive whole number", got=repr(value))
