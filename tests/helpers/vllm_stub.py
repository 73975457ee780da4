"""A stand-in for vLLM's server: the same command line and answers, over a Unix-domain socket, with tokens that follow
from the prompt. `write_stub` puts it into a folder as the package vllm, with this package's plugin as installed.

Token number n of an answer is the sum of the prompt's tokens plus n, modulo 97; a prompt that begins with 42 goes on
until it is cancelled. Records each request in requests.jsonl of the folder of the package, and `cancelled` when a
client goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

STOP = 257
"""<|endoftext|> of the tiny tokenizer."""


def write_stub(folder: Path) -> Path:
    """A folder for PYTHONPATH."""
    package = folder / "vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    metadata = folder / "plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nhunyuan_pretrain = x:y\n")
    return folder


def record(entry: Any) -> None:
    with (Path(__file__).parent / "requests.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def recorded(folder: Path) -> list[Any]:
    """What the stand-in in a folder has recorded."""
    path = folder / "vllm/entrypoints/openai/requests.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def tokens_of(body: dict[str, Any]) -> list[int]:
    first = sum(body["prompt"]) % 97
    count = 10**6 if body["prompt"][-2:-1] == [42] else body["max_tokens"]
    tokens = [(first + number) % 97 for number in range(min(count, body["max_tokens"]))]
    return [*tokens[:-1], STOP] if body["max_tokens"] > 20 and len(tokens) < 100 else tokens


def choice_of(body: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    names = [f"token_id:{token}" for token in tokens]
    tops = [{name: -token / 10, "token_id:1": -0.5} for name, token in zip(names, tokens, strict=True)]
    logprobs = {"tokens": names, "token_logprobs": [-token / 10 for token in tokens], "top_logprobs": tops}
    return {"index": 0, "text": "", "token_ids": tokens, "logprobs": logprobs if "logprobs" in body else None}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    headers = dict(scope["headers"])
    content: Any = {"data": [{"max_model_len": 300}]}
    body = b""
    while scope["method"] == "POST":
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    if scope["path"] != "/health" and headers.get(b"authorization") != f"Bearer {os.environ['VLLM_API_KEY']}".encode():
        await answer(send, 401, {"error": {"message": "no key"}})
        return
    if scope["path"] == "/v1/completions":
        asked = json.loads(body)
        record(asked)
        if asked["seed"] == 400:
            await answer(send, 400, {"error": {"message": "not today"}})
            return
        tokens = tokens_of(asked)
        if asked["stream"]:
            await stream(asked, tokens, receive, send)
            return
        rows = [{str(token): {"logprob": -token / 10}, "1": {"logprob": -0.5}} for token in asked["prompt"]]
        content = {"choices": [choice_of(asked, tokens) | {"prompt_logprobs": [None, *rows[1:]]}]}
    await answer(send, 200, content)


async def answer(send: Any, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def stream(asked: dict[str, Any], tokens: list[int], receive: Any, send: Any) -> None:
    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(until_gone())
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for at in range(0, len(tokens), 2):
        if gone.done():
            record("cancelled")
            return
        event = {"choices": [choice_of(asked, tokens[at : at + 2])]}
        await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        await asyncio.sleep(0.001)
    gone.cancel()
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    for name in ("--model", "--served-model-name", "--uds"):
        parser.add_argument(name, required=True)
    parser.add_argument("--fail", action="store_true")
    options = parser.parse_args()
    if options.fail:
        raise SystemExit(7)
    uvicorn.run(app, uds=options.uds, log_level="warning")
