"""Activations in closed form, by hand for Hunyuan-Large. What a run keeps is compared with it in
tests/unit/model/test_recompute.py and tests/unit/model/test_transformer_engine_recompute.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.activations import activations, kept_by_layer, recompute_cost
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.summary import summarise

ROOT = Path(__file__).parents[3]
RANKS = 64
TOKENS = 4096 // 8
"""Of a tensor-parallel rank, between layers."""


def large(tmp_path: Path, **changes: Any) -> Experiment:
    """Hunyuan-Large on 64 ranks: 8 tensor parallel, 8 pipeline stages of 8 layers, 8 micro-batches."""
    text = f"""base: {ROOT / "configs/model/hunyuan_large.yaml"}
name: large
run_dir: run
tokenizer: tokenizer
parallel:
  tensor_model_parallel_size: 8
  sequence_parallel: true
  pipeline_model_parallel_size: 8
  expert_model_parallel_size: 8
model: {{moe_routing_group_tokens: 512}}
optimizer: {{lr: 1e-4}}
stages:
  - {{name: 4k, tokens: 1e9, sequence_length: 4096, global_batch_sequences: 8, lr_end: 1.0, data: [{{path: x}}]}}
"""
    path = tmp_path / "large.yaml"
    path.write_text(text)
    return load_experiment(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def freed(tmp_path: Path, recompute: str, **changes: Any) -> int:
    """Bytes per layer of one micro-batch that are freed."""
    stages = [
        activations(large(tmp_path, parallel__recompute=one, **changes), stage(tmp_path), RANKS, 7).device
        for one in ("none", recompute)
    ]
    return (stages[0] - stages[1]) // 8


def stage(tmp_path: Path) -> Any:
    return large(tmp_path).stages[0]


def test_each_choice_frees_its_tensors(tmp_path: Path) -> None:
    """Per token of a rank: norms two vectors of the width 6400; swiglu one of 18304 for the routed expert, whole, and
    for the shared one, an eighth for all eight times as many tokens; selective also the two of twice that size which
    SwiGLU reads."""
    norms, swiglu = 2 * 6400, 2 * 18304
    assert freed(tmp_path, "norms") == 2 * TOKENS * norms
    assert freed(tmp_path, "swiglu") == 2 * TOKENS * swiglu
    assert freed(tmp_path, "swiglu+norms") == 2 * TOKENS * (norms + swiglu)
    assert freed(tmp_path, "selective") == 2 * TOKENS * 3 * swiglu
    assert freed(tmp_path, "selective+norms") == 2 * TOKENS * (3 * swiglu + norms)


def test_in_fp8_a_byte_and_its_scale_are_freed(tmp_path: Path) -> None:
    """swiglu frees FP8 copies; norms frees the router's bf16 input and two FP8 copies, for the projection and for the
    shared expert."""
    byte = 1 + 4 / 128
    assert freed(tmp_path, "swiglu", precision__fp8_recipe="blockwise") == TOKENS * byte * 2 * 18304
    assert freed(tmp_path, "norms", precision__fp8_recipe="blockwise") == TOKENS * (2 + 2 * byte) * 6400


def test_full_recompute_keeps_one_vector_per_group_and_micro_batch(tmp_path: Path) -> None:
    vector = 2 * TOKENS * 6400
    for pipeline_rank in (0, 3, 7):
        found = activations(large(tmp_path, parallel__recompute="cla_group"), stage(tmp_path), RANKS, pipeline_rank)
        # 4 groups, and the stage's output; the last stage instead keeps what the final norm and the loss do
        assert found.device == (8 - pipeline_rank) * (4 + (2 if pipeline_rank == 7 else 1)) * vector
        group = [kept_by_layer(large(tmp_path), stage(tmp_path), RANKS, layer) for layer in (0, 1)]
        assert found.working == sum(block.bytes for layer in group for block in layer) - vector


def test_offloaded_groups_wait_on_the_host(tmp_path: Path) -> None:
    """All stages but the last offload all of their groups. Small blocks stay, and so does the input that a stage has
    received."""
    for pipeline_rank in (0, 3, 7):
        here = activations(large(tmp_path), stage(tmp_path), RANKS, pipeline_rank)
        experiment = large(tmp_path, parallel__cpu_offloading_num_layers=8)
        there = activations(experiment, stage(tmp_path), RANKS, pipeline_rank)
        assert there.device + there.host == here.device
        assert there.host < there.pinned < 2 * there.host, "each block in a power of two"
        assert there.host > (0.7 if pipeline_rank == 7 else 0.95) * here.device
        passes, groups = 8 - pipeline_rank, 3 if pipeline_rank == 7 else 4
        assert there.working == pytest.approx(2 * there.host / passes / groups, rel=0.02)


def test_the_cost_of_recomputing(tmp_path: Path) -> None:
    experiment = large(tmp_path)
    flops = flops_per_token(experiment.model, 4096)
    cost = {
        one: recompute_cost(large(tmp_path, parallel__recompute=one), experiment.stages[0])
        for one in ("none", "swiglu", "norms", "selective", "cla_group")
    }
    assert cost["none"] == (0, 0)
    assert cost["swiglu"] == (0, 64 * 2 * 3 * 2 * 18304), "reads two vectors, writes one, in each of two experts"
    assert cost["norms"] == (0, 64 * 2 * 2 * 2 * 6400)
    assert cost["selective"] == (flops.experts / 3, 0)
    assert cost["cla_group"].flops == pytest.approx((flops.total - flops.output_head) / 3)


def test_the_plan_lists_every_legal_choice(tmp_path: Path) -> None:
    changes = {"parallel__cpu_offloading_num_layers": 2, "parallel__recompute": "norms"}
    rows = {row.name: row for row in summarise(large(tmp_path, **changes), RANKS) if row.group == "activations"}
    assert [*rows] == [
        "recompute=none",
        "recompute=swiglu",
        "recompute=norms (chosen)",
        "recompute=swiglu+norms",
        "recompute=selective",
        "recompute=selective+norms",
        "recompute=cla_group",
    ]
    chosen = rows["recompute=norms (chosen)"]
    assert chosen.value.count(",") == 7, "a number for each pipeline rank"
    assert chosen.note.startswith("on the host ")
    assert "of pinned memory" in chosen.note
    assert "read and written again" in chosen.note
    delayed = {"precision__fp8_recipe": "delayed"}
    assert [row.name for row in summarise(large(tmp_path, **delayed), RANKS) if row.group == "activations"] == [
        "recompute=none (chosen)",
        "recompute=selective",
        "recompute=cla_group",
    ]
