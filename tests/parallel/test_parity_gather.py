"""Comparisons of layouts gather the ranks' tensors in parts: gathered at once, NCCL would need memory for all of them
on one GPU."""

from __future__ import annotations

from tests.helpers.ranks import fork_ranks


def gather() -> tuple[list[tuple[str, float]], int]:
    """What arrives, and the most bytes that this rank sends at once."""
    import numpy as np
    import torch.distributed as dist

    from hunyuan_pretrain.diagnostics import parity
    from hunyuan_pretrain.parallel.groups import initialize_distributed

    initialize_distributed("gloo", 60)
    sent: list[int] = []
    gather_object, parity.GATHERED_BYTES = dist.gather_object, 2 * 1000

    def counted(part: list[tuple[str, np.ndarray]], *arguments: object, **options: object) -> None:
        sent.append(sum(values.nbytes for _, values in part))
        gather_object(part, *arguments, **options)  # type: ignore[arg-type]

    dist.gather_object = counted
    rank = dist.get_rank()
    mine = [(f"rank {rank}", np.full(100, number, np.float32)) for number in range(5 - 3 * rank)]
    found = [(name, float(values[0])) for part in parity._gathered(mine) for name, values in part]
    return sorted(found), max(sent)


def test_no_rank_sends_more_at_once_than_its_memory_budget() -> None:
    (found, first), (elsewhere, second) = fork_ranks(2, gather)
    assert found == [("rank 0", float(n)) for n in range(5)] + [("rank 1", float(n)) for n in range(2)]
    assert elsewhere == []
    assert max(first, second) <= 1000
