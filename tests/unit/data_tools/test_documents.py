"""Reading documents: splits of a file, very long documents, records of several fields, parquet and URLs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import documents
from data_tools.corpus import CorpusFile, Split, find_files, split_evenly
from data_tools.documents import Document, cut_between_words, read_documents, read_split
from data_tools.long_json import InvalidJson, stream_fields
from data_tools.records import RecordForm, Reject, parse_conditions
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import Tokenizer

ALPHABET = st.sampled_from(
    [*"aZ 0\n\r\t.,'\"\\\u00e9\u0302中文😀ﬁ½²Ⅷ\u3000\u00a0_-", "'s", "\r\n", "  ", "e\u0301", "\u1100\u1161", "가"]
)
TEXTS = st.lists(ALPHABET, max_size=60).map("".join)


def whole(document: Document | Reject) -> str:
    assert isinstance(document, Document), document
    return document.text if document.parts is None else "".join(document.parts)


@pytest.mark.parametrize("num_shards", [1, 3, 40])
def test_each_line_is_read_by_the_split_that_it_starts_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 50)
    path = tmp_path / "a.jsonl"
    expected = [f"{number} 中" + "x" * (number * 7 % 90) for number in range(60)]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in expected).encode()
    )
    shards = split_evenly(find_files([path]), shard_bytes=path.stat().st_size // num_shards)
    assert num_shards - 1 <= len(shards) <= num_shards + 1
    read = [document for shard in shards for split in shard for document in read_split(split, RecordForm())]
    assert [whole(document) for document in read] == expected
    content = path.read_bytes()
    for document, text in zip(read, expected, strict=True):
        assert isinstance(document, Document)
        assert json.loads(content[document.position :].split(b"\n")[0])["text"] == text


def test_progress_is_reported_in_bytes_on_disk(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"text": "x"}\n' * 500),
        ("b.txt.gz", gzip.compress(b"abc" * 9999)),
        ("c.txt", b"abc"),
    ):
        (tmp_path / name).write_bytes(content)
        seen: list[int] = []
        (file,) = find_files([tmp_path / name])
        list(read_split(Split(file, 0, 0, file.size, 0), RecordForm(), seen.append))
        assert sum(seen) == file.size
    whole = tmp_path / "a.jsonl"
    seen = []
    for shard in split_evenly(find_files([whole]), shard_bytes=1000):
        for split in shard:
            list(read_split(split, RecordForm(), seen.append))
    assert sum(seen) == whole.stat().st_size


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3), st.recursive(st.none() | st.integers() | TEXTS, st.lists, max_leaves=4), max_size=4
    ),
    st.data(),
)
@example({"text": "\\" * 9, "": '"'}, None)
def test_a_long_line_is_parsed_as_json_does(record: dict[str, object], data: st.DataObject | None) -> None:
    name = data.draw(st.sampled_from([*record, "text"])) if data else "text"
    is_ascii, width = (data.draw(st.booleans()), data.draw(st.integers(1, 9))) if data else (True, 1)
    line = json.dumps(record, ensure_ascii=is_ascii).encode()
    blocks = [line[i : i + width] for i in range(0, len(line), width)]
    if isinstance(record.get(name), str):
        assert "".join(stream_fields(blocks, name)) == record[name]
    else:
        with pytest.raises(InvalidJson):
            "".join(stream_fields(blocks, name))
    for end in range(len(line)):  # truncated anywhere, it is not an object
        with pytest.raises(InvalidJson):
            "".join(stream_fields([line[:end]], name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"} x', "more than one JSON object"),
        (b'{"text": "a", "text": "b"}', "field 'text' occurs twice"),
        (b'{"text": ["a"]}', "does not hold text"),
        (b'{"body": "a"}', r"no field 'text' \(fields: body\)"),
        (b'{"text": "\\ud800 alone"}', "invalid JSON .escape"),
        (b'{"text": "\\q"}', "invalid JSON .escape"),
        (b'{"text": "a\nb"}', "Invalid control character"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 0xff"),
        (b'["text"]', "expected '{', found '\\['"),
        (b'{"a": [1, {"b": 2]}, "text": ""}', "expected '}', found '\\]'"),
        (b"{,}", "expected '\"'"),
    ],
)
def test_an_invalid_long_line_is_refused(line: bytes, message: str) -> None:
    with pytest.raises(InvalidJson, match=message):
        "".join(stream_fields([line], "text"))


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONG_BYTES", 200)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 64)


@pytest.mark.usefixtures("short_limits")
def test_very_long_documents_come_in_parts_and_the_next_one_is_found(tmp_path: Path) -> None:
    texts = ["short", '中文 \\ " \n' * 90, "", "x" * 500, "last"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("\ufeff" + texts[1])
    read = list(
        map(
            lambda document: (isinstance(document, Document) and document.parts is not None, whole(document)),
            documents_of(tmp_path),
        )
    )
    assert read == [(len(text) > 100, text) for text in [*texts, texts[1]]]


@pytest.mark.usefixtures("short_limits")
def test_a_very_long_line_that_is_broken_is_a_reject_and_the_next_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 500 + '\\q"}\n{"text": "next"}\n')
    read: list[str] = []
    for document in documents_of(tmp_path):
        try:
            read.append(whole(document))
        except documents.RejectedError as error:
            read.append(str(error))
    assert read[0].startswith("invalid JSON (escape")
    assert read[1:] == ["next"]


@pytest.mark.usefixtures("short_limits")
def test_damage_within_a_very_long_line_counts_as_damage_of_the_file(tmp_path: Path) -> None:
    """Damage of a document, instead, could be allowed by --max-rejects along with everything that follows it."""
    random = "".join(chr(97 + number * number % 97 % 26) for number in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": random}).encode())[:-9])
    found = documents_of(tmp_path)
    document = next(found)
    with pytest.raises(documents.DamagedError, match=r"a\.jsonl\.gz: damaged or truncated"):
        whole(document)


def documents_of(folder: Path, form: RecordForm | None = None) -> Iterator[Document | Reject]:
    for shard in split_evenly(find_files([folder])):
        for split in shard:
            yield from read_split(split, form or RecordForm())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and merges across every kind of boundary that a wrong cut would break."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (" a", "'s", "  ", "\n\n", "\r\n", "aa", ". ", "中", "é", "aé", ".,", "0a", "\n ", " \n", "e\u0301"):
        ranks.setdefault(token.encode(), len(ranks))
    return Tokenizer(ranks)


@settings(deadline=None)
@given(text=TEXTS, size=st.integers(1, 20), width=st.integers(1, 7))
def test_cutting_does_not_change_the_ids(tokenizer: Tokenizer, text: str, size: int, width: int) -> None:
    parts = list(cut_between_words([text[i : i + width] for i in range(0, len(text), width)], size))
    assert "".join(parts) == text
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(text)


def test_text_is_cut_only_at_safe_points() -> None:
    assert max(map(len, cut_between_words(["a word " * 50] * 40, 1000))) < 1500
    assert list(cut_between_words(["中" * 500] * 4, 1000)) == ["中" * 2000]


def test_records_of_several_fields_and_those_chosen(tmp_path: Path) -> None:
    records = [
        {"title": "T{x}", "body": "b", "lang": "zh"},
        {"title": None, "body": "c", "lang": "en"},
        {"title": "U", "lang": "zh"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = list(
        documents_of(tmp_path, RecordForm(template="{title}\n\n{body} {{}}", where={"lang": frozenset({"zh"})}))
    )
    assert whole(read[0]) == "T{x}\n\nb {}"
    assert "no field 'body' (fields: title, lang)" in str(read[1])
    assert len(read) == 2
    assert [whole(document) for document in documents_of(tmp_path, RecordForm("title"))] == ["T{x}", "", "U"]
    for template, message in (("plain", "names no field"), ("{a", "write a literal brace twice")):
        with pytest.raises(DataFormatError, match=message):
            RecordForm(template=template)


def test_parquet_reads_the_same_by_row_groups(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {number}" for number in range(1000)] + [None]
    pq.write_table(pa.table({"text": texts, "n": list(range(1001))}), tmp_path / "a.parquet", row_group_size=300)
    files = find_files([tmp_path])
    shards = split_evenly(files, shard_bytes=1)
    assert [(split.start, split.end) for shard in shards for split in shard] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    read = list(documents_of(tmp_path))
    assert [(document.position, whole(document)) for document in read if isinstance(document, Document)] == [
        (number, text or "") for number, text in enumerate(texts)
    ]
    assert [document.text for document in read_documents(files, RecordForm())] == [text or "" for text in texts]
    with pytest.raises(DataFormatError, match=r"no column 'body' \(columns: text, n\)"):
        list(documents_of(tmp_path, RecordForm("body")))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataFormatError, match=r"a\.parquet: damaged, or not a parquet file"):
        split_evenly(find_files([tmp_path]))


def test_urls_and_patterns_are_inputs(tmp_path: Path) -> None:
    for name in ("a.jsonl", "sub/b.jsonl", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert [Path(file.path).name for file in find_files([f"{tmp_path}/**/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}"
    files = find_files([url])
    assert [file.path.startswith("file://") for file in files] == [True] * 3
    assert [document.text for document in read_documents(files, RecordForm())] == [
        "a.jsonl",
        "sub/b.jsonl",
        json.dumps({"text": "sub/c.txt"}),
    ]
    assert [Path(file.path).name for file in find_files([f"{url}/sub/*.txt"])] == ["c.txt"]
    for missing, message in ((f"{url}/none", "no such file or folder"), ("nothing://x/y", "nothing://x/y: ")):
        with pytest.raises(DataFormatError, match=message):
            find_files([missing])


def test_files_are_assigned_by_size_alone() -> None:
    def file(name: str, size: int) -> CorpusFile:
        return CorpusFile(
            name, 0, size, "", "jsonl" if "jsonl" in name else "text", "gzip" if name.endswith(".gz") else ""
        )

    def weights(files: list[CorpusFile]) -> list[int]:
        return [sum(split.weight for split in shard) for shard in split_evenly(files)]

    assert weights([file("a.jsonl", 100)]) == [100]
    many = weights([file(f"{number}.txt", 1_000_000) for number in range(100)])
    assert sum(many) == 100_000_000
    assert max(many) <= 8_500_000
    assert len(weights([file("a.jsonl", 64_000_000_000)])) == 125
    assert weights([file("a.jsonl.gz", 100_000_000)]) == [400_000_000]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"{title}\n\n{text}", "T\n\nX"),
        ("{title}\n{text}", "T\nX"),
        (r"{title}\t{text}\\n", "T\tX\\n"),
        ("{{{text}}} {{}}", "{X} {}"),
        ("{a b}-{0x}", "AB-H"),
    ],
)
def test_a_template_means_what_a_user_writes_in_single_quotes(template: str, text: str) -> None:
    record = {"title": "T", "text": "X", "a b": "AB", "0x": "H"}
    assert RecordForm(template=template).text_of("", record) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{} {text}",
            r"--template '\{\} \{text\}': character 1: \{\} names no field; write its name, such as \{text\}",
        ),
        ("{text!z}", r"character 1: \{text!z\} is more than the name of a field; write \{text\}"),
        ("ab {text:>10d}", r"character 4: \{text:>10d\} is more than the name of a field; write \{text\}"),
        ("{text", r"character 1: this \{ is never closed; write \{NAME\}, or write a literal brace twice"),
        ("text}", r"character 5: an unmatched \}; write a literal brace twice"),
        ("{a.b}", r"character 1: \{a\.b\} accesses part of a field; only whole fields are supported, such as \{a\}"),
        ("{a[0]}", r"character 1: \{a\[0\]\} accesses part of a field"),
        ("{0}", r"character 1: \{0\} names no field"),
        ("{ text }", r"\{ text \} is more than the name of a field; write \{text\}"),
        (r"{text}\d", r"character 7: \\d is not an escape; the escapes are \\n, \\t and \\\\"),
        ("{text}\\", r"character 7: \\ is not an escape"),
        ("plain", r"names no field; write it like '\{title\}\\n\\n\{text\}'"),
        ("", "names no field"),
    ],
)
def test_an_invalid_template_is_refused_before_anything_is_read(template: str, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        RecordForm(template=template)


@given(st.text(alphabet="{}\\nt a.!:[]0", max_size=12))
def test_any_template_is_read_or_refused(template: str) -> None:
    try:
        form = RecordForm(template=template)
    except DataFormatError as error:
        assert "--template" in str(error)  # noqa: PT017 - either is right
    else:
        assert isinstance(form.text_of("", dict.fromkeys(form.fields, "x")), str)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("lang!=zh", "only FIELD=VALUE is supported, with a literal value; for several values repeat --where"),
        ("score>=1", "only FIELD=VALUE is supported"),
        ("lang==zh", "only FIELD=VALUE is supported"),
        ("lang = zh", "has spaces around the =; write --where lang=zh"),
        (" =zh", "is not FIELD=VALUE"),
    ],
)
def test_an_invalid_condition_is_refused(condition: str, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        parse_conditions([condition])


def test_a_document_without_a_cut_point_is_not_copied_repeatedly() -> None:
    """Without a cut point, the buffered text is searched again only when it has doubled."""
    looked = []

    def counted(text: str) -> int:
        looked.append(len(text))
        return 0

    original, documents._last_boundary = documents._last_boundary, counted
    try:
        assert "".join(cut_between_words(["a" * 100] * 1000, 100)) == "a" * 100_000
    finally:
        documents._last_boundary = original
    assert sum(looked) < 3 * 100_000
