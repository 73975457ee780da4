"""How often a step passes over gradients, weights and moments after the last backward pass: the table of
docs/benchmarks.md."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.benchmarks.optimizer_bytes import count_cases
from tests.helpers.ranks import run_ranks

TRANSFORMER_ENGINE = {
    # zeros, gradient copy, norm, clipping, Adam, conversions of moments, weight copy, average
    "default": (4, 0, 4, 8, 28, 0, 6, 0),
    "default, bf16 gradients": (2, 6, 4, 8, 28, 0, 6, 0),
    "precision-aware": (4, 0, 4, 8, 28, 0, 0, 0),
    "precision-aware, bf16 gradients": (2, 0, 2, 4, 26, 0, 0, 0),
    "precision-aware, bf16 moments": (4, 0, 4, 8, 20, 0, 0, 0),
    "precision-aware, bf16 moments and gradients": (2, 0, 2, 4, 18, 0, 0, 0),
    "default, with average": (4, 0, 4, 8, 28, 0, 6, 12),
    "precision-aware, with average": (4, 0, 4, 8, 28, 0, 0, 36),
}
ADAM, CONVERSIONS = 4, 5


def bytes_per_weight(corpus: Path, with_transformer_engine: bool) -> dict[str, tuple[int, ...]]:
    from tests.benchmarks.optimizer_bytes import PASSES

    (found,) = run_ranks(1, count_cases, corpus, with_transformer_engine)
    return {case: tuple(round(passes.get(name, 0.0)) for name in PASSES) for case, passes in found.items()}


@pytest.mark.slow
def test_passes_with_transformer_engine(corpus: Path, transformer_engine: None) -> None:
    expected = dict(TRANSFORMER_ENGINE)
    if not os.environ["TRANSFORMER_ENGINE_FOLDER"].endswith("newest"):
        # 2.11 converts bf16 moments to fp32 and back, outside its kernel; 2.20 reads and writes them there
        for case, passes in expected.items():
            if "bf16 moments" in case:
                expected[case] = (*passes[:ADAM], passes[ADAM] + 8, 32, *passes[CONVERSIONS + 1 :])
    assert bytes_per_weight(corpus, True) == expected


@pytest.mark.slow
def test_torchs_adam_clips_in_the_pass_that_updates(corpus: Path) -> None:
    """Where Transformer Engine cannot be imported. The kernel writes the gradients that it scales."""
    found = bytes_per_weight(corpus, False)
    assert found["default"] == (4, 0, 4, 0, 32, 0, 6, 0)
    assert found["default, bf16 gradients"] == (2, 6, 4, 0, 32, 0, 6, 0)
