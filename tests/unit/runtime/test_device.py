"""Probing a machine, real and simulated."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.runtime import device, policy
from hunyuan_pretrain.runtime.device import Gpu, Machine, probe
from hunyuan_pretrain.runtime.policy import (
    backend_of,
    choose_device,
    cpu_threads,
    obstacles,
    uses_transformer_engine,
    what_is_used,
)

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
    flash_attn_3=None,
    triton=None,
    wandb=None,
    tensorboard=None,
)
CPU_MACHINE = dataclasses.replace(MACHINE, gpus=(), cuda=None, transformer_engine=None)


def texts(machine: Machine, *overrides: str) -> str:
    return "\n".join(str(problem) for problem in obstacles(machine, load_experiment(DEMO, overrides)))


def module_folder(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty package, on the path."""
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
    code = (
        "import sys, hunyuan_pretrain.runtime.device as d; d.probe(); assert not {'megatron', 'apex', 'wandb'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_if_there_is_none() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(
        ConfigError, match=r"runtime.device=cuda: this machine has no usable CUDA: .*\(use auto or cpu\)"
    ):
        choose_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_chosen_if_there_is_a_gpu() -> None:
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    assert probe().gpus[0].memory_gib > 1


def test_backend_follows_the_device() -> None:
    assert (backend_of("cuda"), backend_of("cpu")) == ("nccl", "gloo")


def test_threads_are_an_equal_share_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "usable_cores", lambda: 10)
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


def test_a_package_that_is_only_named_apex_is_not_taken_for_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    (tmp_path / "transformer_engine-2.11.0.dist-info/METADATA").write_text(
        "Name: transformer-engine\nVersion: 2.11.0\n"
    )
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
        "runtime.device=cuda: this machine has no usable CUDA: torch was built with CUDA 13.0, but sees no "
        "device (use auto or cpu)"
    )
    assert "is a CPU build (use auto or cpu)" in texts(CPU_MACHINE, "runtime.device=cuda")
    assert "pip uninstall apex; NVIDIA's is built from its own repository" in texts(
        dataclasses.replace(MACHINE, apex="wrong")
    )
    assert "megatron-core: is not installed (pip install" in texts(dataclasses.replace(MACHINE, megatron_core=None))
    broken = dataclasses.replace(MACHINE, transformer_engine_error="it cannot be loaded: OSError")
    assert "transformer-engine=2.11.0: it cannot be loaded: OSError (pip install --no-build-isolation" in texts(broken)
    old = dataclasses.replace(MACHINE, gpus=(Gpu("Tesla T4", (7, 5), 15.0),))
    assert (
        texts(old, "precision.dtype=bf16")
        == "precision.dtype=bf16: Tesla T4 has compute capability 7.5, and bf16 needs 8.0 (use fp32)"
    )
    assert texts(old) == texts(old, "precision.dtype=bf16", "runtime.device=cpu") == ""


def test_kernels_run_on_gpus_with_tensor_cores_for_bf16_and_tf32() -> None:
    """One older GPU is enough to keep torch's operations; without a GPU, or without triton, they stay too."""
    with_triton = dataclasses.replace(MACHINE, triton="3.7.1")
    older = Gpu("Tesla T4", (7, 5), 15.0)
    assert with_triton.has_triton
    assert not MACHINE.has_triton
    assert not dataclasses.replace(with_triton, gpus=()).has_triton
    assert not dataclasses.replace(with_triton, gpus=(*MACHINE.gpus, older)).has_triton


def test_what_is_used_follows_the_experiment() -> None:
    assert what_is_used(MACHINE) == [
        ("device", "cuda"),
        ("collectives", "nccl"),
        ("linear layers", "Transformer Engine 2.11.0"),
        ("functions between them", "torch operations"),
    ]
    used = dict(what_is_used(MACHINE, load_experiment(DEMO, ["runtime.device=cpu", "runtime.cpu_threads_per_rank=3"])))
    assert used == {
        "device": "cpu",
        "collectives": "gloo",
        "threads per rank": "3 (for 2 ranks on this node)",
        "linear layers": "local layers",
        "functions between them": "torch operations",
        "attention": "per_document: torch's flash kernels, one call for each document; runs everywhere",
    }


