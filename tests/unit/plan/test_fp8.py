"""FP8 figures, checked against the built model and for Hunyuan-Large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.derived import expert_rows
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.buffers import buffers_of_stage
from hunyuan_pretrain.plan.counts import memory_of_ranks
from hunyuan_pretrain.plan.fp8 import fp8_flops_per_token, fp8_memory_per_rank, layer_sizes
from hunyuan_pretrain.plan.summary import summarise

ROOT = Path(__file__).parents[3]


def large(tmp_path: Path, **changes: Any) -> Experiment:
    """Hunyuan-Large on 512 ranks, 4K and 256K."""
    text = f"""base: {ROOT / "configs/model/hunyuan_large.yaml"}
name: large
run_dir: run
tokenizer: tokenizer
parallel:
  world_size: 512
  tensor_model_parallel_size: 8
  sequence_parallel: true
  pipeline_model_parallel_size: 8
  expert_model_parallel_size: 8
model: {{moe_routing_group_tokens: 512}}
precision: {{fp8_recipe: blockwise}}
optimizer: {{lr: 1e-4}}
stages:
  - {{name: 4k, tokens: 1e9, sequence_length: 4096, global_batch_sequences: 1024, lr_end: 1.0, data: [{{path: x}}]}}
  - {{name: 256k, tokens: 1e9, sequence_length: 262144, global_batch_sequences: 16, lr_end: 0.1, data: [{{path: x}}]}}
