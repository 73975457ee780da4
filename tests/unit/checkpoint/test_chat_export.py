"""Exports of runs that were fine-tuned on conversations: the end of an answer, and the system prompt of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint.adapter import CERTIFICATE
from hunyuan_pretrain.checkpoint.export_run import system_prompt_of
from hunyuan_pretrain.checkpoint.generate import load_model, load_tokenizer
from hunyuan_pretrain.checkpoint.lora_merge import merge_lora
from hunyuan_pretrain.config.history import Segment, SourceFacts
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.serving import exports, terminal
from hunyuan_pretrain.serving.generation import Sampling
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.runs import experiment_fields
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer
from tests.unit.checkpoint.test_lora_merge import Q0, low_rank, write_adapter

PROMPT = 'Be <|eos|> "brief".\n'
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: of documents; chat: of conversations with PROMPT; adapter: one trained on conversations with PROMPT, for
    base; merged: both."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = write_tiny_tokenizer(folder)
    export_tiny(tiny_model(), tokenizer, folder / "base")
    export_tiny(tiny_model(), tokenizer, folder / "chat", system_prompt=PROMPT)
    adapter = write_adapter(folder / "adapter", low_rank(Q0, 32, 32, 4))
    (adapter / CERTIFICATE).write_text(json.dumps({"format": "peft", "chat": {"system_prompt": PROMPT}}))
    merge_lora(folder / "base", adapter, folder / "merged")
    return folder


def fields(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["chat", "merged"])
def test_its_tokenizer_ends_with_an_answer_and_knows_the_system_prompt(name: str, root: Path) -> None:
    folder, tokenizer = root / name, Tokenizer.load(root)
    loaded = load_tokenizer(folder)
    assert (loaded.eos_token_id, load_tokenizer(root / "base").eos_token_id) == (tokenizer.eos_id, tokenizer.end_id)
    assert fields(folder / "config.json")["eos_token_id"] == tokenizer.eos_id
    assert fields(folder / "special_tokens_map.json")["eos_token"] == "<|eos|>"
    assert fields(folder / "generation_config.json")["eos_token_id"] == [tokenizer.end_id, tokenizer.eos_id]
    expected = tokenizer.apply_chat([{"role": "system", "content": PROMPT}, *USER])
    assert loaded.apply_chat_template(USER, return_dict=False) == expected
    assert "generation %}" in loaded.chat_template
    release = fields(folder / "release_tokenizer/tokenizer_config.json")
    assert (release["eos_token"], release["default_system_prompt"]) == ("<|eos|>", PROMPT)
    assert "generation %}" not in release["chat_template"]
    assert loaded.apply_chat_template(USER, chat_template=release["chat_template"], return_dict=False) == expected


def test_certificate_and_card_state_the_system_prompt(root: Path) -> None:
    assert fields(root / "chat/certificate.json")["chat"] == {"system_prompt": PROMPT}
    assert json.dumps(PROMPT) in (root / "chat/README.md").read_text(encoding="utf-8")
    assert "chat" not in fields(root / "base/certificate.json")


def test_chats_and_the_server_use_it_unless_told_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, chat = Vocabulary(root / "base"), Vocabulary(root / "chat")
    adapter = root / "adapter"
    assert exports.system_prompt_of(None, base, None) == ""
    assert exports.system_prompt_of(None, chat, None) == PROMPT
    assert exports.system_prompt_of(None, base, adapter) == PROMPT
    assert [exports.system_prompt_of(given, chat, adapter) for given in ("", "Other.")] == ["", "Other."]
    found = []
    monkeypatch.setattr(terminal, "talk", lambda conversation, *_: found.append(conversation.system))
    for system in (None, ""):
        terminal.run(root / "chat", None, "cpu", system, None, Sampling())
    assert found == [PROMPT, ""]


@pytest.mark.parametrize("name", ["chat", "merged"])
def test_generation_stops_at_the_end_of_an_answer(name: str, root: Path) -> None:
    """Also where a caller names the tokenizer's end alone, as trainers and scripts do."""
    model, tokenizer = load_model(root / name), load_tokenizer(root / name)
    answer = [*b"hey", tokenizer.eos_token_id]
    said: list[int] = []

    def says(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[:, -1, answer[len(said)] if len(said) < len(answer) else 104] = 1e4
        said.append(1)
        return logits

    model.lm_head.register_forward_hook(says)
    prompt: Any = tokenizer.apply_chat_template(USER, return_tensors="pt", return_dict=True)
    for options in ({}, {"eos_token_id": tokenizer.eos_token_id}):
        said.clear()
        new = model.generate(**prompt, max_new_tokens=20, **options)[0, prompt["input_ids"].shape[1] :]
        assert new.tolist() == answer


def checkpoint(folder: Path, task: str, prompts: dict[str, tuple[str | None, float]]) -> Path:
    """A checkpoint of a run whose last stage read these sources: system prompt and weight by name."""
    made = experiment_fields(Path("/data"), folder, 2)
    paths = {name: str(folder / name) for name in prompts}
    data = [{"path": paths[name], "weight": weight} for name, (_, weight) in prompts.items()]
    made["stages"] = [made["stages"][-1] | {"task": task, "data": data}]
    facts = {
        paths[name]: SourceFacts(sequences=9, tokens=90, sequence_length=10, system_prompt=prompt)
        for name, (prompt, _) in prompts.items()
    }
    history = [Segment(first_step=0, experiment=made, sources=facts).model_dump(mode="json")]
    marker = {"step": 1, "world_size": 1, "model": made["model"], "files": {}, "history": history}
    folder.mkdir()
    (folder / "complete.json").write_text(json.dumps(marker))
    return folder


def test_the_system_prompt_of_a_run_is_that_of_its_last_stage(tmp_path: Path) -> None:
    said: list[str] = []
    cases: list[tuple[str, dict[str, tuple[str | None, float]], str | None]] = [
        ("sft", {"a": ("Be brief.", 1)}, "Be brief."),
        ("sft", {"a": ("", 1), "texts": (None, 9)}, ""),
        ("dpo", {"pairs": ("Be brief.", 1)}, "Be brief."),
        ("dpo", {"pairs": ("", 1)}, ""),
        ("pretrain", {"texts": (None, 1)}, None),
    ]
    for number, (task, prompts, expected) in enumerate(cases):
        assert system_prompt_of(checkpoint(tmp_path / str(number), task, prompts), said.append) == expected
    assert said == []
    assert system_prompt_of(checkpoint(tmp_path / "before", "sft", {"a": (None, 1)}), said.append) == ""
    assert said == ["the run has not recorded the system prompt of its conversations: the default is none"]
    said.clear()
    several: dict[str, tuple[str | None, float]] = {"a": ("A", 2), "b": ("B", 3), "c": ("A", 2)}
    assert system_prompt_of(checkpoint(tmp_path / "several", "sft", several), said.append) == "A"
    assert said == ["conversations with several system prompts: the default is 'A', not 'B'"]
