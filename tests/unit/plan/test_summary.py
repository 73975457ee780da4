"""The rows of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.plan.summary import size_text, summarise

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"


def test_the_plan_reports_what_the_run_does_and_costs() -> None:
    rows = {(row.group, row.name): row.value for row in summarise(load_experiment(DEMO))}
    assert rows["model", "parameters"] == "15,804,928"
    assert rows["model", "active per token"] == "4,794,880"
    assert rows["layout", "ranks"] == "2"
    assert rows["stage anneal", "steps"] == "6"
    assert rows["stage anneal", "learning rate"] == "0.0006 -> 0.0002"
    assert rows["stage decay", "routed experts' lr"] == "0.00062 -> 0.000186"
    assert (rows["run", "steps"], rows["run", "tokens"]) == ("120", "491,520")
    assert rows["communication", "expert parallel"] == "16 MiB", (
        "4 all-to-alls in 4 layers, of 2,048 tokens * 256 channels * 4 bytes / 2"
    )
    assert ("layout", "pipeline") not in rows


def test_offloaded_state_is_planned_on_the_host() -> None:
    """Demo on one rank: fp32 weights and gradients stay on the device; moments move to the host, with a copy of each
    weight and gradient."""
    alone = ["parallel.world_size=null", "parallel.expert_model_parallel_size=1", "precision.dtype=fp32"]
    rows = {row.name: row for row in summarise(load_experiment(DEMO, [*alone, "optimizer.cpu_offload_fraction=1"]), 1)}
    assert rows["memory per rank"].value == f"{2 * 4 * 15_804_928 / 2**30:.3g} GiB"
    assert "optimizer 0 GiB" in rows["memory per rank"].note
    average = ["optimizer.cpu_offload_fraction=1", "optimizer.ema_decay=0.9"]
    beside = {row.name: row.value for row in summarise(load_experiment(DEMO, [*alone, *average]), 1)}
    assert beside["host memory per rank"] == f"{20 * 15_804_928 / 2**30:.3g} GiB"
    assert beside["average of weights"] == "4 bytes per trained weight"
    assert rows["host memory per rank"].value == f"{16 * 15_804_928 / 2**30:.3g} GiB"
    assert "host memory per rank" not in {row.name for row in summarise(load_experiment(DEMO, alone), 1)}


def test_the_plan_shows_how_optimizer_state_is_stored() -> None:
    settings = ["precision.dtype=bf16", "optimizer.use_precision_aware_optimizer=true", "optimizer.exp_avg_dtype=bf16"]
    row = {row.name: row for row in summarise(load_experiment(DEMO, settings))}["optimizer state"]
    assert (row.value, row.note) == (
        "8 bytes per bf16 weight",
        "moments bf16 and fp32; 2 bytes are what the weight lacks of its fp32 main weight",
    )
    assert "optimizer state" not in {row.name for row in summarise(load_experiment(DEMO, settings[:1]))}


def test_the_last_stage_of_the_demo_is_five_percent() -> None:
    stages = load_experiment(DEMO).stages
    assert stages[-1].num_steps * 20 == sum(stage.num_steps for stage in stages)
    assert all(stage.tokens == stage.num_steps * stage.global_batch_tokens for stage in stages)


def test_a_constant_stage_starts_at_its_rate() -> None:
    rows = {
        (row.group, row.name): row.value for row in summarise(load_experiment(DEMO, ["stages.1.lr_shape=constant"]))
    }
    assert rows["stage decay", "learning rate"] == "0.0006 -> 0.0006"


def test_without_a_world_size_the_plan_assumes_the_smallest() -> None:
    smaller = [
        f"stages.{i}.micro_batch_sequences=2" for i in range(3)
    ]  # 8 sequences per step can be split over 4 ranks too
    experiment = load_experiment(DEMO, ["parallel.world_size=null", *smaller])
    assert {row.name: row.value for row in summarise(experiment)}["ranks"] == "2"
    assert {row.name: row.value for row in summarise(experiment, 4)}["ranks"] == "4"
    with pytest.raises(ConfigError, match="not a multiple of 2"):
        summarise(experiment, 3)


def test_a_pipeline_is_planned_by_its_fullest_and_its_busiest_rank() -> None:
    parallel = [
        f"parallel.{field}"
        for field in ("pipeline_model_parallel_size=2", "tensor_model_parallel_size=2", "sequence_parallel=true")
    ]
    layout = ["parallel.world_size=8", *parallel, "parallel.use_distributed_optimizer=false"]
    rows = {
        (row.group, row.name): row
        for row in summarise(load_experiment(DEMO, [*layout, "stages.2.micro_batch_sequences=2"]))
    }
    assert rows["layout", "ranks"].note == "data parallel 2, tensor parallel 2, pipeline parallel 2, expert parallel 2"
    assert (rows["layout", "pipeline"].value, rows["layout", "pipeline"].note) == ("2 stages", "2, 2 layers")
    assert rows["layout", "memory by pipeline rank"].value.endswith(rows["layout", "memory per rank"].value), (
        "with the final norm"
    )
    for stages in ("warmup, decay", "anneal"):
        group = f"communication, {stages}"
        assert "pipeline rank 1" in rows[group, "sent per step"].note, (
            "the output layer is divided along the vocabulary"
        )
        assert rows[group, "tied embedding"].value == "2 MiB"
        message, micro_batches = 2 if stages == "anneal" else 4, 2 if stages == "anneal" else 1
        assert (
            rows[group, "pipeline"].note
            == f"send {message * 256 * micro_batches / 1024:g} MiB in {micro_batches} calls"
        )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB"), (2**52, "4,096 TiB")],
)
def test_sizes_use_the_largest_unit_that_leaves_at_least_one(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("settings", "count", "note"),
    [
        ([], 2, "all 2"),
        (["checkpoint.save_every_steps=10"], 3, "at most: the newest 2, one being written"),
        (
            ["checkpoint.save_every_steps=10", "checkpoint.keep_every_steps=40"],
            6,
            "at most: the newest 2 and every 40th step's, one being written",
        ),
        (["checkpoint.save_every_steps=10", "checkpoint.keep_last=null"], 12, "all 12"),
        (["checkpoint.save_every_steps=null"], 1, "the end of the run"),
    ],
)
def test_the_plan_states_the_disk_that_checkpoints_take(settings: list[str], count: int, note: str) -> None:
    rows = {row.name: row for row in summarise(load_experiment(DEMO, settings)) if row.group == "checkpoints"}
    each = 12 * 15_804_928
    assert rows["one"].value == size_text(each)
    assert (rows["on disk"].value, rows["on disk"].note) == (size_text(count * each), note)
