"""Formats a step's numbers as a record for metrics.jsonl and as a line for the log.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from datetime import timedelta
from typing import Any

import psutil
import torch

from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import ModelConfig, StageConfig
from hunyuan_pretrain.model.preference import PairSums
from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.train.logged_numbers import HostSeconds, LoggedNumbers
from hunyuan_pretrain.train.step_result import StepResult

DEAD_LOAD = 0.01
"""An expert with less than this of an even share of a step's choices is counted as dead."""


def routing_record(model: ModelConfig, sums: RouterStatistics, num_groups: int | None) -> dict[str, Any]:
    """Per-layer expert load (share of choices before recycling), the shares of choices that overflowed, were recycled,
    or were dropped, and in training the router's mean entropy: 1 where all experts are equally probable, 0 where one is
    certain.

    sums: all layers, over the global batch. num_groups: routing groups in the global batch, over which the router
    losses are averaged; None without router losses (evaluation).
    """
    choices_L = sums.tokens * model.moe_router_topk
    record: dict[str, Any] = {
        "expert_load": (sums.chosen_E / choices_L[:, None]).tolist(),
        "overflow_share": (sums.overflow / choices_L).tolist(),
        "recycled_share": (sums.recycled / choices_L).tolist(),
        "dropped_share": (sums.dropped / choices_L).tolist(),
    }
    if num_groups is not None:
        nats_L = sums.entropy / sums.tokens
        record["router_entropy"] = (nats_L / math.log(max(model.num_moe_experts, 2))).tolist()
        record["balance_loss"] = (sums.balance_loss / num_groups).mean().item()
        if model.moe_z_loss_coeff:
            record["z_loss"] = (sums.z_loss / num_groups).mean().item()
    return record


def step_record(
    model: ModelConfig,
    stage: StageConfig,
    step: int,
    result: StepResult,
    lr: float,
    expert_lr: float,
    seconds: float,
) -> dict[str, Any]:
    """The metrics.jsonl record of global step `step`. The record counts from 1: its `step` is the number of steps done.

    seconds: mean of the steps since the previous record, validation or checkpoint; it includes `data_wait_seconds`, the
    mean wait for a batch, which is read while the previous step runs.
    """
    tokens_per_s = stage.global_batch_tokens / seconds
    num_groups = stage.global_batch_tokens // model.moe_routing_group_tokens
    routing = routing_record(model, result.statistics, num_groups)
    E = model.num_moe_experts
    nats = result.loss * result.num_target_tokens if stage.loss_average == "tokens" and result.pairs is None else None
    return {
        "step": step + 1,
        "stage": stage.name,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": lr,
        "expert_learning_rate": expert_lr,
        "target_tokens": result.num_target_tokens,
        "seconds": seconds,
        "data_wait_seconds": result.data_wait_seconds,
        "tokens_per_s": tokens_per_s,
        "model_flops_per_s": tokens_per_s * flops_per_token(model, stage.sequence_length).total,
        "max_expert_load": max(max(loads) for loads in routing["expert_load"]) * E,
        "mean_recycled_share": sum(routing["recycled_share"]) / len(routing["recycled_share"]),
        "mean_dropped_share": sum(routing["dropped_share"]) / len(routing["dropped_share"]),
        "mean_router_entropy": sum(routing["router_entropy"]) / len(routing["router_entropy"]),
        "dead_experts": sum(load * E < DEAD_LOAD for loads in routing["expert_load"] for load in loads),
        **({} if result.logged is None else _logged_fields(nats, result.logged)),
        **({} if result.pairs is None else pairs_record(result.pairs)),
        **routing,
    }


def pairs_record(sums: PairSums) -> dict[str, float]:
    """Means over the pairs of a step with task=dpo."""
    named = {
        "preference_loss": sums.preference_loss,
        "preference_accuracy": sums.preferred,
        "reward_margin": sums.margin,
        "chosen_log_probability": sums.chosen_log_probability,
        "rejected_log_probability": sums.rejected_log_probability,
    }
    return {name: total / sums.pairs for name, total in named.items()}


