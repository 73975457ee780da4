"""The text that a tokenizer is trained on, the text that it is measured on, and the report."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from data_tools import training_text
from data_tools.compression import ALL, measure, print_report
from data_tools.corpus import find_files
from data_tools.records import parse_conditions
from data_tools.tokenizer_training import train_tokenizer
from data_tools.training_text import TextSample, TrainingText
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import Tokenizer, format_ranks

RECORDS = [
    {"text": f"number {i} of many words", "lang": ("en", "zh", "de")[i % 3], "good": i % 2 == 0} for i in range(300)
]


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reader(path: Path, **options: object) -> TrainingText:
    return TrainingText([str(path)], find_files([path]), "text", **options)  # type: ignore[arg-type]


def test_conditions_name_documents_by_their_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    where = parse_conditions(["lang=zh", "lang=de", "good=true"])
    texts = [text for text, _ in reader(path, where=where).read()]
    assert texts == [str(record["text"]) for record in RECORDS if record["lang"] != "en" and record["good"]]


def test_held_out_documents_are_chosen_by_content_alone(tmp_path: Path) -> None:
    shuffled = RECORDS + RECORDS[:60]
    random.Random(1).shuffle(shuffled)
    found = []
    for name, records in (("a.jsonl", RECORDS), ("b.jsonl", shuffled)):
        text = reader(write(tmp_path / name, records), holdout_every=5, where={"lang": {"zh"}})
        trained = {content for content, _ in text.read()}
        found.append((trained, text.held_out.groups()))
        held = {content for contents in text.held_out.groups().values() for content in contents}
        assert held == {
            r["text"] for r in RECORDS if int(hashlib.sha256(str(r["text"]).encode()).hexdigest()[:16], 16) % 5 == 0
        }
        assert not held & trained
        assert not text.trained_on
    assert found[0] == found[1]
    assert sorted(found[0][1]) == ["de", "en", "zh"]


def test_a_sample_is_bounded_and_independent_of_order() -> None:
    texts = [(f"text {i}", int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16)) for i in range(200)]
    samples = []
    for order in (texts, texts[::-1], texts + texts):
        sample = TextSample(max_bytes=100)
        for text, digest in order:
            sample.add("g", digest, text, len(text))
        samples.append(sample.groups())
    assert samples[0] == samples[1] == samples[2]
    assert 80 < sum(map(len, samples[0]["g"])) <= 100
    assert samples[0]["g"][0] == min(texts, key=lambda pair: pair[1])[0]


def test_surplus_groups_are_merged_into_others() -> None:
    sample = TextSample()
    for i in range(100):
        sample.add(f"group {i}", i, f"text {i}", 6)
    groups = sample.groups()
    assert len(groups) == training_text._MAX_GROUPS + 1
    assert len(groups["(others)"]) == 60


def test_a_long_run_of_white_space_is_shortened_for_training(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a" + " " * 2_000_000 + "b" + " " * 400_000 + "c"}])
    (text, size), *rest = reader(path).read()
    assert (len(text), size, rest) == (900_003, 2_400_003, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"lang": {"fr"}}}, r"--where lang=fr: matches none of 300 documents \(lang has de, en, zh\)"),
        ({"where": {"src": {"web"}}}, r"--where src=web: matches none of 300 documents \(src has \(none\)\)"),
    ],
)
def test_choosing_nothing_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        list(reader(write(tmp_path / "a.jsonl", RECORDS), **options).read())


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    held = [r for r in RECORDS if int(hashlib.sha256(str(r["text"]).encode()).hexdigest()[:16], 16) % 5 == 0]
    with pytest.raises(DataFormatError, match=f"--holdout-every 5: holds out all of {len(held)} documents; use 0"):
        list(reader(write(tmp_path / "a.jsonl", held), holdout_every=5).read())


def test_compression_counts_characters_bytes_and_tokens() -> None:
    measured = measure(
        {"zh": ["中文", "文"], "en": ["abcd"]}, encode=lambda text: [0] * len(text), base_encode=lambda text: [0] * 4
    )
    assert measured["zh"].as_json() == {
        "documents": 2,
        "characters": 3,
        "bytes": 9,
        "tokens": 3,
        "characters_per_token": 1.0,
        "bytes_per_token": 3.0,
        "base": {"tokens": 8, "characters_per_token": 0.375, "bytes_per_token": 1.125},
        "gain": 2.6667,
    }
    assert (measured[ALL].characters, measured[ALL].tokens, measured[ALL].base_tokens) == (7, 7, 12)


def test_the_report_compares_with_the_base_on_held_out_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    options = {"text_field": "text", "extensions": [".jsonl"]}
    base, _ = train_tokenizer([str(path)], 470, str(tmp_path / "base"), **options)  # type: ignore[arg-type]
    (tmp_path / "base.tiktoken").write_bytes(format_ranks(base.ranks))
    for name in ("one", "two"):
        tokenizer, report = train_tokenizer(
            [str(path)],
            480,
            str(tmp_path / name),
            base=str(tmp_path / "base.tiktoken"),
            base_size=259,
            holdout_every=5,
            **options,
        )  # type: ignore[arg-type]
    written = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert json.loads(written["report.json"]) == report
    assert Tokenizer.load(tmp_path / "one").digest == report["tokenizer_digest"] == tokenizer.digest
    assert report["base"]["ranks"] == 261
    assert report["base"]["kept"] == 259
    assert list(tokenizer.ranks)[:259] == list(base.ranks)[:259]
    assert report["measured_on"] == "documents held out"
    assert list(report["groups"]) == ["de", "en", "zh", ALL]
    for group in report["groups"].values():
        assert group["gain"] == pytest.approx(group["base"]["tokens"] / group["tokens"], abs=1e-4)
        assert group["gain"] > 1.2
    console = Console(width=80, record=True)
    print_report(report, console)
    shown = console.export_text()
    assert "on documents held out, beside base.tiktoken" in shown
    assert f"{report['groups']['zh']['gain']:.3f}" in shown


def test_without_held_out_documents_the_report_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS[:3])
    _, report = train_tokenizer(
        [str(path)], 470, str(tmp_path / "t"), text_field="text", extensions=[".jsonl"], holdout_every=1_000_000
    )
    assert report["measured_on"] == "documents trained on"
    assert report["groups"][ALL]["documents"] == 3
    assert report["base"] is None
