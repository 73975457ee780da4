"""The schema that editors use accepts what the loader accepts, and flags what it refuses in one file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hunyuan_pretrain.config.json_schema import json_schema
from hunyuan_pretrain.config.load import all_paths
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import COUNT_PATTERN, token_count
from hunyuan_pretrain.config.yaml_tree import parse
from tests.unit.config.test_load import EXPERIMENT, MODEL, STAGES

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA = CONFIGS / "experiment.schema.json"
FILES = sorted(CONFIGS.rglob("*.y*ml"))


def complaints(text: str) -> list[str]:
    """ "dotted.path: message" of everything that the schema flags in a YAML text; of alternatives, the nearest."""
    validator = jsonschema.Draft7Validator(json_schema())
    found = []
    for error in validator.iter_errors(parse(text, "text").data):
        deepest = jsonschema.exceptions.best_match([error])
        found.append(f"{'.'.join(map(str, deepest.absolute_path))}: {deepest.message}")
    return sorted(found)


def test_the_file_beside_the_yaml_is_the_schema() -> None:
    written = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert written == json_schema(), "run: hunyuan-pretrain config schema > configs/experiment.schema.json"
    jsonschema.Draft7Validator.check_schema(written)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CONFIGS)) for path in FILES])
def test_every_yaml_is_valid_and_names_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert complaints(text) == []
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named, "the first line tells editors the schema"
    assert os.path.samefile(path.parent / named[1], SCHEMA)


def test_every_setting_is_in_the_schema() -> None:
    def paths(node: dict[str, Any], prefix: str) -> list[str]:
        choices = node.get("anyOf", [])
        node = next((one for one in choices if one.get("type") == "array" or "properties" in one), node)
        node = node.get("items", node)
        own = node.get("properties", {}) if isinstance(node, dict) else {}
        return [path for name, inner in own.items() for path in [prefix + name, *paths(inner, f"{prefix}{name}.")]]

    assert paths(json_schema(), "") == ["base", *all_paths(Experiment)]


@pytest.mark.parametrize(
    "text",
    [EXPERIMENT, MODEL, STAGES, "base: [a.yaml, b.yaml]\nstages: {decay: {tokens: 1.5T}}\n", "tuning: {lora: null}\n"],
)
def test_experiments_and_parts_of_them_are_valid(text: str) -> None:
    assert complaints(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: {lr: fast}", "optimizer.lr: 'fast' is not of type 'number'"),
        ("model: {hidden_sise: 64}", "model: Additional properties are not allowed ('hidden_sise' was unexpected)"),
        ("precision: {dtype: bf61}", "precision.dtype: 'bf61' is not one of ['bf16', 'fp32']"),
        ("stages: {decay: {token: 5}}", "stages.decay: Additional properties are not allowed ('token' was unexpected)"),
        ("base: 5", "base: 5 is not valid under any of the given schemas"),
        ("run_dir: 5", "run_dir: 5 is not of type 'string'"),
        ("seed: 1M", "seed: '1M' is not of type 'integer'"),
        (EXPERIMENT.replace("    lr_end: 1.0\n", ""), "stages.0: 'lr_end' is a required property"),
        (EXPERIMENT.replace("7e6", "7 M"), "stages.0.tokens: '7 M' does not match"),
    ],
)
def test_mistakes_are_flagged_where_they_are(text: str, expected: str) -> None:
    found = complaints(text)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize("pair", ["[[3, 5]]", "[]"])
def test_pairs_are_pairs(pair: str) -> None:
    assert complaints(f"stages: {{decay: {{skip_data_steps: {pair}}}}}") == []


@pytest.mark.parametrize("pair", ["[[3, 5, 7]]", "[[3]]", "[[0, 5]]", "[3, 5]"])
def test_other_lists_are_no_pairs(pair: str) -> None:
    assert complaints(f"stages: {{decay: {{skip_data_steps: {pair}}}}}")


@pytest.mark.parametrize(
    "text",
    [
        *("10B", "1.5T", "4k", "4Ki", "1_000k", ".5k", "1e3k", "1Mi"),
        *("10b", "10G", "B", "10", "k4", "1.5", "10BB", "4kb", "1e", "eB", "1.k", "1..5k", "_1k"),
    ],
)
def test_editors_and_the_loader_agree_on_token_counts(text: str) -> None:
    assert (re.search(COUNT_PATTERN, text) is not None) == (token_count(text) is not None)
