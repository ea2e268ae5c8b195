"""What mkdocs does besides: links out of docs/ go to the repository, nothing comes from outside.

Links such as ``../mixtral_jax/model/axes.py`` work on GitHub as they stand. On the site they become
addresses of the repository, once the file is seen to exist.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/mixtral-jax/mixtral-jax/blob/main/"
_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
# What a browser fetches by itself when it shows a page; a link is fetched when it is clicked.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>|url\([\"']?(?:https?:)?//[^)]*\)"
    r"|@import [\"'](?:https?:)?//[^\"']*",
)
_CANONICAL = re.compile(r"rel=[\"']?(canonical|prev|next)")


class SiteError(Exception):
    """A link to nowhere, or a page that would fetch something from elsewhere."""


def rewritten(markdown: str, page: str) -> str:
    """The page's Markdown with its links out of docs/ as addresses of the repository.

    Args:
        page: its path within docs/.

    Raises:
        SiteError: a link to a file that is not there.
    """

    def replace(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), found[2]))
        is_shown = path.startswith("docs/") and path.endswith((".md", ".svg", ".png"))
        if is_shown or found[2].startswith("/"):
            return found[0]  # mkdocs checks these
        if path.startswith("../") or not (ROOT / path).exists():
            raise SiteError(f"docs/{page}: a link to {found[2]}, which is not there")
        return f"{found[1]}{REPOSITORY}{path}{found[3]}"

    return _LINK.sub(replace, markdown)


def fetched(text: str) -> list[str]:
    """What a page or style sheet would have a browser fetch from elsewhere."""
    return [found for found in _FETCHED.findall(text) if not _CANONICAL.search(found)]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return rewritten(markdown, page.file.src_uri)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Called by mkdocs at the end."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css") and (found := fetched(path.read_text("utf-8"))):
            raise SiteError(f"{path}: fetches {found[0]}")