"""
    path = tmp_path / "large.yaml"
    path.write_text(text)
    return load_experiment(path, [f"{key}={value}" for key, value in changes.items()])


def test_the_counted_matmuls_are_those_that_the_model_quantises() -> None:
    """Weights and saved inputs of a built model, layer by layer."""
    from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
    from hunyuan_pretrain.model.fp8.session import matmuls
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from tests.helpers import tiny

    model = tiny.tiny_model(ffn_hidden_size=64, moe_ffn_hidden_size=48)
    precision = PrecisionConfig(dtype="fp32", fp8_recipe="blockwise", num_layers_at_end_in_bf16=1)
    (built,) = build_model(transformer_config(model, ParallelConfig(), precision), tiny.world_of_one(), 1)
    found: dict[int, list[Any]] = {}
    for name, _ in matmuls([built]):
        found.setdefault(int(name.split(".")[2]), []).append(built.get_parameter(f"{name}.weight"))
    assert [*found] == [0, 1, 2]
    for layer, weights in found.items():
        sizes = layer_sizes(model, layer)
        assert sizes.weights == sum(weight.numel() for weight in weights)
        assert sizes.inputs == sum(weight.shape[-1] for weight in weights)
        assert sizes.visited_weights == sum(
            weight[0].numel() if weight.dim() == 3 else weight.numel() for weight in weights
        )


def test_hunyuan_large_moves_nearly_all_matmuls_to_fp8(tmp_path: Path) -> None:
    experiment = large(tmp_path)
    short = fp8_flops_per_token(experiment.model, experiment.precision, 4096)
    assert short.quantised / short.matmuls == pytest.approx(0.984, abs=5e-4)
    assert short.quantised / short.total == pytest.approx(0.953, abs=5e-4)
    kept = fp8_flops_per_token(
        experiment.model, large(tmp_path, **{"precision.num_layers_at_end_in_bf16": 32}).precision, 4096
    )
    assert kept.quantised == pytest.approx(short.quantised / 2)


def test_memory_of_saved_inputs_halves(tmp_path: Path) -> None:
    experiment = large(tmp_path)
    memory = fp8_memory_per_rank(experiment, experiment.stages[0], 512)
    # 8 layers of a stage, 4096 / 8 tokens: qkv and its projection, shared and routed experts, two bytes a value
    values = 8 * 512 * (6400 + 6400 + 2 * (6400 + 18304))
    assert memory.inputs_without == 2 * values
    assert memory.inputs == round(values * (1 + 4 / 128))
    assert (
        fp8_memory_per_rank(large(tmp_path, **{"parallel.recompute": "cla_group"}), experiment.stages[0], 512).inputs
        == 0
    )
    # layers alternate between owners and borrowers of keys and values; two experts per rank, whole
    attention = (8 * 2 * 6400 * 6400 + 4 * 2 * 6400 * 640) / 8
    assert memory.weight_copies == round(
        2 * (attention + 8 * 3 * 6400 * 18304 / 8 + 8 * 2 * 3 * 6400 * 18304) * (1 + 4 / 128)
    )


def test_fp8_only_parameters_save_two_bytes_of_memory_and_one_of_traffic(tmp_path: Path) -> None:
    """Each quantised weight saves half of its bf16 value, and its FP8 rows beside that value; each gathered value saves
    half."""
    plain, kept = (large(tmp_path, **{"precision.fp8_parameters": text}) for text in ("false", "true"))
    stage, weights = plain.stages[0], fp8_memory_per_rank(plain, plain.stages[0], 512).weight_copies / 2 / (1 + 4 / 128)
    copies = [fp8_memory_per_rank(experiment, stage, 512).weight_copies for experiment in (plain, kept)]
    assert copies[0] - copies[1] == pytest.approx(weights, rel=1e-9)
    memories = [memory_of_ranks(x.model, x.parallel, x.precision, 512, pipeline_rank=1)[0] for x in (plain, kept)]
    assert memories[0].weights - memories[1].weights == pytest.approx(weights, rel=1e-6)  # buffers are padded
    assert memories[0].gradients == pytest.approx(memories[1].gradients, rel=1e-6)
    assert memories[0].optimizer == pytest.approx(memories[1].optimizer, rel=1e-6)
    gathered = []
    for experiment in (plain, kept):
        buffers = buffers_of_stage(experiment.model, experiment.parallel, experiment.precision, 512, 1)
        gathered.append(
            {axis: sum(x.size * x.weight_bytes for x in buffers if x.axis == axis) for axis in ("dp", "expert_dp")}
        )
    assert gathered[0]["expert_dp"] == 2 * gathered[1]["expert_dp"], "routed experts are nothing but quantised weights"
    assert gathered[1]["dp"] < 0.52 * gathered[0]["dp"]


@pytest.mark.parametrize(("factor", "topk", "micro"), [(1.0, 1, 1), (1.25, 1, 2), (0.7, 2, 1)])
def test_rows_per_expert_match_the_router(factor: float, topk: int, micro: int) -> None:
    import torch

    from hunyuan_pretrain.model.routing import TrainingRouting
    from tests.helpers import tiny
    from tests.helpers.runs import experiment_fields

    found = experiment_fields(Path("corpus"), Path("run"))
    model = tiny.tiny_model(moe_expert_capacity_factor=factor, moe_router_topk=topk, recycle_routing=False)
    found["model"] = model.model_dump()
    experiment = Experiment.model_validate(found)
    stage = experiment.stages[0].model_copy(update={"micro_batch_sequences": micro})
    groups = stage.sequence_length * micro // model.moe_routing_group_tokens
    router = tiny.build(model).decoder.layers[0].mlp.router
    hidden_TD = torch.randn(groups * model.moe_routing_group_tokens, model.hidden_size)
    plan = router(hidden_TD, TrainingRouting(1, 0, torch.arange(groups), groups)).plan
    assert expert_rows(experiment, stage, 1) == len(plan.token_R) / model.num_moe_experts


def test_the_plan_reports_what_fp8_does(tmp_path: Path) -> None:
    rows = {(row.group, row.name): row for row in summarise(large(tmp_path)) if row.group == "FP8"}
    assert rows["FP8", "recipe"].note == "in 64 of 64 layers"
    assert rows["FP8", "FLOPs at 4,096 tokens"].note == "98.4% of the matmuls with weights, 95.3% including attention"
    assert rows["FP8", "FLOPs at 262,144 tokens"].note == "98.4% of the matmuls with weights, 31.8% including attention"
    assert rows["FP8", "rows of an expert at 4,096"].note == "a multiple of 16: never padded"
    dropless = {"model.moe_expert_capacity_factor": "null", "model.recycle_routing": "false"}
    notes = {row.name: row for row in summarise(large(tmp_path, **dropless))}
    assert notes["rows of an expert at 4,096"].value == "as chosen"
    assert notes["rows of an expert at 4,096"].note == "padded with zeros to a multiple of 16"
    assert not [row for row in summarise(large(tmp_path, **{"precision.fp8_recipe": "null"})) if row.group == "FP8"]
