"""Tests are collected alike in every worker."""

import pytest


def test_no_test_is_named_after_bytes(request: pytest.FixtureRequest) -> None:
    """pytest's own name for bytes is their escapes, which differ between workers where the time or a random number is
    in them."""
    assert not [item.nodeid for item in request.session.items if r"\x" in item.nodeid]
