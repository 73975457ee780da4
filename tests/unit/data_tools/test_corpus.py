"""Reading a corpus: order, compression, and refusals with file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_tools import documents
from data_tools.corpus import find_files, split_evenly, survey
from data_tools.documents import read_documents
from data_tools.progress import describe_skipped
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
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zst), (".ZST", lambda c: zst(c[:9]) + zst(c[9:]))],
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
        ("a.txt", b"abc\x00", r"a\.txt: a binary file \(NUL at byte 3\); only UTF-8 text is supported"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 \(byte 0xff at position 2\)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"a\.jsonl: line 2: invalid JSON \(Expecting value at column 10\); expected one JSON object per line",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl: line 3: a JSON object is expected, found list"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"a\.jsonl: line 1: no field 'text' \(fields: body, id\); choose with --text-field",
        ),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl: line 1: field 'text' holds int, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl: line 1: an unpaired surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: line 1: not UTF-8 \(byte 0xff at position 10\)"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl: line 1: JSON that cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-4], r"a\.txt\.gz: damaged or truncated"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: damaged or truncated"),
        ("a.txt.zst", zst(bytes(range(1, 120)) * 9)[:-3], r"a\.txt\.zst: damaged or truncated"),
        ("a.txt.zst", b"not zstd", r"a\.txt\.zst: damaged or truncated"),
        ("a.json", b"{}", r"a\.json: line 1: no field 'text' \(fields: none\)"),
    ],
)
def test_content_that_is_not_text_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        texts(tmp_path / name)


def test_rejects_up_to_the_limit_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{\n{"text": "y"}\n{}\n')
    assert texts(tmp_path, max_rejects=2) == ["x", "y"]
    with pytest.raises(
        DataFormatError, match=r"line 4: .* \(after 1 that --max-rejects allowed\); fix it, or .* --max-rejects 2"
    ):
        texts(tmp_path, max_rejects=1)


def test_inputs_that_are_missing_empty_or_duplicated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(
        DataFormatError,
        match=r"no file ends in \.txt \.md \.py \.jsonl .* \.parquet \(or these .*; choose endings with --extension",
    ):
        find_files([tmp_path])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataFormatError, match=r"a\.txt: given twice"):
        find_files([tmp_path, tmp_path / "a.txt"])


def test_an_empty_file_may_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(json_lines({"text": "x"}))
    assert [len(shard) for shard in split_evenly(find_files([tmp_path]), shard_bytes=1000)] == [2]
    assert texts(tmp_path) == ["x"]


def test_a_file_that_a_manifest_could_not_name_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    with pytest.raises(DataFormatError, match=r"udcff\.txt': its name is not UTF-8; rename the file"):
        find_files([tmp_path])


def test_a_document_carries_its_json_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "x", "lang": "zh", "n": 3}))
    (tmp_path / "b.txt").write_text("y")
    records = [document.record for document in read_documents(find_files([tmp_path]), RecordForm())]
    assert records == [{"text": "x", "lang": "zh", "n": 3}, {}]


def corpus(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_links_are_followed_once_per_real_file_and_cycles_end(tmp_path: Path) -> None:
    corpus(tmp_path, "in/a.txt", "in/sub/b.txt", "else/c.txt", "else/deep/d.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "a_link.txt").symlink_to("a.txt")
    (tmp_path / "in" / "sub" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "in" / "sub")
    (tmp_path / "in" / "nowhere.txt").symlink_to("missing")
    os.link(tmp_path / "in" / "a.txt", tmp_path / "in" / "same.txt")
    found = survey([tmp_path / "in"])
    assert [Path(file.path).relative_to(tmp_path / "in").as_posix() for file in found.files] == [
        "a.txt",
        "linked/c.txt",
        "linked/deep/d.txt",
        "sub/b.txt",
    ]
    assert found.skipped == {
        "links to what is not there": 1,
        "other names of a file that is read": 2,
        "other names of a folder that is read": 2,
    }
    (tmp_path / "link").symlink_to("in")
    assert len(find_files([tmp_path / "link"])) == 4
    with pytest.raises(DataFormatError, match="other names of a file that is read"):
        survey([tmp_path / "in", tmp_path / "else"])


def test_other_files_in_a_folder_are_counted_and_named(tmp_path: Path) -> None:
    corpus(
        tmp_path,
        "a.txt",
        "b.rst",
        "c.rst.gz",
        "README",
        ".hidden.txt",
        ".git/x.py",
        "tok/hy.tiktoken",
        "tok/x.txt",
        "d.log",
    )
    (tmp_path / "c.rst.gz").write_bytes(gzip.compress(b"c"))
    os.mkfifo(tmp_path / "pipe.txt")
    found = survey([tmp_path])
    assert [Path(file.path).name for file in found.files] == ["a.txt"]
    assert found.skipped == {
        ".rst": 2,
        ".log": 1,
        "without an ending": 1,
        "hidden (the name begins with a dot)": 2,
        "folders written by hunyuan-data": 1,
        "neither file nor folder": 1,
    }
    line = describe_skipped(found.skipped, found.examples)
    assert line.startswith(
        f"not read: 2 .rst (such as '{tmp_path}/b.rst'), 2 hidden (the name begins with a dot) (such as"
    )
    more = survey([tmp_path], text_endings=[".rst", ""])
    assert [Path(file.path).name for file in more.files] == ["README", "a.txt", "b.rst", "c.rst.gz"]
    assert {file.kind for file in more.files} == {"text"}


def test_a_corpus_from_which_nothing_is_read_is_an_error(tmp_path: Path) -> None:
    corpus(tmp_path, "in/b.rst", "in/.a.txt")
    with pytest.raises(
        DataFormatError, match=r"read other files as text with --text-ending \(not read: 1 \.rst .*, 1 hidden"
    ):
        survey([tmp_path / "in"])
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(DataFormatError, match="link: a broken link"):
        survey([tmp_path / "link"])
    with pytest.raises(DataFormatError, match="no such file or folder, and the pattern matches nothing"):
        survey([tmp_path / "*.jsonl"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataFormatError, match="pipe: neither a file nor a folder; write its content to a file"):
        survey([tmp_path / "pipe"])


def test_a_file_in_two_inputs_is_read_once(tmp_path: Path) -> None:
    corpus(tmp_path, "one/a.txt", "two/b.txt")
    (tmp_path / "two" / "a.txt").symlink_to(tmp_path / "one" / "a.txt")
    found = survey([tmp_path / "one", tmp_path / "two"])
    assert [(Path(file.path).name, file.input_number) for file in found.files] == [("a.txt", 0), ("b.txt", 1)]
    assert found.skipped == {"other names of a file that is read": 1}


def test_a_folder_that_a_pattern_matches_is_read_as_a_folder(tmp_path: Path) -> None:
    corpus(tmp_path, "x1/a.txt", "x2/b.txt", "x3.rst", "x1/c.rst")
    found = survey([tmp_path / "x*"])
    assert [Path(file.path).name for file in found.files] == ["a.txt", "b.txt", "x3.rst"]
    assert found.skipped == {".rst": 1}
    corpus(tmp_path, "out/shard_00000.origin.npy", "out/rejects.jsonl")
    everything = survey([tmp_path / "**"])
    assert [Path(file.path).name for file in everything.files] == ["a.txt", "c.rst", "b.txt", "x3.rst"]
    assert everything.skipped == {"folders written by hunyuan-data": 1}


def test_a_url_follows_the_rules_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    corpus(tmp_path, "a.txt", "b.rst", ".hidden.txt", ".git/x.py", "tok/hy.tiktoken", "tok/x.txt")
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"c"))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b'[{"text": "d"}]'))
    found = survey([f"file://{tmp_path}"])
    assert [(Path(file.path).name, file.kind, file.compression) for file in found.files] == [
        ("a.txt", "text", ""),
        ("c.txt", "text", "gzip"),
        ("d.json.gz", "json", "gzip"),
    ]
    assert found.skipped == {".rst": 1, "hidden (the name begins with a dot)": 2, "folders written by hunyuan-data": 1}
    assert [document.text for document in read_documents(found.files, RecordForm())] == ["a.txt", "c", "d"]


def test_unusual_file_names_are_accepted(tmp_path: Path) -> None:
    names = ["a b.txt", "a\nb.txt", "[1].txt", "*.txt", "中.txt", "-x.txt"]
    corpus(tmp_path, *names)
    assert {Path(file.path).name for file in find_files([tmp_path])} == set(names)
    for name in names:
        assert texts(tmp_path / name) == [name]


def test_unusual_extensions_are_counted_together(tmp_path: Path) -> None:
    corpus(tmp_path, "a.txt", "x.an ending of many words", *(f"doc.{number:05d}" for number in range(100)))
    (tmp_path / os.fsdecode(b"b.\xff")).write_text("x")
    found = survey([tmp_path])
    assert sum(found.skipped.values()) == 102
    assert len(found.skipped) < 70
    assert found.skipped["other endings"] > 30
    "".join(found.skipped).encode()
    describe_skipped(found.skipped, found.examples).encode()
