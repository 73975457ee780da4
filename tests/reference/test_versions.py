"""Our model code and its exports under other versions and beside other packages: the tests of these files, run in a
process that finds them first.

`make` installs the oldest transformers that exports support, accelerate, PEFT and TRL, and lm-eval into folders of
their own (.ci/locks): beside this project they would change what other packages do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = Path(os.environ.get("PACKAGE_FOLDERS", sys.prefix))
"""Where the folders are."""

MODEL = ["tests/reference/test_modeling_hunyuan.py", "tests/reference/test_generation.py"]
EXPORTS = [
    "tests/unit/checkpoint/test_hf_export.py",
    "tests/unit/checkpoint/test_loaders.py",
    "tests/unit/checkpoint/test_tokenizer_files.py",
    "tests/unit/data/test_chat_template.py",
    "tests/unit/data/test_tokenizer.py",
]
PEERS = ["tests/reference/test_peers.py"]
TRAINERS = "tests/reference/test_beside_trl.py"
MERGE = "tests/unit/checkpoint/test_lora_merge.py::test_equals_peft_bit_by_bit"
ADAPTER = "tests/parallel/test_adapters.py::test_peft_reads_the_adapter_and_computes_the_merged_model"
CASES = {
    "the oldest transformers": (["transformers_oldest", "peers"], [*MODEL, *EXPORTS, *PEERS]),
    "this transformers with peers": (["peers"], [*PEERS, TRAINERS, MERGE, ADAPTER]),
    "lm-eval": (
        ["peers", "evaluation"],
        ["tests/reference/test_harness.py", "tests/parallel/test_tasks_in_training.py"],
    ),
}
MAY_SKIP = ("this transformers computes another model", "no sandbox here")
"""Why a test of these files may be skipped: how the reason begins."""


def oldest() -> str:
    """The oldest transformers that pyproject.toml allows."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (version,) = (re.findall(r"^transformers>=([\d.]+)", line) for line in extras["hf"] if "transformers" in line)
    return version[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exports_under_other_versions(case: str, tmp_path: Path) -> None:
    names, files = CASES[case]
    folders = [FOLDERS / name for name in names]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        pytest.skip(f"needs {', '.join(map(str, missing))}: run make")
    if "transformers_oldest" in names:
        (found,) = (FOLDERS / "transformers_oldest").glob("transformers-*.dist-info")
        assert found.name.removeprefix("transformers-").startswith(oldest()), "not the oldest that is allowed"
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--show-capture=no"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT])), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, f"--junit-xml={report}", *files],
        cwd=ROOT,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = ET.parse(report).getroot().iter("testcase")
    skipped = {
        each.get("name"): each.find("skipped").get("message") for each in cases if each.find("skipped") is not None
    }
    assert [name for name, reason in skipped.items() if not reason.startswith(MAY_SKIP)] == []
