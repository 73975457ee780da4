"""A checkpoint of a run as a scorer, under any parallel layout.

Rank 0 leads: it asks, and every rank computes its share. The others only follow (`follow`), so benchmark files and
their packages are needed where rank 0 is.

Shapes: T tokens of a micro-batch on this context-parallel rank, D hidden size, V rows of the output weight on this
rank, n positions of them that are read; of all items, one after the other, M tokens and N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import ADAPTER_OF
from hunyuan_pretrain.config.layouts import Precision, layout_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.evaluation import EvaluationError, ScoringStoppedError
from hunyuan_pretrain.evaluation.scoring import Item, Pack, Read, pack, read_rows
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.parallel.agreement import patience
from hunyuan_pretrain.parallel.context_parallel import context_slice
from hunyuan_pretrain.parallel.groups import build_groups
from hunyuan_pretrain.runtime.handover import handed_over
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.chunks import build_chunks
from hunyuan_pretrain.train.step import run_schedule, sum_over

FILLER = 0
"""The token that fills a micro-batch up; nothing attends to it."""
PACKS_AT_ONCE = 64
"""Micro-batches of a data-parallel rank, at most, between two looks for a stop and two lines of progress."""


class OnRanks(Protocol):
    """A model on the ranks of a job: a training run is one."""

    @property
    def experiment(self) -> Experiment:
        """Its configuration and layout."""

    @property
    def device(self) -> torch.device:
        """Of this rank."""

    @property
    def groups(self) -> ProcessGroupCollection:
        """Of the layout."""

    @property
    def wrapped(self) -> Sequence[Any]:
        """Model chunks of this rank."""


@dataclass(frozen=True)
class Loaded:
    """A model whose weights were read from a checkpoint, without gradients or an optimizer."""

    experiment: Experiment
    device: torch.device
    groups: ProcessGroupCollection
    wrapped: list[HunyuanModel]


def load(experiment: Experiment, checkpoint: Path, layout: str, ranks: int) -> Loaded:
    """Read a checkpoint under `layout`, such as "tp=2,pp=2" (sizes that it does not name are 1, and dp takes the ranks
    that are left). FP8 is off, as in an export. Communicates: all ranks.

    Raises ConfigError if the layout does not fit the model or the ranks, CheckpointError.
    """
    precision: Precision = "fp32" if experiment.precision.dtype == "fp32" else "bf16"
    changed, _ = layout_experiment(experiment, layout, ranks, Path(experiment.run_dir), precision)
    device = setup.start_machine(changed)
    groups = build_groups(changed.parallel, changed.runtime.distributed_timeout_s)
    chunks = [chunk.eval().requires_grad_(False) for chunk in build_chunks(changed, groups, seed=None)]
    save_load.load(checkpoint, chunks, None)
    return Loaded(changed, device, groups, chunks)


class LayoutScorer:
    """Scores on all ranks of a job. Rank 0 calls `score`, the other ranks `follow`, until rank 0 calls `release`."""

    def __init__(
        self,
        model: OnRanks,
        *,
        rope_alpha: float,
        max_length: int,
        batch_tokens: int,
        say: Callable[[str], None] | None = None,
        is_stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """batch_tokens: of a micro-batch, if no single item is longer. max_length: longest text. is_stop_asked: gives
        all ranks the same answer; called now and then."""
        self._model, self._alpha, self._budget, self._say = model, rope_alpha, batch_tokens, say
        self.max_length, self.device, self._is_stop_asked = max_length, model.device, is_stop_asked
        self.is_followed = True
        """On rank 0: whether the other ranks wait for a question; not after an error in an answer."""
        parallel = model.experiment.parallel
        self._unit = model.experiment.model.moe_routing_group_tokens * parallel.context_parallel_size
        self._unit *= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    def score(self, items: Sequence[Item], num_ids: int | None = None) -> list[Read]:
        """As Scorer.score; on rank 0 only. Communicates: all ranks. Raises on all of them: EvaluationError for logits
        that are not numbers, ScoringStoppedError."""
        if not items:
            return []
        asked = _Asked.of(items, num_ids)
        self._tell(asked)
        self.is_followed = False
        answers = self._score(asked)
        self.is_followed = True
        return answers

    def follow(self) -> None:
        """Take part in what rank 0 asks, until it has no more questions. Communicates: all ranks. Raises as `score`."""
        with patience():
            while (asked := self._tell(None)) is not None:
                self._score(asked)

    def release(self) -> None:
        """Rank 0 has no more questions. Communicates: all ranks."""
        self._tell(None)

    def _tell(self, asked: _Asked | None) -> _Asked | None:
        told = [asked]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    @torch.no_grad()
    def _score(self, asked: _Asked) -> list[Read]:
        lengths = asked.num_tokens.tolist()
        budget = max(self._budget, max(lengths))
        packs = pack(lengths, budget)
        tokens = -(-max(one.num_tokens for one in packs) // self._unit) * self._unit
        dp = self._model.groups.dp
        mine = [packs[number] for number in range(dp.rank(), len(packs), dp.size())]
        # all ranks pass the same number of micro-batches: experts may be spread over data-parallel ranks, and the
        # interleaved schedule takes multiples of the pipeline size
        multiple = self._model.experiment.parallel.pipeline_model_parallel_size
        rounds = -(-len(packs) // (dp.size() * multiple)) * multiple
        mine += [Pack([], 0)] * (rounds - len(mine))
        at_once = max(1, PACKS_AT_ONCE // multiple) * multiple
        # each position is read by one rank, so the sum is what it reads; its size does not depend on how many there are
        found_N3 = torch.zeros(len(asked.target_N), 3, dtype=torch.float64, device=self.device)
        for start in range(0, rounds, at_once):
            if self._is_stop_asked():
                raise ScoringStoppedError()
            for place_n, read_n2 in self._pass(asked, mine[start : start + at_once], tokens):
                found_N3[place_n, :2], found_N3[place_n, 2] = read_n2, 1.0
            if self._say is not None and rounds > at_once and dist.get_rank() == 0:
                self._say(f"  {min(start + at_once, rounds)} of {rounds} micro-batches of up to {tokens} tokens")
        return self._answers(sum_over(dist.group.WORLD, found_N3).cpu(), asked.num_read.tolist())

    def _pass(self, asked: _Asked, packs: Sequence[Pack], tokens: int) -> list[tuple[Tensor, Tensor]]:
        """What this rank reads of each micro-batch: ((n,) int64 numbers of the positions, (n, 2) fp64 [logprob, best
        id])."""
        model = self._model
        reads = [self._share(asked, one, tokens) for one in packs]

        def forward(batches: Iterator[_Share], chunk: Any) -> tuple[Tensor, Any]:
            share = next(batches)
            output, _ = chunk(share.inputs(self._alpha, partial(self._read_out, share, asked.num_ids)))
            nothing = torch.zeros((), device=model.device)
            return output, lambda read_n2: (nothing, nothing.int(), read_n2)

        for chunk in model.wrapped:
            chunk.eval()
        answers = run_schedule(model, forward, lambda: iter(reads), len(reads), tokens, forward_only=True)
        if not answers or model.groups.tp.rank() > 0:
            return []
        return [(share.place_n.to(model.device), read_n2) for share, read_n2 in zip(reads, answers, strict=True)]

    def _read_out(self, share: _Share, num_ids: int | None, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        tp = self._model.groups.tp

        def reduce(value: Tensor, how: str) -> Tensor:
            if tp.size() > 1:
                handed_over("all_reduce", value, is_written=True)
                dist.all_reduce(value, op=getattr(dist.ReduceOp, how.upper()), group=tp)
            return value

        rows_n, target_n = share.rows_n.to(hidden_TD.device), share.target_n.to(hidden_TD.device)
        return read_rows(hidden_TD[rows_n], weight_VD, target_n, tp.rank() * len(weight_VD), num_ids, reduce)

    def _share(self, asked: _Asked, one: Pack, tokens: int) -> _Share:
        model, cp = self._model, self._model.groups.cp
        texts = [asked.tokens(number) for number in one.members]
        if one.num_tokens < tokens:
            texts.append(torch.full((tokens - one.num_tokens,), FILLER))
        starts = [0, *accumulate(len(text) for text in texts)]
        token_T, position_T = torch.cat(texts), torch.cat([torch.arange(len(text)) for text in texts])
        rows_T, context = torch.arange(tokens), None
        if cp.size() > 1:
            method, unit = model.experiment.parallel.context_parallel_method, self._unit // cp.size()
            context = context_slice(cp, method, starts, 1, unit, model.device)
            rows_T = torch.cat([torch.arange(start, end) for start, end in context.ranges])
        place_n = torch.cat([torch.arange(0), *(asked.places(number) for number in one.members)])
        starts_n = [torch.full_like(asked.places(n), start) for n, start in zip(one.members, starts, strict=False)]
        row_n = torch.cat([torch.arange(0), *starts_n]) + asked.position_N[place_n]
        local = torch.full((tokens,), -1)  # where a row of the micro-batch is on this rank; -1: elsewhere
        local[rows_T] = torch.arange(len(rows_T))
        is_here_n = local[row_n] >= 0
        return _Share(
            token_T[rows_T].to(model.device),
            position_T[rows_T].to(model.device),
            starts,
            context,
            local[row_n[is_here_n]],
            asked.target_N[place_n[is_here_n]].long(),
            place_n[is_here_n],
        )

    def _answers(self, found_N3: Tensor, num_read: list[int]) -> list[Read]:
        """found_N3: log-probability, likeliest id, how many ranks have read the position; num_read: positions of each
        item."""
        assert bool((found_N3[:, 2] == 1).all()), "a position was read by no rank, or by several"
        if found_N3.isnan().any():
            raise EvaluationError("the model gives logits that are not numbers: its weights are damaged or diverged")
        return [Read(read_n3[:, 0], read_n3[:, 1].long()) for read_n3 in found_N3.split(num_read)]


@dataclass(frozen=True)
class _Asked:
    """The items of a question, one after the other. Every rank has them, so they are int32 and not Python's lists,
    which take up to ten times the memory."""

    token_M: Tensor
    num_tokens: Tensor
    """Of each item."""
    position_N: Tensor
    target_N: Tensor
    num_read: Tensor
    """Positions of each item."""
    num_ids: int | None

    @staticmethod
    def of(items: Sequence[Item], num_ids: int | None) -> _Asked:
        """From lists."""

        def joined(lists: Iterable[Iterable[int]]) -> Tensor:
            return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype=np.int32))

        return _Asked(
            joined(item.tokens for item in items),
            joined([len(item.tokens)] for item in items),
            joined(item.positions for item in items),
            joined(item.targets for item in items),
            joined([len(item.positions)] for item in items),
            num_ids,
        )

    def tokens(self, number: int) -> Tensor:
        """int64, of an item."""
        return self.token_M[self._first_token[number] : self._first_token[number + 1]].long()

    def places(self, number: int) -> Tensor:
        """int64, the numbers of an item's positions among those of all."""
        return torch.arange(self._first_read[number], self._first_read[number + 1])

    @cached_property
    def _first_token(self) -> list[int]:
        return [0, *accumulate(self.num_tokens.tolist())]

    @cached_property
    def _first_read(self) -> list[int]:
        return [0, *accumulate(self.num_read.tolist())]


