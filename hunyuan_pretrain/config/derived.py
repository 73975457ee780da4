"""Values computed from the settings: rank grid, layers per pipeline stage, expert capacity, learning rate of the routed
experts. The plan, training and the model all use these functions, so a plan describes what runs. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from hunyuan_pretrain.config.schema import (
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
)

# --- the rank grid ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Sizes of the rank groups, from the layout and the number of ranks, and the position of a rank in them. Ranks are
    ordered tp, cp, ep, dp, pp, with tp varying fastest."""

    tp: int
    cp: int
    pp: int
    ep: int
    expert_tp: int
    dp: int
    """Ranks that hold different sequences."""
    expert_dp: int
    """Ranks that hold the same routed experts."""
    world_size: int

    @property
    def dp_cp(self) -> int:
        """Ranks that hold the same weights other than routed experts; gradients are reduced over them."""
        return self.dp * self.cp

    @property
    def most_copies(self) -> int:
        """Ranks of the largest group over which gradients are reduced: dp_cp or, with more tensor than expert
        parallelism, expert_dp."""
        return max(self.dp_cp, self.expert_dp)

    @property
    def has_expert_buffers(self) -> bool:
        """Whether routed experts are reduced over another number of ranks than the other weights. If not, core puts
        both into the same buffers."""
        return self.expert_dp != self.dp_cp

    def pipeline_rank(self, rank: int) -> int:
        return rank // (self.world_size // self.pp)

    def shard(self, rank: int, is_expert: bool) -> int:
        """Index of a rank in the group over which the optimizer state of its weights is sharded."""
        return rank % (self.world_size // self.pp) // (self.expert_tp * self.ep if is_expert else self.tp)


def grid(parallel: ParallelConfig, world_size: int) -> Grid:
    """The rank grid of a layout. Raises ValueError if the layout does not fit the number of ranks."""
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    ep, expert_tp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    dense, expert = _ranks_of_one_copy(parallel)
    if world_size % dense or world_size % expert:
        raise ValueError(
            f"world_size={world_size} is not a multiple of TP*CP*PP={tp}*{cp}*{pp}={dense} and of "
            f"ETP*EP*PP={expert_tp}*{ep}*{pp}={expert}"
        )
    return Grid(tp, cp, pp, ep, expert_tp, world_size // dense, world_size // expert, world_size)


def _ranks_of_one_copy(parallel: ParallelConfig) -> tuple[int, int]:
    """(TP*CP*PP, ETP*EP*PP): ranks that share a sequence and one copy of the weights outside the routed experts; ranks
    that hold one copy of every routed expert."""
    pp = parallel.pipeline_model_parallel_size
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size * pp
    return dense, parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size * pp


def data_parallel_size(experiment: Experiment, world_size: int) -> int:
    """Ranks that hold different sequences: world_size / (TP * PP * CP)."""
    return world_size // _ranks_of_one_copy(experiment.parallel)[0]


def smallest_world_size(experiment: Experiment) -> int:
    """Smallest number of ranks that fits the layout: the least common multiple of TP*PP*CP and ETP*EP*PP."""
    return math.lcm(*_ranks_of_one_copy(experiment.parallel))


# --- data parallelism ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlaps:
    """Which communication of the data-parallel ranks runs beside computation."""

    grad_reduce: bool
    param_gather: bool


def overlaps(parallel: ParallelConfig, num_ranks: int, is_recorded: bool = False) -> Overlaps:
    """The settings, or what null means where up to `num_ranks` ranks hold the same weights (Grid.most_copies): one rank
    has nothing to reduce or gather, and would only be slowed by the bookkeeping of each weight.

    is_recorded: with runtime.cuda_graphs; a replay cannot wait for a gather that began outside of it.
    """
    gather, reduce = parallel.overlap_param_gather, parallel.overlap_grad_reduce
    if reduce is None:
        reduce = num_ranks > 1 or bool(gather)
    if gather is None:
        gather = num_ranks > 1 and reduce and parallel.use_distributed_optimizer and not is_recorded
    return Overlaps(reduce, gather)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def pipeline_stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[range, ...]:
    """Layers of every stage, in the order in which a token passes them. Stage i is chunk i // PP of pipeline rank
    i % PP."""
    num_stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    sizes = parallel.pipeline_layout or (model.num_layers // num_stages,) * num_stages
    ends = list(accumulate(sizes))
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def stages_of(model: ModelConfig, parallel: ParallelConfig, pipeline_rank: int) -> dict[int, range]:
    """Stage number -> layers, for the stages of one pipeline rank, in the order of its chunks. Raises ValueError if
    there is no such rank."""
    stages, ranks = pipeline_stages(model, parallel), parallel.pipeline_model_parallel_size
    if not 0 <= pipeline_rank < ranks:
        raise ValueError(f"pipeline_rank={pipeline_rank}, but there are pipeline ranks 0 to {ranks - 1}")
    return {number: stages[number] for number in range(pipeline_rank, len(stages), ranks)}


def offloaded_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> range:
    """Layers of a stage whose activations wait in host memory: parallel.cpu_offloading_num_layers of them, or fewer if
    the stage has fewer. The last CLA group of the model is none of them."""
    stages = pipeline_stages(model, parallel)
    most = len(stages[stage]) - (model.cla_share_factor if stage == len(stages) - 1 else 0)
    return stages[stage][: min(parallel.cpu_offloading_num_layers, most)]


DROPPED_QUERIES = 256
"""Queries of a piece of attention with dropout: it holds the probabilities of all of them at once."""
SMALLEST_OFFLOADED_BYTES = 1 << 20
"""Smaller blocks of memory stay on the device: their copies would cost more launches than they move bytes. The same
limit as in core."""


def virtual_pipeline_size(parallel: ParallelConfig) -> int | None:
    """Model chunks per pipeline rank, in megatron-core's form: None if there is one."""
    return parallel.virtual_pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else None


# --- the model --------------------------------------------------------------------------------------------------------

TASKS_BATCH_TOKENS = 4096
"""Tokens of a micro-batch of benchmarks on a run or its checkpoint, unless one text is longer."""
LOSS_CHUNK_TOKENS = {"cpu": 128, "cuda": 4096}
"""Device type -> tokens per chunk of the output layer, over all tensor-parallel ranks. Only the logits of one chunk
exist at a time (model.cross_entropy): on a CPU they stay in cache; on a GPU each chunk reads and writes the whole
weight gradient once, so fewer chunks move fewer bytes."""


def rope_base(rotary_base: float, alpha: float, head_dim: int) -> float:
    """RoPE base after NTK-alpha scaling: rotary_base * alpha^(d / (d - 2)), d = head_dim in channels.

    Hunyuan-Large at 256K: base 1e4, alpha 1e5, d = 80 give about 1.34e9 (the report rounds to 1e9).
    Raises ValueError if head_dim is below 4: with d = 2 there is one frequency, and it does not depend on the base.
    """
    if head_dim < 4:
        raise ValueError(f"head_dim={head_dim}: NTK-alpha scaling needs at least 4 channels")
    return rotary_base * alpha ** (head_dim / (head_dim - 2))


def expert_capacity(model: ModelConfig) -> int:
    """Slots of one expert per routing group: ceil(factor * tokens * topk / experts). The model must have a capacity."""
    assert model.moe_expert_capacity_factor is not None
    return math.ceil(
        model.moe_expert_capacity_factor
        * model.moe_routing_group_tokens
        * model.moe_router_topk
        / model.num_moe_experts
    )


def routed_model(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """The model with the routing of a stage (StageConfig.routing)."""
    if not stage.is_dropless:
        return model
    return model.model_copy(
        update={
            "moe_expert_capacity_factor": None,
            "recycle_routing": False,
            "moe_aux_loss_coeff": 0.0,
            "moe_z_loss_coeff": 0.0,
        }
    )


def routed_experiment(experiment: Experiment, stage: StageConfig) -> Experiment:
    """The experiment with the model of `routed_model`."""
    model = routed_model(experiment.model, stage)
    return experiment if model is experiment.model else experiment.model_copy(update={"model": model})


def expert_rows(experiment: Experiment, stage: StageConfig, world_size: int) -> int | None:
    """Rows in one matmul of an expert: its capacity in every routing group of the ranks that send to it. None without a
    capacity.

    If this is a multiple of `Recipe.size_multiple`, for example because the capacity is, no rows are ever padded.
    """
    model, ranks = routed_model(experiment.model, stage), grid(experiment.parallel, world_size)
    if model.moe_expert_capacity_factor is None:
        return None
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp // ranks.tp
    groups = tokens // model.moe_routing_group_tokens
    return expert_capacity(model) * groups * ranks.ep * ranks.expert_tp


# --- the learning rate ------------------------------------------------------------------------------------------------


def optimal_lr_factor(batch_tokens: float, noise_scale_tokens: float) -> float:
    """eps_opt(B) / eps_max = 2 / (sqrt(B_noise / B) + sqrt(B / B_noise)), for Adam-like optimizers.

    At most 1, reached at B = B_noise. Both arguments are in tokens. Source: Hunyuan-Large report (arXiv 2411.02265),
    section on expert-specific learning rate scaling, after arXiv 2405.14578.
    """
    ratio = math.sqrt(noise_scale_tokens / batch_tokens)
    return 2 / (ratio + 1 / ratio)


LEAST_MEASUREMENTS = 10
"""Of the noise scale, before a stage uses the value: one estimate of |G|^2 is mostly noise."""


def computed_lr_ratio(model: ModelConfig, batch_tokens: float, noise_scale_tokens: float) -> float:
    """eps_opt(B * topk / E) / eps_opt(B); see `expert_lr_ratio`."""
    expert_tokens = batch_tokens * model.moe_router_topk / model.num_moe_experts
    return optimal_lr_factor(expert_tokens, noise_scale_tokens) / optimal_lr_factor(batch_tokens, noise_scale_tokens)


def expert_lr_ratio(
    model: ModelConfig, optimizer: OptimizerConfig, global_batch_tokens: int, measured: float | None = None
) -> float:
    """Learning rate of the routed experts divided by that of all other weights. `measured`: the noise scale for
    expert_lr_noise_scale_tokens=measured; None: not known yet, so that the fixed ratio applies.

    Either the fixed optimizer.expert_lr_ratio, or eps_opt(B * topk / E) / eps_opt(B), because a routed expert sees
    B * topk / E of a batch of B tokens. The report prints the inverse, gives about 0.31 for 16 experts, and says that
    routed experts are scaled down. As printed, 0.31 would need B = 61.5 B_noise, where the formula scales them up. This
    reading gives 0.31 at B = 0.26 B_noise and scales them down. For B well above B_noise it would scale them up;
    with a measured value the ratio is at most 1.
    """
    noise = optimizer.expert_lr_noise_scale_tokens
    if noise == "measured":
        if measured is not None:
            return min(1.0, computed_lr_ratio(model, global_batch_tokens, measured))
        noise = None
    if noise is None:
        assert optimizer.expert_lr_ratio is not None, "config.rules refuses an experiment with neither"
        return optimizer.expert_lr_ratio
    return computed_lr_ratio(model, global_batch_tokens, noise)
