"""A griffe extension: aligned lists in docstrings become Markdown lists.

name         what it means,
             on as many lines as it takes
other, names  the same
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ENTRY = re.compile(r"(\S+(?:,? \S+)*?) {2,}(\S.*)")


class AlignedLists(Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)


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
