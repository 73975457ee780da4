"""The rows of the table that `hunyuan-pretrain plan` prints: what a run will do and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.derived import (
    data_parallel_size,
    expert_lr_ratio,
    expert_rows,
    grid,
    pipeline_stages,
    rope_base,
    smallest_world_size,
)
from hunyuan_pretrain.config.schema import Experiment, Recompute, StageConfig
from hunyuan_pretrain.config.training_rules import total_steps
from hunyuan_pretrain.plan.activations import activations, recompute_cost, with_recompute
from hunyuan_pretrain.plan.communication import AXES, communication_per_rank
from hunyuan_pretrain.plan.counts import (
    checkpoint_bytes,
    flops_per_token,
    kv_cache_bytes_per_token,
    logits_bytes,
    memory_per_rank,
    parameters,
    report_flops_per_token,
    state_bytes,
)
from hunyuan_pretrain.plan.fp8 import fp8_flops_per_token, fp8_layers, fp8_memory_per_rank


@dataclass(frozen=True)
class Row:
    """One line of the plan."""

    group: str
    name: str
    value: str
    note: str = ""


def summarise(experiment: Experiment, world_size: int | None = None) -> list[Row]:
    """The plan of a run.

    `world_size`: ranks of the job; None: parallel.world_size, or the fewest that the layout allows if that is None too.
    Raises ConfigError with every violated rule.
    """
    rules.check(experiment, world_size)
    ranks = ranks_of(experiment, world_size)
    return [
        *model_rows(experiment),
        *layout_rows(experiment, ranks),
        *activation_rows(experiment, ranks),
        *fp8_rows(experiment, ranks),
        *communication_rows(experiment, ranks),
        *stage_rows(experiment, ranks),
        *checkpoint_rows(experiment),
    ]


def ranks_of(experiment: Experiment, world_size: int | None = None) -> int:
    """Ranks of the job: `world_size`, or what stands for None in `summarise`."""
    return world_size or experiment.parallel.world_size or smallest_world_size(experiment)


def model_rows(experiment: Experiment) -> list[Row]:
    model, count = experiment.model, parameters(experiment.model)
    experts = (
        f"{model.num_moe_experts} routed, top-{model.moe_router_topk}, and 1 shared, in each of "
        f"{model.num_layers} layers"
    )
    return [
        Row("model", "parameters", f"{count.total:,}", "tied embedding counted once"),
        Row("model", "active per token", f"{count.active:,}", "all but the routed experts that a token does not visit"),
        Row("model", "routed experts", f"{count.routed_experts:,}", experts),
        Row("model", "embedding", f"{count.embedding + count.output_head:,}", f"{model.padded_vocab_size:,} rows"),
        Row("model", "KV cache", f"{kv_cache_bytes_per_token(model):,} bytes/token", "bf16, when serving"),
    ]


def layout_rows(experiment: Experiment, ranks: int) -> list[Row]:
    parallel, model = experiment.parallel, experiment.model
    shares, pipeline_ranks = grid(parallel, ranks), range(parallel.pipeline_model_parallel_size)
    sizes = {
        "data": shares.dp,
        "tensor": shares.tp,
        "context": shares.cp,
        "pipeline": shares.pp,
        "expert": shares.ep,
        "expert-tensor": shares.expert_tp,
    }
    held = f"{model.num_moe_experts // shares.ep} experts per layer and rank"
    optimizer = experiment.optimizer
    memories = [
        memory_per_rank(model, parallel, experiment.precision, ranks, pipeline_rank, optimizer, experiment.tuning)
        for pipeline_rank in pipeline_ranks
    ]
    memory = max(memories, key=lambda memory: memory.total)
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    note = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    shared_by = ", ".join(f"{name} parallel {size}" for name, size in sizes.items() if size > 1 or name == "data")
    rows = [
        Row("layout", "ranks", f"{ranks}", shared_by),
        Row("layout", "experts", f"{shares.ep} shares", held),
        Row("layout", "memory per rank", gib(memory.total), f"{note}; without activations"),
    ]
    if optimizer.use_precision_aware_optimizer:
        formats = f"{optimizer.exp_avg_dtype} and {optimizer.exp_avg_sq_dtype}"
        note = f"moments {formats}; 2 bytes are what the weight lacks of its fp32 main weight"
        rows.append(Row("layout", "optimizer state", f"{state_bytes(optimizer, 2)} bytes per bf16 weight", note))
    if optimizer.ema_decay is not None:
        note = "moving average of the trained weights in fp32, in the optimizer state"
        rows.append(Row("layout", "average of weights", "4 bytes per trained weight", note))
    if optimizer.cpu_offload_fraction:
        note = "moments, weights and gradients of the offloaded optimizer state, in fp32"
        rows.append(Row("layout", "host memory per rank", gib(memory.host), note))
    if shares.pp > 1:
        layers = ", ".join(str(len(stage)) for stage in pipeline_stages(model, parallel))
        rows.insert(1, Row("layout", "pipeline", f"{len(pipeline_stages(model, parallel))} stages", f"{layers} layers"))
        by_rank = ", ".join(gib(memory.total) for memory in memories)
        rows.append(Row("layout", "memory by pipeline rank", by_rank, "of the rank that keeps the most in each"))
    return rows


def activation_rows(experiment: Experiment, ranks: int) -> list[Row]:
    """Activations under every legal parallel.recompute, once per batch shape."""
    shapes: dict[tuple[int, int, int], StageConfig] = {}
    for stage in experiment.stages:
        shape = stage.sequence_length, stage.micro_batch_sequences, stage.global_batch_sequences
        shapes.setdefault(shape, stage)
    rows = []
    for stage in shapes.values():
        group = "activations" if len(shapes) == 1 else f"activations, {stage.name}"
        for recompute in get_args(Recompute):
            choice = with_recompute(experiment, recompute)
            if not rules.find_problems(choice, ranks):
                name = f"recompute={recompute}" + " (chosen)" * (recompute == experiment.parallel.recompute)
                rows.append(Row(group, name, *_activations_text(choice, stage, ranks)))
    return rows


def _activations_text(experiment: Experiment, stage: StageConfig, ranks: int) -> tuple[str, str]:
    """Bytes on the device by pipeline rank; and those on the host, what is needed in passing, and what is computed
    again."""
    pipeline_ranks = range(experiment.parallel.pipeline_model_parallel_size)
    found = [activations(experiment, stage, ranks, pipeline_rank) for pipeline_rank in pipeline_ranks]
    cost, notes = recompute_cost(experiment, stage), []
    if any(one.host for one in found):
        pinned = gib(max(one.pinned for one in found))
        notes.append(f"on the host {_gib_each([one.host for one in found])}, in up to {pinned} of pinned memory")
    if working := max(one.working for one in found):
        notes.append(f"up to {gib(working)} more in passing")
    if cost.flops:
        notes.append(f"{cost.flops:.4g} FLOPs/token again")
    if cost.moved_bytes:
        notes.append(f"{size_text(cost.moved_bytes)}/token read and written again")
    return _gib_each([one.device for one in found]), "; ".join(notes)


def _gib_each(sizes: list[int]) -> str:
    """Sizes of the pipeline ranks, or the one that all have."""
    texts = [gib(size).removesuffix(" GiB") for size in sizes]
    return ", ".join(texts if len(set(texts)) > 1 else texts[:1]) + " GiB"


def fp8_rows(experiment: Experiment, ranks: int) -> list[Row]:
    """FLOPs and memory of the FP8 recipe; [] without a recipe."""
    model, precision = experiment.model, experiment.precision
    recipe = precision.recipe
    if recipe is None:
        return []
    layers = len(fp8_layers(model, precision))
    rows = [Row("FP8", "recipe", recipe.name, f"in {layers} of {model.num_layers} layers")]
    shapes: dict[tuple[int, int], StageConfig] = {}
    for stage in experiment.stages:
        shapes.setdefault((stage.sequence_length, stage.micro_batch_sequences), stage)
    for stage in shapes.values():
        flops = fp8_flops_per_token(model, precision, stage.sequence_length)
        memory = fp8_memory_per_rank(experiment, stage, ranks)
        share = (
            f"{flops.quantised / flops.matmuls:.1%} of the matmuls with weights, "
            f"{flops.quantised / flops.total:.1%} including attention"
        )
        kept = f"{gib(memory.inputs)} instead of {gib(memory.inputs_without)}"
        rows.append(Row("FP8", f"FLOPs at {stage.sequence_length:,} tokens", f"{flops.quantised:.4g}/token", share))
        held, unit = expert_rows(experiment, stage, ranks), recipe.size_multiple
        padding = (
            f"a multiple of {unit}: never padded"
            if held and held % unit == 0
            else f"padded with zeros to a multiple of {unit}"
        )
        rows.append(
            Row("FP8", f"rows of an expert at {stage.sequence_length:,}", f"{held:,}" if held else "as chosen", padding)
        )
        note = "inputs that a micro-batch keeps for the backward pass, per rank"
        rows.append(Row("FP8", f"kept inputs at {stage.sequence_length:,}", kept, note))
    note = "in addition to the weights, " + (
        "which are in FP8 only" if precision.fp8_parameters else "for the micro-batches of a step"
    )
    rows.append(Row("FP8", "copies of weights", gib(memory.weight_copies), note))
    return rows


AXIS_NAMES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "expert_tp": "expert-tensor parallel",
    "pp": "pipeline",
    "dp": "data parallel",
    "expert_dp": "expert-data parallel",
    "embedding": "tied embedding",
    "other": "all ranks",
}


def communication_rows(experiment: Experiment, ranks: int) -> list[Row]:
    """Bytes per step and axis of the rank that sends the most, once per batch shape."""
    shapes: dict[tuple[int, int, int], list[StageConfig]] = {}
    for stage in experiment.stages:
        shapes.setdefault(
            (stage.sequence_length, stage.global_batch_sequences, stage.micro_batch_sequences), []
        ).append(stage)
    rows = []
    for stages in shapes.values():
        group = "communication" if len(shapes) == 1 else f"communication, {', '.join(stage.name for stage in stages)}"
        parts = experiment.model, experiment.parallel, experiment.precision, stages[0], ranks
        pipeline_ranks = [
            communication_per_rank(*parts, pipeline_rank, tuning=experiment.tuning)
            for pipeline_rank in range(experiment.parallel.pipeline_model_parallel_size)
        ]
        busiest = max(pipeline_ranks, key=lambda pipeline_rank: pipeline_rank.sent_bytes())
        where = f"pipeline rank {pipeline_ranks.index(busiest)}, " if len(pipeline_ranks) > 1 else ""
        condition = "" if busiest.is_exact else "; with even routing"
        rows.append(
            Row(
                group,
                "sent per step",
                size_text(busiest.sent_bytes()),
                f"by one rank, {where}with ring algorithms{condition}",
            )
        )
        for axis in AXES:
            kinds = {kind: found for (over, kind), found in busiest.messages.items() if over == axis and kind != "recv"}
            note = ", ".join(
                f"{kind.replace('_', '-')} {size_text(found.bytes)} in {found.calls:,} calls"
                for kind, found in kinds.items()
            )
            if kinds:
                rows.append(Row(group, AXIS_NAMES[axis], size_text(busiest.sent_bytes(axis)), note))
    return rows


def stage_rows(experiment: Experiment, ranks: int) -> list[Row]:
    model, optimizer, rows = experiment.model, experiment.optimizer, []
    data_parallel = data_parallel_size(experiment, ranks)
    until = " until it is measured" if optimizer.expert_lr_noise_scale_tokens == "measured" else ""
    total_flops, start = 0.0, 0.0
    for stage in experiment.stages:
        flops = flops_per_token(model, stage.sequence_length)
        tokens = stage.num_steps * stage.global_batch_tokens
        total_flops += tokens * flops.total
        ratio = expert_lr_ratio(model, optimizer, stage.global_batch_tokens)
        begin, end = (
            optimizer.lr * (stage.lr_end if stage.lr_shape == "constant" else start),
            optimizer.lr * stage.lr_end,
        )
        start = stage.lr_end
        group = f"stage {stage.name}"
        micro_batches = stage.global_batch_sequences // (stage.micro_batch_sequences * data_parallel)
        batch = (
            f"{stage.global_batch_sequences} sequences of {stage.sequence_length:,} tokens, {micro_batches} "
            "micro-batches per rank"
        )
        micro_tokens = stage.sequence_length * stage.micro_batch_sequences
        base = rope_base(model.rotary_base, stage.rope_alpha, model.head_dim)
        split = (
            f"matmuls {flops.matmuls:.4g}, attention {flops.attention_scores + flops.attention_values:.4g}; one "
            "document per sequence"
        )
        rows += [
            Row(group, "steps", f"{stage.num_steps:,}", batch),
            Row(group, "tokens", f"{tokens:,}"),
            Row(group, "FLOPs/token", f"{flops.total:.4g}", split),
            Row(group, "learning rate", f"{begin:.3g} -> {end:.3g}", f"{stage.lr_shape}"),
            Row(group, "routed experts' lr", f"{begin * ratio:.3g} -> {end * ratio:.3g}", f"ratio {ratio:.4g}{until}"),
            Row(
                group,
                "logits",
                gib(logits_bytes(micro_tokens, model.padded_vocab_size)),
                "of a micro-batch in fp32; never held in full: the loss is computed in chunks",
            ),
            Row(group, "RoPE base", f"{base:.4g}", f"alpha {stage.rope_alpha:g}"),
        ]
    tokens = sum(stage.num_steps * stage.global_batch_tokens for stage in experiment.stages)
    rows += [
        Row("run", "steps", f"{total_steps(experiment):,}"),
        Row("run", "tokens", f"{tokens:,}"),
        Row("run", "FLOPs", f"{total_flops:.4g}", "forward and backward, model FLOPs"),
        Row(
            "run",
            "FLOPs by the report",
            f"{(by_report := tokens * report_flops_per_token(model)):.4g}",
            f"9.59 N D + 2.3e8 D, {by_report / total_flops:.2f} times those above; 6 N D are a forward and a backward "
            "pass without attention, 8 N D with full recompute; the report does not derive its numbers",
        ),
    ]
    return rows


def checkpoint_rows(experiment: Experiment) -> list[Row]:
    """Bytes on disk of one checkpoint, and of all that are kept at once."""
    settings, size = experiment.checkpoint, checkpoint_bytes(experiment)
    steps = sum(stage.num_steps for stage in experiment.stages)
    form = "fp32 weights" if experiment.precision.dtype == "fp32" else "bf16 weights, fp32 main weights"
    form += "" if experiment.optimizer.ema_decay is None else ", their average"
    rows = [Row("checkpoints", "one", size_text(size), f"{form} and both moments in fp32")]
    if settings.save_every_steps is None:
        return [*rows, Row("checkpoints", "on disk", size_text(size), "the end of the run")]
    saved = -(-steps // settings.save_every_steps)
    if settings.keep_last is None or settings.keep_last >= saved:
        return [*rows, Row("checkpoints", "on disk", size_text(saved * size), f"all {saved:,}")]
    often = steps // settings.keep_every_steps if settings.keep_every_steps else 0
    kept = min(settings.keep_last + often, saved - 1)
    note = f"the newest {settings.keep_last}" + (f" and every {settings.keep_every_steps}th step's" if often else "")
    return [*rows, Row("checkpoints", "on disk", size_text((kept + 1) * size), f"at most: {note}, one being written")]


def gib(size_bytes: int) -> str:
    """Bytes as GiB with three significant digits."""
    return f"{size_bytes / 2**30:.3g} GiB"


def size_text(size_bytes: int) -> str:
    """Bytes in the largest binary unit in which the value is at least 1, with three significant digits."""
    power = min(max(size_bytes.bit_length() - 1, 0) // 10, 4)
    value = size_bytes / 2 ** (10 * power)
    digits = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{digits} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
