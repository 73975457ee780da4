"""Long-context tasks of any length in tokens, made here: the six of RULER (arXiv 2404.06654) that need no download.

    niah_single_1    one number hidden among repeated sentences
    niah_multikey_2  one of many numbers, each with its key
    niah_multikey_3  the same with long random strings as keys and values
    vt               variables that a chain of assignments gives the same value
    cwe              the ten words that are listed more often than others
    fwe              the three most frequent of made-up words

The tasks are RULER's, with texts of this project in English and Chinese. A prompt has exactly the tokens that are
asked for: whole units of filling, then single digits, each of which is one token of the project's tokenizers.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hunyuan_pretrain.evaluation import EvaluationError

Language = str
"""en or zh."""
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
WITH_A_NEEDLE = TASKS[:3]
"""Tasks with one answer at one depth."""
NEW_TOKENS = {"niah_single_1": 128, "niah_multikey_2": 128, "niah_multikey_3": 128, "vt": 30, "cwe": 120, "fwe": 50}
"""Tokens of an answer, RULER's own; they count towards the length."""
SHORT = 4096
"""Below, the common words of cwe occur 10 times and others once; from there on 30 and 3 times, as in RULER."""
HOPS = 4
"""Assignments of a chain after the first."""


@dataclass(frozen=True)
class Haystack:
    """A prompt and what its answer has to contain."""

    prompt: str
    answer_prefix: str
    """Comes after the prompt, in a chat after the template."""
    references: list[str]


Encode = Callable[[str, str], list[int]]
"""(prompt, answer prefix) -> the tokens that the model sees."""


def make(
    task: str, language: Language, tokens: int, encode: Encode, seed: str, depth: float = 0.5, *, swapped: bool = False
) -> Haystack:
    """A prompt of exactly `tokens` tokens under `encode`, answer prefix included.

    seed: all that is random. depth: of the needle, 0 to 1; other tasks spread what they hide. swapped: the needle has
    another value than the reference, and everything else is the same. Raises EvaluationError if even an empty haystack
    is longer.
    """
    build = _BUILDERS["cwe short" if task == "cwe" and tokens < SHORT else task]

    def prompt(units: int, digits: int) -> Haystack:
        return build(random.Random(seed), _TEXTS[language], units, _padding(language, digits), depth, swapped)

    def count(units: int, digits: int = 0) -> int:
        made = prompt(units, digits)
        return len(encode(made.prompt, made.answer_prefix))

    units = _largest(lambda number: count(number), tokens, f"{task} ({language})")
    short = tokens - count(units)
    # the words around the digits are tokens too, so that without digits there are none
    digits = 0 if short == 0 else _digits(lambda number: count(units, number), tokens)
    while digits is None and units > 0:
        units -= 1
        digits = _digits(lambda number, units=units: count(units, number), tokens)  # type: ignore[misc]
    if digits is None or count(units, digits) != tokens:
        raise EvaluationError(
            f"{task} ({language}): no prompt of exactly {tokens} tokens; does this tokenizer take digits one by one?"
        )
    return prompt(units, digits)


def _padding(language: Language, digits: int) -> str:
    if digits == 0:
        return ""
    text = "".join(str(place * 7 % 10) for place in range(digits))
    return f"Ignore this line: {text}\n" if language == "en" else f"请忽略这一行：{text}\n"


def _digits(count: Callable[[int], int], tokens: int) -> int | None:
    wanted = 1 + tokens - count(1)
    return wanted if wanted >= 1 else None


def _largest(count: Callable[[int], int], tokens: int, what: str) -> int:
    """The largest number of units with at most `tokens` tokens: by extrapolation, because counting takes long."""
    low, at_low = 0, count(0)
    if at_low > tokens:
        raise EvaluationError(f"{what}: {tokens} tokens are too few, the question alone has {at_low}")
    high = 64
    while (at_high := count(high)) <= tokens:
        low, at_low, high = high, at_high, 4 * high
    slope = max((at_high - at_low) / (high - low), 1.0)
    turn = 0
    while high - low > 1:
        turn += 1
        guess = (low + high) // 2 if turn % 4 == 0 else low + max(1, int((tokens - at_low) / slope))
        guess = min(guess, high - 1)
        if (found := count(guess)) <= tokens:
            low, at_low = guess, found
        else:
            high = guess
    return low


