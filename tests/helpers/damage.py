"""Ways to damage a file, drawn by hypothesis, and what a reader may do with the result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.data.errors import DataFormatError

_OVERWRITES = [
    b"\x00",
    b"\xff",
    b"\x00" * 8,
    b"\xff" * 8,
    (1 << 60).to_bytes(8, "little"),
    (1 << 31).to_bytes(8, "little"),
    b"9" * 40,
]
_WRONG_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    1 << 31,
    1 << 60,
    1 << 64,
    10**4290,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "\ud800",
    "\0",
]
_WRONG_VALUES += ["x" * 300, "x" * 5000, [], {}, [None], [[]], {"x": 1}]


def fuzzed(max_examples: int = 250) -> settings:
    """Hypothesis settings for tests of damaged files: the same examples in every run; FUZZ_EXAMPLES=5000 searches for
    new defects."""
    wanted = os.environ.get("FUZZ_EXAMPLES")
    return settings(
        max_examples=int(wanted or max_examples),
        derandomize=wanted is None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def damaged(draw: st.DrawFn, content: bytes, other: bytes = b"") -> bytes:
    """`content` truncated, overwritten, with bytes added or removed, or replaced by `other`."""
    at = draw(st.integers(0, len(content)))
    till = draw(st.integers(at, min(len(content), at + 64)))
    inserted = draw(st.sampled_from(_OVERWRITES) | st.binary(min_size=1, max_size=8))
    flipped = bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) if at < len(content) else b""
    return draw(
        st.sampled_from(
            [
                b"",
                other,
                content[:at],
                content[at:],
                content + inserted,
                content[:at] + flipped + content[at + 1 :],
                content[:at] + inserted + content[at:],
                content[:at] + inserted + content[at + len(inserted) :],
                content[:at] + content[till:],
                content[:at] + content[at:till] * 2 + content[till:],
                inserted,
            ]
        )
    )


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes, other: bytes = b"") -> bytes:
    """A JSON document with the damage of any file, or with a value dropped or of the wrong type, or nested without
    end."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content, other))
    document = json.loads(content)
    container: Any = document
    while True:
        key = draw(st.sampled_from(list(container) if isinstance(container, dict) else range(len(container))))
        if not (isinstance(container[key], (dict, list)) and container[key]) or draw(st.integers(0, 3)) == 0:
            break
        container = container[key]
    what = draw(st.integers(0, 9))
    if what == 0:
        return b"[" * 3000
    if what == 1:
        del container[key]
    else:
        container[key] = draw(st.sampled_from(_WRONG_VALUES))
    return json.dumps(document).encode()


@contextmanager
def in_place_of(file: Path, content: bytes) -> Iterator[None]:
    """Write `content` to the file, and restore the old content on exit. Each write creates a new file, because the old
    one may still be mapped."""
    before = file.read_bytes()
    try:
        file.unlink()
        file.write_bytes(content)
        yield
    finally:
        file.unlink()
        file.write_bytes(before)


@contextmanager
def read_or_refused(folder: Path) -> Iterator[None]:
    """Allow harmless damage; otherwise the error must be one for users that names a file or folder below `folder`."""
    message = None
    try:
        yield
    except (DataFormatError, ConfigError) as error:
        message = str(error)
    assert message is None or str(folder) in message, message
