"""Checks the data before training, by SHA-256 or by size. The files are split among the ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from hunyuan_pretrain.data.digests import check_digest_in_steps
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import TokenizedShard
from hunyuan_pretrain.data.packed_format import PackedIndex
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.parallel.agreement import patience
from hunyuan_pretrain.runtime.stop import StoppedBeforeFirstStepError, StopRequest

_SECONDS_BETWEEN_MEETINGS = 10.0
_SHOWN_PROBLEMS = 20


def verify_files(files: Mapping[Path, str | None], stop: StopRequest | None = None) -> None:
    """Check the SHA-256 of each file on one of the ranks; rank 0 prints progress to stderr if it takes long.

    Raises DataFormatError, the same on all ranks, naming the missing or changed files found so far; there may be more.
    Raises StoppedBeforeFirstStepError, on all ranks, if any rank was asked to stop. Communicates: all ranks,
    periodically, so that a rank that finishes early does not run into the timeout of collectives.
    """
    whereabouts.phase("verification of the data")
    rank, size = dist.get_rank(), dist.get_world_size()
    # files of one kind have similar sizes
    mine = sorted(files, key=lambda file: (file.suffix, file))[rank::size]
    reading = _read({file: files[file] for file in mine})
    done, problems = 0, list[str]()
    while True:
        is_done, deadline = False, time.monotonic() + _SECONDS_BETWEEN_MEETINGS
        for num_bytes, problem in reading:
            done += num_bytes
            problems += [problem] if problem else []
            if time.monotonic() > deadline or (stop is not None and stop.is_asked):
                break
        else:
            is_done = True
        states: list[tuple[int, list[str], bool, bool]] = [(0, [], False, False)] * size
        with patience():  # a file system may take longer than a collective for a single block
            dist.all_gather_object(states, (done, problems, is_done, stop is not None and stop.is_asked))
        _raise_if_any([problem for _, of_rank, _, _ in states for problem in of_rank])
        if any(is_stopping for *_, is_stopping in states):
            raise StoppedBeforeFirstStepError()
        if all(is_rank_done for _, _, is_rank_done, _ in states):
            return
        if rank == 0:
            _print_progress(sum(of_rank for of_rank, *_ in states), files)


def verify_data(
    indexes: Sequence[PackedIndex], by: Literal["digests", "sizes"], stop: StopRequest | None = None
) -> None:
    """Check all files of packed folders and their sources, each on one of the ranks.

    Raises and communicates as `verify_files`.
    """
    if by == "digests":
        verify_files({file: digest for index in indexes for file, digest in index.digests().items()}, stop)
    else:
        check_shards({(shard.folder, shard.name): shard for index in indexes for shard in index.read_shards}.values())


def check_shards(shards: Iterable[TokenizedShard]) -> None:
    """Check the sizes of the files and the index header of each shard, on one of the ranks: a rank opens a shard only
    when it reads it.

    Raises DataFormatError as `verify_files`. Communicates: all ranks, once.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    problems = []
    for shard in list(shards)[rank::size]:
        try:
            shard.check()
        except DataFormatError as error:
            problems.append(str(error))
    found: list[list[str]] = [[]] * size
    with patience():  # a file system may take its time to open thousands of files
        dist.all_gather_object(found, problems)
    _raise_if_any([problem for of_rank in found for problem in of_rank])


def _read(files: Mapping[Path, str | None]) -> Iterator[tuple[int, str | None]]:
    """Yields (bytes read, None) after each block and (0, problem) after a missing or changed file."""
    for file, digest in files.items():
        try:
            for num_bytes in check_digest_in_steps(file, digest):
                yield num_bytes, None
        except DataFormatError as error:
            yield 0, str(error)


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        others = [f"and {len(problems) - _SHOWN_PROBLEMS} more files"] if len(problems) > _SHOWN_PROBLEMS else []
        raise DataFormatError("\n".join([*sorted(problems)[:_SHOWN_PROBLEMS], *others]))


def _print_progress(done: int, files: Mapping[Path, str | None]) -> None:
    total = sum(file.stat().st_size for file in files if file.is_file())
    print(
        f"verifying data: {done / 1e9:,.1f} of {total / 1e9:,.1f} GB (runtime.verify_data=sizes skips this)",
        file=sys.stderr,
    )
