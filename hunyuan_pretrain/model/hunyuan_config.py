"""The schema's model, layout and precision as one megatron-core TransformerConfig; derived values are computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.transformer import TransformerConfig

from hunyuan_pretrain.config.attention import PER_DOCUMENT, AttentionChoice
from hunyuan_pretrain.config.derived import pipeline_stages, virtual_pipeline_size
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, TuningConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class HunyuanConfig(TransformerConfig):
    """TransformerConfig plus the settings it was built from, which hold whatever core has no field for."""

    model: ModelConfig = field(kw_only=True)
    parallel: ParallelConfig = field(kw_only=True)
    precision: PrecisionConfig = field(kw_only=True)
    stages: tuple[range, ...] = ()
    """Layers of each pipeline stage, in the order of the forward pass."""
    uses_transformer_engine: bool = False
    uses_kernels: bool = False
    attention: AttentionChoice = PER_DOCUMENT
    tuning: TuningConfig = field(default_factory=TuningConfig)


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    fuse_wgrad_accumulation: bool = False,
    use_transformer_engine: bool = False,
    device: Literal["cuda", "cpu"] | None = None,
    use_kernels: bool = False,
    tuning: TuningConfig | None = None,
) -> HunyuanConfig:
    """Build the config that every module of the model reads.

    device: where the weights are created; None: on a GPU if there is one.
    fuse_wgrad_accumulation: accumulate weight gradients into main_grad inside the GEMM; needs the model wrapped in
    core's DistributedDataParallel.
    tuning: which weights are trained; None: all.

    Losses are sums already divided by the global number of target tokens (train/step.py), so core must sum gradients
    over ranks and micro-batches, not average them: `calculate_per_token_loss`.
    """
    dtype = DTYPES[precision.dtype]
    return HunyuanConfig(
        **_architecture(model),
        **_layout(parallel),
        stages=pipeline_stages(model, parallel),
        # weights are written by initialize_weights, which does not depend on the layout
        perform_initialization=False,
        use_cpu_initialization=device == "cpu" or (device is None and not torch.cuda.is_available()),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuse_wgrad_accumulation,
        deterministic_mode=False,
        model=model,
        parallel=parallel,
        precision=precision,
        uses_transformer_engine=use_transformer_engine,
        uses_kernels=use_kernels,
        tuning=tuning or TuningConfig(),
    )


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Model fields that core reads, in its own checks and modules."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.ffn_hidden_size,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "qk_layernorm": model.qk_layernorm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "init_method_std": model.init_method_std,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    """Layout fields that core's linears and pipeline schedules read."""
    is_interleaved = virtual_pipeline_size(parallel) is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_pipeline_size(parallel),
        # batched, the interleaved schedule's messages would be mistaken for one another where next and previous rank
        # are the same
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
        # NCCL's wait orders the streams of a device; the host need not wait for each message
        "batch_p2p_sync": False,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def weight_device(config: HunyuanConfig) -> torch.device | str:
    """Device on which modules create their weights: torch's default (meta inside `with torch.device("meta")`), or the
    GPU."""
    return (
        torch.get_default_device()
        if config.use_cpu_initialization
        else torch.device("cuda", torch.cuda.current_device())
    )
