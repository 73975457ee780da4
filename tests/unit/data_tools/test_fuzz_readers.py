"""Damaged inputs of `hunyuan-data`: each is read, or refused with one message that names it. Nothing else happens, and
nothing is left half written."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools import documents
from data_tools.corpus import find_files, split_evenly
from data_tools.documents import Document, RejectedError, read_split
from data_tools.encoding import DocumentEncoder, EncoderSource
from data_tools.packed_output import pack
from data_tools.records import RecordForm
from data_tools.tokenization import tokenize
from data_tools.tokenized_shard import Allowance
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer
from tests.helpers.commands import run_data
from tests.helpers.damage import damaged, damaged_json, fuzzed, in_place_of, read_or_refused

LINES = [
    {"text": "the line 中 " * 4, "lang": "zh", "n": 1},
    {"text": "", "lang": None},
    {"id": [1, {"x": "\ud83d\ude00"}], "text": "x" * 300},
]
JSONL = "".join(json.dumps(line, ensure_ascii=number % 2 == 0) + "\n" for number, line in enumerate(LINES)).encode()
ARRAY = json.dumps(LINES, indent=1).encode()
TEXT = "\ufeffthe text 中\n\n".encode() * 30
PLACES = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x00",
    b"\\ud800",
    b'"\\udc00"',
    b"[" * 5000,
    b"1" * 5000,
    b"1e999",
    b'"text": 3, ',
    b'{"text": ["x"]}\n',
]


def parquet(text: list[object]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"text": text, "lang": ["zh"] * len(text)}), file, row_group_size=20)
    return file.getvalue()


@st.composite
def corpus_file(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a corpus file, damaged before or after compression."""
    content, ending = draw(st.sampled_from([(JSONL, ".jsonl"), (ARRAY, ".json"), (TEXT, ".txt")]))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.sampled_from(PLACES)) + content[at:]
    name, compressed = draw(
        st.sampled_from(
            [
                (f"a{ending}", content),
                (f"a{ending}.gz", gzip.compress(content, mtime=0)),
                (f"a{ending}.zst", zstandard.compress(content)),
                (f"a{ending}.bz2", bz2.compress(content)),
                (f"a{ending}.xz", lzma.compress(content)),
                ("a.parquet", parquet(["the row 中"] * 30 + [None])),
                ("a.parquet", parquet([3] * 30)),
            ]
        )
    )
    return name, draw(st.just(compressed) | damaged(compressed, TEXT))


@pytest.mark.parametrize("long_bytes", [documents.LONG_BYTES, 100], ids=["whole", "in parts"])
@fuzzed()
@given(file=corpus_file(), where=st.sampled_from([{}, {"lang": frozenset({"zh"})}]))
def test_files_of_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_bytes: int, file: tuple[str, bytes], where: dict
) -> None:
    monkeypatch.setattr(documents, "LONG_BYTES", long_bytes)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 64)
    name, content = file
    (tmp_path / name).write_bytes(content)
    try:
        with read_or_refused(tmp_path / name):
            for shard in split_evenly(find_files([tmp_path / name]), shard_bytes=200):
                for document in (found for split in shard for found in read_split(split, RecordForm(where=where))):
                    with suppress(RejectedError):
                        (
                            "".join(document.parts or [document.text])
                            if isinstance(document, Document)
                            else str(document)
                        ).encode()
    finally:
        (tmp_path / name).unlink()


@fuzzed()
@given(data=st.data())
def test_ranks_that_are_read_encode(data: st.DataObject, tmp_path: Path, tokenizer_folder: str) -> None:
    content = (Path(tokenizer_folder) / RANKS_FILE).read_bytes()
    at = data.draw(st.integers(0, len(content)))  # the file is much the same at every position
    part = data.draw(damaged(content[at : at + 40], content[:40]))
    (tmp_path / RANKS_FILE).write_bytes(content[:at] + part + content[at + 40 :])
    with read_or_refused(tmp_path):
        tokenizer = Tokenizer.load(tmp_path)
        encoder = DocumentEncoder(EncoderSource.of(str(tmp_path), tokenizer))
        ids, _ = encoder.encode(["the other 中"])
        assert tokenizer.decode(ids[1:-1]) == "the other 中"


@pytest.fixture
def run_folder(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> Path:
    """Folders of the corpus: tokens, packed (an index) and copy (materialized); x.yaml, an experiment; run, the
    directory of a run of it."""
    tokenize(corpus, tokenizer_folder, str(tmp_path / "tokens"), shard_bytes=1000)
    for name in ("packed", "copy"):
        pack([str(tmp_path / "tokens")], 16, str(tmp_path / name), seed=1, materialize=name == "copy")
    data = [{"path": str(tmp_path / name)} for name in ("packed", "copy")]
    model = {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "ffn_hidden_size": 8,
        "num_moe_experts": 2,
    }
    stage = {
        "name": "s",
        "tokens": 640,
        "sequence_length": 16,
        "global_batch_sequences": 4,
        "lr_end": 1.0,
        "data": data,
    }
    fields = {
        "name": "x",
        "run_dir": "run",
        "tokenizer": tokenizer_folder,
        "model": {**model, "padded_vocab_size": 512, "moe_routing_group_tokens": 16},
        "optimizer": {"lr": 1e-3},
        "stages": [stage, {**stage, "balance_attention": "group"}],
        "parallel": {"world_size": 2},
    }
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "x.yaml", tmp_path / "run" / "resolved.yaml"):
        file.write_text(json.dumps(fields, indent=1))
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    return tmp_path


