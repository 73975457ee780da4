"""The commands `serve` and `chat` as the guide shows them, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_pretrain.checkpoint.lora_merge import merge_lora
from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.exports import load_local
from hunyuan_pretrain.serving.server import Options, serve
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import served_export
from tests.unit.test_cli import run

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def block(begin: str) -> str:
    """The code of the guide that begins so."""
    (found,) = (text for _, text in BLOCKS if text.startswith(begin))
    return found


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exports/one."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "exports").mkdir()
    served_export(folder).rename(folder / "exports/one")
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def address(exports: Path, environment: dict[str, str]) -> Iterator[str]:
    """Of a server that the guide's first command started, on a port that is free."""
    command = block("pip install -e").splitlines()[1].split()
    assert command == ["hunyuan-pretrain", "serve", "exports/one"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hunyuan_pretrain", *command[1:], "--port", "0"],
        cwd=exports,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("one at http://127.0.0.1:"), line
        yield line.split()[-1].rstrip("/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_request_of_the_guide(address: str, exports: Path) -> None:
    command = block("curl").replace("http://127.0.0.1:8000", address)
    done = subprocess.run(["bash", "-c", command], cwd=exports, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_the_python_of_the_guide(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("from openai").replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out


def test_the_chat_of_the_guide_from_a_pipe(exports: Path, environment: dict[str, str]) -> None:
    command = block("hunyuan-pretrain chat").split()
    done = subprocess.run(
        [sys.executable, "-m", "hunyuan_pretrain", *command[1:], "--temperature", "0"],
        cwd=exports,
        env=environment,
        input="Hello\nHello\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 2


def adapter(folder: Path, rows: int) -> Path:
    """A LoRA adapter of rank 2 for the first query projection, with so many rows of output."""
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    sizes = {"lora_A": (2, 64), "lora_B": (rows, 2)}
    tensors = {f"{name}.{part}.weight": torch.randn(size, generator=generator) for part, size in sizes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_in_memory_is_the_merged_one(exports: Path, tmp_path: Path) -> None:
    base, vocabulary = exports / "exports/one", Vocabulary(exports / "exports/one")
    lora = adapter(tmp_path / "lora", rows=128)
    merge_lora(base, lora, tmp_path / "merged")
    served = load_local(base, lora, "cpu", vocabulary)._model.state_dict()
    merged = load_local(tmp_path / "merged", None, "cpu", vocabulary)._model.state_dict()
    plain = load_local(base, None, "cpu", vocabulary)._model.state_dict()
    assert served.keys() == merged.keys()
    assert all(torch.equal(served[name], merged[name]) for name in served)
    assert [name for name in served if not torch.equal(served[name], plain[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_what_cannot_be_served_is_one_message_and_status_2(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HUNYUAN_API_KEY", raising=False)
    export = exports / "exports/one"
    untold = tmp_path / "untold"
    shutil.copytree(export, untold)
    for name in ("hy.tiktoken", "tokenizer.json"):
        (untold / name).unlink()
    other = adapter(tmp_path / "other", rows=96)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["serve", str(export), "--port", port], f"--host 127.0.0.1 --port {port}: Address already in use"),
            (["serve", str(export), "--host", "0.0.0.0"], "others reach this address, so a key is required"),
            (["serve", str(export), "--host", "no.such.host.invalid"], "HUNYUAN_API_KEY"),
            (["serve", str(tmp_path / "none")], "no such folder; give one that `hunyuan-pretrain export` wrote"),
            (["serve", str(tmp_path)], "not an exported model: config.json"),
            (["serve", str(untold), "--port", "0"], "no tokenizer: neither hy.tiktoken nor tokenizer.json is there"),
            (["serve", str(export), "--port", "0", "--lora", str(other)], "an adapter of another base"),
            (["serve", str(export), "--port", "0", "--lora", str(tmp_path)], "adapter_config.json: cannot be read"),
            (["serve", str(export), "--api-key-file", str(tmp_path / "none")], "cannot be read"),
            (["chat", str(untold)], "no tokenizer: neither hy.tiktoken nor tokenizer.json is there"),
            (["chat", str(export), "--lora", str(other)], "an adapter of another base"),
        ]
        for arguments, message in cases:
            status, out, error = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
            assert (status, out) == (2, ""), (arguments, error)
            assert message in error
            assert "Traceback" not in error


def test_an_address_of_another_machine_is_refused(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_API_KEY", "k" * 24)
    with pytest.raises(ServingError, match=r"--host 192\.0\.2\.1 --port 0"):
        serve(Options(exports / "exports/one", host="192.0.2.1", port=0), print)
