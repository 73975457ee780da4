"""The rows of a plan about memory peaks, time and energy, and the same as data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_model
from hunyuan_pretrain.config.schema import RuntimeConfig
from hunyuan_pretrain.plan.costs import Costs, as_data, costs, problems, rows
from hunyuan_pretrain.plan.counts import flops_per_token, report_flops_per_token
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.passes import Assumptions
from tests.helpers.planned import ROOT, hunyuan_large

LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
}
RANKS = 512


def planned(hardware: str | None = "H200-141GB", assumptions: Assumptions | None = None, **sections: Any) -> Costs:
    experiment = hunyuan_large(**({"parallel": LAYOUT} | sections))
    return costs(experiment, RANKS, load(hardware) if hardware else None, assumptions)


def texts(found: Costs) -> dict[tuple[str, str], tuple[str, str]]:
    return {(row.group, row.name): (row.value, row.note) for row in rows(found)}


def test_the_rows_answer_what_a_job_takes() -> None:
    found = planned()
    shown, (peaks,), step = texts(found), found.peaks, found.stages[0].step
    assert step is not None
    value, _ = shown["memory peak on a GPU", "by pipeline rank"]
    assert value.removesuffix(" GiB").split(", ") == [f"{peak.total / 2**30:.3g}" for peak in peaks]
    assert shown["memory peak on a GPU", "fullest rank"][1].startswith("pipeline rank 0: weights 11.5 GiB, ")
    assert shown["memory peak on a GPU", "on H200-141GB"][0] == "fits"
    assert shown["time", "step"][0] == f"{step.seconds:.3g} s"
    assert shown["time", "step"][1].startswith("experts ")
    value, note = shown["time", "pipeline bubble"]
    waited = [step.timeline.seconds - busy for busy in step.timeline.busy]
    assert value == f"{sum(waited) / 8 / step.seconds:.1%}"
    assert f"the passes take {step.timeline.bubble:.1%} longer than the busiest rank computes" in note
    assert note.endswith("passes in flight: 8, 7, 6, 5, 4, 3, 2, 1")
    assert shown["time", "MFU"][0] == f"{step.mfu:.1%}"
    assert shown["run", "days"] == shown["run", "days of main"]
    assert float(shown["run", "GPU-hours"][0].replace(",", "")) == pytest.approx(found.stages[-1].gpu_hours, abs=0.5)
    assert problems(found) == []


def test_what_a_recorded_step_reserves_has_a_row() -> None:
    sections: dict[str, Any] = {"model": {"num_layers": 4}, "parallel": {"expert_model_parallel_size": 8}}
    experiment = hunyuan_large(**sections, runtime={"cuda_graphs": True}, evaluation={"data": "heldout"})
    found = costs(experiment, 8)
    shown, ((peak,),) = texts(found), found.peaks
    value, note = shown["memory peak on a GPU", "reserved between steps"]
    assert value == f"{peak.passes / 2**30:.3g} GiB"
    assert note == "by the recorded step, for its passes; the update and a validation need their own"
    assert (
        f"update or validation {peak.beside_recorded / 2**30:.3g} GiB"
        in shown["memory peak on a GPU", "fullest rank"][1]
    )
    never = experiment.model_copy(update={"runtime": RuntimeConfig()})
    assert ("memory peak on a GPU", "reserved between steps") not in texts(costs(never, 8))


def test_without_hardware_there_are_peaks_and_no_times() -> None:
    found = planned(hardware=None)
    shown = texts(found)
    assert ("memory peak on a GPU", "fullest rank") in shown
    assert shown["run", "time"] == ("with --hardware", "B200, GB200, H100-80GB, H20-96GB, H200-141GB, or a YAML file")
    assert not any(group == "time" for group, _ in shown)
    assert as_data(found)["hardware"] is as_data(found)["run"] is None


def test_what_does_not_fit_is_named() -> None:
    flat = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    found = planned("H100-80GB", parallel=LAYOUT | flat)
    lacking = max(peak.total for peak in found.peaks[0]) - 81_559 * 2**20
    assert lacking > 0
    (line,) = problems(found)
    assert line == f"stage main: pipeline rank 0 needs {lacking / 2**30:.3g} GiB more than H100-80GB has"
    assert texts(found)["memory peak on a GPU", "on H100-80GB"][0].startswith("does not fit, by ")


def test_the_data_are_the_numbers_of_the_rows() -> None:
    found = planned()
    data = json.loads(json.dumps(as_data(found)))
    (stage,), step = data["stages"], found.stages[0].step
    assert step is not None
    assert stage["step"]["seconds"] == step.seconds
    assert (stage["step"]["mean_idle"], stage["step"]["bubble"]) == (step.mean_idle, step.timeline.bubble)
    assert sum(stage["step"]["parts"].values()) == pytest.approx(step.seconds)
    assert [rank["total"] for rank in stage["memory"]] == [peak.total for peak in found.peaks[0]]
    assert all(rank["missing"] < 0 for rank in stage["memory"])
    assert data["run"]["days"] == stage["days"] == found.stages[-1].days
    assert data["assumptions"] == {"document_tokens": None, "imbalance": 1.0}


def test_an_assumption_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--document-tokens=512: .* time of a step only \(add --hardware\)"):
        planned(None, Assumptions(document_tokens=512))
    with pytest.raises(ConfigError, match=r"--imbalance=1\.5: experts have a capacity"):
        planned(assumptions=Assumptions(imbalance=1.5))
    with pytest.raises(ConfigError, match=r"precision\.dtype=fp32: .*no speed of fp32 matmuls \(use bf16\)"):
        planned(precision={"dtype": "fp32"})


def test_the_reports_law_counts_more_flops_at_4k_and_fewer_at_256k() -> None:
    model = load_model(ROOT / "configs/model/hunyuan_large.yaml")
    by_report = report_flops_per_token(model)
    assert by_report == pytest.approx(9.59 * 51_318_800_640 + 2.3e8)
    shares = [flops_per_token(model, length).total / by_report for length in (4096, 32_768, 262_144)]
    assert shares == pytest.approx([0.65, 0.79, 1.93], abs=0.005)
