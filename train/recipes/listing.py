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
    """One row a setting: key, kind, required, default, affects, meaning, and `value` where there is a recipe."""
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
    """All settings by section, as wide as the terminal; of a recipe its values, with the defaults that they replace."""
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
    """`  name = value`, and beside it, wrapped, what it means."""
    key = f"  {one.name}" if one.required and value is None else f"  {one.name} = {_shown(value)}"
    notes = []
    if one.required:
        notes.append("required")
    elif _shown(value) != _shown(one.default):
        notes.append(f"default {_shown(one.default)}")
    if "|" in one.kind and one.kind != "true|false":
        notes.append(one.kind)
    text = one.meaning + (f" ({'; '.join(notes)})" if notes else "")
    lines = textwrap.wrap(text, max(width - KEY_COLUMN, 30), break_long_words=False, break_on_hyphens=False)
    if len(key) < KEY_COLUMN - 1:
        lines[0] = key.ljust(KEY_COLUMN) + lines[0]
    else:
        lines[0] = f"{key}\n{' ' * KEY_COLUMN}{lines[0]}"
    return f"\n{' ' * KEY_COLUMN}".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return value if isinstance(value, str) else toml_value(value)
