"""One served export for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hunyuan_pretrain.serving.exports import load_local
from hunyuan_pretrain.serving.local_engine import LocalModel, Worker
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import Served, served_export, serving


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def vocabulary(export: Path) -> Vocabulary:
    return Vocabulary(export)


@pytest.fixture(scope="session")
def local(export: Path, vocabulary: Vocabulary) -> LocalModel:
    return load_local(export, None, "cpu", vocabulary)


@pytest.fixture(scope="session")
def served(local: LocalModel, vocabulary: Vocabulary) -> Iterator[Served]:
    with serving(Worker(local.steps, running=4), vocabulary) as running:
        yield running
