"""Tokenizing in shards: the same bytes for any number of processes and however often it is killed; rejects; very long
documents."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import documents, tokenization, tokenized_shard
from data_tools.encoding import DocumentEncoder
from data_tools.records import RecordForm
from data_tools.tokenization import tokenize
from data_tools.tokenized_shard import Allowance
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import unfinished_folder
from hunyuan_pretrain.data.indexed import Origin, TokenizedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer
from tests.helpers.kills import killed_at


def texts_of(inputs: list[str]) -> list[str]:
    lines = [json.loads(line)["text"] for line in Path(inputs[0]).read_text().split("\n")]
    return [*lines, *(path.read_text() for path in sorted(Path(inputs[1]).iterdir()))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


SHARDS: dict[str, Any] = {"shard_bytes": 400}


def test_every_document_is_in_order_and_records_its_origin(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    (manifest,) = tokenize(corpus, tokenizer_folder, str(tmp_path / "out"), **SHARDS)
    dataset, tokenizer = TokenizedDataset(tmp_path / "out"), Tokenizer.load(tokenizer_folder)
    expected = texts_of(corpus)
    assert len(dataset.shards) > 3
    assert [dataset.document(number).tolist() for number in range(dataset.num_documents)] == [
        tokenizer.encode_document(text).tolist() for text in expected
    ]
    assert manifest["bytes"] == sum(len(text.encode()) for text in expected)
    assert [source["documents"] for source in manifest["sources"]] == [40, 4]
    origin = dataset.origin(17)
    assert json.loads(Path(origin.path).read_bytes()[origin.position :].split(b"\n")[0])["text"] == expected[17]
    assert dataset.origin(42) == Origin(f"{corpus[1]}/2.txt", 0)
    dataset.verify()


def test_the_output_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    before = set(multiprocessing.active_children())  # other tests' processes
    for name, workers in (("one", 1), ("two", 2)):
        holdout = {"holdout_every": 5, "holdout_output": str(tmp_path / f"{name}_held")}
        tokenize(corpus, tokenizer_folder, str(tmp_path / name), workers=workers, **SHARDS, **holdout)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one_held") == contents(tmp_path / "two_held")
    train, held = TokenizedDataset(tmp_path / "one"), TokenizedDataset(tmp_path / "one_held")
    assert (train.num_documents, held.num_documents) == (35, 9)
    assert set(multiprocessing.active_children()) <= before


def test_killed_at_every_write_and_run_again_it_gives_the_same_bytes(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    def job(name: str) -> None:
        folder = tmp_path / name
        tokenize(
            corpus,
            tokenizer_folder,
            str(folder / "train"),
            holdout_every=5,
            holdout_output=str(folder / "held"),
            shard_bytes=2500,
        )

    job("whole")
    kills = 0
    while killed_at(kills + 1, partial(job, f"killed_{kills}")):
        if not (tmp_path / f"killed_{kills}" / "train").exists():
            job(f"killed_{kills}")
        for part in ("train", "held"):
            assert contents(tmp_path / f"killed_{kills}" / part) == contents(tmp_path / "whole" / part), kills
        assert sorted(path.name for path in (tmp_path / f"killed_{kills}").iterdir()) == ["held", "train"]
        kills += 1
    assert kills > 20


def test_finished_shards_are_not_written_again(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tokenize(corpus, tokenizer_folder, str(tmp_path / "whole"), **SHARDS)
    (Path(corpus[1]) / "bad.txt").write_bytes(b"\x00")  # the last file
    with pytest.raises(DataFormatError, match=r"bad\.txt: a binary file"):
        tokenize(corpus, tokenizer_folder, str(out), **SHARDS)
    assert not out.exists()
    written = []
    write_shard = tokenization.write_shard
    monkeypatch.setattr(
        tokenization,
        "write_shard",
        lambda job, number, *rest: written.append(number) or write_shard(job, number, *rest),
    )
    (manifest,) = tokenize(corpus, tokenizer_folder, str(out), max_rejects=Allowance(1), **SHARDS)
    assert len(written) == 1
    assert written[0] == len(manifest["shards"]) - 1
    assert manifest["rejects"] == 1
    (reject,) = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert (reject["where"], reject["sample"]) == (f"{corpus[1]}/bad.txt", "\x00")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_unfinished_output_of_other_inputs_is_not_mixed_in(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    out = str(tmp_path / "out")
    (Path(corpus[1]) / "bad.txt").write_bytes(b"\x00")
    with pytest.raises(DataFormatError, match="binary file"):
        tokenize(corpus, tokenizer_folder, out, **SHARDS)
    Path(corpus[0]).write_text('{"text": "changed"}\n')
    allowed = {"max_rejects": Allowance(1), **SHARDS}
    with pytest.raises(
        DataFormatError, match=r"\.out\.partial: left unfinished by a run with other inputs or options; .* --overwrite"
    ):
        tokenize(corpus, tokenizer_folder, out, **allowed)
    (manifest,) = tokenize(corpus, tokenizer_folder, out, overwrite=True, **allowed)
    assert manifest["documents"] == 5
    assert len(manifest["shards"]) == len(list(Path(out).glob("*.bin")))


def test_rejects_with_half_of_a_surrogate_pair_are_written(tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"\\ud800": 1}\n')
    tokenize([str(tmp_path / "a.jsonl")], tokenizer_folder, str(tmp_path / "out"), max_rejects=Allowance(1))
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert "no field 'text' (fields: ?)" in reject["reason"]


def test_a_damaged_report_of_a_shard_is_refused(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> None:
    out = str(tmp_path / "out")
    (Path(corpus[1]) / "bad.txt").write_bytes(b"\x00")
    with pytest.raises(DataFormatError, match="binary file"):
        tokenize(corpus, tokenizer_folder, out, **SHARDS)
    report = tmp_path / ".out.partial" / "shard_00000.json"
    report.write_text('{"outputs": []')
    with pytest.raises(
        DataFormatError, match=r"shard_00000\.json: not the report of a shard of this version; remove it, and the same"
    ):
        tokenize(corpus, tokenizer_folder, out, max_rejects=Allowance(1), **SHARDS)
    report.unlink()
    tokenize(corpus, tokenizer_folder, out, max_rejects=Allowance(1), **SHARDS)


def test_two_processes_do_not_write_the_same_output(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> None:
    out = tmp_path / "out"
    with (
        unfinished_folder(out, files=["manifest.json"], identity="x"),
        pytest.raises(DataFormatError, match="out: another process is"),
    ):
        tokenize(corpus, tokenizer_folder, str(out))


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_rejects_are_one_error_with_the_first_of_them(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str, workers: int
) -> None:
    before = set(multiprocessing.active_children())  # other tests' processes
    with Path(corpus[0]).open("a") as file:
        file.write("\n{\n[]\n" + '{"text": "' + "x" * 900 + '"}\n')
    out = str(tmp_path / "out")
    with pytest.raises(
        DataFormatError,
        match=r"lines\.jsonl: .* invalid JSON .* allow it with --max-rejects 1 or more; 0 are allowed",
    ):
        tokenize(corpus, tokenizer_folder, out, workers=workers, **SHARDS)
    with pytest.raises(DataFormatError, match=r"\(and 1 more\); .* --max-rejects 2 or more; 1 are allowed"):
        tokenize(corpus, tokenizer_folder, out, workers=workers, max_rejects=Allowance(1), **SHARDS)
    with pytest.raises(DataFormatError, match=r"\(and 1 more\).* 0 are allowed"):
        tokenize(corpus, tokenizer_folder, out, workers=workers, max_rejects=Allowance.parse("2%"), **SHARDS)
    (manifest,) = tokenize(corpus, tokenizer_folder, out, workers=workers, max_rejects=Allowance.parse("5%"), **SHARDS)
    assert (manifest["documents"], manifest["rejects"]) == (45, 2)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("text", ["-1", "many", "x%", "101%"])
def test_an_invalid_allowance_is_refused(text: str) -> None:
    with pytest.raises(
        DataFormatError, match=f"--max-rejects {text}: must be a number such as 100, or a share such as 0.1%"
    ):
        Allowance.parse(text)


def test_encoding_very_long_documents_in_parts_gives_the_same_ids(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = RecordForm()
    tokenize(corpus, tokenizer_folder, str(tmp_path / "whole"), form=form, **SHARDS)
    monkeypatch.setattr(documents, "LONG_BYTES", 30)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(tokenized_shard, "_PART_CHARACTERS", 8)
    tokenize(corpus, tokenizer_folder, str(tmp_path / "parts"), form=form, **SHARDS)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    with Path(corpus[0]).open("a") as file:
        file.write('\n{"text": "the bad one' + "x" * 40 + '\\q"}\n{"text": "the good one"}')
    (manifest,) = tokenize(corpus, tokenizer_folder, str(tmp_path / "bad"), max_rejects=Allowance(1), form=form)
    assert (manifest["documents"], manifest["rejects"]) == (45, 1)
    dataset = TokenizedDataset(tmp_path / "bad")
    good = Tokenizer.load(tokenizer_folder).encode_document("the good one")
    assert dataset.document(40).tolist() == good.tolist()


@pytest.mark.slow
def test_a_very_long_document_does_not_need_its_size_in_memory(tmp_path: Path, tokenizer_folder: str) -> None:
    """As a text file and as one JSON line, in separate processes; the peak is that of a small file plus a bounded
    amount."""
    script = """
