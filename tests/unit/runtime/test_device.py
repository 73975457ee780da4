"""Probing a machine, real and imagined."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import ConfigError
from hunyuan_pretrain.runtime import device
from hunyuan_pretrain.runtime.device import Gpu, Machine, backend_of, choose_device, cpu_threads, obstacles, probe, what_is_used

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"

MACHINE = Machine(
    python="3.11.7",
    torch="2.13.0",
    cuda="13.0",
    gpus=(Gpu("NVIDIA H200", (9, 0), 139.0),),
    cores=16,
    memory_gib=128.0,
    megatron_core="0.16.1",
    transformer_engine="2.11.0",
    transformer_engine_error=None,
    apex="absent",
    flash_attn=None,
    wandb=None,
    tensorboard=None,
)
CPU_MACHINE = dataclasses.replace(MACHINE, gpus=(), cuda=None, transformer_engine=None)


def texts(machine: Machine, *overrides: str) -> str:
    return "\n".join(str(problem) for problem in obstacles(machine, load_experiment(DEMO, overrides)))


def module_folder(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package on the path."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    return folder / name


def test_probe_finds_this_machine() -> None:
    machine = probe()
    assert machine.torch == torch.__version__
    assert machine.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.megatron_core is not None
    assert machine.cores >= 1
    assert machine.memory_gib > 0


def test_probing_imports_no_megatron() -> None:
    code = "import sys, hunyuan_pretrain.runtime.device as d; d.probe(); assert not {'megatron', 'apex', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"runtime.device=cuda: this machine has no usable CUDA: .*\(use auto or cpu\)"):
        choose_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_chosen_where_there_is_one() -> None:
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    assert probe().gpus[0].memory_gib > 1


def test_backend_follows_the_device() -> None:
    assert (backend_of("cuda"), backend_of("cpu")) == ("nccl", "gloo")


def test_threads_are_an_equal_share_or_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_cores", lambda: 10)
    assert [cpu_threads(ranks) for ranks in (1, 3, 10, 40)] == [10, 3, 1, 1]
    assert cpu_threads(40, 7) == 7


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("300000 100000", 3), ("max 100000", 4), ("", 4), ("1000 100000", 1)]
)
def test_a_containers_cpu_quota_counts(monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(device, "read_cgroup", lambda name: quota)
    assert device.usable_cores() == expected


def test_a_containers_memory_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_cgroup", lambda name: "1073741824")
    assert device.usable_memory_bytes() == 2**30
    monkeypatch.setattr(device, "read_cgroup", lambda name: "max")
    assert device.usable_memory_bytes() > 2**30


def test_a_package_that_is_only_named_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.apex_state() != "absent":
        pytest.skip("apex is installed")
    module_folder(tmp_path, "apex", monkeypatch)
    assert probe().apex == "wrong"
    (tmp_path / "amp_C.py").touch()
    assert probe().apex == "nvidia"


def test_transformer_engine_without_its_extension_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.version_of("transformer-engine"):
        pytest.skip("Transformer Engine is installed")
    assert probe(thorough=True).transformer_engine_error is None
    package = module_folder(tmp_path, "transformer_engine", monkeypatch)
    (tmp_path / "transformer_engine-2.11.0.dist-info").mkdir()
    (tmp_path / "transformer_engine-2.11.0.dist-info/METADATA").write_text("Name: transformer-engine\nVersion: 2.11.0\n")
    assert (probe().transformer_engine, probe().has_transformer_engine) == ("2.11.0", False)
    assert "its compiled extension for torch is missing" in str(probe().transformer_engine_error)
    (package / "transformer_engine_torch.so").touch()
    assert probe().transformer_engine_error is None
    # Only loading it shows that this one is broken: the other process sees no such package at all.
    assert "it cannot be loaded: ModuleNotFoundError" in str(probe(thorough=True).transformer_engine_error)


def test_a_good_machine_has_no_obstacles() -> None:
    assert texts(MACHINE) == texts(MACHINE, "runtime.device=cuda", "precision.dtype=bf16") == texts(CPU_MACHINE) == ""
    assert MACHINE.has_transformer_engine
    assert not dataclasses.replace(MACHINE, gpus=()).has_transformer_engine
    assert obstacles(MACHINE) == []


def test_each_obstacle_says_what_to_do() -> None:
    assert texts(dataclasses.replace(MACHINE, gpus=()), "runtime.device=cuda") == (
        "runtime.device=cuda: this machine has no usable CUDA: torch was built with CUDA 13.0, but sees no device (use auto or cpu)"
    )
    assert "is a CPU build (use auto or cpu)" in texts(CPU_MACHINE, "runtime.device=cuda")
    assert "pip uninstall apex; NVIDIA's is built from its own repository" in texts(dataclasses.replace(MACHINE, apex="wrong"))
    assert "megatron-core: is not installed (pip install" in texts(dataclasses.replace(MACHINE, megatron_core=None))
    broken = dataclasses.replace(MACHINE, transformer_engine_error="it cannot be loaded: OSError")
    assert "transformer-engine=2.11.0: it cannot be loaded: OSError (pip install --no-build-isolation" in texts(broken)
    old = dataclasses.replace(MACHINE, gpus=(Gpu("Tesla T4", (7, 5), 15.0),))
    assert texts(old, "precision.dtype=bf16") == "precision.dtype=bf16: Tesla T4 has compute capability 7.5, and bf16 needs 8.0 (use fp32)"
    assert texts(old) == texts(old, "precision.dtype=bf16", "runtime.device=cpu") == ""


def test_what_is_used_follows_the_experiment() -> None:
    assert what_is_used(MACHINE) == [("device", "cuda"), ("collectives", "nccl")]
    used = dict(what_is_used(MACHINE, load_experiment(DEMO, ["runtime.device=cpu", "runtime.cpu_threads_per_rank=3"])))
    assert used == {"device": "cpu", "collectives": "gloo", "threads per rank": "3 (for 2 ranks on this node)"}
