"""The chat page in headless Chromium: a conversation, and text that tries to become more than text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import pytest

from hunyuan_pretrain.serving.chat_page import ChatPage
from hunyuan_pretrain.serving.generation import Job, Scored
from hunyuan_pretrain.serving.local_engine import Worker
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.chromium import CHROMIUM, Page, chromium
from tests.helpers.served import Served, serving

MARKDOWN = """# A *title*

Text with **bold**, `code`, a [link](https://example.org/a?b=1) and 你好🙂.
A second line.

- one
- two
  1. inner

| a | b |
|---|---|
| 1 | `x` |

> quoted

```python
print("<b>")
```
"""
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<svg onload=alert(1)> [bad](javascript:window.hacked=3) [worse](https://a"onclick="window.hacked=4)
**<b onmouseover="window.hacked=5">** `<style>*{display:none}</style>` </style></script><iframe src=/>
"""


class Scripted:
    """Answers by what the last message contains."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.jobs: list[Job] = []
        self.closed = 0

    def steps(self, job: Job) -> Generator[list[Scored], None, None]:
        self.jobs.append(job)
        asked = b"".join(map(self.vocabulary.bytes_of, job.prompt)).decode()
        last = asked.rpartition("Q:")[2]
        text = HOSTILE if "hostile" in last else MARKDOWN if "markdown" in last else f"You said: {last}"
        tokens = [97] * 10**6 if "endless" in last else list(text.encode())
        try:
            for token in tokens[: job.max_new_tokens]:
                time.sleep(0.01 if "endless" in last else 0.001)
                yield [Scored(token, -1.0)]
            yield [Scored(257, -1.0)]  # <|endoftext|>
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def engine(vocabulary: Vocabulary) -> Scripted:
    return Scripted(vocabulary)


@pytest.fixture(scope="module")
def scripted(engine: Scripted, vocabulary: Vocabulary) -> Iterator[Served]:
    with serving(Worker(engine.steps, running=4), vocabulary) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, such as Debian's package chromium, to open the page")
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as page:
        yield page


@pytest.fixture
def page(browser: Page, scripted: Served) -> Iterator[Page]:
    """The page, loaded anew. After each test its console has no error."""
    browser.open(f"{scripted.address}/")
    browser.wait_for("model")
    yield browser
    assert browser.errors == []


def say(page: Page, text: str) -> None:
    page.run("message.focus()")
    page.type(text)
    page.press("Enter", "\r")


def answered(page: Page, count: int) -> str:
    """The text of the last of `count` answers, once it is whole."""
    page.wait_for(f"!running && turns.filter((turn) => turn.role === 'assistant').length === {count}")
    return page.run("[...document.querySelectorAll('.assistant .text')].at(-1).innerText")


def test_a_conversation_edited_and_regenerated(page: Page, engine: Scripted, vocabulary: Vocabulary) -> None:
    say(page, "Q:one 你好🙂")
    assert answered(page, 1) == "You said: one 你好🙂"
    page.run("byId('settings-button').click(); byId('system').value = 'Be brief.'; byId('seed').value = '7'")
    say(page, "Q:two")
    assert answered(page, 2) == "You said: two"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q:one 你好🙂"},
        {"role": "assistant", "content": "You said: one 你好🙂"},
        {"role": "user", "content": "Q:two"},
    ]
    job = engine.jobs[-1]
    assert list(job.prompt) == vocabulary.encode_chat(turns)
    assert (job.sampling.seed, job.sampling.temperature, job.sampling.top_k, job.sampling.top_p) == (7, 0.7, 20, 0.6)
    assert job.sampling.repetition_penalty == 1.05
    page.run("[...document.querySelectorAll('[data-text=again]')].at(-1).click()")
    assert answered(page, 2) == "You said: two"
    assert list(engine.jobs[-1].prompt) == list(job.prompt)
    page.run("document.querySelector('[data-text=edit]').click()")
    page.run("document.querySelector('.edit textarea').value = 'Q:other'")
    page.press("Enter", "\r")
    assert answered(page, 1) == "You said: other"
    assert list(engine.jobs[-1].prompt) == vocabulary.encode_chat([turns[0], {"role": "user", "content": "Q:other"}])
    used = len(engine.jobs[-1].prompt) + len("You said: other") + 1
    assert page.run("byId('context').textContent").startswith(f"{used} / 4,096 tokens (")
    assert "first token" in page.run("document.querySelector('.assistant .about').innerText")
    assert "tokens/s" in page.run("document.querySelector('.assistant .about').innerText")
    page.run("byId('new').click()")
    assert page.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("way", ["key", "button", "new chat"])
def test_an_answer_is_stopped_in_the_page_and_in_the_server(
    way: str, page: Page, engine: Scripted, scripted: Served
) -> None:
    closed = engine.closed
    say(page, "Q:endless")
    page.wait_for("turns.at(-1)?.content.length > 3")
    if way == "key":
        page.press("Escape")
    else:
        page.click("#stop" if way == "button" else "#new")
    page.wait_for("!running")
    scripted.wait_until_free()
    end = time.monotonic() + 20
    while engine.closed == closed and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.closed == closed + 1
    if way == "new chat":
        assert page.run("turns.length") == 0
        return
    assert page.run("document.querySelector('.assistant .about').innerText").find("stopped") >= 0
    say(page, "Q:go on")
    assert answered(page, 2) == "You said: go on"


def test_markdown_becomes_elements(page: Page) -> None:
    say(page, "Q:markdown")
    answered(page, 1)
    shown = "document.querySelector('.assistant .text')"
    names = page.run(f"[...{shown}.children].map((each) => each.nodeName)")
    assert names == ["H3", "P", "UL", "DIV", "BLOCKQUOTE", "DIV"]
    assert page.run(f"{shown}.querySelector('pre code').textContent") == 'print("<b>")'
    assert page.run(f"{shown}.querySelector('ul ol li').textContent") == "inner"
    assert page.run(f"[...{shown}.querySelectorAll('td')].map((each) => each.innerHTML)") == ["1", "<code>x</code>"]
    assert page.run(f"{shown}.querySelector('a').href") == "https://example.org/a?b=1"
    assert page.run(f"{shown}.querySelector('a').rel") == "noopener noreferrer nofollow"
    assert page.run(f"{shown}.querySelector('strong').textContent") == "bold"


def test_text_never_becomes_a_script_or_an_element_of_its_own(page: Page) -> None:
    """In an answer, in a message, in a message that is edited, and in the page of an error."""
    say(page, f"Q:hostile {HOSTILE}")
    answered(page, 1)
    kinds = page.run("[...new Set([...document.querySelectorAll('.turn *')].map((each) => each.nodeName))].sort()")
    assert set(kinds) <= {"DIV", "P", "CODE", "STRONG", "SPAN", "BUTTON"}
    assert "<script>window.hacked = 1</script>" in page.run("document.querySelector('.assistant .text').innerText")
    assert "<img src=x" in page.run("document.querySelector('.user .text').innerText")
    page.run("document.querySelector('[data-text=edit]').click()")
    assert page.run("document.querySelector('.edit textarea').value").startswith("Q:hostile <script>")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('.turn a').length") == 0


def test_the_browser_itself_refuses_scripts_and_html(browser: Page, scripted: Served) -> None:
    """What the policy does if the page's own code had a hole."""
    browser.open(f"{scripted.address}/")
    browser.wait_for("model")
    tried = browser.run(
        """(async () => {
            const found = [];
            try { document.body.innerHTML = "<b>x</b>"; found.push("innerHTML"); } catch { }
            try { eval("1"); found.push("eval"); } catch { }
            const script = document.createElement("script");
            try { script.textContent = "window.hacked = 1"; document.body.append(script); } catch { }
            if (window.hacked) found.push("script");
            try { await fetch("https://example.org/"); found.push("fetch"); } catch { }
            const image = new Image();
            await new Promise((done) => { image.onload = () => { found.push("image"); done(); };
                                          image.onerror = done; image.src = "/health?x"; });
            return found;
        })()"""
    )
    assert tried == []
    assert any("Content Security Policy" in error or "TrustedHTML" in error for error in browser.errors)
    browser.errors.clear()


def test_words_colours_and_widths(page: Page, scripted: Served) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.run(colour)
    page.run("byId('theme').click()")
    dark = page.run(colour)
    assert light != dark
    page.run("byId('language').click()")
    assert page.run("byId('send').textContent") == "发送"
    assert page.run("document.documentElement.lang") == "zh-Hans"
    assert page.run("Object.keys(WORDS.en).sort().join() === Object.keys(WORDS.zh).sort().join()")
    page.open(f"{scripted.address}/", width=390, height=760, prefers_color_scheme="dark")
    page.wait_for("model")
    assert page.run(colour) == dark
    say(page, "Q:markdown")
    answered(page, 1)
    page.run("byId('settings-button').click()")
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth")


def test_the_keyboard_reaches_everything(page: Page) -> None:
    reached = []
    page.run("document.activeElement.blur()")
    for _ in range(20):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id"))
    assert {"new", "language", "theme", "settings-button", "message", "send"} <= set(reached)


def test_a_refused_message_goes_back_to_where_it_was_written(page: Page) -> None:
    say(page, "Q:" + "x" * 4096)
    page.wait_for("!byId('error').hidden && !running")
    assert "but the model has 4096 positions" in page.run("byId('error').textContent")
    assert page.run("message.value.length") == 4098
    assert page.run("turns.length") == 0
    page.run("message.value = ''")
    page.errors.clear()  # Chromium logs every status of 400 and more
    say(page, "Q:short")
    assert answered(page, 1) == "You said: short"


def test_a_key_is_asked_for_and_stays_in_memory(browser: Page, engine: Scripted, vocabulary: Vocabulary) -> None:
    key = "a-key-of-24-characters.."
    with serving(Worker(engine.steps, running=1), vocabulary, key=key) as locked:
        browser.open(f"{locked.address}/")
        browser.wait_for("!byId('key-form').hidden")
        browser.type("wrong-key-of-24-characters")
        browser.press("Enter", "\r")
        browser.wait_for("!byId('error').hidden")
        browser.errors.clear()  # the status 401
        browser.type(key)
        browser.press("Enter", "\r")
        browser.wait_for("model && byId('key-form').hidden")
        say(browser, "Q:in")
        assert answered(browser, 1) == "You said: in"
        stored = "JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])"
        assert browser.run(stored) == '[{},{},""]'
        assert key not in browser.run("document.documentElement.outerHTML")
        assert browser.errors == []


def test_the_system_prompt_of_the_server_is_shown_and_may_be_emptied(
    browser: Page, engine: Scripted, vocabulary: Vocabulary
) -> None:
    user = {"role": "user", "content": "Q:in"}
    with serving(Worker(engine.steps, running=1), vocabulary, system="Be brief.") as briefed:
        briefed.chat("Q:in")
        expected = vocabulary.encode_chat([{"role": "system", "content": "Be brief."}, user])
        assert list(engine.jobs[-1].prompt) == expected
        browser.open(f"{briefed.address}/")
        browser.wait_for("model")
        assert browser.run("byId('system').value") == "Be brief."
        browser.run("byId('system').value = ''")
        say(browser, "Q:in")
        answered(browser, 1)
        assert list(engine.jobs[-1].prompt) == vocabulary.encode_chat([user])
        assert browser.errors == []


def test_the_page_loads_nothing_else_and_its_policy_names_its_parts(scripted: Served) -> None:
    answer = scripted.ask("/")
    page = ChatPage.load()
    assert answer.body == page.html
    policy = answer.headers["Content-Security-Policy"]
    assert policy == page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    text = page.html.decode()
    assert text.count("<script") == text.count("<style") == 1
    for absent in (
        "http://",
        " src=",
        "@import",
        "url(",
        "innerHTML",
        "insertAdjacent",
        "onclick=",
        "localStorage",
    ):
        assert absent not in text, absent
    assert text.count("https://") == 0
