"""The comparisons of all selected layouts, over all files, so that those of one world size share a job."""

from pathlib import Path

import pytest

from tests.helpers.layouts import Comparisons, Layout


@pytest.fixture(scope="session")
def comparisons(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparisons:
    """Of every layout that a selected test has as its parameter."""
    parameters = [value for item in request.session.items if hasattr(item, "callspec") for value in item.callspec.params.values()]
    return Comparisons(corpus, tmp_path_factory.mktemp("layouts"), [value for value in parameters if isinstance(value, Layout)])
