"""The shim that lets megatron-core run without CUDA: each patch is needed, all of them are enough, and CUDA switches it off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hunyuan_pretrain.runtime import cpu_megatron
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is")
NAMES = [patch.name for patch in cpu_megatron.needed_patches()]


def exercise(corpus: Path, *leave_out: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.helpers.cpu_exercise", str(corpus.parent), *leave_out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def exercises(corpus: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The exercise without each patch, and with all of them (""); two processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {"": pool.submit(exercise, corpus)} | {name: pool.submit(exercise, corpus, name) for name in NAMES}


@pytest.mark.slow
def test_training_and_checkpoints_work_with_every_patch(exercises):
    done = exercises[""].result()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_patch_is_needed(exercises, name):
    done = exercises[name].result()
    assert done.returncode == 1, f"everything works without {name}: remove the patch"
    assert "Error" in done.stderr.strip().splitlines()[-1], done.stderr


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120).stdout.strip()


def test_does_nothing_where_cuda_is():
    """Names that the patches would replace are the same objects after install()."""
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


def test_refuses_to_come_after_megatron():
    """Which by then has kept unpatched names."""
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


def test_tensors_say_is_cuda_only_while_asked_to():
    """Copies on the host, and what is computed from them, never do."""

    def answers() -> list[bool]:
        weight = torch.ones(2)
        return [tensor.is_cuda for tensor in (weight, weight.view(1, 2), weight.pin_memory(), weight.bfloat16().pin_memory().float())]

    assert answers() == [False] * 4
    with cpu_megatron.weights_count_as_on_a_device():
        assert answers() == [True, True, False, False]
    assert answers() == [False] * 4


def test_every_patch_has_a_reason_of_its_own():
    assert (
        len({patch.reason for patch in cpu_megatron.PATCHES})
        == len({patch.name for patch in cpu_megatron.PATCHES})
        == len(cpu_megatron.PATCHES)
    )