@dataclass(frozen=True)
class _Share:
    """A micro-batch on this rank, and what is read of it."""

    token_T: Tensor
    position_T: Tensor
    starts: list[int]
    context: Any
    rows_n: Tensor
    target_n: Tensor
    place_n: Tensor
    """int64, the number of each position among those of all items."""

    def inputs(self, rope_alpha: float, read_out: Callable[[Tensor, Tensor], Tensor]) -> ModelInputs:
        """What the model reads."""
        return ModelInputs(
            self.token_T, self.position_T, self.starts, rope_alpha, read_out=read_out, context=self.context
        )


def checkpoint_and_stage(run_dir: Path, step: int | None) -> tuple[Path, Experiment, Any]:
    """The checkpoint of a run, and the experiment and stage in which it was taken. Raises CheckpointError."""
    from hunyuan_pretrain.checkpoint.export_run import choose_checkpoint, in_force
    from hunyuan_pretrain.checkpoint.history import refuse_another_vocabulary

    if not (run_dir / "resolved.yaml").exists():
        raise CheckpointError(f"{run_dir}: not a run directory (no resolved.yaml)")
    folder = choose_checkpoint(run_dir, step, "there is nothing to evaluate")
    experiment, stage = in_force(folder)
    marker = save_load.read_marker(folder)
    if ADAPTER_OF in marker:
        raise CheckpointError(
            f"{folder}: holds an adapter of {marker[ADAPTER_OF]['path']} and no model; to evaluate both together, "
            "export it, merge-lora it with an export of its base, and give the result. In training, evaluation.tasks "
            "evaluates both"
        )
    save_load.refuse_other_model(folder, marker, experiment.model)
    refuse_another_vocabulary(folder, run_dir / "tokenizer")
    return folder, experiment.model_copy(update={"run_dir": str(run_dir)}), stage
