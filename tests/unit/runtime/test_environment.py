"""Variables set before torch is imported: only those that the user has not set; shown and recorded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime import environment
from hunyuan_pretrain.runtime.seeding import use_deterministic_algorithms
from tests.helpers.runs import ROOT, experiment_fields

NAMES = [variable.name for variable in environment.ON_GPU + environment.DETERMINISTIC]


def experiment(**runtime: Any) -> Experiment:
    fields = experiment_fields(Path("corpus"), Path("run"))
    fields["runtime"] = runtime
    return Experiment.model_validate(fields)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*NAMES, "PYTORCH_ALLOC_CONF", environment.HIDDEN_GPUS):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what a test sets
        monkeypatch.delenv(name)


def test_variables_that_a_gpu_run_needs_are_set_and_user_settings_are_kept(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    environment.set_variables(experiment(device="auto"))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "its other name is set"
    assert environment.HIDDEN_GPUS not in os.environ
    rows = {name: (value, who) for name, value, who in environment.variable_rows(experiment(device="auto"))}
    assert rows["NCCL_ALGO"] == ("Ring", "as you set it")
    assert rows["PYTORCH_ALLOC_CONF"] == ("max_split_size_mb:512", "as you set it")
    assert {"NCCL_ALGO": "Ring", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}.items() <= environment.recorded().items()


def test_the_shared_experts_stream_gets_a_queue_of_its_own():
    wanted = experiment(device="auto")
    wanted = wanted.model_copy(update={"parallel": wanted.parallel.model_copy(update={"overlap_shared_expert": True})})
    environment.set_variables(wanted)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert "PYTORCH_CUDA_ALLOC_CONF" in os.environ


def test_nccl_may_choose_if_determinism_is_not_requested():
    environment.set_variables(experiment(device="auto", deterministic=False))
    assert "NCCL_ALGO" not in os.environ
    environment.set_variables(experiment(device="auto"))
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"


@pytest.mark.parametrize("given", [None, "0,1"])
def test_a_run_on_the_cpu_sees_no_gpu(monkeypatch, given):
    if given:
        monkeypatch.setenv(environment.HIDDEN_GPUS, given)
    environment.set_variables(experiment(device="cpu"))
    assert os.environ[environment.HIDDEN_GPUS] == ""
    assert "NCCL_ALGO" not in os.environ


def test_a_process_that_already_has_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ConfigError, match=r"this process has a GPU already.*set CUDA_VISIBLE_DEVICES= before Python starts"
    ):
        environment.set_variables(experiment(device="cpu"))


def test_variables_are_set_before_torch_is_imported():
    code = """
import os, sys
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime import environment
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    for command in ("train", "parity", "shadow"):
        text = (
            (ROOT / "hunyuan_pretrain/cli/training.py")
            .read_text(encoding="utf-8")
            .split(f"def {command}(")[1]
            .split("\ndef ")[0]
        )
        with_torch = re.search(r"from hunyuan_pretrain\.(train|diagnostics)", text)
        assert with_torch, command
        assert text.index("prepare(experiment)") < with_torch.start(), command


def test_fp32_stays_fp32_in_a_container_that_enables_tf32(monkeypatch):
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        use_deterministic_algorithms(False)
        assert torch.backends.cuda.matmul.allow_tf32
        use_deterministic_algorithms(True)
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was[1:]


def test_variables_of_one_node_are_not_compared_between_ranks() -> None:
    of_nodes = {
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "mlx5_0",
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    of_all = {"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "1", "NVTE_FLASH_ATTN": "0"}
    assert environment.compared({**of_nodes, **of_all, "HOME": "/root"}) == of_all
