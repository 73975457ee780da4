"""The shipped recipes: which there are, for which hardware, and each of them scaled down to a few CPU ranks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.hardware import Hardware, load, names
from tests.helpers.runs import SEQUENCE_LENGTH, VOCAB_SIZE

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("pretrain", "longctx", "ladder")
RECIPES = [path for folder in FOLDERS for path in sorted((CONFIGS / folder).glob("*.yaml"))]
BASES = sorted((CONFIGS / "base").glob("*.yaml"))
"""Parts of recipes; no experiments by themselves."""


def named_hardware(path: Path) -> tuple[Hardware, int]:
    """The GPU and the number of GPUs in the name of a recipe: hunyuan_large_h100x512_fp8."""
    found = re.search(r"_([a-z]+\d+)x(\d+)(?:_fp8)?$", path.stem)
    assert found, f"{path.name}: the name says no hardware"
    (profile,) = (name for name in names() if name.lower().partition("-")[0] == found[1])
    return load(profile), int(found[2])


def scaled_down(experiment: Experiment, corpus: Path, run_dir: Path) -> Experiment:
    """The structure of a recipe on at most 4 CPU ranks.

    Sizes of the model: two of the recipe's CLA groups, or one for each model chunk; 128 channels, 4 query and 2
    key/value heads of 32, 4 experts of 128 channels. Axes above 1 become 2; if that makes more than 4 ranks, the
    pipeline is left out. Data parallelism becomes 2 where there is room. Every stage becomes one step of two
    micro-batches per rank, each of 8 sequences of 64 tokens in routing groups of 32, from one data set, without tiers.
    Everything else is the recipe's: number formats, FP8 recipe (emulated), optimizer and its formats, recompute,
    schedule, balancing.
    """
    fields: dict[str, Any] = experiment.model_dump()
    model, parallel = experiment.model, experiment.parallel
    tensor, context, pipeline, expert = (
        min(size, 2)
        for size in (
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.expert_model_parallel_size,
        )
    )
    if tensor * context * pipeline > 4:
        pipeline = 1
    chunks = min(parallel.virtual_pipeline_model_parallel_size, 2) if pipeline > 1 else 1
    dense = tensor * context * pipeline
    has_copies = (parallel.world_size or 1) > 1 and 2 * dense <= 4
    world = math.lcm(dense * (2 if has_copies else 1), expert * pipeline)
    fields["model"] |= {
        "num_layers": max(2, pipeline * chunks) * model.cla_share_factor,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 32,
        "ffn_hidden_size": 128,
        "moe_ffn_hidden_size": 128,
        "num_moe_experts": 4,
        "padded_vocab_size": VOCAB_SIZE,
        "moe_routing_group_tokens": 32,
    }
    fields["parallel"] |= {
        "world_size": world,
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": chunks,
        "expert_model_parallel_size": expert,
    }
    for stage in fields["stages"]:
        batch = 2 * 8 * world // dense
        stage |= {
            "sequence_length": SEQUENCE_LENGTH,
            "micro_batch_sequences": 8,
            "global_batch_sequences": batch,
            "tokens": batch * SEQUENCE_LENGTH,
            "tier_weights": None,
            "data": [{"path": str(corpus / "train")}],
        }
    fields |= {"run_dir": str(run_dir), "tokenizer": str(corpus / "tokenizer"), "evaluation": {}, "checkpoint": {}}
    fields["logging"] |= {"wandb": "disabled", "tensorboard": False}
    fields["runtime"] |= {"device": "cpu", "transformer_engine": "auto", "cpu_threads_per_rank": 1, "probes": False}
    return Experiment.model_validate(fields)
