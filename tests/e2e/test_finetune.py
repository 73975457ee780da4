"""The commands of "Fine-tune on your conversations", one after the other, on the weights of a run of two steps."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.chat import DEFAULT_SYSTEM_PROMPT
from tests.helpers.runs import ROOT, experiment_fields, run_forked, write_experiment

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs/guide/finetune.md"
PROGRAMS = {"hunyuan-data": "data_tools.cli", "hunyuan-pretrain": "hunyuan_pretrain"}


def commands() -> list[list[str]]:
    """Those of the page: of fine-tuning, then of preferences."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_commands_of_the_page_fine_tune_merge_and_prefer(corpus: Path, tmp_path: Path) -> None:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "demo_out").mkdir()
    (tmp_path / "demo_out/tokenizer").symlink_to(corpus / "tokenizer")
    model = yaml.safe_load((ROOT / "configs/model/hunyuan_tiny.yaml").read_text())["model"]
    fields = experiment_fields(corpus, tmp_path / "demo_out/run", 2, model=model | {"moe_routing_group_tokens": 32})
    status, _, error = run_forked("train", str(write_experiment(tmp_path / "base.yaml", fields)))
    assert status == 0, error
    said = {}
    for command in commands():
        done = subprocess.run(
            [sys.executable, "-m", PROGRAMS[command[0]], *command[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said[command[1] + " " + command[-1]] = done.stdout
    records = records_of(tmp_path / "demo_out/sft")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 0.03, losses  # the base has hardly learned anything that it could use
    (last,) = [record for record in records if record.get("step") == 20 and "validation_loss" in record]
    assert last["validation_conversations"] == 6
    assert last["validation_conversation_loss"] > 0
    assert (tmp_path / "demo_out/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "demo_out/merged/merge.json").is_file()
    # the system prompt that `tokenize` gave the conversations, through packs, run, adapter and merged model
    adapter = json.loads((tmp_path / "demo_out/adapter/certificate.json").read_text())
    assert adapter["chat"] == {"system_prompt": DEFAULT_SYSTEM_PROMPT}
    merged = json.loads((tmp_path / "demo_out/merged/tokenizer_config.json").read_text())
    assert (merged["eos_token"], merged["default_system_prompt"]) == ("<|eos|>", DEFAULT_SYSTEM_PROMPT)
    preferred = [record for record in records_of(tmp_path / "demo_out/dpo") if "preference_loss" in record]
    assert abs(preferred[0]["preference_loss"] - math.log(2)) < 1e-6
    assert preferred[-1]["preference_loss"] < 0.2, preferred[-1]
    assert preferred[-1]["reward_margin"] > 0
    assert json.loads((tmp_path / "demo_out/preferred/tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"
