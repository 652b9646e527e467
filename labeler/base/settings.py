"""Settings: typed, frozen, checked when they are made. Each says in its own line what it means and what it affects.

The help of the command lines, the listing of recipes, and what may change when a run goes on come from these lines.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

# What another value of a setting would change: the values that are computed; only their rounding, to the last bits; or
# nothing of them, but speed, places, or what is told.
Affects = Literal["values", "rounding", "nothing"]
WORDS = {str: "text", int: "whole number", float: "number", bool: "true|false", type(None): "none"}


class Settings(BaseModel):
    """A group of settings: no unknown keys, no conversion of types, no change once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def setting(meaning: str, default: Any = ..., *, affects: Affects, **limits: Any) -> Any:
    """A field of `Settings`.

    Args:
        meaning: One plain sentence or phrase; it is the help text.
        default: Without one, the setting must be given.
        affects: What another value changes.
        limits: Bounds, as `pydantic.Field` takes them.
    """
    return Field(default, description=meaning, json_schema_extra={"affects": affects}, **limits)


@dataclass(frozen=True)
class SettingInfo:
    """One setting, as help texts and listings show it."""

    name: str
    meaning: str
    kind: str
    required: bool
    default: Any
    affects: Affects


def settings_of(group: type[Settings]) -> Iterator[SettingInfo]:
    """All settings of a group, in their order."""
    for name, field in group.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield SettingInfo(name, field.description or "", _kind(field), field.is_required(), default, _affects(field))


def names_that_affect(group: type[Settings], *what: Affects) -> frozenset[str]:
    """The settings of a group whose other values would change this."""
    return frozenset(one.name for one in settings_of(group) if one.affects in what)


def _affects(field: FieldInfo) -> Affects:
    extra = field.json_schema_extra
    return extra["affects"] if isinstance(extra, dict) else "values"  # type: ignore[return-value]


def _kind(field: FieldInfo) -> str:
    return _words(field.annotation)


def _words(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_words, arguments)))
    if origin is tuple:
        return f"{len(arguments)} {_words(arguments[0])}s"
    if origin is dict:
        return "table"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
