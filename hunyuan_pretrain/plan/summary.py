"""The table that `hunyuan-pretrain plan` prints, as plain rows: what a run will do and cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.schema import Experiment, rope_base
from hunyuan_pretrain.plan.counts import expert_lr_ratio, flops_per_token, kv_cache_bytes_per_token, memory_per_rank, parameters


@dataclass(frozen=True)
class Row:
    """One line of the plan."""

    group: str
    name: str
    value: str
    note: str = ""


def summarise(experiment: Experiment, world_size: int | None = None) -> list[Row]:
    """The plan of a run.

    `world_size`: ranks of the job; None: parallel.world_size, and without that the fewest that the layout allows. Raises
    ConfigError with every violated rule.
    """
    rules.check(experiment, world_size)
    ranks = world_size or experiment.parallel.world_size or rules.smallest_world_size(experiment)
    return [*model_rows(experiment), *layout_rows(experiment, ranks), *stage_rows(experiment, ranks)]


def model_rows(experiment: Experiment) -> list[Row]:
    model, count = experiment.model, parameters(experiment.model)
    experts = f"{model.num_moe_experts} routed, top-{model.moe_router_topk}, and 1 shared, in each of {model.num_layers} layers"
    return [
        Row("model", "parameters", f"{count.total:,}", "tied embedding counted once"),
        Row("model", "active per token", f"{count.active:,}", "all but the routed experts that a token does not visit"),
        Row("model", "routed experts", f"{count.routed_experts:,}", experts),
        Row("model", "embedding", f"{count.embedding + count.output_head:,}", f"{model.padded_vocab_size:,} rows"),
        Row("model", "KV cache", f"{kv_cache_bytes_per_token(model):,} bytes/token", "bf16, when serving"),
    ]


def layout_rows(experiment: Experiment, ranks: int) -> list[Row]:
    parallel, model = experiment.parallel, experiment.model
    expert_parallel = parallel.expert_model_parallel_size
    held = f"{model.num_moe_experts // expert_parallel} experts of each layer on a rank"
    memory = memory_per_rank(model, parallel, experiment.precision, ranks)
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    note = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return [
        Row(
            "layout", "ranks", f"{ranks}", f"data parallel {rules.data_parallel_size(experiment, ranks)}, expert parallel {expert_parallel}"
        ),
        Row("layout", "experts", f"{expert_parallel} shares", held),
        Row("layout", "memory per rank", gib(memory.total), f"{note}; activations come on top"),
    ]


def stage_rows(experiment: Experiment, ranks: int) -> list[Row]:
    model, optimizer, rows = experiment.model, experiment.optimizer, []
    data_parallel = rules.data_parallel_size(experiment, ranks)
    total_flops, start = 0.0, 0.0
    for stage in experiment.stages:
        flops = flops_per_token(model, stage.sequence_length)
        tokens = stage.num_steps * stage.global_batch_tokens
        total_flops += tokens * flops.total
        ratio = expert_lr_ratio(model, optimizer, stage.global_batch_tokens)
        begin, end = optimizer.lr * (stage.lr_end if stage.lr_shape == "constant" else start), optimizer.lr * stage.lr_end
        start = stage.lr_end
        group = f"stage {stage.name}"
        micro_batches = stage.global_batch_sequences // (stage.micro_batch_sequences * data_parallel)
        batch = f"{stage.global_batch_sequences} sequences of {stage.sequence_length:,} tokens, {micro_batches} micro-batches a rank"
        base = rope_base(model.rotary_base, stage.rope_alpha, model.head_dim)
        split = f"matmuls {flops.matmuls:.4g}, attention {flops.attention_scores + flops.attention_values:.4g}; one document a sequence"
        rows += [
            Row(group, "steps", f"{stage.num_steps:,}", batch),
            Row(group, "tokens", f"{tokens:,}"),
            Row(group, "FLOPs/token", f"{flops.total:.4g}", split),
            Row(group, "learning rate", f"{begin:.3g} -> {end:.3g}", f"{stage.lr_shape}"),
            Row(group, "routed experts' lr", f"{begin * ratio:.3g} -> {end * ratio:.3g}", f"ratio {ratio:.4g}"),
            Row(group, "RoPE base", f"{base:.4g}", f"alpha {stage.rope_alpha:g}"),
        ]
    tokens = sum(stage.num_steps * stage.global_batch_tokens for stage in experiment.stages)
    rows += [
        Row("run", "steps", f"{rules.total_steps(experiment):,}"),
        Row("run", "tokens", f"{tokens:,}"),
        Row("run", "FLOPs", f"{total_flops:.4g}", "forward and backward, model FLOPs"),
    ]
    return rows


def gib(size_bytes: int) -> str:
    """Bytes as GiB with three significant digits."""
    return f"{size_bytes / 2**30:.3g} GiB"
