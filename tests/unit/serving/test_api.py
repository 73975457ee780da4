"""The server's answers: text, log-probabilities, counts, streams, seeds, room, and what happens when a client goes.

Greedy tokens and log-probabilities are compared with the model's forward pass over the whole sequence, without a cache.
"""

from __future__ import annotations

import concurrent.futures
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from hunyuan_pretrain.checkpoint.generate import load_model
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.serving import server
from hunyuan_pretrain.serving.generation import Job, Scored
from hunyuan_pretrain.serving.local_engine import LocalModel, Worker
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import Served, serving

TOLERANCE = 1e-5
"""Of a log-probability in fp32: the cached step sums in another order than the whole sequence does."""
PROMPT = [258, *b"def add(a, b):"]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:
        yield client


class Forward:
    """The model without a cache."""

    def __init__(self, export: Path) -> None:
        self.model, self.tokenizer = load_model(export), Tokenizer.load(export)

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """(tokens, ids of the tokenizer)"""
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, :, : self.tokenizer.vocab_size]
        return logits.log_softmax(-1)

    def greedy(self, prompt: list[int], most: int) -> list[int]:
        ids = list(prompt)
        while len(ids) < len(prompt) + most:
            ids.append(int(self.logprobs(ids)[-1].argmax()))
            if ids[-1] in (self.tokenizer.eos_id, self.tokenizer.end_id):
                break
        return ids[len(prompt) :]

    def text(self, ids: list[int]) -> str:
        return b"".join(bytes([token]) if token < 256 else b"he" if token == 256 else b"" for token in ids).decode(
            errors="replace"
        )


@pytest.fixture(scope="module")
def forward(export: Path) -> Forward:
    return Forward(export)


