"""Tokens by source against the sequences that every step reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunyuan_pretrain.config.history import Segment, SourceFacts
from hunyuan_pretrain.report.sources import mixture_of, tokens_by_source
from tests.helpers.written_run import experiment

FACTS = {
    "/a": SourceFacts(digest="a", sequences=90, tokens=5_000, sequence_length=64),
    "/b": SourceFacts(digest="b", sequences=40, tokens=2_560, sequence_length=64),
}


def segment(first_step: int, sources: list[str], weights: list[float], **of_stages: Any) -> Segment:
    data = [{"path": path, "weight": weight, "max_epochs": 1.0} for path, weight in zip(sources, weights, strict=True)]
    made = experiment(Path("/run"), 30, stages__data=data, **{f"stages__{name}": of for name, of in of_stages.items()})
    facts = {path: FACTS[path] for path in sources}
    return Segment(first_step=first_step, experiment=made.model_dump(mode="json"), sources=facts)


def read_one_by_one(segments: list[Segment], num_steps: int) -> dict[str, dict[str, float]]:
    mixture, found = mixture_of(segments), {}
    for step in range(num_steps):
        piece = mixture.schedule.piece_of_step(step)
        batch = piece.stage.global_batch_sequences
        positions = piece.position_of((step - piece.first_step) * batch + np.arange(batch))
        numbers, _ = mixture.lookup(piece.lane, positions)
        counts = Counter(mixture.sources[number] for number in numbers.tolist())
        of_stage = found.setdefault(piece.stage.name, Counter())
        for path, count in counts.items():
            of_stage[path] += count * FACTS[path].tokens / FACTS[path].sequences
    return found


@pytest.mark.parametrize("num_steps", [1, 7, 12, 13, 30])
@pytest.mark.parametrize(
    "segments",
    [
        [segment(0, ["/a"], [1.0])],
        [segment(0, ["/a", "/b"], [2.0, 1.0])],
        [segment(0, ["/a", "/b"], [2.0, 1.0], skip_data_steps=[[3, 5], [9, 9]])],
        [segment(0, ["/a", "/b"], [2.0, 1.0]), segment(12, ["/a", "/b"], [1.0, 3.0], skip_data_steps=[[14, 15]])],
    ],
    ids=["one", "two", "skipped", "changed"],
)
def test_tokens_are_those_of_the_sequences_read(segments: list[Segment], num_steps: int) -> None:
    found = tokens_by_source(segments, num_steps)
    expected = read_one_by_one(segments, num_steps)
    assert found == {stage: pytest.approx(dict(of)) for stage, of in expected.items()}
    assert sum(map(len, found.values())) > 0


def test_a_history_that_says_nothing_of_its_sources_gives_nothing() -> None:
    assert tokens_by_source([], 5) == {}
    assert tokens_by_source([segment(0, ["/a"], [1.0]).model_copy(update={"sources": {}})], 5) == {}
