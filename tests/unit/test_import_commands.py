"""`import` and `merge-lora` as commands: what they print, one message and status 2 for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.foreign import hf_tensors, write_folder, write_tensors
from tests.helpers.tiny_export import tiny_model
from tests.unit.test_cli import run

MODEL = tiny_model()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: run(*map(str, arguments), monkeypatch=monkeypatch, capsys=capsys)


def test_import_says_what_it_wrote_and_left_out(command, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL), attention_dropout=0.1)
    code, out, err = command("import", folder, tmp_path / "out", "--dtype", "bf16")
    assert (code, err) == (0, "")
    first, *notes, last = out.splitlines()
    assert first.endswith(f" weights of a hunyuan model, bf16, {(43968 + 2 * 4 * 32) * 2 / 1e9:.3g} GB")
    assert any("attention_dropout=0.1" in note for note in notes)
    assert any("tensors in a finer format were rounded to bf16" in note for note in notes)
    assert last.endswith(f"hunyuan-pretrain train {tmp_path / 'out' / 'experiment.yaml'}")
    assert "attention_dropout=0.1" in (tmp_path / "out" / "import.md").read_text()


def test_mistakes_are_one_message_and_status_2(command, tmp_path: Path) -> None:
    tensors = hf_tensors(MODEL)
    folder = write_folder(tmp_path / "hf", MODEL, tensors)
    (tmp_path / "broken").mkdir()
    code, out, err = command("import", tmp_path / "broken", tmp_path / "out")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "Hugging Face model folder" in err
    (folder / "hy.tiktoken").unlink()
    code, out, err = command("import", folder, tmp_path / "out")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, out, err = command("merge-lora", folder, tmp_path / "broken", tmp_path / "out")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "give a folder that PEFT saved" in err
    assert not (tmp_path / "out").exists()


def test_merge_lora_says_what_changed(command, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", MODEL, hf_tensors(MODEL))
    (folder / "certificate.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    write_tensors(adapter, {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    code, out, err = command("merge-lora", folder, adapter, tmp_path / "out", "--dtype", "fp16")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{tmp_path / 'out'}: 1 of 48 tensors changed, fp16"
    assert "certificate.json of the base is not copied" in out
