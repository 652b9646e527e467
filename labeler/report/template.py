"""The report's Jinja2 templates; they escape every text that is inserted, such as file and class names."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def fill(name: str, folder: Path = Path(__file__).parent, **values: Any) -> Markup:
    """Fills in a template.

    Args:
        name: The template's file name.
        folder: Its folder.
        **values: What it inserts; `Markup` is inserted as it is, all else is escaped.

    Returns:
        The HTML, which other templates insert as it is.
    """
    return Markup(_environment(folder).get_template(name).render(values))


@cache
def _environment(folder: Path) -> Environment:
    """Returns the templates of a folder; a name that was not passed is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["formatted"] = format
    return environment
