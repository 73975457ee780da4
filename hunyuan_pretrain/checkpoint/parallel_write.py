"""Writes one distributed checkpoint with the parts of megatron-core's writer.

Core's own entry point writes small files on rank 0 between collectives. If the disk is full, the other ranks wait in a
collective that rank 0 never enters. It also exchanges every rank's whole plan in each save. Here all ranks know after
each step whether it succeeded on all of them, and the plan is exchanged and checked only in the first saves of a run.
"""

from __future__ import annotations

import errno
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException

from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import SYSTEM_REASONS, error_of_rank_0, first_error, reason_of

FULL_DISK_BYTES = 1 << 20
"""A disk with less free space than this after a failed write counts as full; a writer may leave part of a block."""


def write_state(folder: Path, model: HunyuanModel, build: Callable[[], dict[str, Any]]) -> str | None:
    """Write the sharded tensors and objects that `build` returns into an empty folder. Returns the error of any rank.

    The plan is remembered per `model`, which all saves of a run share. Communicates: all ranks.
    """
    made: dict[str, Any] = {}

    def compare() -> None:
        made["parts"] = _parts(made["state"])
        if model in _planners and _planners[model].parts != made["parts"]:
            raise ValueError("not the tensors of the previous save")

    def check() -> None:
        # checks that the ranks' parts make up the whole; if they do in the first save, they do in all later ones
        made["state"], _ = save_preprocess(made["state"], validate_access_integrity=model not in _planners)

    def describe() -> None:
        torch.save({}, folder / COMMON_STATE_FNAME)  # objects common to all ranks; there are none
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    def plan() -> None:
        planner = _planners.setdefault(model, _Planner(made["parts"]))
        made["planned"] = planner.plan(made.pop("state"), str(folder))

    if error := first_error(lambda: made.update(state=build())):
        return error
    if first_error(compare):  # on any rank
        forget_plan(model)
    return (
        first_error(check)
        or error_of_rank_0(describe)
        or first_error(plan)
        or first_error(lambda: _write_planned(folder, made["planned"].writer))
        or _finish(made["planned"])
    )


def forget_plan(model: HunyuanModel) -> None:
    """Call this after a failed save: if a rank has not completed the plan, ranks may remember different plans."""
    _planners.pop(model, None)


class _Planned(NamedTuple):
    """A save that has been split among the ranks, before anything is written."""

    writer: Any
    metadata: Any
    """Which tensor is where; on rank 0 only."""


class _Planner(TorchDistSaveShardedStrategy):
    """Core's strategy up to the plan. It remembers what the ranks have exchanged: from the third save on, no part of
    the plan is sent."""

    def __init__(self, parts: frozenset[Any]) -> None:
        super().__init__("torch_dist", 1, cached_metadata=True)
        self.parts = parts
        """Which parts of which tensors this rank holds."""

    def plan(self, state: dict[str, Any], folder: str) -> _Planned:
        """Communicates: all ranks."""
        # A queue for this process's results. Core would keep it in a separate process, which outlives a rank that exits
        # after an error and keeps the job's pipes open.
        filesystem_async._results_queue = Queue()
        # core 0.19 has two writers; "mcore" is the one that 0.16 has
        chosen = (
            {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(self.async_save).parameters else {}
        )
        return self.async_save(state, folder, **chosen)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return _Planned(writer, planned[1])


_planners: WeakKeyDictionary[HunyuanModel, _Planner] = WeakKeyDictionary()


def _parts(state: dict[str, Any]) -> frozenset[Any]:
    return frozenset(
        (item.key, item.replica_id, getattr(item, "local_shape", None), getattr(item, "global_offset", None))
        for item in nested_values(state)
    )


def _write_planned(folder: Path, writer: Any) -> None:
    """Write this rank's part of the plan. Communicates nothing."""
    writer.results = []
    write, to_host, arguments = writer.get_save_function_and_args()
    if write is None:
        return
    try:
        write(arguments[0], to_host(), arguments[2])
        writer.results = writer.retrieve_write_results()
        if not isinstance(writer.results, list):
            raise CheckpointException("write", {dist.get_rank(): writer.results})
    except (Exception, CheckpointException) as error:
        # megatron-core 0.19's writer does not report why it failed, but a full disk can still be detected
        if reason_of(error) not in SYSTEM_REASONS and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _finish(planned: _Planned) -> str | None:
    """Write which tensor is where. Returns rank 0's error, or None. Communicates: all ranks."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(planned.writer.results, found, dst=0)
    return error_of_rank_0(lambda: planned.writer.finish(planned.metadata, found))