# --- texts ------------------------------------------------------------------------------------------------------------

_FIRST = """
amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow olive plain
quiet rapid silver tidy
"""
_SECOND = """
anchor basket candle desert engine feather garden hammer island jacket kettle ladder meadow needle
orchard pebble quarry ribbon saddle temple umbrella valley window yard zipper
"""
_THIRD = """
apple bridge copper dragon eagle forest guitar harbor iron jungle kitten lemon marble nectar ocean
pepper quartz river stone tiger urchin violet walnut yarn zebra
"""
_CHARACTERS = (
    "山河湖海云雨风雪星月花草竹松梅兰石玉金木水火土田春秋冬夏晨夜东南西北红黄蓝绿青白黑紫龙虎马羊鸟鱼书琴棋画灯桥船车"
)


def _words(rng: random.Random, language: str, parts: int) -> Iterator[str]:
    """Different words without end of the list: 500 of two parts and 12,500 of three in English, more in Chinese."""
    lists = (
        [each.split() for each in (_FIRST, _SECOND, _THIRD)[3 - parts :]]
        if language == "en"
        else [list(_CHARACTERS)] * (parts + 1)
    )
    seen: set[str] = set()
    number = 0
    while True:
        picked = [rng.choice(each) for each in lists]
        word = ("-" if language == "en" else "").join(picked)
        number += 1
        if word in seen:
            word += f"-{number}" if language == "en" else str(number)
        seen.add(word)
        yield word


@dataclass(frozen=True)
class _Texts:
    """What the tasks say in one language."""

    name: Language
    noise: str
    about_needles: str
    needle: str
    ask_needle: str
    answer_needle: str
    about_chain: str
    ask_chain: str
    answer_chain: str
    about_common: str
    ask_common: str
    answer_common: str
    about_coded: str
    ask_coded: str
    answer_coded: str


_TEXTS: dict[str, _Texts] = {
    "en": _Texts(
        name="en",
        noise="The road is long and the hills are green. A cart goes by. Nobody is in a hurry.\n",
        about_needles="The text below hides secret values. Remember them: you will be asked for one.\n\n",
        needle="The secret value of {key} is {value}.\n",
        ask_needle="\nWhich secret value does {key} have in the text above?\n",
        answer_needle="The secret value of {key} is",
        about_chain="The text below assigns values to variables. Follow them from one to the next.\n\n",
        ask_chain="\nList every variable above that has the value {value}.\n",
        answer_chain="The variables with the value {value} are:",
        about_common="Below is a numbered list of words. Some occur often, most only a few times.\n\n",
        ask_common="\nWhich ten words occur most often in the list?\n",
        answer_common="The ten most common words are:",
        about_coded="The text below is in code. Find the words that occur most often; dots mean nothing.\n\n",
        ask_coded="\nWhich three words of the code occur most often?\n",
        answer_coded="The three most frequent words are:",
    ),
    "zh": _Texts(
        name="zh",
        noise="路很长，山很绿。一辆马车慢慢走过。没有人着急。\n",
        about_needles="下面的文字里藏着一些秘密数值。请记住它们，之后会问你其中一个。\n\n",
        needle="{key}的秘密数值是{value}。\n",
        ask_needle="\n在上面的文字里，{key}的秘密数值是什么？\n",
        answer_needle="{key}的秘密数值是",
        about_chain="下面的文字给一些变量赋值。请一个接一个地跟踪它们。\n\n",
        ask_chain="\n列出上面所有值为{value}的变量。\n",
        answer_chain="值为{value}的变量是：",
        about_common="下面是一个带编号的词表。有些词经常出现，大多数词只出现几次。\n\n",
        ask_common="\n词表中出现次数最多的十个词是哪些？\n",
        answer_common="出现次数最多的十个词是：",
        about_coded="下面的文字是密文。请找出出现次数最多的词；点号没有意义。\n\n",
        ask_coded="\n密文中出现次数最多的三个词是哪些？\n",
        answer_coded="出现次数最多的三个词是：",
    ),
}

