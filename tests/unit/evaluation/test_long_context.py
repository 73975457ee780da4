"""Scores by depth and length, losses of the right answer, and bits per byte by position, of models whose answers are
known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.evaluation import EvaluationError, long_context, positions
from hunyuan_pretrain.evaluation.long_context import Plan
from hunyuan_pretrain.evaluation.opened import Opened
from hunyuan_pretrain.evaluation.scoring import Item, Read, pack, sequence_item
from tests.helpers.tiny_export import write_tiny_tokenizer

SEEN, UNSEEN = math.log(0.5), math.log(0.01)


class Reader:
    """Gives a token that it has read before probability 0.5, and any other 0.01; `reach` tokens back."""

    max_length = 1024
    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self._reach = reach

    def score(self, items: Sequence[Item], num_ids: int | None = None) -> list[Read]:
        found = []
        for item in items:
            seen = [set(item.tokens[max(0, at + 1 - self._reach) : at + 1]) for at in item.positions]
            logprobs = [SEEN if target in before else UNSEEN for target, before in zip(item.targets, seen, strict=True)]
            found.append(
                Read(torch.tensor(logprobs, dtype=torch.float64), torch.zeros(len(logprobs), dtype=torch.int64))
            )
        return found


def opened(tmp_path: Path, reach: int) -> Opened:
    tokenizer = Tokenizer.load(write_tiny_tokenizer(tmp_path))

    def encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        return [*([] if add_special_tokens is False else [tokenizer.start_id]), *tokenizer.encode(text)]

    lm: Any = SimpleNamespace(tok_encode=encode, prefix_token_id=tokenizer.start_id, max_length=Reader.max_length)
    return Opened(lm, Reader(reach), None, tokenizer.token_bytes, {})


def test_bits_per_byte_fall_where_the_context_helps(tmp_path: Path) -> None:
    """The text says 60 different bytes, then 340 times one, then the 60 again: 400 tokens back."""
    first = bytes(range(33, 93)).decode()
    records = positions.run(opened(tmp_path, 500), [first + "~" * 388 + first], short_context=64)
    by_range = {(record["begin"], record["end"]): record for record in records}
    assert list(by_range) == [(0, 64), (64, 128), (128, 256), (256, 512)]
    assert sum(record["bytes"] for record in records) == 508
    begin, end = by_range[0, 64], by_range[256, 512]
    assert begin["bits_per_byte"] == pytest.approx((61 * math.log2(100) + 2) / 63)
    assert begin["with_short_context"] is None
    assert end["bits_per_byte"] == pytest.approx(1.0), "all were read before"
    assert end["with_short_context"] == pytest.approx((60 * math.log2(100) + 193) / 253, rel=0.02)
    assert by_range[64, 128]["with_short_context"] == by_range[64, 128]["bits_per_byte"], "it is all there is"


def test_long_texts_are_read_in_pieces_up_to_a_number_of_tokens(tmp_path: Path) -> None:
    records = positions.run(opened(tmp_path, 8), ["~" * 3000], short_context=64, max_tokens=2048)
    assert sum(record["bytes"] for record in records) == 2 * 1023
    for most, read in ((1500, 1023 + 475), (700, 699), (1025, 1023), (2, 1)):
        records = positions.run(opened(tmp_path, 8), ["~" * 3000], short_context=64, max_tokens=most)
        assert sum(record["bytes"] for record in records) == read, "the last piece is cut; each has a first token"


def test_texts_are_read_from_lines_or_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "b.txt").write_text("x\ny\n")
    (tmp_path / "c.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "d.txt").write_text("")
    assert positions.read_texts(tmp_path / "a.jsonl") == ["x", "y"]
    assert positions.read_texts(tmp_path / "b.txt") == ["x\ny\n"]
    for name in ("c.jsonl", "d.txt", "none.txt"):
        with pytest.raises(EvaluationError, match=name):
            positions.read_texts(tmp_path / name)


class Finder(Reader):
    """Is sure of the next token if the last three tokens and it stand together earlier in the text."""

    max_length = 4096

    def score(self, items: Sequence[Item], num_ids: int | None = None) -> list[Read]:
        found = []
        for item in items:
            logprobs = []
            for at, target in zip(item.positions, item.targets, strict=True):
                last = [*item.tokens[at - 2 : at + 1], target]
                there = any(item.tokens[place : place + 4] == last for place in range(at - 6))
                logprobs.append(-0.1 if there else -3.0)
            found.append(
                Read(torch.tensor(logprobs, dtype=torch.float64), torch.zeros(len(logprobs), dtype=torch.int64))
            )
        return found


def test_the_loss_of_the_right_answer_shows_that_the_needle_is_found(tmp_path: Path) -> None:
    model = opened(tmp_path, 0)
    model = Opened(model.lm, Finder(0), None, model.token_bytes, {})
    plan = Plan(("niah_single_1",), ("en",), (2000,), (0.0, 1.0), samples=2, by_loss=True)
    records = long_context.run(model, plan)
    assert [record["depth"] for record in records] == [0.0, 1.0]
    for record in records:
        assert record["loss"] < 0.2
        assert record["loss_without"] > 1.5
    with pytest.raises(EvaluationError, match="lengths 8192: the model has 4096 positions"):
        long_context.run(model, Plan(lengths=(8192,)))


def test_packs_hold_every_text_once_within_the_budget() -> None:
    lengths = [5, 90, 10, 10, 40, 200, 1]
    packs = pack(lengths, 100)
    assert sorted(member for one in packs for member in one.members) == list(range(len(lengths)))
    assert all(one.num_tokens == sum(lengths[member] for member in one.members) for one in packs)
    assert all(one.num_tokens <= 100 or len(one.members) == 1 for one in packs)
    assert pack([], 100) == []


def test_an_item_reads_each_token_after_those_before_it() -> None:
    assert sequence_item([7, 8, 9, 10], 2) == Item([7, 8, 9], [1, 2], [9, 10])