import json, resource, sys
from data_tools.tokenization import tokenize
if __name__ == "__main__":
    tokenize([sys.argv[1]], sys.argv[2], sys.argv[3])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = {}
    line = "the quick brown fox, 中文的句子。\n"
    for name, repeats in (("small.txt", 1000), ("large.txt", 2_000_000), ("large.jsonl", 2_000_000)):
        with (tmp_path / name).open("w") as file:
            file.write('{"id": 1, "text": "' if name.endswith("l") else "")
            for _ in range(repeats // 1000):
                file.write((line if not name.endswith("l") else json.dumps(line)[1:-1]) * 1000)
            file.write('"}' if name.endswith("l") else "")
        command = [sys.executable, "-c", script, tmp_path / name, tokenizer_folder, tmp_path / f"out_{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout) / 1024
    assert (tmp_path / "large.txt").stat().st_size > 60e6
    large = {name: TokenizedDataset(tmp_path / f"out_{name}") for name in ("large.txt", "large.jsonl")}
    assert np.array_equal(large["large.txt"].document(0), large["large.jsonl"].document(0))
    assert peaks["large.txt"] < peaks["small.txt"] + 250
    assert peaks["large.jsonl"] < peaks["small.txt"] + 250


def test_a_document_that_the_engine_cannot_split_costs_only_itself(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when tiktoken fails to split a million characters of white space."""
    encode = DocumentEncoder.encode

    def limited(self: DocumentEncoder, texts: list[str]) -> Any:
        if any("   " in text for text in texts):
            raise DataFormatError("a run of white space is too long to split")
        return encode(self, texts)

    monkeypatch.setattr(DocumentEncoder, "encode", limited)
    texts = ["one", "two   ", "three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = tokenize([str(tmp_path / "a.jsonl")], tokenizer_folder, str(tmp_path / "out"), max_rejects=Allowance(1))[
        0
    ]
    assert (manifest["documents"], manifest["rejects"]) == (2, 1)
    (reject,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert reject["where"].endswith("a.jsonl: byte 16")
    assert reject["reason"].startswith("a run of white space")


def test_a_very_long_record_that_is_left_out_or_empty_is_not_a_document(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONG_BYTES", 200)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 64)
    records = [
        {"text": "a " * 300, "lang": "en"},
        {"text": "b " * 300, "lang": "zh"},
        {"text": "", "lang": "zh", "more": "x" * 900},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    form = RecordForm(where={"lang": frozenset({"zh"})})
    for name, chosen, expected in (("all", RecordForm(), (2, 1, 0)), ("zh", form, (1, 1, 1))):
        manifest = tokenize([str(tmp_path / "a.jsonl")], tokenizer_folder, str(tmp_path / name), form=chosen)[0]
        assert (manifest["documents"], manifest["empty_documents"], manifest["passed_over"]) == expected
