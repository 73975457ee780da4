"""Exports, the wheel that vLLM's processes import, and vLLM itself in an interpreter of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint.generate import load_model
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    return python


@pytest.fixture(scope="session")
def wheel(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, unpacked: a folder for PYTHONPATH. vLLM finds the plugin by its entry point."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "hunyuan_pretrain", folder / "source/hunyuan_pretrain")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, check=True)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "installed", "zip")
    return folder / "installed"


@pytest.fixture(scope="session")
def environment(wheel: Path) -> dict[str, str]:
    """For vLLM's processes. The project's packages come from the wheel only, and no GPU is used."""
    ours = {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | ours


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that exports a random model; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(format: str = "hunyuan", **changes: object) -> Path:
        name = format + json.dumps(changes, sort_keys=True)
        if name not in made:
            folder = tmp_path_factory.mktemp("export")
            (folder / "tokenizer").mkdir()
            small = {"num_layers": 4, "hidden_size": 64, "kv_channels": 32, "ffn_hidden_size": 96}
            made[name] = folder / "model"
            tokenizer = write_tiny_tokenizer(folder / "tokenizer")
            export_tiny(tiny_model(**(small | changes)), tokenizer, made[name], format=format)
        return made[name]

    return make


@pytest.fixture(scope="session")
def serve(
    vllm_python: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """A function that runs engine.py on a model."""

    def run(
        model: Path, prompts: list[list[int]], variables: dict[str, str] | None = None, **job: Any
    ) -> dict[str, Any]:
        """The result of engine.py, and its output as `log`."""
        folder = tmp_path_factory.mktemp("job")
        job = {"model": str(model), "prompts": prompts, "new_tokens": NEW_TOKENS} | job
        (folder / "job.json").write_text(json.dumps(job))
        command = [vllm_python, str(Path(__file__).parent / "engine.py"), str(folder / "job.json")]
        done = subprocess.run(
            [*command, str(folder / "result.json")],
            env=environment | (variables or {}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (folder / "result.json").is_file(), done.stdout[-4000:]
        return json.loads((folder / "result.json").read_text()) | {"log": done.stdout}

    return run


@pytest.fixture(scope="session")
def ours() -> Callable[..., list[dict[str, Any]]]:
    """A function that computes what engine.py does with the model code of the export: one prompt at a time, without a
    cache. Probabilities are over the ids that can be emitted: without those that pad the vocabulary, unless
    may_emit_all."""

    def run(folder: Path, prompts: list[list[int]], may_emit_all: bool = False) -> list[dict[str, Any]]:
        model = load_model(folder)
        never = torch.tensor([] if may_emit_all else model.generation_config.suppress_tokens, dtype=torch.long)
        results = []
        for prompt in prompts:
            row = list(prompt)
            for _ in range(NEW_TOKENS):
                with torch.inference_mode():
                    logits = model(torch.tensor([row]), use_cache=False).logits[0].index_fill(-1, never, -torch.inf)
                row.append(int(logits[-1].argmax()))
            of_next = logits.log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
            first_new = len(prompt) - 1
            results.append(
                {
                    "tokens": row[len(prompt) :],
                    "logprobs": of_next[first_new:],
                    "prompt_logprobs": of_next[:first_new],
                }
            )
        return results

    return run