Build = Callable[[random.Random, _Texts, int, str, float, bool], Haystack]


def _needles(kind: Literal["number", "uuid"], hay: Literal["noise", "needles"]) -> Build:
    def value(rng: random.Random) -> str:
        return str(rng.randint(1_000_000, 9_999_999)) if kind == "number" else str(uuid.UUID(int=rng.getrandbits(128)))

    def build(rng: random.Random, say: _Texts, units: int, padding: str, depth: float, swapped: bool) -> Haystack:
        words = _words(rng, say.name, 3)

        def key() -> str:
            return next(words) if kind == "number" else value(rng)

        asked, answer, other = key(), value(rng), value(rng)
        others = [say.noise] * units
        if hay == "needles":
            others = [say.needle.format(key=key(), value=value(rng)) for _ in range(units)]
        place = round(depth * units)
        needle = say.needle.format(key=asked, value=other if swapped else answer)
        text = "".join([*others[:place], needle, *others[place:]])
        prompt = say.about_needles + padding + text + say.ask_needle.format(key=asked)
        return Haystack(prompt, say.answer_needle.format(key=asked), [answer])

    return build


def _chain(rng: random.Random, say: _Texts, units: int, padding: str, _depth: float, _swapped: bool) -> Haystack:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] if name not in names else []
    value = str(rng.randint(10_000, 99_999))
    lines = [
        f"VAR {names[0]} = {value}\n",
        *(f"VAR {new} = VAR {old}\n" for old, new in pairwise(names)),
    ]
    places = sorted(rng.random() for _ in lines)
    text = [say.noise] * units
    for number, (place, line) in enumerate(zip(places, lines, strict=True)):
        text.insert(int(place * units) + number, line)
    prompt = say.about_chain + padding + "".join(text) + say.ask_chain.format(value=value)
    return Haystack(prompt, say.answer_chain.format(value=value), names)


def _common(often: int, seldom: int) -> Build:
    def build(rng: random.Random, say: _Texts, units: int, padding: str, _depth: float, _swapped: bool) -> Haystack:
        words = _words(rng, say.name, 2)
        common = [next(words) for _ in range(10)]
        rest: list[str] = []
        while len(rest) < units:
            rest += [next(words)] * seldom
        entries = common * often + rest[:units]
        rng.shuffle(entries)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1)) + "\n"
        return Haystack(say.about_common + padding + text + say.ask_common, say.answer_common, common)

    return build


def _coded(rng: random.Random, say: _Texts, units: int, padding: str, _depth: float, _swapped: bool) -> Haystack:
    """Frequencies fall with the square of the rank, as in RULER; the first three are always different."""
    names = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(400)]
    names = list(dict.fromkeys(names))
    words: list[str] = [name for name, times in zip(names, (4, 3, 2), strict=False) for _ in range(times)]
    weights = [1 / (rank + 1) ** 2 for rank in range(len(names))]
    words += rng.choices(names, weights, k=units)
    counts = Counter(words)
    least = 1 + max((counts[name] for name in names[3:]), default=0)
    for number, name in enumerate(reversed(names[:3])):  # chance may have put them in another order
        least = max(least + (number > 0), counts[name])
        words += [name] * (least - counts[name])
    rng.shuffle(words)
    text = " . ".join(words) + "\n"
    return Haystack(say.about_coded + padding + text + say.ask_coded, say.answer_coded, names[:3])


_BUILDERS: dict[str, Build] = {
    "niah_single_1": _needles("number", "noise"),
    "niah_multikey_2": _needles("number", "needles"),
    "niah_multikey_3": _needles("uuid", "needles"),
    "vt": _chain,
    "cwe": _common(30, 3),
    "cwe short": _common(10, 1),
    "fwe": _coded,
}


def match(answer: str, references: list[str]) -> float:
    """RULER's string_match_all: the share of the references that the answer contains, whatever their case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)
