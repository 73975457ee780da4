"""The format of a file is detected by its content: compression, JSON lines, arrays, parquet, text. One bad record costs
one record."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import formats
from data_tools.corpus import find_files, split_evenly, survey
from data_tools.documents import Document, read_documents, read_split
from data_tools.json_values import json_values
from data_tools.records import RecordForm, Reject
from hunyuan_pretrain.data.errors import DataFormatError

RECORDS = [
    {"text": "eins", "n": 1},
    {"text": '二 [}{]"\\', "n": {"a": [1, {"text": "inner"}]}},
    {"text": "drei\nvier", "n": None},
]
TEXTS = [record["text"] for record in RECORDS]


def zst(content: bytes, **options: int) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


def long_window(content: bytes) -> bytes:
    """Compress as `zstd --long=31` does."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


def lines(records: Sequence[object]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(*paths: Path, form: RecordForm | None = None) -> list[str]:
    """Texts of documents and reasons of rejects, in order."""
    return [
        document.text if isinstance(document, Document) else document.reason
        for shard in split_evenly(find_files(paths))
        for split in shard
        for document in read_split(split, form or RecordForm())
    ]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zst,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "gzip of two members": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    "zstd of two frames": lambda content: zst(content[:9]) + zst(content[9:]),
    "bz2 of two streams": lambda content: bz2.compress(content[:9]) + bz2.compress(content[9:]),
    "xz of two streams, padded": lambda content: lzma.compress(content[:9]) + b"\0\0\0\0" + lzma.compress(content[9:]),
    "zstd --long=31": long_window,
    "zstd after a frame to pass over": lambda content: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zst(content),
}
HOLDINGS: dict[str, bytes] = {
    "lines": lines(RECORDS),
    "lines with CRLF and a byte order mark": b"\xef\xbb\xbf" + lines(RECORDS).replace(b"\n", b"\r\n"),
    "an array": json.dumps(RECORDS).encode(),
    "an array over many lines": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "an array of lines": b"[\n" + lines(RECORDS).rstrip().replace(b"\n", b",\n") + b"\n]\n",
    "lines of an array without its brackets": lines(RECORDS).replace(b"\n", b",\n"),
    "objects over many lines": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.data", "part-00000"])
@pytest.mark.parametrize("holding", HOLDINGS.values(), ids=HOLDINGS)
def test_records_are_found_whatever_the_file_name(tmp_path: Path, name: str, holding: bytes) -> None:
    (tmp_path / name).write_bytes(holding)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.txt.bz2", "a.txt.xz"])
def test_compression_is_detected_by_content(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(compress("a text 中\r\n".encode() * 99))
    assert read(tmp_path / name) == ["a text 中\r\n" * 99]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "part.json.zst", "x.jsonl.xz", "y.ndjson.bz2"])
def test_compressed_json_in_a_folder_is_read(tmp_path: Path, name: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zst, ".xz": lzma.compress, ".bz2": bz2.compress}[Path(name).suffix]
    for holding in (HOLDINGS["lines"], HOLDINGS["an array over many lines"]):
        (tmp_path / name).write_bytes(compress(holding))
        assert read(tmp_path) == TEXTS


