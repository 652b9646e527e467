"""MkDocs hooks: include pages from elsewhere, adapt links that leave docs/, and insert the help of all commands.

Links in docs/ are written as they work on GitHub. One to a file outside docs/ leads to the page that includes it; where
there is none, the site shows its text alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from scripts.documentation.commands import help_of_all

ROOT = Path(__file__).parents[2]

INCLUDED = {
    "labeler/FORMAT.md": "format.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
OUTSIDE = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
PATH = re.compile(r"[\w./-]+")
HELP = "<!-- help of every command -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with its includes, and with links that work on the site."""
    here = Path("docs") / page.file.src_uri
    if found := re.search(r"^<!-- include: (\S+) -->$", markdown, re.M):
        source = Path(os.path.normpath(here.parent / found[1]))
        # The source has a title of its own, and links as seen from its own folder.
        markdown, base = (ROOT / source).read_text(), source.parent
    else:
        base = here.parent
    if HELP in markdown:
        markdown = markdown.replace(HELP, _help_text())
    return LINK.sub(lambda link: _link(link, base, here.parent), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Raise ValueError if a page loads anything from another server, as the site must work offline."""
    if found := OUTSIDE.search(output):
        raise ValueError(f"{page.file.src_uri} loads something from another server: {found[0]}")
    return output


def _help_text() -> str:
    os.environ["COLUMNS"] = "90"
    return "\n\n".join(f"## `{name}`\n\n```text\n{text.rstrip()}\n```" for name, text in help_of_all())


def _link(link: re.Match[str], base: Path, here: Path) -> str:
    """A link as seen from `here`, a folder below docs/; `base` is the folder that its text was written for."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if ":" in target:
        return link[0]
    path = os.path.normpath(base / target)
    if path in INCLUDED:
        path = f"docs/{INCLUDED[path]}"
    if not path.startswith("docs/"):
        return f"`{text}`" if PATH.fullmatch(text) else text
    return f"[{text}]({os.path.relpath(path, here)}{anchor})"
