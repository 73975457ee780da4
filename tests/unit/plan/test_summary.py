"""The rows of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import ConfigError
from hunyuan_pretrain.plan.summary import summarise

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"


def test_the_plan_says_what_the_run_does_and_costs() -> None:
    rows = {(row.group, row.name): row.value for row in summarise(load_experiment(DEMO))}
    assert rows["model", "parameters"] == "15,804,928"
    assert rows["model", "active per token"] == "4,794,880"
    assert rows["layout", "ranks"] == "2"
    assert rows["stage anneal", "steps"] == "6"
    assert rows["stage anneal", "learning rate"] == "0.0006 -> 0.0002"
    assert rows["stage decay", "routed experts' lr"] == "0.00062 -> 0.000186"
    assert (rows["run", "steps"], rows["run", "tokens"]) == ("120", "491,520")


def test_the_last_stage_of_the_demo_is_five_percent() -> None:
    stages = load_experiment(DEMO).stages
    assert stages[-1].num_steps * 20 == sum(stage.num_steps for stage in stages)
    assert all(stage.tokens == stage.num_steps * stage.global_batch_tokens for stage in stages)


def test_a_constant_stage_starts_where_it_stays() -> None:
    rows = {(row.group, row.name): row.value for row in summarise(load_experiment(DEMO, ["stages.1.lr_shape=constant"]))}
    assert rows["stage decay", "learning rate"] == "0.0006 -> 0.0006"


def test_without_a_world_size_the_plan_takes_the_smallest() -> None:
    smaller = [f"stages.{i}.micro_batch_sequences=2" for i in range(3)]  # 8 sequences a step are dealt out to 4 ranks too
    experiment = load_experiment(DEMO, ["parallel.world_size=null", *smaller])
    assert {row.name: row.value for row in summarise(experiment)}["ranks"] == "2"
    assert {row.name: row.value for row in summarise(experiment, 4)}["ranks"] == "4"
    with pytest.raises(ConfigError, match="not a multiple of 2"):
        summarise(experiment, 3)
