"""`serve --engine vllm` with the real vLLM: the numbers of our model code, through our API."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.serving.server import Options, start_engine
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import Served, serving
from tests.vllm.test_offline import TOLERANCE

PROMPT = [258, *b"def add(a, b):"]
OPTIONS = ("--dtype", "float32", "--max-num-seqs", "4", "--max-model-len", "512", "--enforce-eager")


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> Path:
    return exported()


@pytest.fixture(scope="module")
def served(model: Path, vllm_python: str, environment: dict[str, str]) -> Iterator[Served]:
    vocabulary = Vocabulary(model)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        options = Options(model, engine="vllm", vllm_python=Path(vllm_python), vllm_options=OPTIONS)
        engine, positions = start_engine(options, vocabulary, 4096)
    assert positions == 512
    with serving(engine, vocabulary, positions=positions, new_tokens=512) as running:
        yield running


def test_logprobs_and_greedy_tokens_are_those_of_our_model_code(
    served: Served, model: Path, ours: Callable[..., list[dict[str, Any]]]
) -> None:
    expected = ours(model, [PROMPT])[0]
    found = served.complete(PROMPT, temperature=0, max_tokens=len(expected["tokens"]), echo=True, logprobs=2)
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(PROMPT)] == pytest.approx(expected["prompt_logprobs"], abs=TOLERANCE)
    vocabulary = served.service.vocabulary
    new = found["usage"]["completion_tokens"]
    assert logprobs["tokens"][len(PROMPT) :] == [vocabulary.name_of(token) for token in expected["tokens"][:new]]
    assert logprobs["token_logprobs"][len(PROMPT) :] == pytest.approx(expected["logprobs"][:new], abs=TOLERANCE)


def test_a_stream_a_stop_string_and_a_seed(served: Served) -> None:
    body = served.chat_body("What does <|eos|> mean?", seed=3, max_tokens=40, temperature=1.0)
    whole = served.ask("/v1/chat/completions", body).json
    events = served.stream("/v1/chat/completions", body)
    text = whole["choices"][0]["message"]["content"]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    stop = text[3:5]
    cut = served.ask("/v1/chat/completions", body | {"stop": stop}).json["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (text[: text.find(stop)], "stop")


def test_of_48_requests_16_at_a_time_none_is_lost(served: Served) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: served.chat("Hi", seed=seed, max_tokens=8), range(48)))
    assert all(0 < answer["usage"]["completion_tokens"] <= 8 for answer in answers)
    served.wait_until_free()
    assert served.ask("/health").status == 200
    assert os.environ.get("VLLM_API_KEY") is None