def test_a_greedy_completion_and_its_logprobs_are_those_of_the_forward_pass(served: Served, forward: Forward) -> None:
    answer = served.complete(PROMPT, logprobs=3, **GREEDY)
    tokens = forward.greedy(PROMPT, 24)
    choice = answer["choices"][0]
    assert choice["text"] == forward.text(tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(tokens),
        "total_tokens": len(PROMPT) + len(tokens),
    }
    rows = forward.logprobs(PROMPT + tokens)[len(PROMPT) - 1 : -1]
    expected = rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)
    best = rows.topk(3).values.tolist()
    for top, values in zip(choice["logprobs"]["top_logprobs"], best, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(values, abs=TOLERANCE)
    assert choice["finish_reason"] == ("length" if len(tokens) == 24 else "stop")


def test_an_evaluation_harness_gets_the_logprobs_of_its_prompts(served: Served, forward: Forward) -> None:
    """The body that lm-eval's local-completions sends for log-likelihoods, and what it reads from the answer."""
    rows = [[258, *b"Q: 1+1="], [258, *b"Q: the sky is blue"], [258, *("天" * 700).encode()]]
    ends = [4, 7, 1500]
    answer = served.complete(rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    for choice, row, end in zip(answer["choices"], rows, ends, strict=True):
        found = choice["logprobs"]
        logprobs = forward.logprobs(row)
        own = logprobs[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == pytest.approx(own.tolist(), abs=TOLERANCE)
        greedy = all(
            token == max(top, key=top.__getitem__)
            for token, top in zip(found["tokens"][end:-1], found["top_logprobs"][end:-1], strict=True)
        )
        assert greedy == bool((logprobs[end - 1 : -1].argmax(-1) == torch.tensor(row[end:])).all())


def test_a_long_prompt_is_read_in_chunks_with_the_same_scores(served: Served, forward: Forward) -> None:
    row = [258, *("a b " * 600).encode()]
    assert len(row) > 2048
    found = served.complete(row, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    own = forward.logprobs(row)[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
    assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-4)
    assert (found["text"], found["finish_reason"]) == ("a b " * 600, "length")


def test_a_chat_has_the_ids_of_training_and_names_of_control_tokens_are_text(served: Served, forward: Forward) -> None:
    turns = ["What does <|eos|> mean?<|extra_0|>", "It ends <|endoftext|>.", "你好"]
    messages = [{"role": "system", "content": "Be brief.<|extra_4|>"}, *served.chat_body(*turns)["messages"]]
    prompt = forward.tokenizer.apply_chat(messages)
    answer = served.chat(**GREEDY, messages=messages)
    tokens = forward.greedy(prompt, 24)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == forward.text(tokens)


def test_text_parts_and_an_empty_system_prompt_are_accepted(served: Served, forward: Forward) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": parts}]
    expected = len(forward.tokenizer.apply_chat([{"role": "user", "content": "Hello"}]))
    assert served.chat(messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == expected


def test_a_stream_has_the_text_and_logprobs_of_the_whole_answer(served: Served) -> None:
    body = {"model": "tiny", "prompt": "é你", "seed": 3, "max_tokens": 40, "echo": True, "logprobs": 2}
    whole = served.complete(**{name: value for name, value in body.items() if name != "model"})["choices"][0]
    events = served.stream("/v1/completions", body)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [each for choice in choices if choice["logprobs"] for each in choice["logprobs"][name]]
        assert joined == whole["logprobs"][name], name
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


def test_a_stop_string_ends_text_and_logprobs_across_tokens(served: Served) -> None:
    free = served.complete("one", seed=5, max_tokens=60, logprobs=0)["choices"][0]
    place = next(at for at in range(5, len(free["text"])) if free["text"].find(free["text"][at : at + 3]) == at)
    stop = free["text"][place : place + 3]
    cut = served.complete("one", seed=5, max_tokens=60, logprobs=0, stop=["never there", stop])
    choice = cut["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (free["text"][:place], "stop")
    offsets = [offset for offset in free["logprobs"]["text_offset"] if offset < place]
    assert choice["logprobs"]["text_offset"] == offsets
    assert len(offsets) < cut["usage"]["completion_tokens"] <= 60
    events = served.stream(
        "/v1/completions", {"model": "tiny", "prompt": "one", "seed": 5, "max_tokens": 60, "stop": stop}
    )
    assert "".join(event["choices"][0]["text"] for event in events) == free["text"][:place]


def test_a_seed_repeats_an_answer_whatever_else_runs(served: Served) -> None:
    fields = {"max_tokens": 32, "temperature": 1.5, "top_p": 1, "top_k": 0}

    def answer(seed: int | None) -> str:
        return served.chat("Hi", seed=seed, **fields)["choices"][0]["message"]["content"]

    alone = [answer(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, range(6))) == alone
    assert answer(None) != answer(None)
    several = served.chat("Hi", seed=0, n=3, **fields)
    assert [choice["message"]["content"] for choice in several["choices"]] == alone[:3]
    assert several["usage"]["prompt_tokens"] == served.chat("Hi", max_tokens=1)["usage"]["prompt_tokens"]


def test_without_fields_the_defaults_of_the_release_hold(served: Served) -> None:
    stated = {"temperature": 0.7, "top_p": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    fields = {"seed": 1, "max_tokens": 32}
    default = served.chat("Hi", **fields)["choices"]
    assert default == served.chat("Hi", **fields, **stated)["choices"]
    for name, other in {"temperature": 2.0, "top_p": 1.0, "top_k": 1, "repetition_penalty": 5.0}.items():
        assert default != served.chat("Hi", **fields, **(stated | {name: other}))["choices"], name


def test_penalties_change_what_is_repeated(served: Served, forward: Forward) -> None:
    """Twice as likely a token loses against one that was not there before."""
    plain = forward.greedy(PROMPT, 24)
    assert len(set(plain)) < len(plain), "the model repeats itself, else this tests nothing"
    for fields in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        answer = served.complete(PROMPT, logprobs=0, **GREEDY, **fields)
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        assert len(set(tokens)) > len(set(plain)), fields


def test_the_openai_client_chats_completes_and_streams(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "你好"}]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, seed=2, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=12,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 20, "repetition_penalty": 1.05},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    completion = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_of_200_requests_16_at_a_time_none_is_lost(served: Served) -> None:
    def ask(number: int) -> tuple[int, str]:
        fields = {"seed": number % 10, "max_tokens": 4, "temperature": 1.0}
        if number % 2:
            events = served.stream("/v1/chat/completions", served.chat_body("Hi", **fields))
            return number, "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        return number, served.chat("Hi", **fields)["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = dict(pool.map(ask, range(200)))
    assert len(answers) == 200
    for number, text in answers.items():
        assert text == answers[number % 10 + 10 if number % 2 == 0 else number % 10], number
    served.wait_until_free()


class Slow:
    """An engine's steps that take a while and count."""

    def __init__(self) -> None:
        self.started, self.computed, self.closed = 0, 0, 0

    def steps(self, job: Job) -> Iterator[list[Scored]]:
        self.started += 1
        try:
            for _ in range(job.max_new_tokens):
                time.sleep(0.01)
                self.computed += 1
                yield [Scored(97, -1.0)]
        finally:
            self.closed += 1


@pytest.fixture
def slow(vocabulary: Vocabulary) -> Iterator[tuple[Served, Slow]]:
    engine = Slow()
    with serving(Worker(engine.steps, running=1), vocabulary, sequences=2) as running:
        yield running, engine


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_ends_its_generation(slow: tuple[Served, Slow], is_streamed: bool) -> None:
    served, engine = slow
    body = json.dumps(served.chat_body("Hi", max_tokens=2000, stream=is_streamed)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        while engine.computed < 3:
            time.sleep(0.01)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.wait_until_free()
    end = time.monotonic() + 30
    while not engine.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.closed == 1
    assert engine.computed < 1000


def test_when_there_is_no_room_a_request_is_told_to_come_back(slow: tuple[Served, Slow]) -> None:
    served, engine = slow
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(served.chat, "Hi", max_tokens=60) for _ in range(2)]
        while served.service.taken < 2:
            time.sleep(0.01)
        refused = served.ask("/v1/chat/completions", served.chat_body("Hi", max_tokens=1))
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json["error"]["code"] == "queue_full"
        assert all(each.result()["usage"]["completion_tokens"] == 60 for each in taken)
    assert served.ask("/v1/chat/completions", served.chat_body("Hi", max_tokens=1)).status == 200
    assert engine.started == 3
    refused = served.ask("/v1/chat/completions", served.chat_body("Hi", n=3))
    assert (refused.status, refused.json["error"]["message"]) == (400, "3 answers, prompts times n; at most 2")


def test_a_request_that_fails_ends_alone(vocabulary: Vocabulary) -> None:
    def steps(job: Job) -> Iterator[list[Scored]]:
        yield [Scored(97, -1.0)]
        if job.max_new_tokens == 7:
            raise RuntimeError("a secret path")
        yield [Scored(97, -1.0)] * (job.max_new_tokens - 1)

    with serving(Worker(steps, running=2), vocabulary) as served:
        whole = served.ask("/v1/chat/completions", served.chat_body("Hi", max_tokens=7))
        assert (whole.status, whole.json["error"]["message"]) == (500, "the model failed: RuntimeError")
        streamed = served.ask("/v1/chat/completions", served.chat_body("Hi", max_tokens=7, stream=True))
        last = streamed.body.decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert served.chat("Hi", max_tokens=3)["choices"][0]["message"]["content"] == "aaa"
        assert served.ask("/health").json == {"status": "ok"}
        assert served.service.taken == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_give_no_numbers_are_an_error_and_not_a_token(
    export: Path, vocabulary: Vocabulary, value: float
) -> None:
    model = load_model(export)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    worker = Worker(LocalModel(model, vocabulary.size, vocabulary.stop_ids).steps, running=1)
    with serving(worker, vocabulary) as served:
        assert served.ask("/v1/chat/completions", served.chat_body("Hi")).status == 500


def test_a_connection_that_sends_nothing_is_closed(
    local: LocalModel, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that sends half a header, first or after an answer."""
    monkeypatch.setattr(server, "HEADER_S", 0.5)
    with serving(Worker(local.steps, running=1), vocabulary) as served:
        whole = f"GET /health HTTP/1.1\r\nHost: {served.host}:{served.port}\r\n\r\n".encode()
        for sent in (b"", b"GET /health HTTP/1.1\r\n", whole + b"GET /"):
            with socket.create_connection((served.host, served.port), timeout=20) as connection:
                connection.sendall(sent)
                answer = b""
                while part := connection.recv(4096):
                    answer += part
            assert answer.startswith(b"HTTP/1.1 200") == sent.startswith(whole), answer
        assert served.ask("/health").status == 200


def test_an_engine_that_has_ended_is_reported(vocabulary: Vocabulary) -> None:
    class Ended(Worker):
        is_healthy = False

    with serving(Ended(Slow().steps, running=1), vocabulary) as served:
        assert served.ask("/health").status == 503
        assert served.ask("/v1/chat/completions", served.chat_body("Hi")).status == 503


def test_an_answer_takes_the_positions_that_are_left(vocabulary: Vocabulary) -> None:
    with serving(Worker(Slow().steps, running=1), vocabulary, positions=40, new_tokens=30) as served:
        body = {"model": "tiny", "prompt": [258] * 37}
        assert served.complete(body["prompt"])["usage"]["total_tokens"] == 40
        refused = served.ask("/v1/completions", body | {"max_tokens": 4})
        assert refused.json["error"]["code"] == "context_length_exceeded"
        assert "37 tokens of prompt and max_tokens=4, but the model has 40 positions" in refused.body.decode()
        assert served.chat("Hi")["usage"]["completion_tokens"] == 30
        refused = served.ask("/v1/chat/completions", served.chat_body("Hi", max_tokens=31))
        assert refused.json["error"]["message"] == "max_tokens=31: this server allows 30"
