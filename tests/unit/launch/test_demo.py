"""The demo's own checks."""

from __future__ import annotations

import ast
import json

import pytest

from launch.demo import GREEDY_TOKENS, LOAD_BACK, PROMPT, check_greedy
from launch.demo_text import DemoError


def printed(text: str) -> str:
    return f"HunYuanForCausalLM 1 parameters, loss of a line 2.0\ngreedy, without a cache: {json.dumps(text)}\n"


def test_a_sample_that_the_model_does_not_reproduce_fails_the_demo() -> None:
    check_greedy(printed(" = 1\n"), " = 1\n\n")
    with pytest.raises(
        DemoError, match="is 'def def def\\\\n' by `generate`, which keeps a cache, but ': Reader' without a cache"
    ):
        check_greedy(printed(": Reader"), "def def def\n")


def test_the_script_that_loads_the_export_back_is_valid_python() -> None:
    ast.parse(LOAD_BACK.format(folder="out", prompt=PROMPT, tokens=GREEDY_TOKENS))
