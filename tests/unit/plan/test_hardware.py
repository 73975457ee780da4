"""Hardware profiles: all load, each figure says where it comes from, and a bad one is refused in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.plan.hardware import PROFILES, load, names
from hunyuan_pretrain.plan.peaks import peak_flops_per_s


def test_the_profiles_are_these() -> None:
    assert names() == ["B200", "GB200", "H100-80GB", "H20-96GB", "H200-141GB"]


@pytest.mark.parametrize("name", names())
def test_a_profile_is_complete_and_agrees_with_the_table_of_mfu(name: str) -> None:
    hardware = load(name)
    assert hardware.name == name
    assert load(name.lower()) == hardware
    assert hardware.peak_bf16_flops_per_s == pytest.approx(peak_flops_per_s(name.partition("-")[0]), rel=1e-3)
    assert all(0 < share < 1 for share in hardware.achieved.model_dump().values())
    assert hardware.nvlink_domain_gpus % hardware.node_gpus == 0


@pytest.mark.parametrize("name", names())
def test_each_figure_of_a_section_has_a_source(name: str) -> None:
    """A line without a comment shares that of the one above it, or of its section."""
    lines = (PROFILES / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# NVIDIA ")
    peaks = [line for line in lines if line.startswith(("peak_", "memory_", "network_bytes", "host_", "power_"))]
    assert len(peaks) == 10
    assert all(" # " in line for line in peaks)


def test_the_measured_ceilings_of_an_h200() -> None:
    hardware = load("H200-141GB")
    assert hardware.matmul_flops_per_s("bf16") == pytest.approx(781e12, rel=1e-3)
    assert hardware.matmul_flops_per_s("fp8") == pytest.approx(1428e12, rel=1e-3)
    assert hardware.copy_bytes_per_s == pytest.approx(4.26e12, rel=1e-3)


def test_a_format_that_the_gpu_lacks_is_refused() -> None:
    assert load("B200").matmul_flops_per_s("mxfp8") == load("B200").matmul_flops_per_s("fp8")
    with pytest.raises(ConfigError, match="H200-141GB does not compute in mxfp8"):
        load("H200-141GB").matmul_flops_per_s("mxfp8")


def test_a_missing_or_misspelt_figure_is_named_in_one_message(tmp_path: Path) -> None:
    text = (PROFILES / "B200.yaml").read_text()
    broken = tmp_path / "mine.yaml"
    broken.write_text(text.replace("\nmemory_bytes: ", "\nmemory_byte: ").replace("  elementwise:", "  elementwize:"))
    with pytest.raises(ConfigError) as caught:
        load(broken)
    message = str(caught.value)
    assert message.startswith(f"{broken}: 4 problems")
    assert "memory_bytes: missing (Device memory as the driver reports it)" in message
    assert "memory_byte=192265846784: unknown key (did you mean " in message
    assert "achieved.elementwise: missing" in message


def test_a_file_can_build_on_a_profile(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {PROFILES / 'GB200.yaml'}\nname: ours\nnetwork_bytes_per_s: 100e9\n")
    assert load(mine).network_bytes_per_s == 2 * load("GB200").network_bytes_per_s


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean H100-80GB\? known: B200, GB200, .*; or a YAML file"):
        load("H100")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")