def test_a_window_of_two_gib_is_accepted_and_a_missing_dictionary_is_named(tmp_path: Path) -> None:
    assert formats.MAX_WINDOW_BYTES == 1 << 31
    dictionary = zstandard.train_dictionary(1024, [lines([{"text": f"text {n} of some"}]) for n in range(2000)])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(lines(RECORDS)))
    message = (
        rf"a\.jsonl\.zst: compressed with zstd dictionary {dictionary.dict_id()}, which is not available; compress it "
        rf"without -D"
    )
    with pytest.raises(DataFormatError, match=message):
        read(tmp_path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", lines(RECORDS))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            lines(RECORDS).decode().encode("utf-16"),
            r"a\.jsonl: UTF-16, but only UTF-8 is supported; convert it: iconv -f UTF-16 -t UTF-8",
        ),
        ("a.jsonl", lines(RECORDS).decode().encode("utf-16-le"), r"a\.jsonl: UTF-16, but only UTF-8 is supported"),
        ("a.json", lines(RECORDS).decode().encode("utf-32"), r"a\.json: UTF-32, but only UTF-8 is supported"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(lines(RECORDS))),
            r"a\.jsonl\.gz: compressed twice \(gzip around gzip\); decompress it once",
        ),
        (
            "a.jsonl.gz",
            lines(RECORDS),
            r"a\.jsonl\.gz: damaged or truncated, or not gzip despite its name \(it begins with b'{\"text\":'\)",
        ),
        (
            "a.csv",
            b"id,text\n1,x\n",
            r"a\.csv: a table, which is not supported; .* JSON lines, or read it as one text with --text-ending \.csv",
        ),
        ("a.bin", b"%PDF-1.7", r"a\.bin: a PDF; extract its text"),
        ("a.tar.gz", gzip.compress(b"x" * 257 + b"ustar" + b"\0" * 250), r"a\.tar\.gz: a tar archive; unpack it"),
        ("a.jsonl.bz2", bz2.compress(lines(RECORDS) * 99)[:-20], r"a\.jsonl\.bz2: damaged or truncated"),
        ("a.jsonl.xz", lzma.compress(lines(RECORDS) * 99)[:-20], r"a\.jsonl\.xz: damaged or truncated"),
        ("a.jsonl.bz2", bz2.compress(lines(RECORDS) * 9)[:30] + b"x" * 99, r"a\.jsonl\.bz2: damaged or truncated"),
    ],
)
def test_content_that_holds_no_records_is_identified_and_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        read(tmp_path / name)


def test_a_text_in_another_encoding_is_a_reject_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a text".encode("utf-16"))
    (tmp_path / "b.txt").write_text("fine")
    assert read(tmp_path) == ["UTF-16, but only UTF-8 is supported; convert it: iconv -f UTF-16 -t UTF-8", "fine"]


def test_parquet_is_detected_by_content_and_a_text_that_starts_like_it_is_not(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("PAR1 is how parquet begins")
    assert read(tmp_path) == ["PAR1 is how parquet begins", "one", "two"]


def test_two_columns_with_the_same_name_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataFormatError, match=r"a\.parquet: two columns are named 'text'; rename one of them"):
        read(tmp_path)


def test_a_row_that_is_not_utf8_costs_only_itself(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values = pa.array([b"one", b"t\xffo", b"three"], type=pa.binary())
    column = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path) == ["one", "not UTF-8 (byte 0xff at position 1)", "three"]


def values(content: bytes, width: int) -> list[object]:
    blocks = [content[i : i + width] for i in range(0, len(content), width)]
    return [value for _, value, _ in json_values("a.json", blocks)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=6)


@settings(deadline=None)
@given(
    records=OBJECTS,
    width=st.integers(1, 40),
    indent=st.none() | st.integers(0, 3),
    is_ascii=st.booleans(),
    is_array=st.booleans(),
)
def test_an_array_is_read_as_json_reads_it(
    records: list[dict], width: int, indent: int | None, is_ascii: bool, is_array: bool
) -> None:
    def dumped(value: object) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=is_ascii)

    content = (dumped(records) if is_array else "\n".join(map(dumped, records))).encode()
    assert values(content, width) == records


