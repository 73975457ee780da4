"""Batches: the same global batch under every layout, and refusals before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_pretrain.data.balance import imbalance
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.loader import EvaluationLoader, MicroBatch, StepLoader, by_conversation
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import SampleOrder, positions_of_rank

DIGEST = "d" * 64


@pytest.fixture
def stages(packed: Callable[..., Path], numbered_documents: Callable[..., list]) -> list[dict]:
    a = str(packed("a", numbered_documents(60, 1), 16))
    b = str(packed("b", numbered_documents(40, 2), 16))
    c = str(packed("c", numbered_documents(50, 3), 32))
    return [
        {"name": "short", "data": [{"path": a, "weight": 2}, {"path": b}]},
        {
            "name": "long",
            "sequence_length": 32,
            "tokens": 32 * 4 * 3,
            "global_batch_sequences": 4,
            "data": [{"path": c}],
        },
    ]


def by_rank(batches: list[MicroBatch], sequence_length: int) -> dict[int, tuple]:
    """Each sequence of the micro-batches: its tensors, and its cu_seqlens counted from its own start."""
    found = {}
    for batch in batches:
        for i, position in enumerate(batch.sequence_ids.tolist()):
            part = slice(i * sequence_length, (i + 1) * sequence_length)
            cu_seqlens = [b - part.start for b in batch.cu_seqlens.tolist() if part.start <= b <= part.stop]
            columns = (batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.positions_T)
            found[position] = (*(tuple(column[part].tolist()) for column in columns), tuple(cu_seqlens))
    return found


def test_batch_order_is_independent_of_dp_size_and_micro_batch(experiment: Callable, stages: list[dict]) -> None:
    reference: list[dict] = []
    for dp_size, micro_batch in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        run = experiment([{**stage, "micro_batch_sequences": micro_batch} for stage in stages])
        loaders = [StepLoader(run, rank, dp_size, DIGEST) for rank in range(dp_size)]
        steps = []
        for step in range(loaders[0].num_steps):
            length = run.stages[loaders[0].order.schedule.stage_of_step(step)[0]].sequence_length
            ranks = [loader.micro_batches(step) for loader in loaders]
            assert len({len(batches) for batches in ranks}) == 1
            steps.append(by_rank([batch for batches in ranks for batch in batches], length))
        reference = reference or steps
        assert steps == reference
        for loader in loaders:
            loader.close()
    assert [len(step) for step in reference] == [8] * 5 + [4] * 3


def test_a_micro_batch_is_whole_sequences_one_after_the_other(experiment: Callable, stages: list[dict]) -> None:
    loader = StepLoader(experiment([{**stages[0], "micro_batch_sequences": 4}]), 1, 2, DIGEST)
    (batch,) = loader.micro_batches(0)
    assert batch.sequence_ids.tolist() == [4, 5, 6, 7]
    assert {len(column) for column in (batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.positions_T)} == {64}
    assert (batch.tokens_T.dtype, batch.loss_mask_T.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.float32,
        torch.int32,
    )
    assert {0, 16, 32, 48, 64} <= set(batch.cu_seqlens.tolist())
    sizes = batch.cu_seqlens.diff()
    assert (sizes > 0).all()
    assert batch.max_seqlen == sizes.max().item()
    assert batch.positions_T.tolist() == [position for size in sizes.tolist() for position in range(size)]


def test_steps_can_be_requested_in_any_order(experiment: Callable, stages: list[dict]) -> None:
    """A run that resumes at step 4, or goes back, gets the batches that a run from the start gets."""
    straight, jumping = (StepLoader(experiment(stages), 0, 1, DIGEST) for _ in range(2))
    expected = [by_rank(straight.micro_batches(step), 16) for step in range(5)]
    for step in (4, 0, 1, 3):
        assert by_rank(jumping.micro_batches(step), 16) == expected[step]


def test_steps_run_through_the_stages(experiment: Callable, stages: list[dict]) -> None:
    loader = StepLoader(experiment(stages), 0, 1, DIGEST)
    assert [loader.order.schedule.stage_of_step(step) for step in (0, 4, 5, 7)] == [(0, 0), (0, 4), (1, 0), (1, 2)]
    with pytest.raises(IndexError, match="step 8 of 8"):
        loader.micro_batches(8)


def test_an_error_of_the_reading_thread_reaches_the_caller(
    experiment: Callable, stages: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = StepLoader(experiment(stages), 0, 1, DIGEST)
    read = loader._read

    def fail_at_one(step: int) -> list[MicroBatch]:
        if step == 1:
            raise DataFormatError("the disk went away")
        return read(step)

    monkeypatch.setattr(loader, "_read", fail_at_one)
    loader.micro_batches(0)
    with pytest.raises(DataFormatError, match="the disk went away"):
        loader.micro_batches(1)


@pytest.mark.parametrize(
    ("change", "dp_size", "digest", "message"),
    [
        ({"data": [{"path": "nowhere"}]}, 1, DIGEST, "nowhere: no such folder; write it with `hunyuan-data pack`"),
        (
            {"sequence_length": 32},
            1,
            DIGEST,
            r"a: packed to sequences of 16 tokens, but stages\[0\] \(short\) has sequence_length=32; set it to "
            r"16, or run "
            r"`hunyuan-data pack --sequence-length 32`",
        ),
        ({}, 1, "e" * 64, r"a: tokenized with tokenizer dddddddddddd\.\.\., but this run has eeeeeeeeeeee"),
        (
            {},
            3,
            DIGEST,
            r"stages\[0\] \(short\): global_batch_sequences=8 is not a multiple of data-parallel size 3 x "
            r"micro_batch_sequences 1 = 3",
        ),
    ],
)
def test_opening_refuses(
    experiment: Callable, stages: list[dict], change: dict, dp_size: int, digest: str, message: str
) -> None:
    with pytest.raises(DataFormatError, match=message):
        StepLoader(experiment([{**stages[0], **change}]), 0, dp_size, digest)


def test_ids_beyond_the_embedding_are_refused(experiment: Callable, stages: list[dict]) -> None:
    with pytest.raises(
        DataFormatError, match=r"vocabulary of 1000 ids, but model\.padded_vocab_size=512; set it to at least 1000"
    ):
        StepLoader(experiment(stages, padded_vocab_size=512), 0, 1, DIGEST)


@pytest.mark.parametrize(("dp_size", "micro_batch", "limit"), [(1, 1, None), (2, 1, 5), (4, 2, 5), (3, 4, None)])
def test_evaluation_takes_each_sequence_once_and_ranks_stay_in_step(
    experiment: Callable,
    packed: Callable,
    numbered_documents: Callable,
    stages: list[dict],
    dp_size: int,
    micro_batch: int,
    limit: int | None,
) -> None:
    folder = packed("held_out", numbered_documents(30, 9), 16)
    run = experiment(stages, {"data": str(folder), "max_sequences": limit, "micro_batch_sequences": micro_batch})
    loaders = [EvaluationLoader(run, rank, dp_size, DIGEST) for rank in range(dp_size)]
    assert len({len(loader) for loader in loaders}) == 1
    assert loaders[0].num_sequences == (limit or len(loaders[0]._dataset))
    found = by_rank([batch for loader in loaders for batch in loader], 16)
    real = {position: value for position, value in found.items() if position < loaders[0].num_sequences}
    assert sorted(found) == list(range(len(loaders[0]) * dp_size * micro_batch))
    for position, (tokens, *_rest) in real.items():
        assert list(tokens) == loaders[0]._dataset[position].tokens.tolist()
    for position in found.keys() - real.keys():
        assert np.sum(found[position][2]) == 0
        assert found[position][4] == (0, 16)


@pytest.mark.parametrize("balance", ["off", "deal", "group"])
def test_no_sample_is_lost_or_repeated_when_a_run_restarts_with_other_ranks(
    packed: Callable[..., Path], numbered_documents: Callable[..., list], experiment: Callable, balance: str
) -> None:
    """Random restarts, each with another data-parallel size and micro-batch: together the steps take each sequence of
    the epoch exactly once."""
    source = str(packed("a", numbered_documents(200, 1), 16))
    size = len(PackedDataset(source))
    batch = 8
    steps = size // batch
    stage = {"name": "s", "tokens": steps * batch * 16, "data": [{"path": source}], "balance_attention": balance}
    whole = SampleOrder(experiment([stage]), DIGEST)
    rng = np.random.default_rng(3)
    step, seen = 0, []
    while step < steps:
        dp_size, micro_batch = [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)][rng.integers(5)]
        run = experiment([{**stage, "micro_batch_sequences": micro_batch}])
        loaders = [StepLoader(run, rank, dp_size, DIGEST) for rank in range(dp_size)]
        for _ in range(min(int(rng.integers(1, 4)), steps - step)):
            micro_batches = [loader.micro_batches(step) for loader in loaders]
            positions = sorted(
                int(position) for batches in micro_batches for one in batches for position in one.sequence_ids
            )
            assert positions == list(range(batch))
            rows = [row for _, row in whole.sequences(step, np.arange(batch))]
            for batches in micro_batches:
                for one in batches:
                    expected = [whole.datasets[source][rows[position]].tokens for position in one.sequence_ids.tolist()]
                    assert one.tokens_T.tolist() == np.concatenate(expected).tolist()
            seen += rows
            step += 1
        for loader in loaders:
            loader.close()
    assert len(seen) == len(set(seen)) == steps * batch


def test_assigning_by_cost_balances_what_runs_side_by_side(
    packed: Callable[..., Path], experiment: Callable, numbered_documents: Callable[..., list]
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 900, 2 ** rng.integers(1, 8)).tolist() for _ in range(400)]
    source = str(packed("a", documents, 128))
    worst = {}
    for balance in ("off", "deal", "group"):
        stage = {
            "name": "s",
            "sequence_length": 128,
            "tokens": 128 * 16 * 4,
            "global_batch_sequences": 16,
            "data": [{"path": source}],
        }
        if balance == "group":
            stage["balance_group_sequences"] = 4
        order = SampleOrder(experiment([{**stage, "balance_attention": balance}]), DIGEST)
        slowdowns = []
        for step in range(order.num_steps):
            costs = order.costs(step)
            of_ranks = np.stack(
                [costs[positions_of_rank(order, step, rank, 4)].sum(axis=1) for rank in range(4)], axis=1
            )
            slowdowns.append(imbalance(of_ranks).slowdown)
        worst[balance] = max(slowdowns)
    assert worst["deal"] < worst["off"]
    assert worst["group"] < worst["deal"] < 1.5


def test_by_conversation_gives_each_document_with_a_label_the_same_weight() -> None:
    mask = torch.tensor([0.0, 1, 1, 0, 0, 0, 1, 1, 1, 1])
    batch = MicroBatch(mask, mask, mask, mask, torch.tensor([0, 4, 6, 10], dtype=torch.int32), 4, torch.tensor([0]))
    weighted, number = by_conversation(batch)
    assert number == 2
    assert weighted.loss_mask_T.tolist() == [0, 0.5, 0.5, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]
    assert batch.loss_mask_T is mask
