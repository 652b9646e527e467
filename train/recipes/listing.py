"""Every setting of a recipe with its value, its default and its meaning, for `fit --help` and `recipes NAME`."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict
from typing import Any

from labeler.base.settings import SettingInfo, settings_of
from train.recipes.config import SECTIONS, TrainConfig
from train.recipes.recipe import flat, toml_value

KEY_COLUMN = 36
WIDEST = 120


def setting_rows(config: TrainConfig | None = None) -> list[dict[str, Any]]:
    """All settings, one row each.

    Args:
        config: a recipe, for its values; None: none.

    Returns:
        Rows with key, kind, required, default, affects, meaning, and with a recipe its value.
    """
    values = {} if config is None else flat(config)
    rows = []
    for section, group in SECTIONS.items():
        for one in settings_of(group):
            key = f"{section}.{one.name}"
            rows.append({"key": key, **{k: v for k, v in asdict(one).items() if k != "name"}})
            if config is not None:
                rows[-1]["value"] = values[key]
    return rows


def listing(config: TrainConfig | None = None) -> str:
    """All settings by section as text, wrapped to the terminal.

    Args:
        config: a recipe, whose values are listed with the defaults that they replace; None: the defaults.

    Returns:
        The text.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    values = {} if config is None else flat(config)
    parts = []
    for section, group in SECTIONS.items():
        parts.append(f"{section}: {(group.__doc__ or '').splitlines()[0]}")
        for one in settings_of(group):
            parts.append(_entry(one, values.get(f"{section}.{one.name}", one.default), width))
        parts.append("")
    return "\n".join(parts)


def _entry(one: SettingInfo, value: Any, width: int) -> str:
    """`  name = value`, and beside it its meaning, wrapped."""
    key = f"  {one.name}" if one.required and value is None else f"  {one.name} = {_text(value)}"
    notes = []
    if one.required:
        notes.append("required")
    elif _text(value) != _text(one.default):
        notes.append(f"default {_text(one.default)}")
    if "|" in one.kind and one.kind != "true|false":
        notes.append(one.kind)
    text = one.meaning + (f" ({'; '.join(notes)})" if notes else "")
    lines = textwrap.wrap(text, max(width - KEY_COLUMN, 30), break_long_words=False, break_on_hyphens=False)
    if len(key) < KEY_COLUMN - 1:
        lines[0] = key.ljust(KEY_COLUMN) + lines[0]
    else:
        lines[0] = f"{key}\n{' ' * KEY_COLUMN}{lines[0]}"
    return f"\n{' ' * KEY_COLUMN}".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else toml_value(value)
