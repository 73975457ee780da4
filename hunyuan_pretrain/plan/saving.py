"""The host memory that a save takes: a rank copies what it writes, and training goes on while that is written."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.buffers import Weight, weights_of_stage
from hunyuan_pretrain.plan.counts import saved_sizes

ALIGNMENT = 256
"""Bytes; where each tensor starts (runtime.transfers)."""


def bytes_copied(experiment: Experiment, world_size: int, pipeline_rank: int) -> int:
    """Bytes of the rank of a pipeline rank that writes the most: each weight in its format, both moments, the main
    weight of a bf16 weight and the average in fp32; of a frozen weight the weight alone, with LoRA the adapters only.

    The data-parallel ranks that share weights share the writing: each weight in turn goes to the one with the fewest
    elements so far. Of tensor-parallel ranks, the first writes what is the same on all. Raises ValueError if the layout
    does not fit the number of ranks.
    """
    ranks = grid(experiment.parallel, world_size)
    loads = {False: [0] * ranks.dp_cp, True: [0] * ranks.expert_dp}
    written = {False: [0] * ranks.dp_cp, True: [0] * ranks.expert_dp}
    for weight, is_copy in _weights(experiment, pipeline_rank):
        if not (sizes := saved_sizes(experiment, weight)):
            continue
        load = loads[weight.is_routed_expert]
        home = load.index(min(load))
        load[home] += weight.size
        if not is_copy:
            written[weight.is_routed_expert][home] += sum(-(-weight.size * size // ALIGNMENT) for size in sizes)
    dense, experts = written[False], written[True]
    return ALIGNMENT * max(
        dense[ranks.shard(rank, False)] + experts[ranks.shard(rank, True)] for rank in range(world_size // ranks.pp)
    )


def _weights(experiment: Experiment, pipeline_rank: int) -> Iterator[tuple[Weight, bool]]:
    """This rank's weights; and whether another stage holds the original."""
    for stage in stages_of(experiment.model, experiment.parallel, pipeline_rank):
        for weight in weights_of_stage(experiment.model, experiment.parallel, stage, experiment.tuning):
            yield weight, weight.is_shared_embedding and stage > 0
