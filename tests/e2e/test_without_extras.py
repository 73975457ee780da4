"""After a plain `pip install hunyuan-pretrain`: what needs no extra works, and what needs one names it, in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hunyuan_pretrain.config.extras import EXTRAS, REQUIRED, install_hint, missing_package
from tests.helpers.runs import ROOT, experiment_fields, write_experiment

WITHOUT_EXTRAS = """
import json, os, sys, traceback
import importlib.metadata  # gives PathFinder its find_distributions
from importlib.machinery import PathFinder

class WithoutSome:
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

absent, commands = json.loads(sys.argv[1])
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutSome()
import torch
import hunyuan_pretrain.cli, data_tools.cli
mains = {"hunyuan-pretrain": hunyuan_pretrain.cli.main, "hunyuan-data": data_tools.cli.main}
for number, (name, *arguments) in enumerate(commands):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        sys.argv = [name, *arguments]
        try:
            mains[name]()
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ABSENT = sorted(name for names in EXTRAS.values() for name in names)


DATA, HF = (
    'is not installed: pip install "hunyuan-pretrain[data',
    'is not installed: pip install "hunyuan-pretrain[data,hf]',
)


def needs(module: str) -> str:
    return f"{module} is not installed: {install_hint(module)}"


def test_every_command_works_or_names_the_extra(corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Hello"}\n')
    fields = experiment_fields(corpus, tmp_path / "run", steps=2)
    config = str(write_experiment(tmp_path / "x.yaml", fields))
    out, tokenizer, tokenized = str(tmp_path / "out"), str(corpus / "tokenizer"), str(corpus / "tokenized")
    (tmp_path / "exported").mkdir()
    expected: list[tuple[list[str], str | None]] = [
        (["hunyuan-pretrain", "explain", "optimizer.lr"], None),
        (["hunyuan-pretrain", "config", "show", config], None),
        (["hunyuan-pretrain", "config", "diff", config, config], None),
        (["hunyuan-pretrain", "plan", config], None),
        (["hunyuan-pretrain", "doctor", config], None),
        (["hunyuan-pretrain", "train", config], None),
        (["hunyuan-pretrain", "export", str(tmp_path / "run"), out], HF),
        (["hunyuan-pretrain", "generate", str(tmp_path / "exported"), "--prompt", "x"], needs("transformers")),
        (["hunyuan-pretrain", "serve", str(tmp_path / "exported")], needs("starlette")),
        (["hunyuan-pretrain", "evaluate", str(tmp_path / "run"), "--tasks", "piqa"], needs("datasets")),
        (["hunyuan-data", "train-tokenizer", str(text), "--vocab-size", "600", "--output", out], DATA),
        (["hunyuan-data", "tokenize", str(text), "--tokenizer", tokenizer, "--output", out], DATA),
        (
            ["hunyuan-data", "tokenize", str(text), "--tokenizer", tokenizer, "--output", out, "--executor", "local"],
            "is not installed: ",
        ),
        (["hunyuan-data", "pack", tokenized, "--sequence-length", "64", "--output", str(tmp_path / "packed")], None),
        (["hunyuan-data", "mix", config], None),
        (
            ["hunyuan-data", "mix", config, "--output", out],
            f"the plot needs matplotlib: {install_hint('matplotlib')}",
        ),
        (["hunyuan-data", "where", config, "--step", "1"], None),
        (["hunyuan-data", "verify", tokenized], None),
        (["hunyuan-data", "inspect", str(corpus / "train")], None),
    ]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps([ABSENT, [arguments for arguments, _ in expected]])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    wrong = []
    for number, ((arguments, message), status) in enumerate(zip(expected, done.stdout.split(), strict=True)):
        said = (tmp_path / f"{number}.err").read_text()
        is_right = (
            status == "0" if message is None else (status == "2" and message in said and len(said.splitlines()) == 1)
        )
        if not is_right or "Traceback" in said:
            wrong.append((arguments, status, said))
    assert not wrong, "\n".join(map(str, wrong))
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("module", "program", "arguments"),
    [
        ("typer", "hunyuan_pretrain", ["explain"]),
        ("typer", "data_tools", ["inspect", "x"]),
        ("pydantic", "hunyuan_pretrain", ["explain"]),
        ("yaml", "hunyuan_pretrain", ["config", "show", "configs/dev/demo_cpu.yaml"]),
        ("torch", "hunyuan_pretrain", ["doctor"]),
        ("numpy", "data_tools", ["inspect", "x"]),
    ],
)
def test_a_required_package_that_is_absent_is_named(module: str, program: str, arguments: list[str]) -> None:
    """As after `pip install --no-deps` in a container whose torch must not be replaced."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['x', *{arguments}]; "
        f"from {program}.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = f'{REQUIRED[module].partition(">")[0]} is not installed: pip install "{REQUIRED[module]}"\n'
    assert (done.returncode, done.stderr.removeprefix("hunyuan-data: ")) == (2, said)


def test_required_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(REQUIRED.values()) == sorted(project["dependencies"])


def test_every_optional_package_of_the_project_is_known() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    of = {"fasttext": "fasttext-numpy2-wheel", "lm_eval": "lm-eval", "transformer_engine": "transformer-engine"}
    for extra, names in EXTRAS.items():
        for name in names:
            assert any(line.startswith(of.get(name, name)) for line in extras[extra]), (extra, name)
    known = {of.get(name, name) for names in EXTRAS.values() for name in names}
    for extra in EXTRAS:
        for line in extras[extra]:
            assert line.startswith((*known, "hunyuan-pretrain[")), line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("", name="zstandard"), 'zstandard is not installed: pip install "hunyuan-pretrain[data]"'),
        (
            ModuleNotFoundError("", name="megatron.core"),
            'megatron-core is not installed: pip install "megatron-core>=0.16.1,<0.20"',
        ),
        (ModuleNotFoundError("", name="torch.gone"), None),
        (ModuleNotFoundError("", name="hunyuan_pretrain.model.gone"), None),  # a bug of ours stays a traceback
        (ModuleNotFoundError("", name="transformers.gone"), None),  # another version: not an absent package
        (ImportError("broken", name="zstandard"), None),
        (ValueError(), None),
    ],
)
def test_only_an_absent_package_counts_as_absent(error: BaseException, said: str | None) -> None:
    assert missing_package(error) == said