BREAKS: dict[str, Callable[[str], str]] = {
    "a quote too many": lambda text: text.replace("broken", 'bro"ken'),
    "a quote too few": lambda text: text.replace('broken"', "broken"),
    "a wrong escape": lambda text: text.replace("broken", r"bro\qken"),
    "a line break in a string": lambda text: text.replace("broken", "bro\nken"),
    "a bracket too many": lambda text: text.replace('"broken"', '["broken"]]'),
    "no comma": lambda text: text.replace('"broken",', '"broken"'),
    "a byte that is not UTF-8": lambda text: text.replace("broken", "bro\udcffken"),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("width", [7, 10_000])
def test_a_broken_record_of_an_array_costs_only_itself(
    damage: Callable[[str], str], indent: int | None, width: int
) -> None:
    records = [
        {"text": "broken" if number == 3 else f"text {number}", "tags": [{"a": "b"}], "end": 1} for number in range(7)
    ]
    content = damage(json.dumps(records, indent=indent)).encode("utf-8", "surrogateescape")
    found = values(content, width)
    assert [value for value in found if isinstance(value, dict)] == [
        record for record in records if record["text"] != "broken"
    ]
    assert sum(isinstance(value, ValueError) for value in found) >= 1


def test_a_truncated_array_is_reported_after_its_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"},')
    assert read(tmp_path) == ["a", "b", "the array is never closed; the file is truncated"]
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b')
    found = read(tmp_path)
    assert found[0] == "a"
    assert "invalid JSON" in found[1]


def test_reading_an_array_takes_work_proportional_to_its_length(tmp_path: Path) -> None:
    """Counted in copied characters, not in seconds."""
    record = json.dumps({"text": "x" * 200})
    copied = {}
    for count in (1000, 4000):
        content = f"[{','.join([record] * count)}]".encode()
        total = 0

        def blocks(content: bytes = content) -> object:
            nonlocal total
            for begin in range(0, len(content), 1 << 16):
                total += 1
                yield content[begin : begin + (1 << 16)]

        from data_tools.json_values import _Reader

        reader = _Reader("a.json", blocks())  # type: ignore[arg-type]
        passed = 0
        drop = reader._pass_to

        def counted(end: int, reader: _Reader = reader, drop: Callable[[int], None] = drop) -> None:
            nonlocal passed
            passed += end - reader._begin
            drop(end)

        reader._pass_to = counted  # type: ignore[method-assign]
        assert sum(1 for _ in reader.values()) == count
        copied[count] = passed
    assert copied[4000] < 4.1 * copied[1000]


def test_a_bad_line_of_any_kind_costs_only_itself(tmp_path: Path) -> None:
    good = b'{"text": "good"}\n'
    bad = [
        b'{"text": "\xff"}',
        b'{"text": }',
        b"{}",
        b'{"text": 7}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b"\x00",
        b'{"text": "a"} x',
    ]
    content = good + b"".join(line + b"\n" + good for line in bad)
    for name, compress in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zst)):
        (tmp_path / name).write_bytes(compress(content))
        found = read(tmp_path / name)
        assert [text for text in found if text == "good"] == ["good"] * (len(bad) + 1)
        assert len(found) == 2 * len(bad) + 1


def test_concatenated_files_may_contain_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((b"\xef\xbb\xbf" + lines(RECORDS[:1])) * 3)
    assert read(tmp_path) == ["eins"] * 3


def test_a_text_file_has_no_field_for_a_condition_to_test(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "x", "lang": "zh"}, {"text": "y", "lang": "en"}]))
    passed = []
    found = [
        document
        for shard in split_evenly(find_files([tmp_path]))
        for split in shard
        for document in read_split(
            split, RecordForm(where={"lang": frozenset({"zh"})}), pass_over=lambda: passed.append(1)
        )
    ]
    assert [document.text for document in found if isinstance(document, Document)] == ["x"]
    assert len(passed) == 2
    assert not any(isinstance(document, Reject) for document in found)


@pytest.mark.parametrize(
    "head", [b"", b"\x1f\x8b", b"(\xb5/\xfd", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"{", b"[", b"PAR1", b"\xef\xbb\xbf"]
)
@given(data=st.binary(max_size=60))
@settings(deadline=None, max_examples=40)
def test_any_leading_bytes_are_recognised_or_refused(head: bytes, data: bytes) -> None:
    for name in ("a", "a.jsonl", "a.json", "a.gz", "a.zst", "a.txt.xz", "a.parquet"):
        try:
            kind, compression = formats.format_of(name, head + data)
        except DataFormatError as error:
            kind, compression, refused = "text", "", str(error)
        else:
            refused = f"{name}: "
        assert refused.startswith(f"{name}: ")
        assert kind in ("text", "jsonl", "json", "object", "no records", "parquet")
        assert compression in ("", "gzip", "zstd", "bz2", "xz")


def test_a_json_file_that_holds_no_records_is_counted_in_a_folder_and_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(json.dumps({"text": "one", "b": {}}, indent=2))
    (tmp_path / "a.txt").write_text("a")
    found = survey([tmp_path])
    assert found.skipped == {"without records (.json of neither lines nor an array)": 1}
    assert [document.text for document in read_documents(found.files, RecordForm())] == ["a"]
    assert read(tmp_path / "package.json") == ["one"]
