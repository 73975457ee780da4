"""Activations: what a rank keeps from the forward pass for the backward pass, on the device and on the host, under each
choice of parallel.recompute, and what recomputing costs. In closed form, for the layers and kernels of a GPU.

Left out: numbers of which a token has one or two per row, such as index maps of the routing.

Shapes: T tokens of this rank in attention and in sharded matmuls, t of them between layers, R rows of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from hunyuan_pretrain.config.derived import (
    DROPPED_QUERIES,
    SMALLEST_OFFLOADED_BYTES,
    Grid,
    expert_capacity,
    grid,
    offloaded_layers,
    pipeline_stages,
    routed_model,
    stages_of,
)
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, ParallelConfig, StageConfig
from hunyuan_pretrain.config.tuning import Linear, adapted_sizes, linears_of_layer, targets
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.pipeline import Pass, program


class Kept(NamedTuple):
    """One block of memory that a layer keeps."""

    bytes: int
    freed_by: str = ""
    """Words of parallel.recompute, of which each frees it. cla_group frees all but the group's input."""
    only_with: str = ""
    """A word without which it is not kept."""

    def is_kept(self, parts: frozenset[str]) -> bool:
        """Whether it is, if these parts are recomputed."""
        return not parts & set(self.freed_by.split()) and self.only_with in {"", *parts}


@dataclass(frozen=True)
class _Sizes:
    """What a rank computes of one micro-batch."""

    model: ModelConfig
    ranks: Grid
    tokens: int
    value_bytes: int
    scale_bytes: float | None
    """Bytes of scales per FP8 value in this layer; None: not in FP8."""
    is_gathered: bool
    """Keys and values of all context-parallel ranks; else heads are exchanged (all_to_all)."""
    imbalance: float
    """Rows of experts over those of even routing, where there is no capacity."""

    @property
    def local_tokens(self) -> int:
        """Between layers."""
        return self.tokens // self.ranks.tp

    @property
    def rows(self) -> int:
        """Rows of experts that this rank's tokens fill: every slot with a capacity, else `imbalance` times even
        routing."""
        model = self.model
        if model.moe_expert_capacity_factor is None:
            return round(self.imbalance * self.local_tokens * model.moe_router_topk)
        return model.num_moe_experts * self.local_tokens // model.moe_routing_group_tokens * expert_capacity(model)

    def of_linear(self, values: int, freed_by: str) -> Iterator[Kept]:
        """An input that only a linear layer keeps: as it is, or its FP8 copy."""
        if self.scale_bytes is None:
            yield Kept(values * self.value_bytes, freed_by)
        else:
            yield from self.fp8_copy(values, freed_by)

    def fp8_copy(self, values: int, freed_by: str) -> Iterator[Kept]:
        """What a linear layer keeps of an input that something else keeps too."""
        if self.scale_bytes is not None:
            yield Kept(values, freed_by)
            yield Kept(round(values * self.scale_bytes), freed_by)


class _Adapters(NamedTuple):
    """LoRA's of a layer. One keeps its input, which recomputing then does not free; with dropout, a copy of it, which
    no linear layer keeps beside it: those are frozen."""

    linears: frozenset[str] = frozenset()
    """Names of the linear layers that have one."""
    have_dropout: bool = False

    @classmethod
    def of(cls, experiment: Experiment, layer: int) -> _Adapters:
        """Those of a layer."""
        lora = experiment.tuning.lora
        if lora is None:
            return cls()
        return cls(frozenset(targets(experiment.model, lora, layer)), lora.dropout > 0)

    def are_on(self, *names: str) -> bool:
        """Whether one of these linear layers has one."""
        return not self.linears.isdisjoint(names)


def kept_by_layer(
    experiment: Experiment, stage: StageConfig, world_size: int, layer: int, imbalance: float = 1.0
) -> list[Kept]:
    """Everything that a layer may keep of one micro-batch, its input first; `Kept` says under which recompute."""
    model, parallel, precision = routed_model(experiment.model, stage), experiment.parallel, experiment.precision
    ranks, recipe = grid(parallel, world_size), precision.recipe
    sizes = _Sizes(
        model,
        ranks,
        stage.sequence_length * stage.micro_batch_sequences // ranks.cp,
        2 if precision.dtype == "bf16" else 4,
        recipe.scale_bytes_per_value if recipe and precision.is_fp8_layer(layer, model.num_layers) else None,
        parallel.context_parallel_method == "all_gather",
        imbalance,
    )
    adapters = _Adapters.of(experiment, layer)
    return [*_attention(sizes, layer % model.cla_share_factor == 0, adapters), *_experts(sizes, adapters)]


