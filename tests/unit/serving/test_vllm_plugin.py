"""The entry point that vLLM calls, without vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

ROOT = Path(__file__).parents[3]


def python(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter: registering changes transformers for a whole process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_entry_point_names_the_plugin_and_the_plugin_the_model() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugins = project["entry-points"]["vllm.general_plugins"]
    assert plugins == {"hunyuan_pretrain": "hunyuan_pretrain.serving.vllm_plugin:register"}
    from hunyuan_pretrain.serving.vllm_plugin import MODEL

    module, _, name = MODEL.partition(":")
    source = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in source.body if isinstance(node, ast.ClassDef)}


def test_importing_the_plugin_imports_nothing_else() -> None:
    """vLLM imports it in every process, whatever model it serves."""
    code = (
        "import sys\nimport hunyuan_pretrain.serving.vllm_plugin\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'megatron', 'numpy'} & set(sys.modules)))"
    )
    assert python(code) == "[]\n"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_so() -> None:
    from hunyuan_pretrain.serving.vllm_plugin import register

    with pytest.raises(ImportError, match=r"is called by vLLM, which is not installed here \(docs/guide/serving.md\)"):
        register()


def test_the_configuration_loads_without_remote_code_and_no_heavy_part_of_ours(tmp_path: Path) -> None:
    """vLLM's registry is replaced by one that records. The file config.json names code of the export's folder, which is
    removed here."""
    (tmp_path / "tokenizer").mkdir()
    export_tiny(tiny_model(), write_tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "export")
    for file in (tmp_path / "export").glob("*.py"):
        file.unlink()
    code = (
        "import sys, types\n"
        "calls = []\n"
        "vllm = types.ModuleType('vllm')\n"
        "vllm.ModelRegistry = types.SimpleNamespace(register_model=lambda *names: calls.append(names))\n"
        "sys.modules['vllm'] = vllm\n"
        "from hunyuan_pretrain.serving.vllm_plugin import register\n"
        "register(), register()\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "print(type(config).__module__, config.kv_share_factor, calls[0], len(calls))\n"
        "print([name for name in sys.modules if name.startswith(('megatron', 'hunyuan_pretrain.model'))])"
    )
    model = "hunyuan_pretrain.serving.vllm_model:HunYuanForCausalLM"
    assert python(code, str(tmp_path / "export")).splitlines() == [
        f"hunyuan_pretrain.checkpoint.configuration_hunyuan 2 ('HunYuanForCausalLM', '{model}') 2",
        "[]",
    ]
