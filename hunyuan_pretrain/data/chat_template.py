"""The layout of a conversation as a chat template in Hugging Face format, and the system prompt that a model was
fine-tuned with.

The ids are those of `Tokenizer.apply_chat`. The tokens that the assistant writes are marked with transformers'
`{% generation %}`, from which trainers read what to train on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["chat_fields", "default_system_prompt"]

GUARD = "\ufdd0"
"""Inserted into each "<|" of a text that passes through Hugging Face's chat template, so that no special token name is
found there. The normaliser of tokenizer.json removes it again. Unicode reserves this code point for internal use: text
for interchange never contains it."""
SYSTEM_PROMPT = "default_system_prompt"
"""Field of tokenizer_config.json; only of a model that was fine-tuned on conversations."""

TEMPLATE = (
    # G: the guard. Reversible for any text, because the normaliser removes one guard after each "<".
    "{% macro text(message) %}{% if message['content'] is not string %}{{ raise_exception('the content of a "
    "message must be text') }}"
    "{% endif %}{{ message['content'] | replace('<G', '<GG') | replace('<|', '<G|') }}{% endmacro %}"
    "{% set offset = 0 %}{{ '<|startoftext|>' }}"
    "{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}"
    "{% if messages[0]['content'] %}{{ text(messages[0]) + '<|extra_4|>' }}{% endif %}DEFAULT{% endif %}"
    "{% for message in messages[offset:] %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles must be an optional system, then user and assistant in turn') }}{% endif %}"
    "{% if message['role'] == 'user' %}{% if not loop.first %}{{ '<|startoftext|>' }}{% endif %}{{ text(message) "
    "+ '<|extra_0|>' }}"
    "{% else %}{% generation %}{{ text(message) + '<|eos|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
).replace("G", GUARD)


def chat_fields(system_prompt: str | None, *, is_marked: bool = True) -> dict[str, Any]:
    """What tokenizer_config.json says of chats.

    system_prompt: of a model that was fine-tuned on conversations, for those without a system message; "" for none.
    Its end-of-sequence token is <|eos|>, which ends an answer. None: a model of documents, which end with
    <|endoftext|>. is_marked: False for transformers before 4.42, which knows no marks.
    """
    template = TEMPLATE
    if not is_marked:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    if system_prompt is None:
        return {"eos_token": "<|endoftext|>", "chat_template": template.replace("DEFAULT", "")}
    default = ""
    if system_prompt:
        guarded = system_prompt.replace("<" + GUARD, "<" + GUARD * 2).replace("<|", f"<{GUARD}|")
        # Jinja reads the escapes of a JSON string, but not pairs of surrogates: other characters stay as they are
        default = "{% else %}{{ " + json.dumps(guarded, ensure_ascii=False) + " + '<|extra_4|>' }}"
    return {
        "eos_token": "<|eos|>",
        "chat_template": template.replace("DEFAULT", default),
        SYSTEM_PROMPT: system_prompt,
    }


def default_system_prompt(folder: Path) -> str | None:
    """The system prompt that a model folder records for chats without a system message; None if it records none.

    Raises ValueError for a tokenizer_config.json that is not JSON, OSError.
    """
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = fields.get(SYSTEM_PROMPT) if isinstance(fields, dict) else None
    return found if isinstance(found, str) else None
