"""How long a rank's messages take: over NVLink within a domain, over the network beyond it.

Ranks are numbered as in config.derived.Grid: tp, cp, ep, dp, pp, with tp fastest, node by node. Each GPU has its own
network adapter, so `k` ranks of a group in one domain have `k` adapters.
"""

from __future__ import annotations

from typing import NamedTuple

from hunyuan_pretrain.config.derived import Grid
from hunyuan_pretrain.plan.communication import Communication
from hunyuan_pretrain.plan.hardware import Hardware


class Group(NamedTuple):
    """Ranks that communicate: `size` of them, `stride` apart."""

    stride: int
    size: int


def group_of(axis: str, ranks: Grid) -> Group:
    """The ranks of an axis of plan.communication."""
    per_stage = ranks.world_size // ranks.pp
    return {
        "tp": Group(1, ranks.tp),
        "cp": Group(ranks.tp, ranks.cp),
        "expert_tp": Group(1, ranks.expert_tp),
        "ep": Group(ranks.expert_tp, ranks.ep),
        "pp": Group(per_stage, ranks.pp),
        "dp": Group(ranks.tp, ranks.dp_cp),
        "expert_dp": Group(ranks.expert_tp * ranks.ep, ranks.expert_dp),
        "embedding": Group(per_stage * max(ranks.pp - 1, 1), min(2, ranks.pp)),
        "other": Group(1, ranks.world_size),
    }[axis]


def in_one_domain(group: Group, hardware: Hardware) -> int:
    """Ranks of the group in one NVLink domain."""
    return max(1, min(group.size, hardware.nvlink_domain_gpus // group.stride))


def call_s(group: Group, hardware: Hardware) -> float:
    """Latency of a call."""
    is_near = in_one_domain(group, hardware) == group.size
    return hardware.nvlink_latency_s if is_near else hardware.network_latency_s


def bytes_per_s(kind: str, group: Group, hardware: Hardware) -> float:
    """Of what plan.communication counts: bytes that a rank sends.

    A ring passes all bytes through every link of its way, and several rings share the adapters of a domain. An
    all-to-all sends to each rank directly, over both links at once.
    """
    inside = hardware.nvlink_bytes_per_s * hardware.achieved.nvlink
    outside = hardware.network_bytes_per_s * hardware.achieved.network
    near = in_one_domain(group, hardware)
    if near == group.size:
        return inside
    if kind in ("send", "recv"):
        return outside
    if kind == "all_to_all":
        others = group.size - 1
        return 1 / max((group.size - near) / others / outside, (near - 1) / others / inside)
    return min(inside, near * outside)


def seconds(messages: Communication, axis: str, ranks: Grid, hardware: Hardware) -> float:
    """Of all messages of an axis, one after another. Received messages are those that others send."""
    group = group_of(axis, ranks)
    return sum(
        found.bytes / bytes_per_s(kind, group, hardware) + found.calls * call_s(group, hardware)
        for (over, kind), found in messages.messages.items()
        if over == axis and kind != "recv"
    )
