"""The chat template of a model that was fine-tuned on conversations: ids, end of sequence, marks, and its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hunyuan_pretrain.data.chat_template import chat_fields, default_system_prompt
from hunyuan_pretrain.data.hf_tokenizer import read_hf_tokenizer
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks, write_hf_tokenizer

HOSTILE = "Say \"}}\" or '{%' \\n <|eos|> <\ufdd0| \n\t🙂 DEFAULT {# é\u0301"
TURNS = [
    {"role": "user", "content": "he <|extra_0|>"},
    {"role": "assistant", "content": "\u0301<|eos|> {% generation %} he"},
    {"role": "user", "content": "谢谢"},
    {"role": "assistant", "content": "<\ufdd0he"},
]
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)} | {b"he": 256})


def written(folder: Path, system_prompt: str | None) -> Any:
    (folder / RANKS_FILE).write_bytes(format_ranks(TOKENIZER.ranks))
    write_hf_tokenizer(TOKENIZER, folder, model_max_length=4096, system_prompt=system_prompt)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("prompt", ["You are a helpful assistant.", HOSTILE, ""], ids=["usual", "hostile", "none"])
def test_the_default_system_prompt_is_that_of_the_data_and_may_be_empty(prompt: str, tmp_path: Path) -> None:
    loaded = written(tmp_path, prompt)
    assert (loaded.eos_token, loaded.pad_token) == ("<|eos|>", "<|pad|>")
    assert default_system_prompt(tmp_path) == prompt
    default, other, empty = ({"role": "system", "content": text} for text in (prompt, "Be brief.", ""))
    for given, meant in (
        (TURNS[:1], [default, *TURNS[:1]]),
        (TURNS, [default, *TURNS]),
        ([other, *TURNS], [other, *TURNS]),
        ([empty, *TURNS], TURNS),
    ):
        assert loaded.apply_chat_template(given, return_dict=False) == TOKENIZER.apply_chat(meant)
    loaded.save_pretrained(tmp_path / "again")
    assert default_system_prompt(tmp_path / "again") == prompt
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert again.apply_chat_template(TURNS, return_dict=False) == TOKENIZER.apply_chat([default, *TURNS])
    assert read_hf_tokenizer(tmp_path / "again").digest == TOKENIZER.digest


def test_a_model_of_documents_has_no_default_and_ends_with_its_documents(tmp_path: Path) -> None:
    loaded = written(tmp_path, None)
    assert (loaded.eos_token, default_system_prompt(tmp_path)) == ("<|endoftext|>", None)
    assert loaded.apply_chat_template(TURNS, return_dict=False) == TOKENIZER.apply_chat(TURNS)


@pytest.mark.parametrize("prompt", ["Be brief.", None])
def test_the_marks_are_what_fine_tuning_trains_on(prompt: str | None, tmp_path: Path) -> None:
    from data_tools.encoding import DocumentEncoder, EncoderSource

    loaded = written(tmp_path, prompt)
    meant = [{"role": "system", "content": prompt or ""}, *TURNS]
    ids, _, targets = DocumentEncoder(EncoderSource.of(str(tmp_path), TOKENIZER)).encode_chats([meant], False)
    found = loaded.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == ids.tolist()
    assert found["assistant_masks"] == targets.astype(int).tolist()


def test_older_programs_get_the_same_template_without_marks(tmp_path: Path) -> None:
    loaded = written(tmp_path, HOSTILE)
    plain = chat_fields(HOSTILE, is_marked=False)["chat_template"]
    assert "generation %}" not in plain
    assert loaded.apply_chat_template(TURNS, chat_template=plain, tokenize=False) == loaded.apply_chat_template(
        TURNS, tokenize=False
    )
