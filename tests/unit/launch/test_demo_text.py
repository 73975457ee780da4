"""Which text the demo accepts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import demo, demo_text
from launch.demo_text import DemoError, read_text, write_text


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "MIN_BYTES", 100)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file or folder"),
        ("empty.txt", "", "empty.txt: 0 bytes of text; the demo needs at least 100"),
        ("blank.txt", " \n" * 500, "blank.txt: 0 bytes of text"),
        ("binary.txt", b"text\x00" * 100, "binary.txt: a binary file; the demo trains on UTF-8 text"),
        ("latin.txt", b"caf\xe9 " * 100, "latin.txt: not UTF-8 text (byte 0xe9 at position 3)"),
    ],
)
def test_unfit_text_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    output = tmp_path / "out"
    assert demo.main(["--text", str(tmp_path / name), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not output.exists()


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", "x" * 500)
    with pytest.raises(DemoError, match=r"no file in it ends in \.txt \.md \.rst \.py"):
        read_text(str(tmp_path))


def test_a_foreign_folder_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = write(tmp_path / "out/thesis.txt", "x" * 500)
    assert demo.main(["--text", str(theirs), "--output", str(tmp_path / "out")]) == 2
    assert "already exists, and was not written by the demo" in capsys.readouterr().err
    assert theirs.exists()


def test_an_unknown_setting_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--output", str(tmp_path / "out"), "optimizer.lrr=1"]) == 2
    assert "did you mean optimizer.lr?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_long_files_become_several_documents_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(20_000)) + "x" * 100_000
    found = read_text(str(write(tmp_path / "long.txt", text)))
    assert "".join(found.documents) == text
    assert max(len(document) for document in found.documents) <= demo_text.LONGEST_DOCUMENT
    write_text(found, tmp_path / "text.jsonl")
    assert [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()] == found.documents


def test_a_large_text_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "MAX_BYTES", 10_000)
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", f"{i:03} " * 250)
    found = read_text(str(tmp_path))
    assert 8_000 <= found.utf8_bytes <= 10_000
    firsts = [int(document[:3]) for document in found.documents]
    assert firsts == sorted(firsts)
    assert firsts[-1] > 75


def test_the_default_text_is_the_standard_library_without_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_text(None)
    assert 2_000_000 < found.utf8_bytes <= demo_text.MAX_BYTES
    folders = {part for path in demo_text._text_files(Path(found.origin), is_library=True) for part in path.parts}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__", "ensurepip"}
