"""The chat page: one HTML file made of three sources, which loads nothing else.

Its Content-Security-Policy names the digests of its script and its style, so the browser runs no other script, whatever
a model or a user writes. Text becomes nodes of text only; `require-trusted-types-for` makes the browser refuse anything
that would parse it as HTML.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

__all__ = ["ChatPage"]

SOURCES = Path(__file__).parent / "page"


class ChatPage(NamedTuple):
    """The page and the headers that it needs."""

    html: bytes
    headers: dict[str, str]

    @classmethod
    def load(cls) -> ChatPage:
        """Join the sources."""
        html, style, script = (
            (SOURCES / name).read_text(encoding="utf-8") for name in ("chat.html", "chat.css", "chat.js")
        )
        whole = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
        policy = (
            f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        )
        return cls(whole.encode(), {"Content-Security-Policy": policy})


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