BF16 = "precision.dtype=bf16"


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (MACHINE, [BF16], ("Transformer Engine 2.11.0", None)),
        (
            MACHINE,
            [BF16, "precision.fp8_recipe=blockwise"],
            ("Transformer Engine 2.11.0", "blockwise on Transformer Engine"),
        ),
        (MACHINE, [], ("local layers", None)),  # fp32, which Transformer Engine multiplies in TF32
        (MACHINE, [BF16, "runtime.transformer_engine=never"], ("local layers", None)),
        (MACHINE, [BF16, "runtime.device=cpu"], ("local layers", None)),
        (
            CPU_MACHINE,
            [BF16, "precision.fp8_recipe=mxfp8"],
            ("local layers", "mxfp8, emulated (slow; numbers, not speed)"),
        ),
    ],
)
def test_which_engine_provides_the_layers(
    machine: Machine, overrides: list[str], expected: tuple[str, str | None]
) -> None:
    experiment = load_experiment(DEMO, overrides)
    used = dict(what_is_used(machine, experiment))
    assert (used["linear layers"], used.get("FP8")) == expected
    assert uses_transformer_engine(machine, experiment) == expected[0].startswith("Transformer Engine")


def test_required_transformer_engine_that_cannot_be_used_says_why() -> None:
    required = (BF16, "runtime.transformer_engine=required")
    assert texts(MACHINE, *required) == ""
    absent = dataclasses.replace(MACHINE, transformer_engine=None)
    assert texts(absent, *required) == (
        "runtime.transformer_engine=required: it is not installed (pip install --no-build-isolation "
        '"hunyuan-pretrain[gpu]")'
    )
    assert texts(absent, BF16) == ""
    broken = dataclasses.replace(MACHINE, transformer_engine_error="it cannot be loaded: OSError")
    assert "runtime.transformer_engine=required: it cannot be loaded: OSError (pip install" in texts(broken, *required)
    assert texts(dataclasses.replace(MACHINE, gpus=()), *required) == (
        "runtime.transformer_engine=required: it runs on a CUDA device, and this machine has none (use auto or never)"
    )


@pytest.mark.parametrize(
    ("core", "version", "fits"),
    [
        ("0.16.1", "2.8.0", "2.9 to 2.11"),
        ("0.16.1", "2.12.1", "2.9 to 2.11"),
        ("0.16.1", "2.20.2", "2.9 to 2.11"),
        ("0.19.2", "2.10.0", "2.11 to 2.20"),
        ("0.19.2", "2.21.0", "2.11 to 2.20"),
        ("0.17.1", "3.0.1", "2.11 to 2.20"),
    ],
)
def test_an_unsupported_transformer_engine_version_is_refused_if_it_would_be_used(
    core: str, version: str, fits: str
) -> None:
    other = dataclasses.replace(MACHINE, megatron_core=core, transformer_engine=version)
    first, last = fits.split(" to ")
    wanted = f">={first},<2.{int(last[2:]) + 1}"
    assert texts(other, BF16) == (
        f"transformer-engine={version}: megatron-core {core} works with {fits} "
        f'(pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]{wanted}")'
    )
    assert texts(other, BF16, "runtime.transformer_engine=never") == ""


@pytest.mark.parametrize(
    ("core", "version"),
    [
        ("0.16.1", "2.9.0"),
        ("0.16.1", "2.11.0"),
        ("0.17.0", "2.14.1"),
        ("0.19.2", "2.11.0"),
        ("0.19.2", "2.20.2"),
        ("0.19.2", "2.14.0+abc"),
    ],
)
def test_a_transformer_engine_that_fits_megatron_core_is_accepted(core: str, version: str) -> None:
    assert texts(dataclasses.replace(MACHINE, megatron_core=core, transformer_engine=version), BF16) == ""


