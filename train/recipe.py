"""Recipes: TOML files, with `key=value` overrides, to a checked configuration and back."""

from __future__ import annotations

import difflib
import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from labeler.errors import InputError
from train.config import BEGINNING, TrainConfig

log = logging.getLogger("train")

RECIPES = Path(__file__).with_name("recipes")
MAX_BYTES = 1 << 20
# What may differ between a run and its resumption: it changes no batch, and no weight that is finite. Whose weights a
# run began with is in its checkpoints.
FREE = frozenset(
    {"model.weights", "model.weights_ema", "model.new_heads", "model.aux_weight", "data.images", "data.store",
     "data.validation", "data.image_list", "data.cache", "data.threads", "data.prefetch", "augment.crop_pct",
     "augment.crop_mode", "run.out", "run.log_every", "run.eval_every", "run.save_every", "run.keep",
     "run.skip_non_finite", "run.tensorboard", "run.tracker", "run.progress"}
)  # fmt: skip
UNSET = ("", "none")  # what an override says for a setting that shall have no value
# pydantic's words for types, in plain ones
PLAIN = {
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text in quotes",
    "a valid array": "a list",
    "an object": "a section",
}
# May differ, too, but changes how results are rounded, and with micro-batches what BatchNorm sees.
ROUNDING = frozenset(
    {"run.device", "run.threads", "run.micro_batch", "run.grad_checkpointing", "run.compile", "run.channels_last"}
)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A recipe by its file or name, with `section.key=value` overrides in TOML's notation (quotes may be left away).

    `key=none`, or nothing behind the sign, unsets a setting that may be None, or one of `model.args`.
    Raises InputError with the file or flag, and the nearest valid name, where something is wrong.
    """
    path = recipe_path(recipe)
    values = _read(path)
    given = {_override(values, override): override for override in overrides}
    if path.parent == RECIPES and "data.images" in given:
        _leave_absent_paths(values["data"], given)
    config = parse_config(values, str(path), given)
    run = config.run.model_copy(update={"out": config.run.out.replace("{recipe}", path.stem)})
    return config.model_copy(update={"run": run})


def _leave_absent_paths(data: dict[str, Any], given: Mapping[str, str]) -> None:
    """The other paths of a packaged recipe belong to its own images: with others, what does not exist is unset."""
    for key in ("store", "validation"):
        if f"data.{key}" in given or not isinstance(data.get(key), str) or Path(data[key]).exists():
            continue
        absent = data.pop(key)
        if key == "validation":
            log.warning("the recipe's data.validation %s does not exist: nothing is evaluated while training", absent)


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
        remedy=alike(path.stem, names),
    )  # fmt: skip


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def parse_config(values: Mapping[str, Any], source: str, given: Mapping[str, str] | None = None) -> TrainConfig:
    """Values of sections, as TOML gives them, to a configuration.

    source  stands in the errors; given  `section.key` -> the override that gave it, which stands there instead
    """
    try:
        # By way of JSON: in it a list serves as a tuple, while all else keeps its type.
        return TrainConfig.model_validate_json(json.dumps(values))
    except TypeError:
        raise InputError(
            f"{source}: got a date or a time, which no setting is", remedy="Put quotes around it."
        ) from None
    except RecursionError:
        raise InputError(f"{source} cannot be read", got="too deep nesting") from None
    except ValidationError as error:
        raise _explained(error, source, given or {}) from None


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
    for one in (before, after):
        one["model.args"] = {key: value for key, value in one["model.args"].items() if key not in BEGINNING}
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


def _override(values: dict[str, Any], override: str) -> str:
    """Put an override among the values; the setting's full name."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise InputError("an override is not readable", got=repr(override)[:80], expected="section.key=value")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise InputError("an override is not UTF-8", got=ascii(override)[:80]) from None
    if len(parts) == 1:
        parts = _with_section(parts[0])
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError("an override is not readable", got=repr(override)[:80], expected=f"{part} to be a section")
    unset = text.strip().lower() in UNSET
    kind = _type_of(parts)
    if unset and parts[:-1] == ["model", "args"]:
        values.pop(parts[-1], None)
    elif unset and type(None) in get_args(kind):
        values[parts[-1]] = None
    else:
        values[parts[-1]] = _value(text.strip(), kind in (str, str | None), override)
    return ".".join(parts)


