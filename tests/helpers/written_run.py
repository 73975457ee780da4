"""Run directories with the files that a run writes, without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.history import Segment, SourceFacts, write_history, write_whole
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.runs import experiment_fields

PARTS = ("embedding", "attention", "router", "shared_expert", "routed_experts", "norms")
SOURCE = "/data/train"


def experiment(run_dir: Path, steps: int, name: str = "written", **changes: Any) -> Experiment:
    """Of two stages: one step, and the others."""
    fields = experiment_fields(Path("/data"), run_dir, steps, name=name, **changes)
    return Experiment.model_validate(fields)


def write_run(
    run_dir: Path,
    steps: int,
    *,
    of: int | None = None,
    layers: int = 4,
    experts: int = 4,
    seed: int = 0,
    name: str = "written",
    rank_seconds: bool = True,
) -> Path:
    """A run of `of` steps that has trained `steps`; each is logged."""
    run_dir.mkdir(parents=True)
    made = experiment(run_dir, of or steps, name)
    facts = {SOURCE: SourceFacts(digest="d", sequences=1000, tokens=50_000, sequence_length=64)}
    first = Segment(
        first_step=0,
        experiment=made.model_dump(mode="json"),
        started="2026-01-01T00:00:00Z",
        world_size=4,
        layout="dp=4",
        sources=facts,
    )
    middle = max(steps // 2, 1)
    second = first.model_copy(
        update={"first_step": middle, "changes": ["optimizer.lr: 0.01 -> 0.005 (scales the learning rate)"]}
    )
    write_history(run_dir, [first, second])
    write_whole(run_dir / "resolved.yaml", dump_resolved(made))
    draw = random.Random(seed)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            stage = "warmup" if step == 1 else "decay"
            file.write(json.dumps(record(step, steps, stage, draw, layers, experts, rank_seconds)) + "\n")
            if step % max(steps // 10, 1) == 0:
                file.write(json.dumps({"step": step, "validation_loss": 2.1 + 8 * math.exp(-6 * step / steps)}) + "\n")
    events = [
        {"time": "2026-01-01T00:00:00Z", "kind": "started", "step": 0, "text": "4 ranks on NVIDIA H200"},
        {"time": "2026-01-01T01:00:00Z", "kind": "saved", "step": middle, "text": "complete after 3.20 s"},
        {"time": "2026-01-01T01:30:00Z", "kind": "alarm", "step": middle, "text": "2 dead experts (layer 0: 2, 3)"},
        {"time": "2026-01-01T02:00:00Z", "kind": "stopped", "step": middle, "text": "told to stop"},
        {"time": "2026-01-01T03:00:00Z", "kind": "started", "step": middle, "text": "4 ranks on NVIDIA H200"},
    ]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def record(
    step: int, steps: int, stage: str, draw: random.Random, layers: int, experts: int, rank_seconds: bool
) -> dict[str, Any]:
    """As train.metrics makes one; a spike of the loss three quarters of the way, and an expert that dies in layer 0."""
    done = step / steps
    loss = 2.0 + 8 * math.exp(-6 * done) + draw.gauss(0, 0.03) + (3.0 if step == 3 * steps // 4 else 0.0)
    loads = [
        [1 + draw.gauss(0, 0.25) + (2 * (1 - done) if expert == 0 else 0) for expert in range(experts)]
        for _ in range(layers)
    ]
    loads[0][-1] = 0.0 if done > 0.6 else loads[0][-1]
    loads = [[max(load, 0.0) for load in layer] for layer in loads]
    shares = [[load / sum(layer) for load in layer] for layer in loads]
    recycled = [0.2 * math.exp(-3 * done) * (1 + layer / layers) for layer in range(layers)]
    entropy = [0.9 - 0.4 * done + 0.1 * draw.random() for _ in range(layers)]
    seconds = 1.0 + abs(draw.gauss(0, 0.02))
    ranks = {"max_data_wait_seconds": 0.01, "max_data_wait_rank": 3, "max_launch_seconds": 0.2, "max_launch_rank": 1}
    return {
        "step": step,
        "stage": stage,
        "loss": loss,
        "grad_norm": 1.0 + 4 * math.exp(-8 * done) + abs(draw.gauss(0, 0.1)),
        "learning_rate": 1e-2 * (1 - done),
        "expert_learning_rate": 3.1e-3 * (1 - done),
        "target_tokens": 500,
        "seconds": seconds,
        "data_wait_seconds": 0.001 * draw.random(),
        "tokens_per_s": 512 / seconds,
        "model_flops_per_s": 5e12 / seconds,
        "max_expert_load": max(max(layer) for layer in shares) * experts,
        "mean_recycled_share": sum(recycled) / layers,
        "mean_dropped_share": 0.0,
        "mean_router_entropy": sum(entropy) / layers,
        "dead_experts": int(done > 0.6),
        **{f"{part}_grad_norm": 0.2 * (place + 1) * math.exp(-done) for place, part in enumerate(PARTS)},
        "bits_per_byte": loss / 3.2,
        **(ranks | {"median_launch_seconds": 0.15} if rank_seconds else {}),
        "expert_load": shares,
        "overflow_share": recycled,
        "recycled_share": recycled,
        "dropped_share": [0.0] * layers,
        "router_entropy": entropy,
        "balance_loss": 1.0 + math.exp(-4 * done),
        "cumulative_tokens": step * 512,
        "time": "2026-01-01T00:00:00Z",
        "run_seconds": step * seconds,
        "process_seconds": step * seconds,
        "eta_seconds": (steps - step) * seconds,
        "host_rss_bytes": 2_000_000_000,
        "device_peak_bytes": 60_000_000_000 + step,
        "mfu": 0.4 + draw.gauss(0, 0.005),
    }
