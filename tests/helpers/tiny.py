"""A small model with every feature on, and one packed micro-batch for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.routing import TrainingRouting
from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed

if TYPE_CHECKING:  # importing this module must work before megatron is importable
    from megatron.core.process_groups_config import ProcessGroupCollection

GROUP_TOKENS = 32


def tiny_model(**changes: Any) -> ModelConfig:
    """4 layers in CLA groups of 2, GQA, QK norm, 4 experts, recycling, tied embeddings; `changes` are fields of
    ModelConfig."""
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 40,
        "num_moe_experts": 4,
        "padded_vocab_size": 96,
        "moe_routing_group_tokens": GROUP_TOKENS,
        "moe_aux_loss_coeff": 0.01,
        "init_method_std": 0.1,
    }
    return ModelConfig(**(fields | changes))


def world_of_one() -> ProcessGroupCollection:
    """Process groups of a single rank; every call in a process returns the same ones."""
    global _groups
    if _groups is None:
        initialize_distributed("gloo", 60)
        _groups = build_groups(ParallelConfig(), 60)
    return _groups


_groups: ProcessGroupCollection | None = None


def build(model: ModelConfig, seed: int = 1, dtype: str = "fp32", **parallel: Any) -> HunyuanModel:
    """The model on one rank, not wrapped in DDP."""
    config = transformer_config(model, ParallelConfig(**parallel), PrecisionConfig(dtype=dtype))
    (whole,) = build_model(config, world_of_one(), seed)
    return whole


def packed_inputs(model: ModelConfig, lengths: tuple[int, ...] = (20, 44, 7, 25), seed: int = 0) -> ModelInputs:
    """A micro-batch of documents of these lengths, with equal loss weights, in training mode."""
    T = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    groups = T // GROUP_TOKENS
    return ModelInputs(
        tokens_T=torch.randint(0, model.padded_vocab_size, (T,), generator=generator),
        labels_T=torch.randint(0, model.padded_vocab_size, (T,), generator=generator),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        rope_alpha=10.0,
        loss_weight_T=torch.full((T,), 1.0 / T),
        routing=TrainingRouting(seed=3, step=5, group_n=torch.arange(groups), num_global_groups=groups),
    )
