"""Recipes: TOML files, with `key=value` overrides, to a checked configuration and back."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from labeler.errors import InputError
from train.config import TrainConfig

RECIPES = Path(__file__).with_name("recipes")
MAX_BYTES = 1 << 20
# What may differ between a run and its resumption: it changes no batch and no weight.
FREE = frozenset(
    {"data.images", "data.store", "data.validation", "data.image_list", "data.cache", "data.threads", "data.prefetch",
     "run.out", "run.save_every", "run.keep", "run.tensorboard", "run.tracker", "run.progress"}
)  # fmt: skip


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A recipe by its file or name, with `section.key=value` overrides in TOML's notation (quotes may be left away).

    Raises InputError with the file or flag, and the nearest valid name, where something is wrong.
    """
    path = recipe_path(recipe)
    values = _read(path)
    for override in overrides:
        _override(values, override)
    config = parse_config(values, str(path))
    run = config.run.model_copy(update={"out": config.run.out.replace("{recipe}", path.stem)})
    return config.model_copy(update={"run": run})


def recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = RECIPES / f"{recipe}.toml"
    if packaged.is_file():
        return packaged
    names = recipe_names()
    raise InputError(
        "there is no such recipe", got=repr(str(recipe)), expected=f"a .toml file, or one of {', '.join(names)}",
        remedy=nearest(str(recipe), names),
    )  # fmt: skip


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def parse_config(values: Mapping[str, Any], source: str) -> TrainConfig:
    """Values of sections, as TOML gives them, to a configuration. `source` stands in the errors."""
    try:
        # By way of JSON: in it a list serves as a tuple, while all else keeps its type.
        return TrainConfig.model_validate_json(json.dumps(values))
    except TypeError as error:  # a date, which no setting is
        raise InputError(f"a value in {source} is not usable", got=str(error)) from None
    except ValidationError as error:
        raise _explained(error, source) from None


def to_toml(config: TrainConfig) -> str:
    """A recipe that gives this configuration."""
    lines: list[str] = []
    for name, section in config.model_dump(exclude_none=True).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value != {}]
        lines.append("")
    return "\n".join(lines)


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old, new) of all settings that differ and are not `FREE`."""
    before, after = flat(old), flat(new)
    return {key: (before.get(key), after[key]) for key in after if key not in FREE and before.get(key) != after[key]}


def flat(config: TrainConfig) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, section in config.model_dump().items() for key, value in section.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path} is no recipe", got=f"{path.stat().st_size:,} bytes", expected=f"up to {MAX_BYTES:,}"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        got = "too deep nesting" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not a TOML file", got=got) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error.strerror) from None


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise InputError("an override is not readable", got=repr(override), expected="section.key=value")
    if len(parts) == 1:
        parts = _with_section(parts[0])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError("an override is not readable", got=repr(override), expected=f"{part} to be a section")
    values[parts[-1]] = value


def _with_section(key: str) -> list[str]:
    """A key alone serves where only one section has it."""
    homes = [name for name, field in TrainConfig.model_fields.items() if key in _fields(field.annotation)]
    if len(homes) == 1:
        return [homes[0], key]
    keys = sorted({k for field in TrainConfig.model_fields.values() for k in _fields(field.annotation)})
    expected = " or ".join(f"{home}.{key}" for home in homes) or None
    raise InputError("an override has no section", got=repr(key), expected=expected, remedy=nearest(key, keys))


def _explained(error: ValidationError, source: str) -> InputError:
    """The first fault as one line, with the nearest valid name where a name is wrong."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    # pydantic adds the type tried to the place of a union's member: cut it where the configuration knows no such name.
    place = [str(part) for part in fault["loc"][:2]]
    name, more = ".".join(place), f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    kind, got = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        fields: Any = TrainConfig.model_fields
        known = list(fields) if len(place) == 1 else _fields(fields[place[0]].annotation)
        return InputError(f"{source}: unknown key {name!r}{more}", remedy=nearest(place[-1], known))
    if kind == "missing":
        return InputError(f"{source}: {name} is missing{more}", remedy=f"Give it there, or as {name}=… .")
    if kind == "value_error":
        return InputError(f"{source}: {fault['ctx']['error']}{more}")
    remedy = "Leave the quotes away." if isinstance(got, str) and "number" in fault["msg"] + kind + "int" else None
    expected = fault["msg"].removeprefix("Input should be ")
    return InputError(f"{source}: {name}{more}", got=repr(got)[:80], expected=expected, remedy=remedy)


def _fields(section: Any) -> list[str]:
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def nearest(name: str, known: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f"Did you mean {found[0]!r}?" if found else f"There is: {', '.join(known)}." if known else None


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)  # its shortest form that reads back as the same number
    return json.dumps(value, ensure_ascii=False)
