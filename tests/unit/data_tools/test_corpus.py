"""Reading a corpus: order, compression, and what is refused with its file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_tools import documents
from data_tools.corpus import deal_out, find_files
from data_tools.documents import read_documents
from data_tools.records import RecordForm
from hunyuan_pretrain.data.errors import DataFormatError


def texts(*paths: Path, text_field: str = "text", max_rejects: int = 0) -> list[str]:
    return [document.text for document in read_documents(find_files(paths), RecordForm(text_field), max_rejects)]


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def test_folders_are_walked_in_sorted_order_and_by_extension(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/z.md", "a/sub/1.py", "a/skipped.bin", "c.jsonl", "a/skipped.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_lines({"text": name}) if name.endswith("l") else name.encode())
    assert texts(tmp_path) == ["a/sub/1.py", "a/z.md", "b/2.txt", "c.jsonl"]
    assert [file.input_number for file in find_files([tmp_path / "b", tmp_path / "a"])] == [0, 1, 1]


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zst), (".ZST", lambda c: zst(c[:9]) + zst(c[9:]))]
)
def test_compressed_files_read_the_same(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    lines, text = json_lines({"text": "eins"}, {"text": "二"}), "a\r\nb 中".encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(text))
    assert texts(tmp_path) == ["eins", "二", "a\r\nb 中"]


def test_lines_across_blocks_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(*({"text": "x" * i} for i in range(150))) + b"\n\nnot json")
    with pytest.raises(DataFormatError, match="line 153: invalid JSON"):
        texts(path)
    assert len(texts(path, max_rejects=1)) == 150


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\x00", r"a\.txt: a binary file \(NUL at byte 3\); only UTF-8 text is read"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 \(byte 0xff at position 2\)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"a\.jsonl: line 2: invalid JSON \(Expecting value at column 10\); one JSON object a line",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl: line 3: a JSON object is expected, found list"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl: line 1: no field 'text' \(fields: body, id\); choose with --text-field"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl: line 1: field 'text' holds int, text is expected"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl: line 1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: line 1: not UTF-8 \(byte 0xff at position 10\)"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl: line 1: JSON that cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-4], r"a\.txt\.gz: damaged or cut short"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: damaged or cut short"),
        ("a.txt.zst", zst(bytes(range(1, 120)) * 9)[:-3], r"a\.txt\.zst: damaged or cut short"),
        ("a.txt.zst", b"not zstd", r"a\.txt\.zst: damaged or cut short"),
        ("a.json", b"{}", r"a\.json: a \.json file is not read; write one JSON object a line, in a file named \.jsonl"),
    ],
)
def test_what_is_not_text_is_refused_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        texts(tmp_path / name)


def test_rejects_up_to_the_limit_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{\n{"text": "y"}\n{}\n')
    assert texts(tmp_path, max_rejects=2) == ["x", "y"]
    with pytest.raises(DataFormatError, match=r"line 4: .* \(after 1 that --max-rejects allowed\); put it right, or .* --max-rejects 2"):
        texts(tmp_path, max_rejects=1)


def test_inputs_that_are_missing_empty_or_double_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(
        DataFormatError, match=r"no file ends in \.txt \.md \.py \.jsonl \.parquet \(or these with \.gz or \.zst\); choose with --extension"
    ):
        find_files([tmp_path])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataFormatError, match=r"a\.txt: given twice"):
        find_files([tmp_path, tmp_path / "a.txt"])


def test_an_empty_file_may_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(json_lines({"text": "x"}))
    assert [len(shard) for shard in deal_out(find_files([tmp_path]), shard_bytes=1000)] == [2]
    assert texts(tmp_path) == ["x"]


def test_a_file_that_a_manifest_could_not_name_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    with pytest.raises(DataFormatError, match=r"udcff\.txt': its name is not UTF-8; give the file another one"):
        find_files([tmp_path])


def test_a_document_carries_its_json_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "x", "lang": "zh", "n": 3}))
    (tmp_path / "b.txt").write_text("y")
    records = [document.record for document in read_documents(find_files([tmp_path]), RecordForm())]
    assert records == [{"text": "x", "lang": "zh", "n": 3}, {}]
