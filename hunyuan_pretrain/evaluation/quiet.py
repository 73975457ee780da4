"""Third-party packages that print progress and warnings of their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def stay_offline() -> None:
    """No package of Hugging Face may reach for its hub: call before they are imported, which is when they look."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within it, the package datasets shows no bars."""
    import datasets

    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Within it, no package shows a bar of progress: for a run, whose output is a log."""
    from tqdm.std import tqdm

    original = tqdm.__init__

    def without_bar(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **(options | {"disable": True}))

    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Within it, lm-eval logs errors only: it warns of what this project does on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
