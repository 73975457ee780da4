"""Experiments for tests of the plan: a step that was measured on an H200, and Hunyuan-Large on many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.load import load_model
from hunyuan_pretrain.config.schema import DataSource, Experiment, ModelConfig, OptimizerConfig, StageConfig

ROOT = Path(__file__).parents[2]


LARGE = {"num_layers": 2, "hidden_size": 6400, "num_attention_heads": 80, "num_query_groups": 8, "num_moe_experts": 2}
BENCH = {"num_layers": 4, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4, "num_moe_experts": 8}


def measured_on_an_h200(fp8_recipe: str | None = None, shape: dict[str, int] = LARGE) -> Experiment:
    """`large` and `bench` of docs/benchmarks.md: 2 layers of Hunyuan-Large's width, or 4 narrower ones; 16,384 tokens
    in 2 micro-batches."""
    ffn = 18304 if shape is LARGE else 5632
    model = ModelConfig(**shape, ffn_hidden_size=ffn, padded_vocab_size=32768, moe_routing_group_tokens=4096)
    return experiment(model, 4096, 4, 2, precision={"fp8_recipe": fp8_recipe})


def hunyuan_large(sequences: int = 512, sequence_length: int = 4096, **sections: dict[str, Any]) -> Experiment:
    """389B parameters, micro-batches of one sequence; `sections`: settings of parallel, precision, optimizer, model."""
    model = load_model(ROOT / "configs/model/hunyuan_large.yaml")
    model = model.model_copy(update={"moe_routing_group_tokens": 512} | sections.pop("model", {}))
    return experiment(model, sequence_length, sequences, 1, **sections)


def experiment(
    model: ModelConfig, sequence_length: int, sequences: int, micro_batch: int, **sections: dict[str, Any]
) -> Experiment:
    """One training stage of 7e12 tokens."""
    stage = StageConfig(
        name="main",
        tokens=7_000_000_000_000,
        sequence_length=sequence_length,
        global_batch_sequences=sequences,
        micro_batch_sequences=micro_batch,
        lr_end=1.0,
        data=(DataSource(path="x"),),
    )
    optimizer = OptimizerConfig(lr=1e-4, **sections.pop("optimizer", {}))
    fields = {"name": "planned", "run_dir": "run", "tokenizer": "tokenizer", "model": model, "stages": (stage,)}
    return Experiment.model_validate(fields | {"optimizer": optimizer} | sections)
