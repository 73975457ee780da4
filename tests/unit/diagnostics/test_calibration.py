"""`plan --calibrate`: what is measured, what is taken over, and that the profile says which is which."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_pretrain.cli.ranks import mistake_in_environment
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.diagnostics import calibration
from hunyuan_pretrain.diagnostics.calibrated_profile import Figure, Shape, nearest, profile
from hunyuan_pretrain.plan.hardware import load, names
from hunyuan_pretrain.runtime.device import Gpu, probe
from tests.helpers.byte_counter import FREE, size
from tests.helpers.ranks import fork_ranks

CPU = torch.device("cpu")
COMPUTED = {"achieved.bf16", "achieved.memory", "achieved.elementwise", "host_launch_s"}
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)


def flat(hardware: str | Path) -> dict[str, Any]:
    data = load(hardware).model_dump()
    return data | {f"achieved.{name}": value for name, value in data.pop("achieved").items()}


def check_file(path: Path, rows: list[tuple[str, str, str]], expected: set[str], base: str | Path) -> None:
    """The file is a profile; what was measured says so, and everything else is as in the base."""
    assert {key for key, _, _ in rows} == expected
    found, given = flat(path), flat(base)
    assert {key for key in found if found[key] != given[key]} == expected | {"name"}
    for key, text, source in rows:
        assert found[key] == float(text)
        assert source.startswith("measured on CPU with ")
    sources = re.findall(r"^ *\w+: \S+ # (.*)$", path.read_text(), re.MULTILINE)
    assert len(sources) == len(found) - 1
    assert sum(source.startswith("measured on CPU with ") for source in sources) == len(expected)
    assert sum(source.startswith("taken over from ") for source in sources) == len(sources) - len(expected)
    assert found["name"].startswith("CPU with ")


def test_one_process_measures_computing_and_takes_over_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rows = calibration.calibrate(path, "H200-141GB")
    check_file(path, rows, COMPUTED, "H200-141GB")
    assert re.search(r"^# bf16 256 x 256 x 256: \d\S*, \d", path.read_text(), re.MULTILINE)
    written = path.read_text()
    with pytest.raises(ConfigError, match=r"^plan: 1 problem\n  --calibrate=\S+: File exists"):
        calibration.calibrate(path, "H200-141GB")
    assert path.read_text() == written


def test_ranks_measure_the_links_between_them(tmp_path: Path) -> None:
    islands = tmp_path / "islands.yaml"
    base = Path(__file__).parents[3] / "hunyuan_pretrain/plan/profiles/H200-141GB.yaml"
    islands.write_text(f"base: {base}\nname: islands\nnvlink_domain_gpus: 1\n")
    for hardware, link in (("H200-141GB", "nvlink"), (islands, "network")):
        path = tmp_path / f"{link}.yaml"
        rows, others = fork_ranks(2, calibration.calibrate, path, str(hardware))
        assert others == []
        check_file(path, rows, COMPUTED | {f"achieved.{link}", f"{link}_latency_s"}, hardware)
        (source,) = (source for key, _, source in rows if key == f"achieved.{link}")
        assert re.search(r"gloo, 2 ranks: \S+ GB/s in an all-reduce, \S+ in an all-to-all", source)


def test_ranks_that_do_not_fill_the_domains_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    rule = r"--calibrate: 6 ranks do not fill domains of 4 GPUs joined by NVLink \(start a multiple of 4 ranks\)"
    with pytest.raises(ConfigError, match=rule):
        calibration._join(load("H200-141GB"), CPU)


def test_the_profile_of_a_gpu_is_found_by_its_name_and_peak() -> None:
    for gpu, name in (
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H20", "H20-96GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
    ):
        assert nearest(gpu, "").name == name
    for gpu in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", None):
        with pytest.raises(ConfigError, match="--hardware: no profile comes with the project for") as caught:
            nearest(gpu, "")
        assert all(name in str(caught.value) for name in (gpu or "a CPU", *names()))
        assert nearest(gpu, "h20-96gb").name == "H20-96GB"


def test_figures_are_work_over_time_as_shares_of_the_base() -> None:
    base, sizes = load("H200-141GB"), calibration.GPU_SIZES
    machine = replace(probe(), gpus=(Gpu("NVIDIA H200", (9, 0), 140.0),), triton="3")
    seconds = {
        "bf16 8192 x 8192 x 8192": 2 * 8192**3 / (0.5 * base.peak_bf16_flops_per_s),
        "fp8 8192 x 8192 x 8192": 2 * 8192**3 / (0.25 * base.peak_fp8_flops_per_s),
        "copy": 2 * 2**31 / (0.8 * base.memory_bytes_per_s),
        "swiglu": 16384 * 18304 * 2 * 8 / (0.4 * base.memory_bytes_per_s),
        "launches": 160 * 7e-6,
        "to host": 2**29 / (0.6 * base.host_bytes_per_s),
        "to device": 2**29 / (0.9 * base.host_bytes_per_s),
    }
    alone = calibration.Ranks(None, None)
    figures = calibration._figures(seconds, sizes, base, alone, torch.device("cuda", 0), machine)
    expected = {"bf16": 0.5, "fp8": 0.25, "memory": 0.8, "elementwise": 0.4, "host": 0.6}
    found = {name: figure.value for name, figure in figures.items()}
    assert found.pop("host_launch_s") == pytest.approx(7e-6)
    assert found == pytest.approx({f"achieved.{name}": share for name, share in expected.items()})
    assert all(figure.source.startswith("measured on NVIDIA H200: ") for figure in figures.values())


def test_the_plan_with_a_profile_gives_back_the_matmul_that_was_measured(tmp_path: Path) -> None:
    shape, rate = Shape(8192, 8192, 8192), 6e14
    base = load("H100-80GB")
    figures = {"achieved.bf16": Figure(rate / base.peak_bf16_flops_per_s, "measured\non two lines")}
    text, _ = profile(base, figures, 'a "GPU"', [("bf16", shape, rate)])
    assert "# bf16 8192 x 8192 x 8192: 600, 600" in text
    (tmp_path / "x.yaml").write_text(text)
    found = load(tmp_path / "x.yaml")
    assert found.name == 'a "GPU", measured'
    assert found.matmul_flops_per_s("bf16") == pytest.approx(rate, rel=1e-3)  # four digits are written
    assert found.achieved.fp8 == base.achieved.fp8


class Counter(TorchDispatchMode):
    """Counts operations, and the bytes that they read and write."""

    operations = moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in FREE | {"detach"}:
            self.operations += 1
            self.moved += sum(size(value) for value in (*args, result) if isinstance(value, torch.Tensor))
        return result


def test_kernels_and_bytes_are_those_of_the_code() -> None:
    machine, sizes = probe(), calibration.CPU_SIZES
    assert not machine.has_triton or torch.cuda.is_available()
    machine = replace(machine, gpus=())
    for run, name, expected in (
        (calibration._small_layers(CPU, machine), "operations", calibration._launches(machine)),
        (calibration._wide_swiglu(sizes, CPU, machine), "moved", calibration._swiglu_bytes(sizes, machine)),
    ):
        with Counter() as counter:
            run()
        assert getattr(counter, name) == expected


def test_the_fp8_product_is_the_product() -> None:
    a, b = (torch.randint(-4, 5, (64, 64)).to(torch.bfloat16) for _ in range(2))  # exact in FP8, and so is the sum
    assert torch.equal(calibration._fp8_product(a, b)().float(), (a.float() @ b.float()).bfloat16().float())


def test_torchruns_variables_are_kept_for_a_calibration_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, kept in ((["plan", "--calibrate=x.yaml"], True), (["plan", "x.yaml"], False)):
        for name in JOB:
            monkeypatch.setenv(name, "1")
        assert mistake_in_environment(arguments) is None
        assert ("RANK" in os.environ) is kept
