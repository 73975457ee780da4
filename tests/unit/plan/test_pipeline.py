"""The simulated pipeline schedule against closed formulas. Its order is compared with that of core's schedules in
tests/parallel/test_pipeline_order.py."""

from __future__ import annotations

from collections import Counter

import pytest

from hunyuan_pretrain.config.schema import ParallelConfig
from hunyuan_pretrain.plan.activations import passes_in_flight
from hunyuan_pretrain.plan.pipeline import Pass, Timeline, program, simulate

LAYOUTS = [
    (2, 1, 4),
    (4, 1, 8),
    (4, 1, 2),
    (8, 1, 8),
    (2, 2, 4),
    (4, 2, 4),
    (4, 2, 8),
    (3, 3, 9),
    (8, 4, 16),
    (2, 4, 2),
]


def equal_stages(ranks: int, chunks: int, micro_batches: int, message_s: float = 0.0) -> Timeline:
    """A micro-batch takes a rank 1 s forward and 2 s backward."""
    stages = ranks * chunks
    return simulate([1 / chunks] * stages, [2 / chunks] * stages, ranks, micro_batches, message_s)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), LAYOUTS)
def test_the_bubble_of_equal_stages_is_the_closed_formula(ranks: int, chunks: int, micro_batches: int) -> None:
    timeline = equal_stages(ranks, chunks, micro_batches)
    assert timeline.bubble == pytest.approx((ranks - 1) / (chunks * micro_batches))
    assert timeline.seconds == pytest.approx(3 * micro_batches + 3 * (ranks - 1) / chunks)
    assert timeline.busy == pytest.approx([3 * micro_batches] * ranks)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), LAYOUTS)
def test_every_pass_runs_once_after_the_one_it_needs(ranks: int, chunks: int, micro_batches: int) -> None:
    timeline = equal_stages(ranks, chunks, micro_batches, message_s=0.01)
    ends: dict[tuple[str, int, int], float] = {}
    starts: dict[tuple[str, int, int], float] = {}
    for rank, slots in enumerate(timeline.slots):
        assert Counter(slot.what for slot in slots) == Counter(
            Pass(kind, chunk, number)  # type: ignore[arg-type]
            for kind in ("forward", "backward")
            for chunk in range(chunks)
            for number in range(micro_batches)
        )
        for slot in slots:
            key = slot.what.kind, slot.what.chunk * ranks + rank, slot.what.micro_batch
            starts[key], ends[key] = slot.start, slot.end
    last = ranks * chunks - 1
    for (kind, stage, number), start in starts.items():
        if kind == "forward" and stage > 0:
            assert start >= ends["forward", stage - 1, number] + 0.01
        if kind == "backward":
            assert start >= (
                ends["forward", last, number] if stage == last else ends["backward", stage + 1, number] + 0.01
            )


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), LAYOUTS)
def test_as_many_passes_wait_as_a_rank_is_ahead(ranks: int, chunks: int, micro_batches: int) -> None:
    """One more than the passes before its first backward pass; with several chunks a rank runs all but its last chunk
    once before, and two passes for every rank behind it."""
    parallel = ParallelConfig(pipeline_model_parallel_size=ranks, virtual_pipeline_model_parallel_size=chunks)
    timeline = equal_stages(ranks, chunks, micro_batches)
    for rank in range(ranks):
        behind = ranks - 1 - rank
        ahead = 2 * behind + (chunks - 1) * ranks if chunks > 1 else behind
        assert timeline.in_flight[rank] == min(ahead + 1, chunks * micro_batches)
        assert max(map(sum, passes_in_flight(parallel, micro_batches, rank))) == timeline.in_flight[rank]


def test_the_slowest_stage_sets_the_pace() -> None:
    """The last stage, with the loss, takes twice as long. The others wait for it; it waits for its first input, and the
    last gradient passes through the others after it."""
    timeline = simulate([1.0, 1.0, 2.0], [2.0, 2.0, 4.0], 3, 10)
    assert timeline.busy == (30, 30, 60)
    assert timeline.seconds == pytest.approx(2 + 60 + 4)
    assert timeline.bubble == pytest.approx(6 / 60)
    assert timeline.idle == pytest.approx((36 / 66, 36 / 66, 6 / 66))


def test_messages_of_one_chunk_are_waited_for_and_those_of_several_overlap() -> None:
    """In 1F1B a rank waits for both messages of each micro-batch, so a message costs more than its time once."""
    message = 0.1
    assert equal_stages(4, 1, 16, message).seconds > equal_stages(4, 1, 16).seconds + 16 * message
    added = equal_stages(4, 2, 16, message).seconds - equal_stages(4, 2, 16).seconds
    assert 0 < added < 16 * message


def test_one_rank_passes_no_messages() -> None:
    assert program(0, 1, 1, 2) == [Pass(kind, 0, number) for number in range(2) for kind in ("forward", "backward")]  # type: ignore[arg-type]
    assert simulate([1.0], [2.0], 1, 5, message_s=9.0).seconds == 15
