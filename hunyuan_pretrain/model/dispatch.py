"""Dispatch of tokens to the routed experts of all ranks, and the return of their outputs.

model/permutation.py permutes tokens into rows sorted by expert. With expert parallelism, rows travel to the ranks that
hold their experts. With expert-tensor parallelism, the ranks that share experts gather each other's rows. Outputs
return the same way, as rows; model/permutation.py combines them. All of this is gathers, forward and backward: no
scatter adds into a row, so the result does not depend on the order of threads.

Shapes: T tokens of this rank, D hidden, E experts, e experts of this rank, R rows (slots of experts), p ranks of a
group, P rows of all ranks of a group, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from hunyuan_pretrain.model.expert_rows import RowSplits, inverse, moved
from hunyuan_pretrain.model.routing import RoutingPlan
from hunyuan_pretrain.parallel.collectives import all_gather_rows, exchange_rows
from hunyuan_pretrain.runtime.handover import to_device

Experts = Callable[[Tensor, RowSplits, Tensor | None], Tensor]
"""Computes the experts of this rank: (R, D), rows sorted by expert, and their numbers (R, 1), if any -> (R, D)."""


def read_counts(counts: Tensor) -> Any:
    """Row counts of experts, as nested lists. The host waits here: it needs the sizes of exchanges and matmuls."""
    return counts.tolist()


def _apply(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else function(x)


class Dispatch:
    """Sends the rows of tokens to the experts of a layer and brings the outputs back."""

    def __init__(self, num_experts: int, groups: ProcessGroupCollection) -> None:
        self.num_experts = num_experts
        self.ep_group, self.etp_group = groups.ep, groups.expt_tp

    def __call__(self, rows_RD: Tensor, plan: RoutingPlan, experts: Experts, number_R1: Tensor | None = None) -> Tensor:
        """(R, D): the output of each row of `plan`, for rows of tokens that no other rank of this stage holds.

        `experts` computes those of this rank. `number_R1`: int64, goes to the experts with the rows.

        Communicates: expert-parallel group, two all-to-alls in each direction (forward, backward);
        expert-tensor-parallel group, an all-gather and a reduce-scatter of the rows from those. Without a capacity, row
        counts too; with numbers, those on the way to the experts.
        """
        if plan.rows_E is None:
            return self._exchange_equal(rows_RD, experts, number_R1)
        return self._exchange_counted(rows_RD, plan.rows_E, experts, number_R1)

    # --- over expert-parallel ranks -----------------------------------------------------------------------------------

    def _exchange_equal(self, rows_RD: Tensor, experts: Experts, number_R1: Tensor | None) -> Tensor:
        """Every rank sends the same number of rows to every expert: shapes are known, and no counts are exchanged."""
        ep, rows = self.ep_group.size(), rows_RD.shape[0] // self.num_experts
        e, D = self.num_experts // ep, rows_RD.shape[1]
        splits = RowSplits.equal(e, ep * rows)
        if ep == 1:
            return self._over_tensor_ranks(rows_RD, splits, experts, number_R1)

        def received(x_RC: Tensor) -> Tensor:
            C = x_RC.shape[1]
            return all_to_all(self.ep_group, x_RC).view(ep, e, rows, C).transpose(0, 1).reshape(-1, C)

        output = self._over_tensor_ranks(received(rows_RD), splits, experts, _apply(received, number_R1))
        return all_to_all(self.ep_group, output.view(e, ep, rows, D).transpose(0, 1).reshape(-1, D))

    def _exchange_counted(self, rows_RD: Tensor, rows_E: Tensor, experts: Experts, number_R1: Tensor | None) -> Tensor:
        """Without a capacity the ranks first exchange how many rows they send to each expert."""
        ep = self.ep_group.size()
        if ep == 1:
            return self._over_tensor_ranks(rows_RD, RowSplits(tuple(read_counts(rows_E))), experts, number_R1)
        e = self.num_experts // ep
        sent_pe = rows_E.view(ep, e)
        received_pe = exchange_rows(sent_pe, self.ep_group)
        sent, arriving = read_counts(torch.stack((sent_pe, received_pe)))
        sent_p, received_p = ([sum(rows_e) for rows_e in rows_pe] for rows_pe in (sent, arriving))
        # rows arrive in rank order, each rank's sorted by expert; the experts need all of them sorted by expert
        expert_pe = torch.arange(e, device=rows_RD.device).repeat(ep)
        order_R = expert_pe.repeat_interleave(received_pe.reshape(-1), output_size=sum(received_p)).argsort(stable=True)
        back_R = inverse(order_R, order_R.shape[0])
        splits = RowSplits(tuple(sum(rows_p) for rows_p in zip(*arriving, strict=True)))

        def received(x_RC: Tensor) -> Tensor:
            by_rank = all_to_all(self.ep_group, x_RC, received_p, sent_p)
            return moved(by_rank, order_R, back_R, False)

        output = self._over_tensor_ranks(received(rows_RD), splits, experts, _apply(received, number_R1))
        return all_to_all(self.ep_group, moved(output, back_R, order_R, False), sent_p, received_p)

    # --- over expert-tensor-parallel ranks ----------------------------------------------------------------------------

    def _over_tensor_ranks(
        self, rows_RD: Tensor, splits: RowSplits, experts: Experts, number_R1: Tensor | None
    ) -> Tensor:
        """Ranks that share experts gather their rows and compute partial sums for all of them; each gets back the sums
        of its own rows."""
        if self.etp_group.size() == 1:
            return experts(rows_RD, splits, number_R1)
        if splits.are_equal:
            return self._share_equal(rows_RD, splits, experts, number_R1)
        return self._share_counted(rows_RD, splits, experts, number_R1)

    def _share_equal(self, rows_RD: Tensor, splits: RowSplits, experts: Experts, number_R1: Tensor | None) -> Tensor:
        """Every rank has the same number of rows for every expert."""
        etp, e, rows, D = self.etp_group.size(), len(splits.rows_e), splits.rows_e[0], rows_RD.shape[1]

        def gathered(x_RC: Tensor) -> Tensor:
            whole, C = gather_from_sequence_parallel_region(x_RC, group=self.etp_group), x_RC.shape[1]
            return whole.view(etp, e, rows, C).transpose(0, 1).reshape(-1, C)

        output = experts(gathered(rows_RD), RowSplits.equal(e, etp * rows), _apply(gathered, number_R1))
        by_rank = output.view(e, etp, rows, D).transpose(0, 1).reshape(-1, D)
        return reduce_scatter_to_sequence_parallel_region(by_rank, group=self.etp_group)

    def _share_counted(self, rows_RD: Tensor, splits: RowSplits, experts: Experts, number_R1: Tensor | None) -> Tensor:
        """Without a capacity row counts differ between ranks, so each pads its rows with zeros to the longest."""
        etp, e, R = self.etp_group.size(), len(splits.rows_e), rows_RD.shape[0]
        mine_1e = to_device(torch.tensor([splits.rows_e]), rows_RD.device)
        counts_pe: list[list[int]] = read_counts(all_gather_rows(mine_1e, self.etp_group))
        longest = max(sum(counts_e) for counts_e in counts_pe)
        # positions among the padded rows of all ranks of each rank's rows of each expert; the experts need them sorted
        # by expert
        positions = torch.arange(etp * longest).view(etp, longest)
        by_rank = [row[: sum(counts_e)].split(counts_e) for row, counts_e in zip(positions, counts_pe, strict=True)]
        order_R = to_device(
            torch.cat([by_rank[rank][expert] for expert in range(e) for rank in range(etp)]), rows_RD.device
        )
        back_P = inverse(order_R, etp * longest)
        together = RowSplits(tuple(sum(counts_p) for counts_p in zip(*counts_pe, strict=True)))

        def gathered(x_RC: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(x_RC, (0, 0, 0, longest - R))
            whole_PC = gather_from_sequence_parallel_region(padded, group=self.etp_group)
            return moved(whole_PC, order_R, back_P, True)

        output = experts(gathered(rows_RD), together, _apply(gathered, number_R1))
        return reduce_scatter_to_sequence_parallel_region(moved(output, back_P, order_R, True), group=self.etp_group)[
            :R
        ]