HINT = "(use another recipe, or runtime.transformer_engine=never, which emulates it slowly)"


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "need"),
    [
        ("delayed", (8, 9), "12.1", None),
        ("tensorwise", (9, 0), "12.0", None),
        ("delayed", (8, 9), "12.0", "9.0 or more, or 8.9 and CUDA 12.1 or more"),
        ("tensorwise", (8, 0), "13.0", "9.0 or more, or 8.9 and CUDA 12.1 or more"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "12.8", "9.0 or more, and CUDA 12.9 or more"),
        ("blockwise", (8, 9), "13.0", "9.0 or more, and CUDA 12.9 or more"),
        ("mxfp8", (10, 0), "12.8", None),
        ("mxfp8", (9, 0), "13.0", "10.0 or more, and less than 12.0"),
        ("mxfp8", (12, 0), "13.0", "10.0 or more, and less than 12.0"),
    ],
)
def test_fp8_recipes_need_their_hardware_only_on_transformer_engine(
    recipe: str, capability: tuple[int, int], cuda: str, need: str | None
) -> None:
    machine = dataclasses.replace(MACHINE, gpus=(Gpu("NVIDIA Xyz", capability, 80.0),) * 2, cuda=cuda)
    setting = f"precision.fp8_recipe={recipe}"
    has = f"NVIDIA Xyz has compute capability {capability[0]}.{capability[1]}, torch CUDA {cuda}"
    assert texts(machine, BF16, setting) == ("" if need is None else f"{setting}: {has}; it needs {need} {HINT}")
    assert texts(machine, BF16, setting, "runtime.transformer_engine=never") == ""
    assert texts(CPU_MACHINE, BF16, setting) == ""


def attention(capability: tuple[int, int], *overrides: str, **packages: str | None) -> dict[str, str | None]:
    """Backend -> why it cannot be used on such a machine, in bf16."""
    machine = dataclasses.replace(MACHINE, gpus=(Gpu("NVIDIA Xyz", capability, 80.0),) * 2, **packages)
    return dict(policy.attention_obstacles(machine, load_experiment(DEMO, (BF16, *overrides))))


EVERYTHING = {"flash_attn": "2.8.3", "flash_attn_3": "3.0.0b1"}


@pytest.mark.parametrize(
    ("capability", "is_deterministic", "able"),
    [
        ((8, 0), False, "flash_attn_2 torch_varlen per_document cudnn_batched torch_batched"),
        ((8, 0), True, "flash_attn_2 torch_varlen per_document torch_batched"),
        ((9, 0), True, "cudnn flash_attn_3 flash_attn_2 torch_varlen per_document cudnn_batched torch_batched"),
        ((10, 0), True, "flash_attn_2 torch_varlen per_document torch_batched"),
        ((10, 0), False, "cudnn flash_attn_2 torch_varlen per_document cudnn_batched torch_batched"),
        ((12, 0), False, "flash_attn_2 torch_varlen per_document cudnn_batched torch_batched"),
        ((7, 5), False, "per_document"),
    ],
)
def test_attention_backends_need_their_gpu(capability: tuple[int, int], is_deterministic: bool, able: str) -> None:
    found = attention(capability, f"runtime.deterministic={str(is_deterministic).lower()}", **EVERYTHING)
    assert " ".join(name for name, reason in found.items() if reason is None) == able


