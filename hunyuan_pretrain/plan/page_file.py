"""A page as one HTML file that loads nothing, and where it may be written."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.plan.charts import Html, element

HEAD_BYTES = 512
"""`PageFile.marker` is within these."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser lets a page do: nothing but use its own style sheet, and run the script whose digest is added."""


@dataclass(frozen=True)
class PageFile:
    """The pages of one command."""

    command: str
    option: str
    """With which a file is named."""
    content: str
    """What a page is of."""

    @property
    def marker(self) -> str:
        """A file with this in its head is such a page, and may be replaced by one."""
        return f'<meta name="generator" content="hunyuan-pretrain {self.command}">'

    def document(
        self, title: str, sections: Iterable[Html], style: str, refresh_s: int | None = None, script: str = ""
    ) -> str:
        """The page. refresh_s: seconds after which a browser reads it again. script: the only one that it runs."""
        policy, run = POLICY, ""
        if script:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            policy, run = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
        refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n'
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{self.marker}\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{refresh}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{element('title', title)}\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(sections)
            + f"\n</main>\n{run}</body>\n</html>\n"
        )

    def write(self, path: Path, text: str) -> None:
        """Write a page, all of it or none. Raises ConfigError."""
        self.check(path)
        try:
            write_whole(path, text)
        except OSError as error:
            raise self._refused(path, f"cannot be written: {error.strerror}", "choose another file") from None

    def check(self, path: Path) -> None:
        """Raise ConfigError if a page cannot go there: a page may be replaced, any other file not."""
        try:
            if not path.parent.is_dir():
                raise self._refused(path, "its folder does not exist", f"create {path.parent}, or choose another")
            if path.is_dir():
                raise self._refused(path, "is a folder", f"name a file, such as {path / self.command}.html")
            if path.exists():
                with path.open("rb") as file:
                    is_ours = self.marker.encode() in file.read(HEAD_BYTES)
                if not is_ours:
                    rule = f"exists and is no page of {self.content}"
                    raise self._refused(path, rule, "choose another name, or remove the file")
        except OSError as error:
            raise self._refused(path, f"cannot be read: {error.strerror}", "choose another file") from None

    def _refused(self, path: Path, rule: str, hint: str) -> ConfigError:
        return ConfigError(self.command, [Problem(self.option, str(path), rule, hint)])
