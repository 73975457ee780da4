"""The tiny corpus, made once."""

from pathlib import Path

import pytest

from tests.helpers.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tokenizer/, train/ and heldout/ of about 500 short sequences."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")
