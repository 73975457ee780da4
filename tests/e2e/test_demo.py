"""The demo, shortened: a small text, a smaller model, the same parts."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hunyuan_pretrain.config.load import load_experiment

ROOT = Path(__file__).parents[2]
STAGES = range(len(load_experiment(ROOT / "configs/dev/demo_cpu.yaml").stages))
SMALLER = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.kv_channels=16",
    "model.ffn_hidden_size=64",
    "model.moe_ffn_hidden_size=64",
    "model.moe_routing_group_tokens=64",
    *(f"stages.{i}.sequence_length=128" for i in STAGES),
    *(f"stages.{i}.global_batch_sequences=4" for i in STAGES),
    *(f"stages.{i}.micro_batch_sequences=2" for i in STAGES),
    *(f"stages.{i}.tokens={tokens}" for i, tokens in zip(STAGES, (5 * 512, 190 * 512, 5 * 512), strict=True)),
    "evaluation.max_sequences=16",
    "logging.log_every_steps=1",
    "logging.tensorboard=false",
]


@pytest.mark.slow
def test_demo_runs_from_text_to_generation(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("[a-d]*.py")):
        (text / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out"
    command = [sys.executable, "-m", "launch.demo", "--text", str(text), "--output", str(output), *SMALLER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    shown = done.stdout
    for line in (
        "hunyuan-data train-tokenizer",
        "hunyuan-data pack",
        "launch/train.sh",
        "hunyuan-pretrain export",
        "hunyuan-pretrain generate",
    ):
        assert f"$ {line}" in shown, line
    for row in (
        "held-out bits per byte",
        "the same text, unigram model",
        "busiest expert / mean",
        "tokens/s (median)",
        "export and load back",
    ):
        assert row in shown, row
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "Bits per byte" in (output / "run/report.html").read_text()

    # stopped in mid-run, resumed by the same command, every step there once
    assert "status 75: stopped by SIGTERM, saved after step" in shown
    stopped_at = int(shown.split("saved after step ")[-1].split(".")[0].split(";")[0])
    log = (output / "run/log.txt").read_text()
    assert 80 <= stopped_at < 200
    assert f"steps {stopped_at + 1} to 200" in log
    assert "done: 200 steps" in log
    steps = [
        record["step"]
        for line in (output / "run/metrics.jsonl").read_text().splitlines()
        if "loss" in (record := json.loads(line))
    ]
    assert steps == list(range(1, 201))

    assert "HunYuanForCausalLM" in shown
    certificate = json.loads((output / "model/certificate.json").read_text())
    assert certificate["source"]["step"] == 200
    assert certificate["max_abs_difference"] < 1e-3
