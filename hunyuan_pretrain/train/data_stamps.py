"""Which data files of a run have been read and had the SHA-256 of their manifest, and how each looked before that:
RUN_DIR/verified_data.json. A later start of the run reads only the others.

A file looks changed if its length, its time of modification, its inode or its time of change differs. The last one is
set by the system at every write, rename and change of times, and by no program; a copy has another inode. So a stamp
does not outlive what it was made of, except where a disk loses bits by itself:
runtime.verify_data=digests_at_every_start finds that.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_pretrain.data.folders import write_file

FILE = "verified_data.json"
FORMAT = "hunyuan-verified-data 1"
SETTLED_S = 60.0
"""A file that was changed less than this ago gets no stamp: a second change could bear the same time. Times of files
are exact to 2 s at worst; the rest is for a file server whose clock is wrong."""


class Stamps:
    """The stamps of a run, on rank 0. How a file looks is noted before it is read, so a change during or after the
    reading shows."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._before: dict[str, list[Any]] = {}
        self._is_changed = False

    def bits_of_unread(self, files: Mapping[Path, str | None]) -> bytes:
        """One bit for each file, the lowest of the first byte for the first: whether it has to be read. `files`: path
        -> SHA-256."""
        known, bits = self._read(), bytearray(-(-len(files) // 8))
        self._before, settled = {}, time.time_ns() - int(SETTLED_S * 1e9)
        for number, (file, digest) in enumerate(files.items()):
            found = _looks(file)
            if found is not None and known.get(str(file)) == [*found, digest]:
                self._before[str(file)] = [*found, digest]
                continue
            bits[number // 8] |= 1 << number % 8
            if found is not None and max(found[1], found[2]) < settled:
                self._before[str(file)] = [*found, digest]
        self._is_changed = self._before != known
        return bytes(bits)

    def keep(self) -> None:
        """Write the stamps, once every file is known to be right. Where that is not possible, the next start reads
        again."""
        if self._is_changed:
            try:
                write_file(self._path, json.dumps({"format": FORMAT, "files": self._before}).encode())
            except OSError:
                return

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
            return {}
        return dict(found["files"])


def _looks(file: Path) -> list[int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
