"""Recipes: TOML files and `key=value` overrides to a checked configuration, and back."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from labeler.base.errors import InputError, did_you_mean
from labeler.remote.urls import is_url
from labeler.sources.open_source import exists
from train.recipes.config import SECTIONS, TrainConfig
from train.recipes.overrides import apply_override

log = logging.getLogger("train")

RECIPES = Path(__file__).parent / "packaged"
MAX_BYTES = 1 << 20
# pydantic's names for types -> plain ones
PLAIN = {
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text in quotes",
    "a valid array": "a list",
    "an object": "a section",
}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a recipe.

    Args:
        recipe: a .toml file, or the name of a packaged recipe.
        overrides: `section.key=value` in TOML's notation; quotes may be omitted. `key=none` or `key=` unsets a setting
            that may be None, or one of `model.args`. An override of schedule.epochs replaces the recipe's
            schedule.steps. `data.store=none` asks for plain classification: token_labels=false and
            dense_weight=0 come with it, unless they are given.

    Returns:
        The checked configuration.

    Raises:
        InputError: the recipe or an override is wrong; names the file or flag, and the nearest valid name.
    """
    path = recipe_path(recipe)
    values = _read(path)
    given = {apply_override(values, override): override for override in overrides}
    if path.parent == RECIPES and "data.images" in given:
        _leave_absent_paths(values["data"], given)
    if "data.store" in given and values["data"]["store"] is None:  # asked for: plain classification, by one switch
        for section, key, value in (("data", "token_labels", False), ("loss", "dense_weight", 0.0)):
            if f"{section}.{key}" not in given:
                values.setdefault(section, {})[key] = value
    if "schedule.epochs" in given and "schedule.steps" not in given and values["schedule"].pop("steps", None):
        log.info("schedule.epochs replaces the recipe's schedule.steps")
    config = parse_config(values, str(path), given)
    run = config.run.model_copy(update={"out": config.run.out.replace("{recipe}", path.stem)})
    return config.model_copy(update={"run": run})


def _leave_absent_paths(data: dict[str, Any], given: Mapping[str, str]) -> None:
    """Unset the other paths of a packaged recipe if they do not exist: they belong to the recipe's own images."""
    for key in ("store", "validation"):
        if f"data.{key}" in given or not isinstance(data.get(key), str) or Path(data[key]).exists():
            continue
        absent = data.pop(key)
        if key == "validation":
            log.warning("the recipe's data.validation %s does not exist: no evaluation during training", absent)


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe, given by path or name. Raises InputError if there is none."""
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = RECIPES / f"{recipe}.toml"
    if packaged.is_file():
        return packaged
    names = recipe_names()
    raise InputError(
        "no such recipe", got=repr(str(recipe)), expected=f"a .toml file, or one of {', '.join(names)}",
        remedy=did_you_mean(path.stem, names),
    )  # fmt: skip


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def parse_config(values: Mapping[str, Any], source: str, given: Mapping[str, str] | None = None) -> TrainConfig:
    """Check the values of a recipe.

    Args:
        values: section -> key -> value, as parsed from TOML.
        source: where they come from, for error messages.
        given: `section.key` -> the override that set it, which error messages name instead of `source`.

    Returns:
        The configuration.

    Raises:
        InputError: a value is wrong.
    """
    try:
        # Through JSON, where a list is accepted as a tuple and everything else keeps its type.
        return TrainConfig.model_validate_json(json.dumps(values))
    except TypeError:
        raise InputError(
            f"{source}: got a date or a time, which no setting takes", remedy="Put quotes around it."
        ) from None
    except RecursionError:
        raise InputError(f"{source} cannot be read", got="nesting that is too deep") from None
    except ValidationError as error:
        raise _explained(error, source, given or {}) from None


def refuse_absent_paths(config: TrainConfig) -> None:
    """Raise InputError, naming the setting, if images or labels do not exist."""
    for name in ("images", "validation"):
        path = getattr(config.data, name)
        if path is not None and not exists(path):
            raise InputError(
                f"data.{name}: {path!r} is not a folder of images",
                got="a file" if Path(path).exists() else "nothing there",
                expected="a folder, a list, .tar or .parquet files, or a URL",
            )  # fmt: skip
    for store in config.data.stores:
        if not is_url(store) and not Path(store).is_dir():
            raise InputError(f"data.store: {store!r} is not a label store", got="no such folder")


def to_toml(config: TrainConfig) -> str:
    """The configuration as the text of a recipe."""
    lines: list[str] = []
    for name, section in config.model_dump(exclude_none=True).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in section.items() if value != {}]
        lines.append("")
    return "\n".join(lines)


def flat(config: TrainConfig) -> dict[str, Any]:
    """The configuration as `section.key` -> value."""
    return {f"{name}.{key}": value for name, section in config.model_dump().items() for key, value in section.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path} is not a recipe", got=f"{path.stat().st_size:,} bytes", expected=f"up to {MAX_BYTES:,}"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        got = "nesting that is too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not a TOML file", got=got) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error.strerror) from None


def _explained(error: ValidationError, source: str, given: Mapping[str, str]) -> InputError:
    """The first fault in one line, with the nearest valid name for a wrong one."""
    faults = error.errors(include_url=False)
    # Unknown names first: a misspelled name is often the cause of a missing one.
    fault = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    path = [str(part) for part in fault["loc"][:2]]
    same = [other for other in faults if other["loc"][:2] == fault["loc"][:2]]
    count = len({other["loc"][:2] for other in faults}) - 1
    name, more = ".".join(path), f" ({count} more)" if count else ""
    source = next((f"override {given[key][:80]!r}" for key in given if f"{key}.".startswith(f"{name}.")), source)
    kind, got = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        known = list(SECTIONS if len(path) == 1 else SECTIONS[path[0]].model_fields)
        what = "section" if len(path) == 1 else "key"
        remedy = did_you_mean(path[-1], known, or_all=True)
        return InputError(f"{source}: unknown {what} {name!r}{more}", remedy=remedy)
    if kind == "missing" and len(fault["loc"]) <= 2:
        how = f"Add a section [{name}]." if len(path) == 1 else f"Add it there, or pass {name}=… ."
        return InputError(f"{source}: {name} is missing{more}", remedy=how)
    if kind == "value_error":
        return InputError(f"{source}: {fault['ctx']['error']}{more}")
    if path == ["data", "store"]:  # of two types, and the faults of both would be confusing
        return InputError(f"{source}: {name}{more}", got=repr(got)[:80], expected="text in quotes, or a list of texts")
    name = ".".join(str(part) for part in fault["loc"][:3] if isinstance(part, str))
    remedy = "Remove the quotes." if kind in ("float_type", "int_type") and _is_number(got) else None
    return InputError(f"{source}: {name}{more}", got=repr(got)[:80], expected=_expected(same), remedy=remedy)


def _expected(faults: Sequence[Any]) -> str:
    """What a setting should have been. Several faults: it has several values, or may be of several types."""
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


def toml_value(value: Any) -> str:
    """A value in TOML's notation."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)  # the shortest form that reads back as the same number
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML, unlike JSON, needs DEL escaped