def _value(text: str, is_text: bool, override: str) -> Any:
    """What an override says; `is_text`: the setting is text, which is taken as given unless it begins with a quote."""
    quoted = text[:1] in ("'", '"')
    if is_text and not quoted:
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        json.dumps(value)  # dates and times are no values of settings
    except (ValueError, RecursionError, TypeError) as error:
        if quoted:
            raise InputError(
                f"the quotes of override {override[:80]!r} are malformed", got=error,
                remedy="Leave them away, or use single quotes, in which a backslash is a backslash.",
            ) from None  # fmt: skip
        return text
    if isinstance(value, str) and any(sign < " " for sign in value):
        raise InputError(
            f"override {override[:80]!r} holds a control character", got=repr(value)[:80],
            remedy="Leave the quotes away, or use single ones, in which a backslash is a backslash.",
        )  # fmt: skip
    return value


def _type_of(parts: Sequence[str]) -> Any:
    """What `section.key` is declared to be; None where there is no such key."""
    section = TrainConfig.model_fields.get(parts[0])
    fields = {} if section is None or len(parts) != 2 else section.annotation.model_fields  # type: ignore[union-attr]
    return fields[parts[1]].annotation if parts[-1] in fields else None


def _with_section(key: str) -> list[str]:
    """A key alone serves where only one section has it."""
    homes = [name for name, field in TrainConfig.model_fields.items() if key in _fields(field.annotation)]
    if len(homes) == 1:
        return [homes[0], key]
    if homes:
        expected = " or ".join(f"{home}.{key}" for home in homes)
        raise InputError("an override needs its section", got=repr(key), expected=expected)
    if key in TrainConfig.model_fields:
        raise InputError("an override names a section only", got=repr(key), expected=f"{key}.key=value")
    keys = sorted({k for field in TrainConfig.model_fields.values() for k in _fields(field.annotation)})
    remedy = alike(key, keys) or "docs/recipes.md lists the sections and train/config.py all keys."
    raise InputError(f"no section has a key {key!r}", remedy=remedy)


def _explained(error: ValidationError, source: str, given: Mapping[str, str]) -> InputError:
    """The first fault as one line, with the nearest valid name where a name is wrong."""
    faults = error.errors(include_url=False)
    # A name that is wrong explains one that is missing.
    fault = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    place = [str(part) for part in fault["loc"][:2]]
    same = [other for other in faults if other["loc"][:2] == fault["loc"][:2]]
    count = len({other["loc"][:2] for other in faults}) - 1
    name, more = ".".join(place), f" ({count} more)" if count else ""
    source = next((f"override {given[key][:80]!r}" for key in given if f"{key}.".startswith(f"{name}.")), source)
    kind, got = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        fields: Any = TrainConfig.model_fields
        known = list(fields) if len(place) == 1 else _fields(fields[place[0]].annotation)
        what = "section" if len(place) == 1 else "key"
        return InputError(f"{source}: unknown {what} {name!r}{more}", remedy=nearest(place[-1], known))
    if kind == "missing" and len(fault["loc"]) <= 2:
        how = f"Give it as [{name}] there." if len(place) == 1 else f"Give it there, or as {name}=… ."
        return InputError(f"{source}: {name} is missing{more}", remedy=how)
    if kind == "value_error":
        return InputError(f"{source}: {fault['ctx']['error']}{more}")
    name = ".".join(str(part) for part in fault["loc"][:3] if isinstance(part, str))
    remedy = "Leave the quotes away." if kind in ("float_type", "int_type") and _is_number(got) else None
    return InputError(f"{source}: {name}{more}", got=repr(got)[:80], expected=_expected(same), remedy=remedy)


def _expected(faults: Sequence[Any]) -> str:
    """What a setting should have been; several faults where it has several values, or may be of several types."""
    first = faults[0]
    if first["type"] == "too_long":
        return f"{first['ctx']['max_length']} values"
    if first["type"] == "missing":
        return f"{faults[-1]['loc'][-1] + 1} values"
    same = [fault for fault in faults if fault["loc"][:3] == first["loc"][:3]]
    texts = [fault["msg"].removeprefix("Input should be ") for fault in same]
    return " or ".join(dict.fromkeys(PLAIN.get(text, text) for text in texts))


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(float(text) + 1)
    except ValueError:
        return False


def _fields(section: Any) -> list[str]:
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def nearest(name: str, known: Sequence[str]) -> str | None:
    return alike(name, known) or (f"There is: {', '.join(known)}." if known else None)


def alike(name: str, known: Sequence[str]) -> str | None:
    """A remedy that asks for the nearest of the known names."""
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f"Did you mean {found[0]!r}?" if found else None


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)  # its shortest form that reads back as the same number
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML, unlike JSON, wants escaped
