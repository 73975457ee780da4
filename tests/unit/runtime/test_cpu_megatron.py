"""The shim that lets megatron-core run without CUDA: each patch is needed, together they suffice, and the shim does
nothing if CUDA is available."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_pretrain.runtime import cpu_megatron
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is")
NAMES = [patch.name for patch in cpu_megatron.needed_patches()]


@pytest.fixture(scope="module")
def exercises(corpus: Path) -> dict[str, tuple[int, str]]:
    """Status and output of the exercise without each patch, and with all of them (key "")."""
    command = [sys.executable, "-m", "tests.helpers.cpu_exercise", str(corpus.parent), *NAMES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1200, check=True)
    return {name: (status, said) for name, (status, said) in json.loads(done.stdout).items()}


@pytest.mark.slow
def test_training_and_checkpoints_work_with_every_patch(exercises):
    status, said = exercises[""]
    assert status == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_patch_is_needed(exercises, name):
    status, said = exercises[name]
    assert status == 1, f"everything works without {name}: remove the patch"
    assert "Error" in said.strip().splitlines()[-1], said


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120).stdout.strip()


def test_does_nothing_if_cuda_is_available():
    """The names that the patches would replace refer to the same objects after install()."""
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
from hunyuan_pretrain.runtime import cpu_megatron
before = [torch.empty, torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize]
print(cpu_megatron.install())
after = [torch.empty, torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize]
print(all(a is b for a, b in zip(before, after)), "fused_weight_gradient_mlp_cuda" in sys.modules)
"""
    assert python(code).split() == ["False", "True", "False"]


def test_installs_once():
    code = """
import torch
from hunyuan_pretrain.runtime import cpu_megatron
print(cpu_megatron.install())
first = torch.empty
print(cpu_megatron.install(), torch.empty is first)
"""
    assert python(code).split() == ["True", "True", "True"]


def test_refuses_to_install_after_megatron_is_imported():
    """By then megatron has bound unpatched names."""
    code = """
import sys, types
from hunyuan_pretrain.runtime import cpu_megatron
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
try:
    cpu_megatron.install()
except RuntimeError as error:
    print(error)
"""
    assert python(code) == "cpu_megatron.install() must run before megatron.core is imported"


@pytest.mark.parametrize("package", ["model", "parallel", "train"])
def test_importing_a_package_patches_nothing_and_says_which_call_is_missing(package):
    code = f"""
import torch
before = [torch.empty, torch.Tensor.type, torch.cuda.current_device, torch.compile]
try:
    import hunyuan_pretrain.{package}
except RuntimeError as error:
    print(error)
print([torch.empty, torch.Tensor.type, torch.cuda.current_device, torch.compile] == before)
"""
    said, is_unchanged = python(code).splitlines()
    assert said == (
        f"hunyuan_pretrain.{package} needs a CUDA device, or, to run on the CPU, this call before it is imported: "
        "hunyuan_pretrain.runtime.cpu_megatron.install()"
    )
    assert is_unchanged == "True"


def test_the_named_call_makes_the_import_work():
    code = """
import hunyuan_pretrain.runtime.cpu_megatron
hunyuan_pretrain.runtime.cpu_megatron.install()
import hunyuan_pretrain.model.router
print("imported")
"""
    assert python(code) == "imported"


def test_megatron_is_imported_without_wandb_which_can_be_imported_afterwards():
    code = """
import importlib.util, sys
from hunyuan_pretrain.runtime import cpu_megatron
cpu_megatron.install()
import hunyuan_pretrain.train.loop
print("megatron.core" in sys.modules, "wandb" in sys.modules, importlib.util.find_spec("wandb") is not None)
"""
    assert python(code).split() == ["True", "False", "True"]


def test_tensors_report_is_cuda_only_inside_the_context():
    """Copies on the host, and what is computed from them, never report it."""
    assert cpu_megatron.install()

    def answers() -> list[bool]:
        weight = torch.ones(2)
        return [
            tensor.is_cuda
            for tensor in (weight, weight.view(1, 2), weight.pin_memory(), weight.bfloat16().pin_memory().float())
        ]

    assert answers() == [False] * 4
    with cpu_megatron.weights_count_as_on_a_device():
        assert answers() == [True, True, False, False]
    assert answers() == [False] * 4


def test_every_patch_has_its_own_reason():
    assert (
        len({patch.reason for patch in cpu_megatron.PATCHES})
        == len({patch.name for patch in cpu_megatron.PATCHES})
        == len(cpu_megatron.PATCHES)
    )