def test_a_recorded_step_takes_backends_that_read_boundaries_from_memory() -> None:
    found = attention((9, 0), "runtime.cuda_graphs=true", **EVERYTHING)
    able = [name for name, reason in found.items() if reason is None]
    assert able == ["cudnn", "flash_attn_3", "flash_attn_2", "torch_varlen"]
    assert "the documents of the step that was recorded" in str(found["per_document"])
    newer = attention((9, 0), "runtime.cuda_graphs=true", transformer_engine="2.20.0")
    assert "for all documents that a micro-batch may have (runtime.cuda_graphs)" in str(newer["cudnn"])


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"}, "NVTE_USE_CUTLASS_GROUPED_GEMM=1 is set in the environment: replays"),
        ({"NVTE_USE_CUTLASS_GROUPED_GEMM": "0"}, ""),
        ({"TORCH_NCCL_BLOCKING_WAIT": "1"}, "TORCH_NCCL_BLOCKING_WAIT=1 is set in the environment: NCCL would"),
        (
            {"NCCL_GRAPH_REGISTER": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            "NCCL_GRAPH_REGISTER=1 is set",
        ),
        (
            {"NCCL_GRAPH_REGISTER": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "NCCL_GRAPH_REGISTER=1 is",
        ),
        ({"NCCL_GRAPH_REGISTER": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:False"}, ""),
    ],
)
def test_cuda_graphs_exclude_variables_with_which_replays_go_wrong(variables: dict[str, str], refused: str) -> None:
    found = [str(problem) for problem in policy._recording_obstacles(MACHINE, variables)]
    assert len(found) == bool(refused)
    assert refused in "".join(found)


def test_cuda_graphs_need_a_cuda_device() -> None:
    refused = "runtime.cuda_graphs=true: this machine has no CUDA device (use false)"
    assert texts(CPU_MACHINE, BF16, "runtime.cuda_graphs=true") == refused
    assert texts(MACHINE, BF16, "runtime.cuda_graphs=true") == ""


def test_attention_backends_need_their_package_heads_and_layout() -> None:
    found = attention((9, 0))
    assert found["flash_attn_2"] == "flash-attn is not installed"
    assert attention((9, 0), flash_attn="2.4.0")["flash_attn_2"] == "it needs flash-attn 2.4.1 or newer, not 2.4.0"
    never = attention((9, 0), "runtime.transformer_engine=never", **EVERYTHING)
    assert never["cudnn"] == never["cudnn_batched"] == "transformer-engine is not used"
    wide = attention((9, 0), "model.kv_channels=200", **EVERYTHING)
    assert wide["flash_attn_3"] == "its backward pass is deterministic for head widths up to 192, not 200"
    assert wide["flash_attn_2"] is None
    odd = attention((9, 0), "model.kv_channels=18", **EVERYTHING)
    assert [name for name, reason in odd.items() if reason is None] == ["per_document"]
    gathered = attention((9, 0), "parallel.context_parallel_size=2")
    assert "a rank has more keys" in str(gathered["torch_batched"])
    traded = attention((9, 0), "parallel.context_parallel_size=2", "parallel.context_parallel_method=all_to_all")
    assert traded["torch_batched"] is None


def test_long_packs_have_no_deterministic_cudnn_kernel_on_hopper_with_a_new_transformer_engine() -> None:
    """8 heads; Transformer Engine 2.20 refuses from 2^30 scores on."""
    for length, has_kernel in ((11584, True), (11592, False)):
        settings = (f"stages.0.sequence_length={length}", "model.moe_routing_group_tokens=8")
        found = attention((9, 0), *settings, transformer_engine="2.20.2")
        assert (found["cudnn"] is None) == has_kernel, found["cudnn"]
        assert found["cudnn_batched"] is None
        assert attention((9, 0), *settings, transformer_engine="2.11.0")["cudnn"] is None


def test_a_named_attention_backend_is_refused_where_it_cannot_run() -> None:
    name = "runtime.attention_backend"
    assert texts(MACHINE, BF16, f"{name}=cudnn") == ""
    assert texts(MACHINE, BF16, f"{name}=flash_attn_2") == (
        f"{name}=flash_attn_2: flash-attn is not installed (use cudnn, or auto)"
    )
    assert texts(CPU_MACHINE, BF16, f"{name}=torch_batched") == (
        f"{name}=torch_batched: it runs on CUDA devices only (use auto)"
    )
    assert texts(CPU_MACHINE, BF16, f"{name}=per_document") == ""


def test_doctor_says_what_computes_attention_and_why_the_others_do_not() -> None:
    rows = dict(what_is_used(MACHINE, load_experiment(DEMO, (BF16,))))
    assert rows["attention of packs"].endswith("before the first step: cudnn, torch_varlen, per_document")
    assert rows["attention of one length"].endswith("torch_varlen, per_document, cudnn_batched, torch_batched")
    assert rows["not flash_attn_3"] == "flash-attn-3 is not installed"
    named = dict(what_is_used(MACHINE, load_experiment(DEMO, (BF16, "runtime.attention_backend=torch_varlen"))))
    assert named["attention of packs"] == named["attention of one length"] == "torch_varlen"
    assert dict(what_is_used(CPU_MACHINE, load_experiment(DEMO)))["attention"].startswith("per_document: ")


def test_more_ranks_than_gpus_are_refused_before_cuda_says_invalid_device_ordinal():
    experiment = load_experiment(DEMO)
    (problem,) = obstacles(MACHINE, experiment, ranks=4)
    assert str(problem) == (
        "ranks: 4 ranks on this node, which has 1 GPUs, and each rank needs its own (start fewer ranks here, "
        "or use runtime.device=cpu)"
    )
    assert not obstacles(MACHINE, experiment, ranks=1)
    assert not obstacles(CPU_MACHINE, experiment, ranks=4)


def test_the_precision_aware_optimizer_needs_transformer_engine_on_a_gpu():
    split = ("precision.dtype=bf16", "optimizer.use_precision_aware_optimizer=true", "runtime.transformer_engine=never")
    assert texts(MACHINE, *split) == ""
    without = dataclasses.replace(MACHINE, transformer_engine=None)
    assert texts(without, *split) == (
        "optimizer.use_precision_aware_optimizer=true: on a GPU it is Transformer Engine's Adam, which is not "
        f"installed ({policy.INSTALL_TRANSFORMER_ENGINE}, or use false)"
    )
    assert texts(without, *split, "runtime.device=cpu") == "", "a CPU has this project's Adam"
    assert texts(CPU_MACHINE, *split) == ""
    old = dataclasses.replace(MACHINE, transformer_engine="2.3.0")
    assert "transformer-engine=2.3.0: megatron-core" in texts(old, *split), "whatever computes the layers"
    assert texts(old, *split[:1], "runtime.transformer_engine=never") == ""


class FakeNvml:
    """NVML's functions as ctypes shows them: they return a status, and write through pointers."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: ctypes.Array[ctypes.c_char], size: int) -> int:
        text.value = b"570.124.06"
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-1b" else 6  # not found

    def nvmlDeviceGetMaxClockInfo(self, handle: ctypes.c_void_p, kind: int, value: Any) -> int:
        value._obj.value = {device.SM_CLOCK: 1980, device.MEMORY_CLOCK: 2619}[kind]
        return 0

    def nvmlDeviceGetApplicationsClock(self, handle: ctypes.c_void_p, kind: int, value: Any) -> int:
        return 3  # not supported

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p, value: Any) -> int:
        value._obj.value = 700_000
        return 0


def test_clocks_and_power_limit_of_a_gpu_come_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.settings_of_gpu("GPU-1b", "libnone.so") == []
    assert device.gpu_state(None) == "none"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml())
    found = ["driver 570.124.06", "SM clock at most 1980 MHz", "memory clock at most 2619 MHz", "power limit 700 W"]
    assert device.settings_of_gpu("GPU-1b") == found
    assert device.settings_of_gpu("GPU-2b") == found[:1]
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetEnforcedPowerLimit")
    assert device.settings_of_gpu("GPU-1b") == []
