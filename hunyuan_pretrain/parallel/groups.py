"""Process groups: one collection, built once and passed on. Only this module reads megatron's parallel_state."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from hunyuan_pretrain.config.derived import virtual_pipeline_size
from hunyuan_pretrain.config.schema import ParallelConfig
from hunyuan_pretrain.parallel import inquiry


def initialize_distributed(backend: str, timeout_s: int) -> None:
    """Join the ranks that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them), or
    form a world of one.

    Communicates: all ranks (rendezvous). A collective that waits longer than `timeout_s` seconds raises; after half of
    that the rank asks the others where they are, and reports (inquiry.py).
    """
    global _timeout
    if dist.is_initialized():
        return
    _timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(backend, _timeout)
        if dist.get_world_size() > 1:
            inquiry.start(timeout_s)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_timeout)


def _join(backend: str, timeout: timedelta) -> None:
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun keeps one store for all its starts: without a prefix, ranks would connect to those of the start before
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    prefixed = dist.PrefixStore(f"start {restarts}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout)


_timeout: timedelta | None = None


def collective_timeout() -> timedelta | None:
    """The time-out that `initialize_distributed` set; None if something else created the default group."""
    return _timeout


def build_groups(parallel: ParallelConfig, timeout_s: int) -> ProcessGroupCollection:
    """Every process group of the layout; rank order is megatron's default (tp, cp, ep, dp, pp).

    Besides core's own it has `expt_tp_dp`: the ranks of a stage that hold the same experts, or parts of them.

    Communicates: all ranks. `config.rules` has checked that the layout fits the world before this is called.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,  # core makes a timedelta of it
        # core's second set of groups is for CPU optimizers and checkpoints, which are not used here: each would hold
        # sockets to all its ranks, on whichever network interface gloo picks
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.expt_tp_dp = _same_experts(groups, timeout_s)
    return groups


def _same_experts(groups: ProcessGroupCollection, timeout_s: int) -> dist.ProcessGroup:
    """The ranks with the same expert-parallel and pipeline ranks as this one."""
    if groups.expt_tp.size() == 1:
        return groups.expt_dp
    if groups.expt_dp.size() == 1:
        return groups.expt_tp
    sizes = {"tp": groups.expt_tp.size(), "ep": groups.ep.size(), "dp": groups.expt_dp.size(), "pp": groups.pp.size()}
    ranks = parallel_state.RankGenerator(**sizes, cp=1, order="tp-cp-ep-dp-pp").get_ranks("tp-dp")
    # every rank has to take part in creating each group, and core's list has to include ours, see leave_layout
    timeout = timedelta(seconds=timeout_s)
    made = [
        parallel_state.create_group(group, timeout, group_desc="EXPERT_TENSOR_AND_DATA_PARALLEL_GROUP")
        for group in ranks
    ]
    return next(group for group, members in zip(made, ranks, strict=True) if dist.get_rank() in members)


def leave_layout() -> None:
    """Leave the groups of a layout but not the job, so that its ranks can build another layout; communicates
    nothing."""
    # core only forgets them, and each gloo group has its own threads: a job of many layouts would accumulate hundreds
    for group in (parallel_state._global_process_group_list or [])[1:]:  # the first is the default group
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def destroy_groups() -> None:
    """Leave all process groups; communicates nothing."""
    leave_layout()
    inquiry.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
