"""Typed, frozen settings that are checked on creation. Each states in one place what it means and what it affects.

Recipes are pydantic models of `setting`s; the configurations of labeler and loader are dataclasses of `option`s. All of
this is derived from them: the flags and help texts of the command lines, the listing of recipes, the settings that a
store's plan keeps, those that a loader's state compares, and those that may change when a run is resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from labeler.base.errors import InputError

# What a different value of a setting changes: the computed values; values, but through something else that is recorded
# and compared, such as the fingerprint of the images; only the rounding of values, in their last bits; or none of the
# values, only speed, locations or output.
Affects = Literal["values", "recorded", "rounding", "nothing"]
WORDS = {str: "text", int: "whole number", float: "number", bool: "true|false", type(None): "none"}


class Settings(BaseModel):
    """A group of settings: no unknown keys, no type conversion, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def setting(meaning: str, default: Any = ..., *, affects: Affects, **limits: Any) -> Any:
    """Declares a field of `Settings`.

    Args:
        meaning: One plain sentence or phrase; it is the help text.
        default: Without one, the setting is required.
        affects: What a different value changes.
        limits: Bounds, as `pydantic.Field` takes them.
    """
    return Field(default, description=meaning, json_schema_extra={"affects": affects}, **limits)


def option(
    meaning: str,
    default: Any = dataclasses.MISSING,
    *,
    affects: Affects,
    choices: Sequence[str] = (),
    lowest: float | None = None,
    highest: float | None = None,
) -> Any:
    """Declares a field of a dataclass of settings, whose `__post_init__` calls `check_options`.

    Args:
        meaning: One plain sentence or phrase; it is the help text.
        default: Without one, the setting is required.
        affects: What a different value changes.
        choices: The values that are allowed; empty: any.
        lowest: Smallest number that is allowed.
        highest: Largest number that is allowed.
    """
    limits = {"choices": tuple(choices), "lowest": lowest, "highest": highest}
    return dataclasses.field(default=default, metadata={"meaning": meaning, "affects": affects, **limits})


def check_options(config: Any) -> None:
    """Checks all options of a dataclass.

    Raises:
        InputError: A value is not among its choices, not a number, or out of bounds.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if value is None and type(None) in get_args(hints[field.name]):
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise InputError(f"`{field.name}` is not known", got=repr(value), expected=" or ".join(limits["choices"]))
        if limits["lowest"] is not None:
            _check_number(field.name, value, int in (hints[field.name], *get_args(hints[field.name])), limits)


def _check_number(name: str, value: Any, whole: bool, limits: Any) -> None:
    """Raises InputError if the value is not a number within its limits."""
    lowest, highest = limits["lowest"], limits["highest"]
    number = type(value) is int or (not whole and isinstance(value, float) and math.isfinite(value))
    if number and value >= lowest and (highest is None or value <= highest):
        return
    kind = "a whole number" if whole else "a number"
    bounds = f"{lowest:g} or more" if highest is None else f"{lowest:g} to {highest:g}"
    raise InputError(f"`{name}` must be {kind}", got=repr(value), expected=bounds)


@dataclass(frozen=True)
class SettingInfo:
    """One setting, as help texts and listings show it.

    Attributes:
        name: Its name.
        meaning: Its help text.
        kind: Its type in words, or its choices.
        required: Whether it has no default.
        default: Its default; None if it is required.
        affects: What a different value changes.
    """

    name: str
    meaning: str
    kind: str
    required: bool
    default: Any
    affects: Affects


def settings_of(group: Any) -> Iterator[SettingInfo]:
    """Yields all settings of a group, a pydantic model or a dataclass, in order of definition."""
    if dataclasses.is_dataclass(group):
        hints = typing.get_type_hints(group)
        for one in dataclasses.fields(group):
            required, kind = one.default is dataclasses.MISSING, _words(hints[one.name])
            kind = "|".join(one.metadata["choices"]) or kind
            default = None if required else one.default
            yield SettingInfo(one.name, one.metadata["meaning"], kind, required, default, one.metadata["affects"])
        return
    for name, field in group.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        affects = _affects(field)
        yield SettingInfo(
            name, field.description or "", _words(field.annotation), field.is_required(), default, affects
        )


def names_that_affect(group: Any, *what: Affects) -> frozenset[str]:
    """Returns the names of the settings in a group that affect any of `what`."""
    return frozenset(one.name for one in settings_of(group) if one.affects in what)


def add_flags(parser: Any, group: Any, *names: str) -> None:
    """Adds flags for options of a dataclass: `batch_size` becomes `--batch-size`, with its type, default and help.

    Args:
        parser: An argparse parser or group.
        group: The dataclass.
        names: The options to add.
    """
    hints, fields = typing.get_type_hints(group), {field.name: field for field in dataclasses.fields(group)}
    for name in names:
        field = fields[name]
        kinds = [kind for kind in (get_args(hints[name]) or (hints[name],)) if kind is not type(None)]
        how: dict[str, Any] = {"default": field.default, "help": field.metadata["meaning"].replace("%", "%%")}
        if field.default not in (None, False, dataclasses.MISSING):
            how["help"] += " (%(default)s)"
        if kinds == [bool]:
            how["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction  # --x, --no-x
        elif field.metadata["choices"]:
            how["choices"] = field.metadata["choices"]
        elif get_origin(kinds[0]) is tuple:
            how |= {"nargs": len(get_args(kinds[0])), "type": get_args(kinds[0])[0]}
        else:
            how |= {"type": kinds[0], "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}
        parser.add_argument("--" + name.replace("_", "-"), **how)


def _affects(field: FieldInfo) -> Affects:
    """Returns what a pydantic field affects; "values" unless it was declared with `setting`."""
    extra = field.json_schema_extra
    return extra["affects"] if isinstance(extra, dict) else "values"  # type: ignore[return-value]


def _words(annotation: Any) -> str:
    """Describes a type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_words, arguments)))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_words(arguments[0])}s"
    if origin is tuple:
        return f"{len(arguments)} {_words(arguments[0])}s"
    if origin is dict:
        return "table"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
