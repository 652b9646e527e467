"""`section.key=value` on the command line, in TOML's notation; quotes may be omitted."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from labeler.base.errors import InputError, did_you_mean
from train.recipes.config import SECTIONS

UNSET = ("", "none")  # values that unset a setting


def apply_override(values: dict[str, Any], override: str) -> str:
    """Apply an override to the values of a recipe.

    Args:
        values: section -> key -> value; modified.
        override: `section.key=value`, or `key=value` if only one section has the key.

    Returns:
        The setting's full name, `section.key`.

    Raises:
        InputError: the override cannot be read.
    """
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise InputError("an override cannot be read", got=repr(override)[:80], expected="section.key=value")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise InputError("an override is not UTF-8", got=ascii(override)[:80]) from None
    if len(parts) == 1:
        parts = _with_section(parts[0])
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError("an override cannot be read", got=repr(override)[:80], expected=f"{part} to be a section")
    unset = text.strip().lower() in UNSET
    kind = _type_of(parts)
    if unset and parts[:-1] == ["model", "args"]:
        values.pop(parts[-1], None)
    elif unset and type(None) in get_args(kind):
        values[parts[-1]] = None
    else:
        is_text = kind in (str, str | None) or (_may_be_list(kind) and not text.strip().startswith("["))
        values[parts[-1]] = _value(text.strip(), is_text, override)
    return ".".join(parts)


def _value(text: str, is_text: bool, override: str) -> Any:
    """The value of an override; `is_text`: the setting is text, used as it is unless it begins with a quote."""
    quoted = text[:1] in ("'", '"')
    if is_text and not quoted:
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        json.dumps(value)  # refuses dates and times, which no setting takes
    except (ValueError, RecursionError, TypeError) as error:
        if quoted:
            raise InputError(
                f"the quotes of override {override[:80]!r} are malformed", got=error,
                remedy="Remove them, or use single quotes, in which a backslash is a backslash.",
            ) from None  # fmt: skip
        return text
    if isinstance(value, str) and any(sign < " " for sign in value):
        raise InputError(
            f"override {override[:80]!r} contains a control character", got=repr(value)[:80],
            remedy="Remove the quotes, or use single ones, in which a backslash is a backslash.",
        )  # fmt: skip
    return value


def _type_of(parts: Sequence[str]) -> Any:
    """The declared type of `section.key`; None: no such key."""
    section = SECTIONS.get(parts[0])
    fields = {} if section is None or len(parts) != 2 else section.model_fields
    return fields[parts[1]].annotation if parts[-1] in fields else None


def _may_be_list(kind: Any) -> bool:
    """Whether a setting is a text or a list of texts."""
    kinds = get_args(kind)
    return str in kinds and any(get_origin(getattr(one, "__origin__", one)) is tuple for one in kinds)


def _with_section(key: str) -> list[str]:
    """The section and the key; a key alone is enough if only one section has it."""
    homes = [name for name, section in SECTIONS.items() if key in section.model_fields]
    if len(homes) == 1:
        return [homes[0], key]
    if homes:
        expected = " or ".join(f"{home}.{key}" for home in homes)
        raise InputError("an override needs its section", got=repr(key), expected=expected)
    if key in SECTIONS:
        raise InputError("an override names only a section", got=repr(key), expected=f"{key}.key=value")
    keys = sorted({key for section in SECTIONS.values() for key in section.model_fields})
    remedy = did_you_mean(key, keys) or "`fit --help` lists all keys."
    raise InputError(f"no section has a key {key!r}", remedy=remedy)