def _attention(sizes: _Sizes, is_owner: bool, adapters: _Adapters) -> Iterator[Kept]:
    model, ranks, width = sizes.model, sizes.ranks, sizes.value_bytes
    hidden = sizes.local_tokens * model.hidden_size
    query = sizes.tokens * model.num_attention_heads // ranks.tp * model.head_dim
    key = sizes.tokens * model.num_query_groups // ranks.tp * model.head_dim * is_owner
    yield Kept(hidden * width)
    yield Kept(4 * sizes.local_tokens)  # 1 / rms
    is_kept = adapters.are_on("self_attention.linear_qkv", "self_attention.linear_q")
    yield from sizes.of_linear(hidden, "" if is_kept else "norms")
    if model.qk_layernorm:
        yield Kept((query + 2 * key) * width)  # the projection's output
    shared = ranks.cp if sizes.is_gathered else 1
    yield Kept(query * width)
    if is_owner:
        yield from (Kept(shared * key * width), Kept(shared * key * width))
    yield Kept(query * width)  # attention's output
    yield Kept(4 * query // model.head_dim)  # its logsumexp
    if adapters.have_dropout and adapters.are_on("self_attention.linear_proj"):
        yield Kept(query * width)
    if ranks.cp > 1 and not sizes.is_gathered:
        yield from sizes.of_linear(query, "")  # exchanged for the projection
    else:
        yield from sizes.fp8_copy(query, "")


def _experts(sizes: _Sizes, adapters: _Adapters) -> Iterator[Kept]:
    model, ranks, width = sizes.model, sizes.ranks, sizes.value_bytes
    hidden, rows = sizes.local_tokens * model.hidden_size, sizes.rows
    yield Kept(hidden * width)
    yield Kept(4 * sizes.local_tokens)
    reads_hidden = adapters.are_on("mlp.shared_experts.linear_fc1")
    # kept by the router in the dtype of the run
    yield Kept(hidden * width, "" if reads_hidden and not adapters.have_dropout else "norms")
    if reads_hidden and adapters.have_dropout:
        yield Kept(hidden * width, "selective")
    yield from sizes.fp8_copy(hidden, "norms selective")
    yield Kept(4 * sizes.local_tokens * model.num_moe_experts)  # probabilities
    inner = {
        "shared": sizes.tokens * model.ffn_hidden_size // ranks.tp,
        "routed": rows * ranks.expert_tp * model.expert_ffn_size // ranks.expert_tp,
    }
    # recomputed experts keep their input as it came
    gathered = rows * ranks.expert_tp * model.hidden_size
    if sizes.scale_bytes is None:
        yield Kept(gathered * width)
    else:
        yield from sizes.fp8_copy(gathered, "selective")
        yield Kept(gathered * width, only_with="selective")
    # what routed experts keep is found again and freed, but for copies; of the shared one, nothing of an adapter's
    keeps = {
        "shared": adapters.are_on("mlp.shared_experts.linear_fc2"),
        "routed": adapters.are_on("mlp.experts.linear_fc2") and adapters.have_dropout,
    }
    for name, values in inner.items():
        yield Kept(2 * values * width, "selective")
        yield from sizes.of_linear(values, "selective" if keeps[name] else "swiglu selective")
    yield Kept(rows * model.hidden_size * width)  # outputs of the routed experts


# --- per pipeline rank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank while it holds most."""

    device: int
    """Kept by all micro-batches in flight, without what is on the host."""
    working: int
    """In addition, at one time or another: what a recomputed part keeps until its backward pass is done, and CLA groups
    on their way to the host or back."""
    host: int
    """Offloaded."""
    pinned: int
    """Pinned memory for that: torch rounds each block up to a power of two, to use it again."""


def passes_in_flight(parallel: ParallelConfig, micro_batches: int, pipeline_rank: int) -> list[tuple[int, ...]]:
    """After each forward pass of a pipeline rank, for each of its model chunks: how many passes wait for their backward
    pass. In core's 1F1B and interleaved schedules."""
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    return list(_in_flight(ranks, chunks, micro_batches, pipeline_rank))


@lru_cache(maxsize=1024)
def _in_flight(ranks: int, chunks: int, micro_batches: int, pipeline_rank: int) -> tuple[tuple[int, ...], ...]:
    waiting, found = [0] * chunks, []
    for one in program(pipeline_rank, ranks, chunks, micro_batches):
        if isinstance(one, Pass):
            waiting[one.chunk] += 1 if one.kind == "forward" else -1
            if one.kind == "forward":
                found.append(tuple(waiting))
    return tuple(found)


def activations(
    experiment: Experiment, stage: StageConfig, world_size: int, pipeline_rank: int, imbalance: float = 1.0
) -> Activations:
    """Activations of one pipeline rank under the experiment's settings, with `stage`'s batch. `imbalance`: rows of its
    experts over those of even routing, where there is no capacity."""
    model, parallel = experiment.model, experiment.parallel
    ranks = grid(parallel, world_size)
    chunks = [
        _of_one_pass(experiment, stage, world_size, number, imbalance)
        for number in stages_of(model, parallel, pipeline_rank)
    ]
    micro_batches = stage.global_batch_sequences // (stage.micro_batch_sequences * ranks.dp)
    # it repeats itself after a few rounds
    states = set(passes_in_flight(parallel, min(micro_batches, 4 * ranks.pp), pipeline_rank))

    def most(of_chunks: list[int]) -> int:
        return max(sum(passes * size for passes, size in zip(state, of_chunks, strict=True)) for state in states)

    return Activations(
        most([chunk.device for chunk in chunks]),
        max(chunk.working for chunk in chunks),
        most([chunk.host for chunk in chunks]),
        most([chunk.pinned for chunk in chunks]),
    )


def offloaded_bytes(experiment: Experiment, stage: StageConfig, world_size: int, number: int) -> int:
    """Bytes that one micro-batch in pipeline stage `number` leaves on the host."""
    return _of_one_pass(experiment, stage, world_size, number).host


def _of_one_pass(
    experiment: Experiment, stage: StageConfig, world_size: int, number: int, imbalance: float = 1.0
) -> Activations:
    """Of one micro-batch in pipeline stage `number`."""
    model, parallel = experiment.model, experiment.parallel
    share, ranks, parts = model.cla_share_factor, grid(parallel, world_size), parallel.recomputed_parts
    stages = pipeline_stages(model, parallel)
    device = host = pinned = working = 0
    moving: list[int] = []
    alike: dict[Any, list[list[Kept]]] = {}  # groups differ in the layers that are in FP8 or have adapters
    for first in stages[number][::share]:
        layers = range(first, first + share)
        kinds = tuple(
            (experiment.precision.is_fp8_layer(layer, model.num_layers), _Adapters.of(experiment, layer))
            for layer in layers
        )
        if kinds not in alike:
            alike[kinds] = [kept_by_layer(experiment, stage, world_size, layer, imbalance) for layer in layers]
        group = alike[kinds]
        kept: list[int] = kept_by_group(group, parts)
        blocks: list[int] = []
        if first in offloaded_layers(model, parallel, number):
            # the input of a stage after the first belongs to the schedule, which holds it
            candidates = kept[1:] if number > 0 and first == stages[number][0] else kept
            blocks = [size for size in candidates if size >= SMALLEST_OFFLOADED_BYTES]
            moving.append(sum(blocks))
        device, host = device + sum(kept) - sum(blocks), host + sum(blocks)
        pinned += sum(1 << (size - 1).bit_length() for size in blocks)
        working = max(working, _recomputed_at_once(group, parts))
    width = 2 if experiment.precision.dtype == "bf16" else 4
    rows = stage.sequence_length * stage.micro_batch_sequences // ranks.cp // ranks.tp
    working += _drawn_at_once(experiment, stage, ranks, imbalance)
    # the last stage: the input of the final norm, and the loss's gradient of its output. Others: their output, which
    # core's schedule holds until the backward pass
    device += (2 if number == len(stages) - 1 else 1) * rows * model.hidden_size * width
    return Activations(device, working + sum(sorted(moving)[-2:]), host, pinned)


def kept_by_group(group: list[list[Kept]], parts: frozenset[str]) -> list[int]:
    """Bytes of each block that the layers of a CLA group keep, the group's input first."""
    if "cla_group" in parts:
        return [group[0][0].bytes]
    return [block.bytes for layer in group for block in layer if block.is_kept(parts)]


def _recomputed_at_once(group: list[list[Kept]], parts: frozenset[str]) -> int:
    """Bytes that exist again while a part is differentiated."""
    none: frozenset[str] = frozenset()
    if "cla_group" in parts:
        return sum(kept_by_group(group, none)[1:])
    return max(
        sum(block.bytes for block in layer if block.is_kept(none) and not block.is_kept(parts)) for layer in group
    )


def _adapted(experiment: Experiment) -> list[tuple[Linear, int]]:
    """The linear layers that have adapters in any layer, each once, with the size of their whole input."""
    lora, model = experiment.tuning.lora, experiment.model
    if lora is None:
        return []
    found = {}
    for layer in range(model.num_layers):
        named = targets(model, lora, layer)
        for linear in linears_of_layer(model, layer):
            if linear.name in named:
                found[linear.name] = linear, adapted_sizes(model, linear, named[linear.name][0])[0]
    return list(found.values())


def _drawn_at_once(experiment: Experiment, stage: StageConfig, ranks: Grid, imbalance: float) -> int:
    """Bytes while a mask is drawn: three copies of its random bits, 16 for each element. Of hidden states, of the input
    of an adapter, or of the probabilities of one piece of attention, of which there are up to five copies in fp32
    meanwhile."""
    lora, model = experiment.tuning.lora, experiment.model
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp
    sizes = _Sizes(routed_model(model, stage), ranks, tokens, 0, None, False, imbalance)
    elements = [sizes.local_tokens * model.hidden_size] if stage.hidden_dropout else []
    for linear, width in _adapted(experiment) if lora is not None and lora.dropout else []:
        shards = ranks.expert_tp if linear.is_routed else ranks.tp
        # of an input that is sharded: all rows, some channels; else some rows, but experts gather those that they share
        rows = (
            sizes.rows * ranks.expert_tp if linear.is_routed else tokens if linear.is_row_parallel else tokens // shards
        )
        elements.append(rows * width // (shards if linear.is_row_parallel else 1))
    heads = model.num_attention_heads // ranks.tp
    probabilities = heads * DROPPED_QUERIES * stage.sequence_length if stage.attention_dropout else 0
    return max(3 * 2 * max(elements, default=0), (3 * 2 + 5 * 4) * probabilities)


# --- what recomputing costs -------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of recomputing, per token, over the whole model."""

    flops: float
    """Of matmuls and attention, which run again."""
    moved_bytes: int
    """Read and written by SwiGLU and norms where they run again by themselves."""


def recompute_cost(experiment: Experiment, stage: StageConfig) -> Cost:
    """What parallel.recompute adds to a training step, in the conventions of `counts.flops_per_token`."""
    model, parts = experiment.model, experiment.parallel.recomputed_parts
    width = 2 if experiment.precision.dtype == "bf16" else 4
    flops = flops_per_token(model, stage.sequence_length)
    again = 0.0
    if "cla_group" in parts:
        again = (flops.total - flops.output_head) / 3
    elif "selective" in parts:
        again = flops.experts / 3
    moved = 0
    if "swiglu" in parts:
        moved += 3 * (model.ffn_hidden_size + model.moe_router_topk * model.expert_ffn_size)
    if "norms" in parts:
        moved += 2 * 2 * model.hidden_size
    return Cost(again, moved * width * model.num_layers)


def with_recompute(experiment: Experiment, recompute: str) -> Experiment:
    """The experiment with another parallel.recompute."""
    parallel = experiment.parallel.model_copy(update={"recompute": recompute})
    return experiment.model_copy(update={"parallel": parallel})