@fuzzed(40)
@given(data=st.data())
def test_commands_on_damaged_folders(data: st.DataObject, run_folder: Path) -> None:
    tokenizer = run_folder / "tokenizer"
    commands = {
        "tokens": [
            ("inspect", "tokens", "--tokenizer", tokenizer),
            ("verify", "tokens"),
            ("pack", "tokens", "--sequence-length", 16, "--output", "out"),
            ("pack", "tokens", "--sequence-length", 16, "--materialize", "--output", "out"),
        ],
        "packed": [
            ("inspect", "packed"),
            ("inspect", "packed", "--tokenizer", tokenizer, "--verify"),
            ("mix", "x.yaml", "--output", "out"),
        ],
        "copy": [
            ("inspect", "copy", "--tokenizer", tokenizer),
            ("verify", "copy"),
            ("where", "x.yaml", "--step", 3, "--json"),
        ],
        "run": [("where", "run", "--step", 3), ("verify", "run"), ("mix", "run/resolved.yaml")],
        "tokenizer": [("inspect", "tokens", "--tokenizer", tokenizer)],
    }
    damaged_folder = data.draw(st.sampled_from(sorted(commands)))
    file = data.draw(st.sampled_from(sorted((run_folder / damaged_folder).iterdir())))
    content = data.draw((damaged_json if file.suffix in (".json", ".yaml") else damaged)(file.read_bytes()))
    name, *arguments = data.draw(st.sampled_from(commands[damaged_folder]))
    before = {path.name for path in run_folder.iterdir()}
    places = [
        run_folder / argument if str(argument) in (*before, "out", "run/resolved.yaml") else argument
        for argument in arguments
    ]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with in_place_of(file, content), redirect_stdout(out), redirect_stderr(err):
        code = run_data(name, *places)
    message = err.getvalue()
    if code == 0:
        shutil.rmtree(run_folder / "out", ignore_errors=True)
    else:
        assert code == 2
        assert message.count("hunyuan-data: ") == 1
        assert str(run_folder) in message
    assert "Traceback" not in message
    assert {path.name for path in run_folder.iterdir()} == before, "nothing is left half written"


@pytest.fixture
def interrupted(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> Path:
    """A copy of what `tokenize` of the corpus leaves in `out` if the last file is not text."""
    (Path(corpus[1]) / "bad.txt").write_bytes(b"\x00")
    with pytest.raises(DataFormatError, match="binary file"):
        tokenize(corpus, tokenizer_folder, str(tmp_path / "out"), shard_bytes=1000)
    return (tmp_path / ".out.partial").rename(tmp_path / "interrupted")


@fuzzed(100)
@given(data=st.data())
def test_what_an_interrupted_tokenize_left(
    data: st.DataObject, tmp_path: Path, corpus: list[str], tokenizer_folder: str, interrupted: Path
) -> None:
    """The unfinished shard is written; the finished ones are used as they are, or refused."""
    out, left = tmp_path / "out", tmp_path / ".out.partial"
    file = data.draw(
        st.sampled_from(sorted(path for path in interrupted.iterdir() if path.suffix == ".json" or path.name == ".job"))
    )
    content = data.draw((damaged_json if file.suffix else damaged)(file.read_bytes()))
    shutil.copytree(interrupted, left)
    (left / file.name).write_bytes(content)
    try:
        with read_or_refused(tmp_path):
            tokenize(corpus, tokenizer_folder, str(out), shard_bytes=1000, max_rejects=Allowance(1))
    finally:
        shutil.rmtree(left if left.exists() else out)


@fuzzed(100)
@given(data=st.data())
def test_the_plan_of_tasks(data: st.DataObject, tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'hunyuan-pretrain[cluster]'")
    from data_tools.datatrove_pipeline import JoinShards, begin

    begin(corpus, tokenizer_folder, str(tmp_path / "out"), shard_bytes=1000)
    left = tmp_path / ".out.partial"
    try:
        with (
            in_place_of(left / ".plan", data.draw(damaged_json((left / ".plan").read_bytes()))),
            pytest.raises(DataFormatError) as refused,
        ):
            JoinShards(str(tmp_path / "out")).run()
        assert f"{left}/.plan: not a plan" in str(refused.value) or "shards are not finished" in str(refused.value)
    finally:
        shutil.rmtree(left)
