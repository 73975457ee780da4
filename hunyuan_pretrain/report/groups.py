"""Which numbers of a run belong into one chart."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Group(NamedTuple):
    """Numbers in one chart; on a page of several runs, a chart for each number."""

    section: str
    title: str
    patterns: tuple[str, ...]
    unit: str = ""
    may_be_log: bool = False
    is_wide: bool = False


GROUPS = (
    Group("Loss", "Loss", ("loss", "validation_loss", "validation/*/loss"), "nats per token", is_wide=True),
    Group("Loss", "Bits per byte", ("bits_per_byte", "validation_bits_per_byte", "validation/*/bits_per_byte")),
    Group("Loss", "Preferences", ("preference_loss",), "nats per pair"),
    Group("Loss", "Preferences: chosen answer preferred", ("preference_accuracy",), "share of pairs"),
    Group("Loss", "Preferences: margin", ("reward_margin",), "mean over pairs"),
    Group("Loss", "Log-probability of an answer", ("chosen_log_probability", "rejected_log_probability"), "nats"),
    Group("Loss", "Losses of the router", ("balance_loss", "z_loss"), may_be_log=True),
    Group(
        "Benchmarks",
        "Benchmarks: share that is right",
        ("tasks/*/acc*", "tasks/*/exact_match*", "tasks/*/em", "tasks/*/f1", "tasks/*/pass*"),
        is_wide=True,
    ),
    Group("Benchmarks", "Benchmarks: other numbers", ("tasks/*",)),
    Group("Update", "Learning rate", ("learning_rate", "expert_learning_rate")),
    Group("Update", "Gradient norm", ("grad_norm", "update_norm"), "before clipping", may_be_log=True),
    Group("Update", "Gradient norm by part", ("*_grad_norm",), may_be_log=True),
    Group("Update", "Gradient noise scale", ("noise_scale_tokens*",), "tokens", may_be_log=True),
    Group("Speed", "Throughput", ("tokens_per_s",), "tokens/s"),
    Group("Speed", "MFU", ("mfu",)),
    Group("Speed", "Time of a step", ("seconds",), "s"),
    Group("Speed", "Waiting for data", ("data_wait_seconds", "max_data_wait_seconds"), "s in a step"),
    Group("Speed", "Launching a step, by host", ("max_launch_seconds", "median_launch_seconds"), "s"),
    Group("Speed", "Memory of rank 0", ("device_peak_bytes", "host_rss_bytes"), "bytes"),
    Group("Experts", "Busiest expert", ("max_expert_load",), "times an even share"),
    Group("Experts", "Recycled and dropped", ("mean_recycled_share", "mean_dropped_share"), "share of choices"),
    Group("Experts", "Dead experts", ("dead_experts",), "below 1% of an even share"),
    Group("Experts", "Router entropy", ("mean_router_entropy",), "of the largest possible"),
    Group("Update", "Skipped steps", ("skipped",)),
)
SECTIONS = ("Loss", "Benchmarks", "Update", "Speed", "Experts", "Other numbers")
WITHOUT_CHART = frozenset(
    {"cumulative_tokens", "run_seconds", "process_seconds", "eta_seconds", "model_flops_per_s"}
    | {"target_tokens", "validation_target_tokens", "max_data_wait_rank", "max_launch_rank"}
)


def groups_of(names: Collection[str]) -> Iterator[tuple[Group, list[str]]]:
    """Each group with those of the names that are in it; every other name in a group of its own, last."""
    left = {name for name in names if name not in WITHOUT_CHART and not name.endswith("/target_tokens")}
    for group in GROUPS:
        found = [
            name
            for pattern in group.patterns
            for name in sorted(left)
            if fnmatch.fnmatchcase(name, pattern) and not (pattern.startswith("*") and name == pattern[2:])
        ]
        left -= set(found)
        if found:
            yield group, list(dict.fromkeys(found))
    for name in sorted(left):
        yield Group("Other numbers", name, (name,)), [name]
