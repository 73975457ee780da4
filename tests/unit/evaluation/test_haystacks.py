"""Long-context prompts: exact lengths, the needle where it should be, answers that are there to be found."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest

from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.haystacks import TASKS, WITH_A_NEEDLE, make, match
from hunyuan_pretrain.evaluation.long_context import Plan, check, heat_maps, plan
from tests.helpers.tiny_export import write_tiny_tokenizer


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return lambda prompt, prefix: [tokenizer.start_id, *tokenizer.encode(prompt + prefix)]


@pytest.mark.parametrize(("task", "language"), list(product(TASKS, ("en", "zh"))))
def test_a_prompt_has_exactly_the_tokens_asked_for(encode, task: str, language) -> None:  # type: ignore[no-untyped-def]
    """The tokenizer has a token for each byte, so 12,000 tokens are few words; the search is the same."""
    for tokens in (12_000, 12_001, 12_017):
        made = make(task, language, tokens, encode, "a", 0.5)
        assert len(encode(made.prompt, made.answer_prefix)) == tokens
        assert made == make(task, language, tokens, encode, "a", 0.5), "the same seed gives the same text"
        assert made.prompt != make(task, language, tokens, encode, "b", 0.5).prompt


@pytest.mark.parametrize("task", WITH_A_NEEDLE)
def test_the_needle_is_there_once_at_its_depth(encode, task: str) -> None:  # type: ignore[no-untyped-def]
    for depth in (0.0, 0.5, 1.0):
        made = make(task, "en", 12_000, encode, "a", depth)
        (answer,) = made.references
        assert made.prompt.count(answer) == 1
        assert made.prompt.index(answer) / len(made.prompt) == pytest.approx(depth, abs=0.06)
        other = make(task, "en", 12_000, encode, "a", depth, swapped=True)
        assert other.references == [answer]
        assert answer not in other.prompt
        differing = [
            line for line in zip(made.prompt.splitlines(), other.prompt.splitlines(), strict=True) if len(set(line)) > 1
        ]
        assert len(differing) == 1, "everything else is the same"


def test_keys_differ(encode) -> None:  # type: ignore[no-untyped-def]
    for language, pattern in (("en", r"value of (\S+) is"), ("zh", r"(\S+)的秘密数值是\d")):
        made = make("niah_multikey_2", language, 12_000, encode, "a", 0.5)
        keys = re.findall(pattern, made.prompt)
        assert len(keys) > 50
        assert len(set(keys)) == len(keys)


def test_the_chain_leads_from_the_value_to_every_variable(encode) -> None:  # type: ignore[no-untyped-def]
    made = make("vt", "en", 12_000, encode, "a")
    values: dict[str, str] = {}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", made.prompt, re.MULTILINE):
        values[name] = values.get(source, source)
    assert set(values) == set(made.references)
    assert len(set(values.values())) == 1
    assert f"value {values[made.references[0]]}" in made.prompt


def test_the_common_words_are_the_most_common(encode) -> None:  # type: ignore[no-untyped-def]
    for tokens, often, seldom in ((3_000, 10, 1), (20_000, 30, 3)):
        made = make("cwe", "en", tokens, encode, "a")
        counts = Counter(re.findall(r"\d+\. (\S+)", made.prompt))
        assert {word for word, _ in counts.most_common(10)} == set(made.references)
        assert all(counts[word] == often for word in made.references)
        assert max(count for word, count in counts.items() if word not in made.references) <= seldom


def test_the_three_most_frequent_are_in_order(encode) -> None:  # type: ignore[no-untyped-def]
    for seed in "abcdef":
        made = make("fwe", "en", 4_000, encode, seed)
        (line,) = (line for line in made.prompt.splitlines() if " . " in line)
        counts = Counter(line.split(" . "))
        (a, b, c, d) = (count for _, count in counts.most_common(4))
        assert a > b > c > d
        assert [word for word, _ in counts.most_common(3)] == made.references


def test_too_few_tokens_are_refused(encode) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=r"vt \(en\): 50 tokens are too few, the question alone has \d+"):
        make("vt", "en", 50, encode, "a")


def test_a_match_counts_what_was_found() -> None:
    assert match("It is ABC, and def.", ["abc", "x"]) == 0.5


def test_a_plan_that_cannot_be_is_refused_at_once() -> None:
    wrong = plan("4K,300000", "vt,niah", "en,fr", "0,2", 1, False, True, 1)
    assert wrong.lengths == (4096, 300_000)
    with pytest.raises(EvaluationError) as caught:
        check(wrong, 262_144)
    assert str(caught.value).splitlines() == [
        f"niah: no such task; they are {', '.join(TASKS)}",
        "fr: no such language; use en, zh",
        "depth 2: use 0 to 1",
        f"vt: no single answer whose loss says something; use {', '.join(WITH_A_NEEDLE)}",
        "lengths 300000: the model has 262144 positions",
    ]
    with pytest.raises(EvaluationError, match="--lengths 4x: not numbers"):
        plan("4x", None, "en", "0", 1, False, False, 1)
    assert len(list(Plan(depths=(0.0, 1.0), languages=("en",)).cells())) == 9


def test_heat_maps_have_depth_against_length() -> None:
    cells = [
        {"task": "niah_single_1", "language": "en", "length": length, "depth": depth, "score": depth}
        for length in (8192, 4096)
        for depth in (1.0, 0.0)
    ]
    cells.append({"task": "vt", "language": "en", "length": 4096, "depth": None, "score": 0.25})
    assert heat_maps(cells, by_loss=False) == [
        ("niah_single_1, en", [("depth", "4,096", "8,192"), ("0%", "0.0", "0.0"), ("100%", "100.0", "100.0")]),
        ("vt, en", [("depth", "4,096"), ("all", "25.0")]),
    ]
