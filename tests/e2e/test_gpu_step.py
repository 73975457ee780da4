"""The GPU benchmark runs end to end without a GPU, on tiny sizes: its parts, contenders, report and failures."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu_attention, gpu_step
from tests.benchmarks.gpu_contenders import SHAPES, Contender, contenders
from tests.helpers.transformer_engine_stub import TE_FOLDER

ROOT = Path(__file__).parents[2]
needs_package = pytest.mark.skipif(
    not TE_FOLDER.is_dir(), reason=f"needs Transformer Engine's Python part in {TE_FOLDER}: run make"
)


def dry(parts: str, report: Path) -> dict[str, Any]:
    command = ["-m", "tests.benchmarks.gpu_step", "--dry", "--parts", parts, "--steps", "1", "--out", str(report)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def check(report: dict[str, Any], parts: list[str]) -> None:
    """Every contender of every part has all figures, and the report says that they are void."""
    assert report["machine"]["figures_are_void"]
    assert list(report["parts"]) == parts
    for part in parts:
        results = report["parts"][part]["results"]
        if part == "ceilings":
            assert results["ceilings"]["bf16_tflops"] > 0
            continue
        if part == "attention":
            check_attention(results)
            continue
        assert list(results) == [
            contender.name for contender in contenders(part, list(gpu_step.supported_recipes(True)), has_graphs=False)
        ]
        for result in results.values():
            assert result["step_ms"] > 0
            assert 0 < result["loss"] < 10
            groups = result["kernels"]["groups"]
            assert {"matrix products", "elementwise, reductions"} <= set(groups)
            assert sum(group["launches"] for group in groups.values()) == result["kernels"]["launches"]


def check_attention(results: dict[str, Any]) -> None:
    """Every backend has a time for each of its cases. The stand-in is of a Blackwell GPU, where Transformer Engine 2.11
    has no deterministic attention."""
    assert list(results) == gpu_attention.names()
    for name, result in results.items():
        cases = ["one document", "two sequences", *(["pack of eight"] * ("batched" not in name))]
        assert list(result["ms"])[: len(cases)] == list(result["tflops"])[: len(cases)] == cases, (name, result["out"])
        assert all(milliseconds > 0 for milliseconds in result["ms"].values())
        assert set(result["ms"]) | set(result["out"]) == {*cases, *(f"{case}, deterministic" for case in cases)}
        assert bool(result["out"]) == name.startswith("cudnn"), result["out"]


@needs_package
def test_the_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    parts = ["ceilings", "attention", "long"]
    check(dry(",".join(parts), tmp_path / "report.json"), parts)


@needs_package
@pytest.mark.slow
def test_every_recipe_of_the_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    check(dry("bench", tmp_path / "report.json"), ["bench"])


def test_after_a_crash_the_part_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The contender that the process died in gets the reason; the next process starts with the one after it."""
    names = [contender.name for contender in contenders("long", [])]
    figures = {"ceilings": 1}
    asked = []

    def worker(part: str, waiting: list[str], arguments: Namespace, timeout_s: float) -> tuple[list[Any], str]:
        asked.append(list(waiting))
        if len(asked) == 1:
            return [{"finished": waiting[0], "result": figures}, {"started": waiting[1]}], "illegal memory access"
        return [{"finished": name, "result": figures} for name in waiting], ""

    monkeypatch.setattr(gpu_step, "run_worker", worker)
    monkeypatch.setattr(gpu_step, "supported_recipes", lambda is_dry: [])
    results = gpu_step.run_part("long", Namespace(dry=False))
    assert results == {names[0]: figures, names[1]: {"error": "illegal memory access"}, names[2]: figures}
    assert asked == [names, names[2:]]
    assert "failed: illegal memory access" in capsys.readouterr().out


def test_a_process_that_kept_memory_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [contender.name for contender in contenders("long", [])]
    lines: list[list[dict[str, Any]]] = [
        [{"started": names[0]}, {"finished": names[0], "result": {"a": 1}}, {"restart": "left 5.0 GiB behind"}],
        [{"finished": name, "result": {"a": 1}} for name in names[1:]],
    ]
    monkeypatch.setattr(gpu_step, "run_worker", lambda *args: (lines.pop(0), ""))
    monkeypatch.setattr(gpu_step, "supported_recipes", lambda is_dry: [])
    assert gpu_step.run_part("long", Namespace(dry=False)) == {name: {"a": 1} for name in names}


def test_what_a_time_out_leaves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [contender.name for contender in contenders("long", [])]
    monkeypatch.setattr(gpu_step, "supported_recipes", lambda is_dry: [])
    monkeypatch.setitem(gpu_step.PARTS, "long", 0)
    results = gpu_step.run_part("long", Namespace(dry=False))
    assert results == {name: {"error": "not started: the time-out of long"} for name in names}


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise, reductions",
        ),
        ("void at::native::tensor_kernel_scan_outer_dim<long, unsigned int>", "routing, gathers"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("compute_dot_do_o<true>", "attention"),
        ("void transformer_engine::multi_tensor_apply_kernel<AdamFunctor>", "optimizer, gradient norm"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "RMSNorm"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_swiglu_forward", "this project's kernels"),
        ("an_unknown_kernel", "other"),
    ],
)
def test_a_kernel_belongs_to_one_group(kernel: str, group: str) -> None:
    assert gpu_step.group_of(kernel, {"_swiglu_forward"}) == group


def test_the_parts_fit_in_nine_minutes() -> None:
    assert sum(gpu_step.PARTS.values()) <= 540
    assert set(gpu_step.PARTS) == {"ceilings", "attention", *SHAPES}


def test_kernels_are_on_and_off_and_gpt_model_is_beside_them() -> None:
    recipes = ["delayed", "tensorwise", "blockwise"]
    for part in ("large", "bench"):
        found = set(contenders(part, recipes))
        for recipe in (None, "blockwise"):
            for has_kernels in (True, False):
                assert Contender(recipe=recipe, has_kernels=has_kernels) in found
            assert Contender(recipe=recipe, is_recorded=True) in found
        for recipe in (None, *recipes):
            assert {Contender(recipe=recipe), Contender(is_gpt=True, recipe=recipe)} <= found
        assert Contender(is_deterministic=True) in found
    assert len(contenders("bench", recipes)) == 4 * 3 + 2 + 1 + 2
    assert not any(one.is_recorded for one in contenders("bench", recipes, has_graphs=False))
