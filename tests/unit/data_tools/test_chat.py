"""Conversations: what of them is trained on, what is refused, and that packing never cuts a turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_tools.chat import ChatForm
from data_tools.cli import main
from data_tools.datatrove_pipeline import tokenize_on
from data_tools.inspection import inspect
from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from data_tools.tokenized_shard import Allowance
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return str(path)


RECORDS = [
    {"messages": [SYSTEM, *turns("the one", "the two", "the three", "the four")]},
    {"prompt": "a question <|eos|>", "completion": "an <|endoftext|> answer 中"},
    {"messages": [{"role": "system", "content": ""}, *turns("hello", "the reply")]},
]


def spans(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of marked tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    tokenize([write(folder / "chats.jsonl", RECORDS)], tokenizer_folder, str(folder / "tokenized"), form=ChatForm())
    return folder / "tokenized"


def test_ids_are_those_of_the_chat_template(chats: Path, tokenizer_folder: str) -> None:
    tokenizer, dataset = Tokenizer.load(tokenizer_folder), TokenizedDataset(chats)
    default = {"role": "system", "content": "You are a helpful assistant."}
    expected = [RECORDS[0]["messages"], [default, *turns(*RECORDS[1].values())], RECORDS[2]["messages"]]
    assert [dataset.document(i).tolist() for i in range(3)] == [tokenizer.apply_chat(one) for one in expected]
    # control tokens in contents are ordinary characters
    assert dataset.document(1).tolist().count(tokenizer.eos_id) == 1
    assert tokenizer.end_id not in dataset.document(1)
    assert dataset.chat == {"system_prompt": default["content"], "train_end_of_user": False}


@pytest.mark.parametrize("materialize", [False, True])
def test_the_first_token_of_an_answer_and_its_eos_are_labels_and_nothing_else_is(
    chats: Path, tokenizer_folder: str, tmp_path: Path, materialize: bool
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    manifest = pack([str(chats)], 256, str(tmp_path / "packed"), seed=1, materialize=materialize)
    dataset = PackedDataset(tmp_path / "packed")
    (sequence,) = [dataset[i] for i in range(len(dataset))]
    labels = sequence.labels[sequence.loss_mask]
    eos = "<|eos|>"
    assert tokenizer.decode(labels) == f"the two{eos}the four{eos}an <|endoftext|> answer 中{eos}the reply{eos}"
    # shifted once: the token before the first label of an answer is the end of the question
    before = sequence.tokens[np.flatnonzero(np.diff(sequence.loss_mask.astype(np.int8), prepend=0) == 1)]
    assert set(before.tolist()) == {tokenizer.special_ids["<|extra_0|>"]}
    assert (sequence.labels[:-1][sequence.loss_mask[:-1]] == sequence.tokens[1:][sequence.loss_mask[:-1]]).all()
    assert manifest["target_tokens"] == len(labels)
    assert manifest["cut_documents"] == 0
    dataset.index.verify()


def test_the_releases_habit_trains_on_the_end_of_the_question_too(tmp_path: Path, tokenizer_folder: str) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    form = ChatForm(system_prompt="", train_end_of_user=True)
    tokenize([write(tmp_path / "c.jsonl", RECORDS[1:2])], tokenizer_folder, str(tmp_path / "t"), form=form)
    shard = TokenizedDataset(tmp_path / "t").shards[0]
    assert shard.targets is not None
    assert spans(shard.tokens, shard.targets, tokenizer) == ["<|extra_0|>an <|endoftext|> answer 中<|eos|>"]
    assert tokenizer.decode(shard.tokens[:2]).startswith("<|startoftext|>a")


def test_conversations_with_other_system_prompts_are_packed_apart(tmp_path: Path, tokenizer_folder: str) -> None:
    for name, prompt in (("a", "Be brief."), ("b", "")):
        path = write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x"}])
        tokenize([path], tokenizer_folder, str(tmp_path / name), form=ChatForm(system_prompt=prompt))
    with pytest.raises(DataFormatError, match=r"b: conversations tokenized with .* those of .*a with .*Be brief"):
        pack([str(tmp_path / "a"), str(tmp_path / "b")], 80, str(tmp_path / "p"), seed=1)
    pack([str(tmp_path / "b")], 80, str(tmp_path / "p"), seed=1)
    assert PackedDataset(tmp_path / "p").index.system_prompt == ""


BAD = [
    ("{", "invalid JSON"),
    ([], "a JSON object is expected"),
    ({"text": "x"}, 'neither "messages" nor "prompt" and "completion" (fields: text)'),
    ({"messages": "x"}, '"messages" holds str'),
    ({"messages": []}, "an empty conversation"),
    ({"messages": [SYSTEM]}, "no assistant message"),
    ({"messages": turns("q")}, "no assistant message"),
    ({"messages": turns("q", "a", "q")}, "message 3: the last message is the user's"),
    ({"messages": [*turns("q"), *turns("q", "a")]}, "message 2: role 'user', expected 'assistant'"),
    ({"messages": [*turns("q", "a"), SYSTEM]}, "message 3: role 'system', expected 'user'"),
    ({"messages": turns("q", " ")}, "message 2: the assistant's message is empty"),
    ({"messages": [{"role": "user", "content": ["q"]}]}, "message 1: its content holds list"),
    ({"messages": [{"from": "human"}]}, 'message 1: expected {"role", "content"}'),
    ({"prompt": "q", "completion": 3}, '"completion" holds int'),
    ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
]


def test_each_bad_record_has_one_message_with_its_line(tmp_path: Path, tokenizer_folder: str) -> None:
    path = write(tmp_path / "bad.jsonl", [RECORDS[1], *(record for record, _ in BAD)])
    output = tmp_path / "out"
    allowed = Allowance(number=len(BAD))
    (manifest,) = tokenize([path], tokenizer_folder, str(output), form=ChatForm(), max_rejects=allowed)
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert manifest["rejects"] == len(BAD)
    assert [one["where"] for one in rejects] == [f"{path}: line {number}" for number in range(2, len(BAD) + 2)]
    for reject, (_, reason) in zip(rejects, BAD, strict=True):
        assert reason in reject["reason"]
    with pytest.raises(DataFormatError, match="line 2: invalid JSON"):
        tokenize([path], tokenizer_folder, str(tmp_path / "none"), form=ChatForm())
    assert not (tmp_path / "none").exists()


def test_text_files_hold_no_conversations(tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataFormatError, match="--chat reads records"):
        tokenize([str(tmp_path / "a.txt")], tokenizer_folder, str(tmp_path / "o"), form=ChatForm())


LONG = {"messages": turns("q1", "a1 " * 10, "q2", "a2 " * 10, "q3", "a3 " * 10)}


@pytest.fixture(scope="module")
def long_chats(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """Three conversations: one of 34 tokens per turn, one that fits, one whose first answer is too long."""
    folder = tmp_path_factory.mktemp("long")
    path = write(folder / "c.jsonl", [LONG, *({"prompt": "x", "completion": answer} for answer in ("y", "y" * 99))])
    tokenize([path], tokenizer_folder, str(folder / "t"), form=ChatForm(system_prompt=""))
    return folder / "t"


def test_a_conversation_that_is_too_long_is_refused(long_chats: Path, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="2 conversations have more than --sequence-length 80 tokens"):
        pack([str(long_chats)], 80, str(tmp_path / "p"), seed=1)
    with pytest.raises(DataFormatError, match="would cut conversations"):
        pack([str(long_chats)], 80, str(tmp_path / "p"), seed=1, method="chop")
    with pytest.raises(DataFormatError, match="every conversation is longer"):
        pack([str(long_chats)], 4, str(tmp_path / "p"), seed=1, overlong="drop")


def test_overlong_conversations_lose_whole_turns_or_are_left_out_and_both_are_counted(
    long_chats: Path, tmp_path: Path, tokenizer_folder: str
) -> None:
    tokenizer, lengths = Tokenizer.load(tokenizer_folder), TokenizedDataset(long_chats).lengths
    dropped = pack([str(long_chats)], 80, str(tmp_path / "drop"), seed=1, overlong="drop")
    assert dropped["overlong"] == {
        "policy": "drop",
        "dropped": 2,
        "dropped_tokens": int(lengths[0] + lengths[2]),
        "cut": 0,
        "cut_tokens": 0,
    }
    assert dropped["tokens"] == lengths[1]
    cut = pack([str(long_chats)], 80, str(tmp_path / "cut"), seed=1, overlong="cut_turns", materialize=True)
    two_turns = len(tokenizer.apply_chat(LONG["messages"][:4]))
    assert two_turns <= 80 < lengths[0]
    assert cut["overlong"] == {
        "policy": "cut_turns",
        "dropped": 1,
        "dropped_tokens": int(lengths[2]),
        "cut": 1,
        "cut_tokens": int(lengths[0]) - two_turns,
    }
    plain = pack([str(long_chats)], 80, str(tmp_path / "plain"), seed=1, overlong="cut_turns")
    assert plain["target_tokens"] == cut["target_tokens"]
    ours, copied = PackedDataset(tmp_path / "plain"), PackedDataset(tmp_path / "cut")
    for number in range(len(ours)):
        for name in ("tokens", "labels", "loss_mask", "positions", "cu_seqlens"):
            assert np.array_equal(getattr(ours[number], name), getattr(copied[number], name)), name
    labels = np.concatenate([ours[i].labels[ours[i].loss_mask] for i in range(len(ours))])
    assert tokenizer.decode(labels).count("<|eos|>") == 3
    assert len(labels) == cut["target_tokens"]


def test_conversations_and_texts_are_not_packed_together(chats: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "a.txt").write_text("the text")
    tokenize([str(tmp_path / "a.txt")], tokenizer_folder, str(tmp_path / "texts"))
    with pytest.raises(DataFormatError, match=r"holds conversations, .* texts; pack them apart"):
        pack([str(chats), str(tmp_path / "texts")], 64, str(tmp_path / "p"), seed=1)
    with pytest.raises(DataFormatError, match="--overlong: has no effect on texts"):
        pack([str(tmp_path / "texts")], 64, str(tmp_path / "p"), seed=1, overlong="drop")


def test_inspect_prints_token_label_and_mask(chats: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    pack([str(chats)], 256, str(tmp_path / "p"), seed=1)
    console = Console(record=True, width=200)
    options: dict[str, Any] = {"num_samples": 1, "tokenizer_path": tokenizer_folder, "verify": True}
    inspect(str(tmp_path / "p"), console, num_positions=12, **options)
    shown = console.export_text()
    assert "trained on" in shown
    assert "You are a helpful assistant." in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    positions = [row for row in rows if len(row) == 4 and row[0].isdecimal()]
    assert len(positions) == 12
    first = next(row for row in positions if row[3] == "yes")
    assert "<|extra_0|>" in first[1]


def test_datatrove_tasks_write_the_same_bytes(chats: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    path = write(tmp_path / "chats.jsonl", RECORDS)
    tokenize_on("local", [path], tokenizer_folder, str(tmp_path / "t"), tasks=1, workers=1, form=ChatForm())
    for name in ("shard_00000.bin", "shard_00000.targets"):
        assert (tmp_path / "t" / name).read_bytes() == (chats / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--system-prompt", "x"], "--system-prompt: has no effect without --chat"),
        (["--train-end-of-user"], "--train-end-of-user: has no effect without --chat"),
        (["--chat", "--text-field", "content"], "--chat: reads messages, or prompt and completion"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path,
    tokenizer_folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: str,
) -> None:
    path = write(tmp_path / "c.jsonl", RECORDS)
    arguments = ["tokenize", path, "--tokenizer", tokenizer_folder, "--output", str(tmp_path / "o"), *options]
    monkeypatch.setattr(sys, "argv", ["hunyuan-data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
