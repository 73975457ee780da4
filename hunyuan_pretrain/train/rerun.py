"""Silent data corruption: a step's forward and backward are computed twice and compared (resilience.rerun_every).

A rank's results are compared before anything is reduced, so that a rank that computed wrongly is told from those that
would receive its values. Ranks that work on the same micro-batches (tensor, context and pipeline parallelism, experts)
exchange values while they compute, so a wrong one may make its neighbours differ too; data-parallel replicas it does
not reach.

What is compared are sums of the bit patterns, plain and weighted by position. One changed bit changes a sum, always.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from hunyuan_pretrain.model.engines import kept_scales
from hunyuan_pretrain.parallel.comparison import sums_of_ranks, texts_of_ranks
from hunyuan_pretrain.runtime.seeding import generator_state, restore_generator_state
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.run import Run

PIECE = 1 << 20
"""Elements per pair of sums. 32-bit patterns times weights below WEIGHTS, added up, fit into 64 bits."""
WEIGHTS = 1021
MOST_NAMED = 16

OwnGradients = Callable[[], bool]
"""Called when this rank's own gradients are complete; returns whether to reduce them now."""
Pass = Callable[[OwnGradients], tuple[list[Tensor], list[Tensor]]]
"""Forward and backward passes of a step: (losses, router statistics), as train.step.forward_and_backward."""


class DifferingRanksError(TrainingError):
    """Two computations of one step gave different results."""

    def __init__(self, step: int, ranks: list[tuple[int, str, str]], count: int, num_ranks: int) -> None:
        """ranks: (rank, host, device) of the first of `count` that differ, of `num_ranks`."""
        self.ranks = ranks
        named = ", ".join(f"rank {rank} ({host}, {device})" for rank, host, device in ranks)
        more = f" and {count - len(ranks)} more" if count > len(ranks) else ""
        cure = "take its machine out of the job, and the same command resumes from the newest checkpoint"
        if count > 1:
            cure = f"one of them, whose values the others received: {cure}"
        if count == num_ranks > 1:
            cure = f"{cure}; if every rank differs again and again, an operation is not deterministic"
        super().__init__(
            f"step {step + 1}: computed twice from the same weights and data with different results on {named}{more}; "
            f"nothing was updated. Hardware computes wrongly: {cure}"
        )


def is_due(run: Run, step: int) -> bool:
    """Whether global step `step`, counted from 0, is computed twice."""
    every = run.experiment.resilience.rerun_every
    return every is not None and (step + 1) % every == 0


def compute_twice(run: Run, step: int, compute: Pass) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the second of two passes; only its gradients are reduced, so the step is as if computed once.

    Raises DifferingRanksError, on all ranks, if the two differ on any rank. Communicates: all ranks, beside the passes.
    """
    put_back, generators = kept_scales(run.chunks), generator_state()
    digests: list[list[Tensor]] = []

    def one_pass(*, reduces: bool) -> tuple[list[Tensor], list[Tensor]]:
        found: list[Tensor] = []

        def own_gradients() -> bool:
            found.extend(digest(buffer.grad_data) for buffer in _buffers(run))
            return reduces

        losses, statistics = compute(own_gradients)
        found.extend(digest(tensor) for tensor in (*losses, *statistics))
        digests.append(found)
        return losses, statistics

    one_pass(reduces=False)
    put_back()
    restore_generator_state(generators)
    results = one_pass(reduces=True)
    first, second = (torch.cat(found) for found in digests)
    is_different = bool((first != second).any())
    if count := sums_of_ranks(int(is_different))[0]:
        told = texts_of_ranks(f"{socket.gethostname()}\n{_name(run.device)}" if is_different else None, MOST_NAMED)
        named = [(rank, text.partition("\n")[0], text.partition("\n")[2]) for rank, text in told]
        raise DifferingRanksError(step, named, count, dist.get_world_size())
    return results


def digest(tensor: Tensor) -> Tensor:
    """int64 (2 n,): two sums of the bit patterns of each of the n pieces of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[flat.element_size()])
    sums = []
    for piece in bits.split(PIECE):
        wide = piece.long()
        weights = torch.arange(len(piece), device=piece.device) % WEIGHTS + 1
        sums += [wide.sum(), (wide * weights).sum()]
    return torch.stack(sums)


@contextmanager
def without_reductions(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside, backward passes do not start to reduce gradients, the last one of a step included."""
    config: Any = chunks[0].config
    no_sync, config.no_sync_func = config.no_sync_func, None
    try:
        with ExitStack() as stack:
            for model in chunks:
                stack.enter_context(model.no_sync())
            yield
    finally:
        config.no_sync_func = no_sync


def start_reductions(chunks: list[DistributedDataParallel]) -> None:
    """What backward passes of `without_reductions` have left out, where core only waits for it at the end of a step."""
    for model in chunks:
        for group in model.bucket_groups + model.expert_parallel_bucket_groups:
            # in the first batch core starts them at its end, and without overlap always
            if model.ddp_config.overlap_grad_reduce and not group.is_first_batch:
                group.start_grad_sync()


def _buffers(run: Run) -> list[Any]:
    return [buffer for model in run.wrapped for buffer in model.buffers + model.expert_parallel_buffers]


def _name(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"