def _logged_fields(nats: float | None, logged: LoggedNumbers) -> dict[str, Any]:
    """The gradient norm of each part, bits per byte where the sum of all cross-entropies is known, and on several ranks
    which rank waited longest for its batch and which took longest to launch a step."""
    found: dict[str, Any] = {f"{part}_grad_norm": norm for part, norm in logged.part_norms.items()}
    if logged.target_bytes and nats is not None:
        found["bits_per_byte"] = nats / math.log(2) / logged.target_bytes
    if len(logged.host) > 1:
        for name, seconds in zip(HostSeconds._fields, zip(*logged.host, strict=True), strict=True):
            longest = max(seconds)
            found |= {f"max_{name}_seconds": longest, f"max_{name}_rank": seconds.index(longest)}
        found["median_launch_seconds"] = statistics.median(one.launch for one in logged.host)
    return found


class StepClock:
    """Mean time of steps. A step ends when the host has read its numbers: the device may then have begun the next."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin here: the device has nothing to do."""
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._began, self._ended, self._steps, self._data_wait_seconds = now, now, 0, 0.0

    def ended(self, data_wait_seconds: float) -> None:
        """One more step ended."""
        self._ended, self._steps = time.perf_counter(), self._steps + 1
        self._data_wait_seconds += data_wait_seconds

    def means(self) -> tuple[float, float]:
        """(seconds, data_wait_seconds) of a step, of those that ended since the clock began. It begins anew where the
        last of them ended."""
        found = (self._ended - self._began) / self._steps, self._data_wait_seconds / self._steps
        self._begin(self._ended)
        return found


class Meter:
    """Measures time, memory, MFU and the remaining time of a run, on rank 0."""

    def __init__(
        self, schedule: Schedule, began: float | None, peak_flops_per_s: float | None, device: torch.device
    ) -> None:
        """`began`: Unix time of the run's first start. `peak_flops_per_s`: sum over all ranks, None if unknown."""
        self._schedule, self._peak, self._device = schedule, peak_flops_per_s, device
        self._process = psutil.Process()
        self._process_began = self._process.create_time()
        self._run_began = began if began is not None else self._process_began
        self._after_first: tuple[float, int] | None = None

    def fields(self, done: int, step: dict[str, Any]) -> dict[str, Any]:
        """Further fields of a step's record; `done` is the number of steps completed.

        cumulative_tokens: whole run, padding included. time: UTC. run_seconds: since the run first started, breaks
        included. process_seconds: since this process started. eta_seconds: time to the last step, at this process's
        mean speed after its first step, validations and checkpoints included. device_peak_bytes: peak tensor memory
        on the GPU since the previous record, or since the process began to train. host_rss_bytes: resident memory of
        the process. Both are rank 0's.
        """
        now, tokens = time.time(), self._schedule.tokens_after(done)
        left = self._schedule.tokens_after(self._schedule.num_steps) - tokens
        if self._after_first is None:
            tokens_per_s, self._after_first = step["tokens_per_s"], (now, tokens)
        else:
            tokens_per_s = (tokens - self._after_first[1]) / max(now - self._after_first[0], 1e-9)
        found: dict[str, Any] = {
            "cumulative_tokens": tokens,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "run_seconds": round(now - self._run_began, 3),
            "process_seconds": round(now - self._process_began, 3),
            "eta_seconds": round(left / tokens_per_s, 1),
            "host_rss_bytes": self._process.memory_info().rss,
        }
        if self._device.type == "cuda":
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._peak is not None:
            found["mfu"] = step["model_flops_per_s"] / self._peak
        return found


def step_line(record: dict[str, Any], num_steps: int) -> str:
    """The record as one line. `load` is the busiest expert's load relative to an even share."""
    share = f" ({record['mfu']:.1%} MFU)" if "mfu" in record else ""
    left = f" ETA {timedelta(seconds=round(record['eta_seconds']))}" if record.get("eta_seconds") else ""
    return (
        f"step {record['step']}/{num_steps} [{record['stage']}] loss {record['loss']:.4f} balance "
        f"{record['balance_loss']:.3f} "
        f"grad norm {record['grad_norm']:.3f} lr {record['learning_rate']:.2e} load {record['max_expert_load']:.2f} "
        f"recycled {record['mean_recycled_share']:.1%} {record['tokens_per_s']:,.0f} tokens/s "
        f"{record['model_flops_per_s'] / 1e12:.3g} TFLOP/s{share}{left}"
    )
