"""The comparison of a run with its plan: planted differences are named, and a run as it should be has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hunyuan_pretrain.plan.counts import RankMemory, parameters
from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.train import as_planned, loop, saves
from hunyuan_pretrain.train.as_planned import Causes, Figures, compare, told
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

GIB = 2**30
PLAN = Figures(1_000_000, 4096, RankMemory(10 * GIB, 20 * GIB, 30 * GIB), 100 * GIB)
ALL_KNOWN = Causes(emulates_fp8=False, emulates_fp8_parameters=False, uses_kernels=True, has_capacity=True)
ABOUT_THE_PLAN = "as planned", "warning: not as planned", "not compared"
NOT_COUNTED = "bytes sent: not counted while training"


def difference(causes: Causes = ALL_KNOWN, **changes: Any) -> tuple[str, list[str]]:
    return told(compare(replace(PLAN, **changes), PLAN, causes))


def test_a_run_as_planned_gets_one_line() -> None:
    assert difference() == (
        "as planned: parameters of this rank 1,000,000; tokens a step 4,096; weights, gradients and optimizer state "
        f"60 GiB; peak of tensors 100 GiB; {NOT_COUNTED}",
        [],
    )


def test_a_difference_within_a_tenth_is_in_the_line() -> None:
    line, warnings = difference(peak=109 * GIB, kept=RankMemory(10 * GIB, 20 * GIB, 25 * GIB))
    assert warnings == []
    assert "optimizer state 55 GiB (planned 60 GiB, -8.3%); peak of tensors 109 GiB (planned 100 GiB, +9%)" in line


def test_on_a_cpu_there_is_no_peak() -> None:
    line, warnings = difference(peak=None)
    assert line.endswith(f"60 GiB; peak of memory: on GPUs only; {NOT_COUNTED}")
    assert warnings == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"parameters": 1_000_001},
            "parameters of this rank 1,000,001 (planned 1,000,000, +0.0001%): this code builds",
        ),
        ({"tokens": 4032}, "tokens a step 4,032 (planned 4,096, -1.6%): the loader or the router leaves tokens out"),
        (
            {"kept": RankMemory(10 * GIB, 20 * GIB, 37 * GIB)},
            "weights, gradients and optimizer state 67 GiB (planned 60 GiB, +12%): optimizer 37 GiB of 30 GiB; this",
        ),
        ({"peak": 111 * GIB}, "peak of tensors 111 GiB (planned 100 GiB, +11%): an attention backend that needs more"),
        ({"peak": 89 * GIB}, "peak of tensors 89 GiB (planned 100 GiB, -11%): the plan adds up largest parts"),
    ],
    ids=["parameters", "tokens", "kept", "more", "less"],
)
def test_each_difference_is_named_with_both_numbers_and_a_cause(changes: dict[str, Any], expected: str) -> None:
    """Parameters and tokens have to be equal, bytes within a tenth."""
    line, warnings = difference(**changes)
    (warning,) = warnings
    assert warning.startswith(f"not as planned: {expected}")
    assert warning.removeprefix("not as planned: ").partition(" (")[0] not in line


def test_the_offloaded_optimizer_is_a_figure_where_there_is_one() -> None:
    plan = replace(PLAN, kept=RankMemory(10, 20, 30, 100))
    line, warnings = told(compare(replace(plan, kept=RankMemory(10, 20, 30, 50)), plan, ALL_KNOWN))
    assert [warning.partition(";")[0] for warning in warnings] == [
        "not as planned: offloaded optimizer 50 bytes (planned 100 bytes, -50%): host 50 bytes of 100 bytes"
    ]
    assert "optimizer state 60 bytes;" in line


def test_the_causes_are_those_of_the_run() -> None:
    emulated = Causes(emulates_fp8=True, emulates_fp8_parameters=True, uses_kernels=False, has_capacity=False)
    (warning,) = difference(emulated, peak=200 * GIB)[1]
    for cause in ("plan --imbalance", "FP8 is emulated", "torch's functions between the matmuls", "attention backend"):
        assert cause in warning
    (warning,) = difference(emulated, peak=50 * GIB)[1]
    assert "plan --imbalance" in warning
    assert "torch's functions" not in warning, "they only keep more"
    (warning,) = difference(emulated, kept=RankMemory(90 * GIB, 0, 0))[1]
    assert "precision.fp8_parameters" in warning


# --- in the loop ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(corpus: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains some steps on one rank; returns the lines of the log about the plan, and after which step they came."""

    def train(plant: Any = lambda run: None, steps: int = 5, **changes: Any) -> list[tuple[int, str]]:
        fields = experiment_fields(corpus, tmp_path / "run", steps, model__num_layers=2, **changes)
        fields["runtime"] |= {"probes": False}
        run = on_this_rank(fields)
        found: list[tuple[int, str]] = []
        done: list[int] = []
        monkeypatch.setattr(run.log, "line", lambda line: found.append((len(done), line)))
        monkeypatch.setattr(run.log, "metrics", lambda record: done.append(record["step"]))
        monkeypatch.setattr(saves.Saves, "save", lambda *_, **__: None)
        plant(run)
        loop._train(run, StopRequest())
        run.loader.close()
        return [(step, line) for step, line in found if line.startswith(ABOUT_THE_PLAN)]

    return train


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": {"dtype": "bf16"}, "parallel": {"recompute": "cla_group"}},
    "bf16 gradients": {"precision": {"dtype": "bf16", "grad_reduce_in_fp32": False}},
    "dropless": {"model__moe_expert_capacity_factor": None, "model__recycle_routing": False},
    "half offloaded": {"optimizer": {"lr": 1e-2, "cpu_offload_fraction": 0.5}},
    "plain optimizer": {"parallel": {"use_distributed_optimizer": False}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_as_planned(trained: Any, corpus: Any, name: str) -> None:
    """Said once, when three steps have been read; the third is recorded after that."""
    ((step, line),) = trained(**CASES[name])
    assert step == 2
    assert line.startswith("as planned: parameters of this rank ")
    assert "(planned" not in line, "on a CPU every figure is exact"
    assert ("offloaded optimizer" in line) == ("offloaded" in name)


def test_the_parameters_are_those_of_the_model(trained: Any) -> None:
    of_runs: list[Any] = []
    ((_, line),) = trained(of_runs.append)
    assert f"parameters of this rank {parameters(of_runs[0].experiment.model).total:,};" in line
    assert "tokens a step 512;" in line


def test_a_shorter_run_is_compared_at_its_end(trained: Any) -> None:
    ((step, line),) = trained(steps=2)
    assert step == 1
    assert line.startswith("as planned: ")


def test_planted_differences_of_a_run_are_found(trained: Any) -> None:
    """A weight that the plan does not know, a third moment, a batch that lost a micro-batch."""

    def plant(run: Any) -> None:
        run.chunks[0].extra = torch.nn.Parameter(torch.zeros(3))
        for part in run.optimizer.chained_optimizers:
            part.optimizer.register_step_post_hook(lambda adam, *_: add_moment(adam.state))
        micro_batches = run.loader.micro_batches
        run.loader.micro_batches = lambda step: micro_batches(step)[: 3 if step == 0 else 4]

    def add_moment(state: Any) -> None:
        for tensors in state.values():
            tensors["third"] = torch.zeros_like(tensors["exp_avg"], dtype=torch.float64)

    lines = [line for _, line in trained(plant)]
    total = "warning: not as planned: "
    assert lines[0] == f"as planned: peak of memory: on GPUs only; {NOT_COUNTED}"
    assert [line.startswith(total) for line in lines[1:]] == [True] * 3
    assert "parameters of this rank " in lines[1]
    assert "tokens a step 384 (planned 512, -25%)" in lines[2]
    assert "optimizer state " in lines[3]


def test_a_plan_that_cannot_be_computed_ends_no_run(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("no such layout")

    monkeypatch.setattr(as_planned, "planned", refuse)
    assert trained() == [(0, "not compared with the plan: ValueError: no such layout")]


def test_nor_does_a_run_that_cannot_be_measured(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_planned, "held", lambda run: run.optimizer.nothing)
    ((step, line),) = trained()
    assert step == 2
    assert line.startswith("not compared with the plan: AttributeError: ")


def test_the_peak_is_of_all_first_steps(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record of metrics.jsonl resets the peak that torch counts."""
    peaks, resets = iter((5 * GIB, 9 * GIB, 3 * GIB)), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    begin = as_planned.AsPlanned._begin

    def on_a_gpu(comparison: Any, world_size: int) -> None:
        comparison._is_on_gpu = True
        begin(comparison, world_size)

    monkeypatch.setattr(as_planned.AsPlanned, "_begin", on_a_gpu)
    (_, line), (_, warning) = trained()
    assert resets == [torch.device("cpu")], "what came before the first step does not count"
    assert warning.startswith("warning: not as planned: peak of tensors 9 GiB (planned ")
    assert "peak" not in line
