"""A griffe extension: aligned lists in docstrings become Markdown lists.

name         what it means,
             on as many lines as it takes
other, names  the same
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Class, ExprCall, ExprKeyword, Extension, Object

ENTRY = re.compile(r"(\S+(?:,? \S+)*?) {2,}(\S.*)")


class MeaningLists(Extension):
    """Rewrites docstrings, and gives the fields of settings their plain defaults."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        settings = {name: field for name, field in cls.members.items() if _is_option(field)}
        meanings = [f"* **{name}**: {_take_meaning(field)}" for name, field in settings.items()]
        if meanings and cls.docstring:
            cls.docstring.value += "\n\n" + "\n".join(meanings)


def _is_option(member: Object) -> bool:
    value = getattr(member, "value", None)
    return isinstance(value, ExprCall) and str(value.function) == "option"


def _take_meaning(field: Attribute) -> str:
    """The meaning of a field that is an `option(…)`, which leaves its default as the field's value."""
    meaning, *rest = [argument for argument in field.value.arguments if not isinstance(argument, ExprKeyword)]
    field.value = rest[0] if rest else None
    return ast.literal_eval(str(meaning))


def as_lists(text: str) -> str:
    """`text` with each aligned entry as a list item, set off from the prose around it."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if entry := ENTRY.fullmatch(line):
            lines += [*([] if inside or not lines else [""]), f"* **{entry[1]}**: {entry[2]}"]
            inside = True
        elif inside and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            lines += ["", line] if inside else [line]
            inside = False
    return "\n".join(lines)
