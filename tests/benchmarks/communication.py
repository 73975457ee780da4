"""Bytes that a rank sends in one training step, counted: this trainer, with CLA and without, and megatron-core's
GPTModel with MoE.

    python tests/benchmarks/communication.py [--only tp2 ep2] [--json FILE]

Two gloo ranks of one process each, fp32, no distributed optimizer; model, tokens and steps are those of train_step.py.
parallel.traffic, which defines the bytes, counts the second step of each; the bytes do not depend on the machine or its
load. Of the two ranks, the one that sends more counts. megatron-core has no context parallelism without Transformer
Engine. The output ends with what cross-layer attention (CLA) and recycle routing save at the size of Hunyuan-Large,
from the plan's closed forms, which a test compares with the counted bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from train_step import Step, megatron_gpt, ours

ROOT = Path(__file__).parents[2]
TENSOR = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any] | None]] = {
    # name: micro-batches, fields of parallel of ours, of GPTModel
    "dp2": (1, {}, {}),
    "tp2": (1, TENSOR, TENSOR),
    "ep2": (1, {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}),
    "cp2": (1, {"context_parallel_size": 2}, None),
    "cp2 all_to_all": (1, {"context_parallel_size": 2, "context_parallel_method": "all_to_all"}, None),
}
CONTENDERS = ("ours", "ours, no CLA", "GPTModel")


def build(layout: str, contender: str) -> Step:
    num_micro_batches, mine, peer = LAYOUTS[layout]
    if contender == "GPTModel":
        assert peer is not None
        return megatron_gpt(num_micro_batches, **peer)[0]
    return ours(1 if contender == "ours, no CLA" else 2, num_micro_batches, **mine)[0]


def worker(layout: str, contender: str) -> None:
    """One rank: prints [axis, kind, calls, bytes] of the second step."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    step = build(layout, contender)
    step()
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hunyuan_pretrain.parallel.traffic import TrafficCounter

    with TrafficCounter(ProcessGroupCollection.use_mpu_process_groups()) as counter:
        step()
    print(json.dumps([[*key, *messages] for key, messages in counter.traffic.items()]))


def count(layout: str, contender: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(axis, kind) -> (calls, bytes) of the rank that sends more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = (
            os.environ
            | {key: str(value) for key, value in place.items()}
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        )
        command = [sys.executable, __file__, "--worker", layout, contender]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    answers = [process.communicate()[0].strip().splitlines() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{layout}, {contender}: a rank failed")
    found = [{(axis, kind): (calls, size) for axis, kind, calls, size in json.loads(answer[-1])} for answer in answers]
    return max(found, key=lambda traffic: sum(sent(traffic).values()))


def sent(traffic: dict[tuple[str, str], tuple[int, int]]) -> dict[str, int]:
    """axis -> bytes."""
    found: dict[str, int] = {}
    for (axis, kind), (_, size) in traffic.items():
        if kind != "recv":
            found[axis] = found.get(axis, 0) + size
    return found


def savings() -> None:
    """Hunyuan-Large in bf16, from the closed forms."""
    from hunyuan_pretrain.config.load import load_model
    from hunyuan_pretrain.config.schema import DataSource, ModelConfig, ParallelConfig, PrecisionConfig, StageConfig
    from hunyuan_pretrain.plan.communication import communication_per_rank
    from hunyuan_pretrain.plan.counts import parameters

    large = load_model(ROOT / "configs/model/hunyuan_large.yaml")

    def stage(length: int) -> StageConfig:
        return StageConfig(
            name="s",
            tokens=1,
            sequence_length=length,
            global_batch_sequences=1,
            lr_end=1.0,
            data=(DataSource(path="none"),),
        )

    def sends(axis: str, ranks: int, length: int, sizes: dict[str, Any], **changes: Any) -> str:
        model, parallel = ModelConfig.model_validate(large.model_dump() | changes), ParallelConfig(**sizes)
        data_parallel = ranks // sizes.get("context_parallel_size", 1)
        batch = stage(length).model_copy(update={"global_batch_sequences": data_parallel})
        found = communication_per_rank(model, parallel, PrecisionConfig(), batch, ranks)
        calls = sum(
            messages.calls for (over, kind), messages in found.messages.items() if over == axis and kind != "recv"
        )
        return f"{found.sent_bytes(axis) / 2**30:.3g} in {calls} calls"

    context = {"context_parallel_size": 8, "context_parallel_method": "all_gather"}
    print("\nHunyuan-Large in bf16, GiB that a rank sends for one sequence, forward and backward")
    keys = "  keys and values, 8 context-parallel ranks, 32,768 tokens,"
    print(
        f"{keys} with CLA: {sends('cp', 8, 32768, context)}; without: "
        f"{sends('cp', 8, 32768, context, cla_share_factor=1)}"
    )
    fewer = parameters(large.model_copy(update={"cla_share_factor": 1})).total - parameters(large).total
    print(f"  weights to reduce and gather: {fewer:,} fewer of them by CLA")
    rows: dict[str, dict[str, Any]] = {
        "recycled, capacity 1.0": {},
        "padded to capacity 1.25": {"moe_expert_capacity_factor": 1.25},
        "padded to capacity 2.0": {"moe_expert_capacity_factor": 2.0},
        "dropless, even routing (16/15 of it at most)": {"recycle_routing": False, "moe_expert_capacity_factor": None},
    }
    for name, changes in rows.items():
        found = sends("ep", 16, 4096, {"expert_model_parallel_size": 16}, **changes)
        print(f"  tokens to the experts, 16 expert-parallel ranks, 4,096 tokens, {name}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--json", help="also write every count to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    report: dict[str, Any] = {}
    print(
        f"{'MiB sent by a rank in a step':32}"
        + "".join(f"{name:>14}" for name in CONTENDERS)
        + f"{'ours/GPTModel':>16}"
    )
    for layout in arguments.only:
        contenders = [name for name in CONTENDERS if name != "GPTModel" or LAYOUTS[layout][2] is not None]
        found = {name: count(layout, name) for name in contenders}
        report[layout] = {
            name: [[*key, *messages] for key, messages in traffic.items()] for name, traffic in found.items()
        }
        by_axis = {name: sent(traffic) for name, traffic in found.items()}
        totals = {name: sum(axes.values()) for name, axes in by_axis.items()}
        ratio = f"{totals['ours'] / totals['GPTModel']:16.2f}" if "GPTModel" in totals else f"{'-':>16}"
        print(f"{layout:32}" + columns(totals) + ratio)
        for axis in sorted({axis for axes in by_axis.values() for axis in axes}):
            print(f"  {axis:30}" + columns({name: axes.get(axis, 0) for name, axes in by_axis.items()}))
        calls = {
            name: sum(number for (_, kind), (number, _) in traffic.items() if kind != "recv")
            for name, traffic in found.items()
        }
        print(
            f"  {'calls':30}" + "".join(f"{calls[name]:14,}" if name in calls else f"{'-':>14}" for name in CONTENDERS),
            flush=True,
        )
    savings()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def columns(sizes: dict[str, int]) -> str:
    return "".join(f"{sizes[name] / 2**20:14.3f}" if name in sizes else f"{'-':>14}" for name in CONTENDERS)


if __name__ == "__main__":
    main()
