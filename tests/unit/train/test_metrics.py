"""The metrics of a step."""

from __future__ import annotations

import calendar
import math
import time
from dataclasses import replace

import pytest
import torch

from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import ModelConfig, StageConfig
from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.peaks import peak_flops_per_s
from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from hunyuan_pretrain.train.logged_numbers import HostSeconds, LoggedNumbers
from hunyuan_pretrain.train.metrics import Meter, routing_record, step_line, step_record
from hunyuan_pretrain.train.step_result import StepResult
from tests.helpers.tiny import tiny_model

STAGE = StageConfig(
    name="decay", tokens=640, sequence_length=64, global_batch_sequences=2, lr_end=1.0, data=({"path": "x"},)
)
PROMISED = {
    "step",
    "stage",
    "loss",
    "balance_loss",
    "grad_norm",
    "learning_rate",
    "expert_learning_rate",
    "tokens_per_s",
    "model_flops_per_s",
    "expert_load",
    "overflow_share",
    "recycled_share",
    "dropped_share",
}


def statistics(model: ModelConfig) -> RouterStatistics:
    """Statistics of two layers of 128 tokens in 4 routing groups; in layer 0, 32 choices overflow, of which 24 are
    recycled and 8 dropped."""
    sums = {
        "overflow": [32, 0],
        "recycled": [24, 0],
        "dropped": [8, 0],
        "balance_loss": [8, 4],
        "z_loss": [12, 4],
        "entropy": [128 * math.log(4), 64 * math.log(4)],
        "tokens": [128, 128],
    }
    choices = torch.tensor([[64, 32, 32, 0], [32, 32, 32, 32]]) * model.moe_router_topk
    return RouterStatistics(choices.double(), **{name: torch.tensor(sum_L).double() for name, sum_L in sums.items()})


def record(model: ModelConfig) -> dict:
    return step_record(model, STAGE, 4, StepResult(2.5, 0.7, 120, statistics(model)), 1e-3, 3.1e-4, seconds=0.5)


def test_the_record_has_every_promised_key():
    model = tiny_model()
    found = record(model)
    assert found.keys() >= PROMISED
    assert (found["step"], found["stage"], found["loss"], found["grad_norm"], found["target_tokens"]) == (
        5,
        "decay",
        2.5,
        0.7,
        120,
    )
    assert (found["learning_rate"], found["expert_learning_rate"]) == (1e-3, 3.1e-4)
    assert found["tokens_per_s"] == 256
    assert found["model_flops_per_s"] == 256 * flops_per_token(model, 64).total


@pytest.mark.parametrize("topk", [1, 2])
def test_loads_are_shares_of_choices_and_sum_to_one(topk):
    found = record(tiny_model(moe_router_topk=topk))
    assert found["expert_load"] == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    assert [sum(layer) for layer in found["expert_load"]] == [1.0, 1.0]
    assert found["max_expert_load"] == 2.0, "times the even share"


def test_overflow_is_the_sum_of_recycled_and_dropped():
    found = record(tiny_model())
    assert found["overflow_share"] == [0.25, 0.0]
    assert found["recycled_share"] == [0.1875, 0.0]
    assert found["dropped_share"] == [0.0625, 0.0]
    assert (found["mean_recycled_share"], found["mean_dropped_share"]) == (0.09375, 0.03125)


def test_entropy_is_a_share_of_the_largest_and_dead_experts_are_counted():
    found = record(tiny_model())
    assert found["router_entropy"] == pytest.approx([1.0, 0.5])
    assert (found["mean_router_entropy"], found["dead_experts"]) == (pytest.approx(0.75), 1)


def test_a_logged_step_says_which_part_of_the_gradient_and_which_rank():
    model = tiny_model()
    host = (HostSeconds(0.1, 1.0), HostSeconds(0.3, 1.5), HostSeconds(0.0, 4.0))
    logged = LoggedNumbers({"router": 0.25, "norms": 0.5}, 40, host)
    result = StepResult(2.5, 0.7, 120, statistics(model), logged=logged)
    found = step_record(model, STAGE, 4, result, 1e-3, 3.1e-4, seconds=0.5)
    assert {name: value for name, value in found.items() if name not in record(model)} == {
        "router_grad_norm": 0.25,
        "norms_grad_norm": 0.5,
        "bits_per_byte": 2.5 * 120 / math.log(2) / 40,
        "max_data_wait_seconds": 0.3,
        "max_data_wait_rank": 1,
        "max_launch_seconds": 4.0,
        "max_launch_rank": 2,
        "median_launch_seconds": 1.5,
    }
    alone = step_record(
        model, STAGE, 4, replace(result, logged=replace(logged, host=host[:1], target_bytes=0)), 1, 1, 1
    )
    assert alone.keys() - record(model).keys() == {"router_grad_norm", "norms_grad_norm"}


def test_balance_loss_is_the_mean_over_groups_and_layers():
    assert record(tiny_model())["balance_loss"] == (8 / 4 + 4 / 4) / 2
    assert "z_loss" not in record(tiny_model())
    assert record(tiny_model(moe_z_loss_coeff=0.1))["z_loss"] == (12 / 4 + 4 / 4) / 2


def test_evaluation_has_no_router_losses():
    assert "balance_loss" not in routing_record(tiny_model(), statistics(tiny_model()), None)


def test_the_line_for_the_console():
    line = step_line(record(tiny_model()), 10)
    assert line.startswith(
        "step 5/10 [decay] loss 2.5000 balance 1.500 grad norm 0.700 lr 1.00e-03 load 2.00 recycled 9.4% 256 tokens/s "
    )


def test_a_record_reports_progress_and_remaining_time(monkeypatch):
    """5 steps of 128 tokens, after 3 of them: the rest is estimated from the speed since the first step of this
    process, however long that step took."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    meter = Meter(Schedule.of([STAGE]), now - 1000, None, torch.device("cpu"))
    step = record(tiny_model())
    first = meter.fields(1, step)
    assert first["eta_seconds"] == 4 * 128 / step["tokens_per_s"]
    now += 20
    third = meter.fields(3, step)
    assert (third["cumulative_tokens"], third["eta_seconds"], third["run_seconds"]) == (3 * 128, 20.0, 1020.0)
    assert 0 < third["process_seconds"] < time.monotonic() + 1020
    assert calendar.timegm(time.strptime(third["time"], "%Y-%m-%dT%H:%M:%SZ")) == int(now)
    assert third["host_rss_bytes"] > 10**7
    assert meter.fields(5, step)["eta_seconds"] == 0
    assert first.keys() - CLOCK_FIELDS == {"cumulative_tokens"}


def test_mfu_is_reported_only_if_the_peak_is_known():
    step = record(tiny_model())
    schedule, device = Schedule.of([STAGE]), torch.device("cpu")
    assert not {"mfu", "device_peak_bytes"} & Meter(schedule, None, None, device).fields(1, step).keys(), (
        "not 0: not known"
    )
    found = step | Meter(schedule, None, 4 * step["model_flops_per_s"], device).fields(1, step)
    assert found["mfu"] == 0.25
    assert step_line(found, 10).endswith(f"TFLOP/s (25.0% MFU) ETA 0:00:{round(4 * 128 / 256):02d}")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.1e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, peak):
    assert peak_flops_per_s(name) == peak
