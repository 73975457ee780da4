"""Pairs of answers: what is compared, what is refused, and that a pair stays whole in one sequence."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console

from data_tools.chat import PairForm
from data_tools.cli import main
from data_tools.inspection import inspect
from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "the one"},
    {"role": "assistant", "content": "the two"},
    {"role": "user", "content": "the three"},
]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS: list[dict[str, Any]] = [
    {"prompt": [SYSTEM, *TURNS], "chosen": "the good", "rejected": "bad <|eos|> answer"},
    {"prompt": "hello", "chosen": [answer("reply")], "rejected": [answer("no")]},
    {"prompt": "another", "chosen": "yes " * 30, "rejected": "no"},
]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def run_command(*words: str) -> int:
    with patch.object(sys, "argv", ["hunyuan-data", *words]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    path = write(folder / "pairs.jsonl", PAIRS)
    assert run_command("tokenize", "--pairs", path, "--tokenizer", tokenizer_folder, "--output", str(folder / "t")) == 0
    return folder / "t"


@pytest.mark.parametrize("materialize", [False, True])
def test_a_pair_is_two_documents_whose_last_answers_are_labels(
    tokenized: Path, tmp_path: Path, tokenizer_folder: str, materialize: bool
) -> None:
    tokenizer, size = Tokenizer.load(tokenizer_folder), 256
    pack([str(tokenized)], size, str(tmp_path / "packed"), seed=0, materialize=materialize)
    dataset = PackedDataset(tmp_path / "packed")
    default = {"role": "system", "content": "You are a helpful assistant."}
    prompts = [PAIRS[0]["prompt"], *([default, {"role": "user", "content": one["prompt"]}] for one in PAIRS[1:])]
    expected = {
        tuple(
            tokenizer.apply_chat(
                [*prompt, answer(pair[name] if isinstance(pair[name], str) else pair[name][0]["content"])]
            )
        ): (number, name)
        for number, (prompt, pair) in enumerate(zip(prompts, PAIRS, strict=True))
        for name in ("chosen", "rejected")
    }
    found = []
    for number in range(len(dataset)):
        sequence = dataset[number]
        place = dataset.answers(number)
        bounds = sequence.cu_seqlens[: place.stop - place.start + 1].tolist()
        for begin, end in itertools.pairwise(bounds):
            ids = sequence.tokens[begin:end]
            found.append(expected[tuple(ids.tolist())])
            assert sequence.positions[begin:end].tolist() == list(range(end - begin))
            assert sequence.labels[begin : end - 1].tolist() == ids[1:].tolist()
            pair, name = found[-1]
            text = PAIRS[pair][name] if isinstance(PAIRS[pair][name], str) else PAIRS[pair][name][0]["content"]
            marked = sequence.labels[begin:end][sequence.loss_mask[begin:end]]
            assert marked.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        assert not sequence.loss_mask[bounds[-1] :].any()
    assert sorted(found[::2]) == [(number, "chosen") for number in range(3)]
    assert [(pair, "rejected") for pair, _ in found[::2]] == found[1::2]
    lengths = np.array([len(one) for one in expected])
    assert dataset.index.num_tokens == lengths.sum()


def test_a_pair_too_long_is_refused_or_left_out_and_never_cut(tokenized: Path, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"1 pairs have more than .* choose --overlong drop$"):
        pack([str(tokenized)], 96, str(tmp_path / "packed"), seed=0)
    with pytest.raises(DataFormatError, match="--overlong cut_turns: a pair has two last answers"):
        pack([str(tokenized)], 96, str(tmp_path / "packed"), seed=0, overlong="cut_turns")
    manifest = pack([str(tokenized)], 96, str(tmp_path / "packed"), seed=0, overlong="drop")
    assert manifest["overlong"]["dropped"] >= 1
    dataset = PackedDataset(tmp_path / "packed")
    assert len(dataset.index.piece_length) == 3 - manifest["overlong"]["dropped"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, 'no "rejected"; a pair has "prompt", "chosen" and "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are the same answer'),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": "a", "chosen": "b", "rejected": [*TURNS]}, '"rejected": expected text, or a list of one message'),
        ({"prompt": {}, "chosen": "b", "rejected": "c"}, '"prompt" holds dict'),
        ({"prompt": TURNS[:2], "chosen": "b", "rejected": "c"}, "\"prompt\": message 3: role 'assistant', expected"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "\"prompt\": message 1: role 'assistant', expected 'user'"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_with_its_place(record: Any, message: str) -> None:
    found = PairForm().text_of("pairs.jsonl: line 2", record)
    assert str(found).startswith(f"pairs.jsonl: line 2: {message}")


def test_options_that_contradict_pairs_are_refused(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    for option in ("--chat", "--train-end-of-user", "--template={text}"):
        command = ["tokenize", "--pairs", option, path, "--tokenizer", tokenizer_folder]
        assert run_command(*command, "--output", str(tmp_path / "t")) == 2
        assert option.partition("=")[0] in capsys.readouterr().err
        assert not (tmp_path / "t").exists()


def test_pairs_and_conversations_are_not_packed_together(
    tokenized: Path, tmp_path: Path, tokenizer_folder: str
) -> None:
    from data_tools.chat import ChatForm

    path = write(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    tokenize([path], tokenizer_folder, str(tmp_path / "chats"), form=ChatForm())
    with pytest.raises(DataFormatError, match=r"holds pairs, .* conversations; pack them apart"):
        pack([str(tokenized), str(tmp_path / "chats")], 256, str(tmp_path / "packed"), seed=0)


@pytest.mark.parametrize("materialize", [False, True])
def test_a_pack_of_pairs_records_the_system_prompt(tmp_path: Path, tokenizer_folder: str, materialize: bool) -> None:
    path, prompt = write(tmp_path / "pairs.jsonl", PAIRS), "Be brief."
    options = ["--tokenizer", tokenizer_folder, "--system-prompt", prompt, "--output", str(tmp_path / "t")]
    assert run_command("tokenize", "--pairs", path, *options) == 0
    pack([str(tmp_path / "t")], 256, str(tmp_path / "packed"), seed=0, materialize=materialize)
    index = PackedDataset(tmp_path / "packed").index
    assert (index.is_pairs, index.system_prompt) == (True, prompt)


def test_inspect_shows_what_both_begin_with_and_the_two_answers(
    tokenized: Path, tmp_path: Path, tokenizer_folder: str
) -> None:
    pack([str(tokenized)], 256, str(tmp_path / "packed"), seed=0)
    for folder in (tokenized, tmp_path / "packed"):
        console = Console(record=True, width=200)
        inspect(str(folder), console, num_samples=9, tokenizer_path=tokenizer_folder, verify=False)
        shown = console.export_text()
        for chosen, rejected in (("the good", "bad <|eos|> answer"), ("reply", "no")):
            assert f"chosen: {chosen}<|eos|>\nrejected: {rejected}<|eos|>\n" in shown
        assert shown.count("both: <|startoftext|>") == len(PAIRS)
        assert sum(line.startswith(("pair ", "── pair ")) for line in shown.splitlines()) == len(PAIRS)
        assert "the three<|extra_0|>\nchosen: the good" in shown, "the answers begin after the prompt"
