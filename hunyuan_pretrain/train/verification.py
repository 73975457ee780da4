"""Checks the data before training, by SHA-256 or by size. The files are split among the ranks.

A file whose SHA-256 was right is not read again by later starts of the run, unless it has changed: data_stamps.py.
"""

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
from hunyuan_pretrain.parallel.agreement import from_rank_0, patience
from hunyuan_pretrain.parallel.comparison import sums_of_ranks, texts_of_ranks
from hunyuan_pretrain.runtime.stop import StoppedBeforeFirstStepError, StopRequest
from hunyuan_pretrain.train.data_stamps import Stamps

_SECONDS_BETWEEN_MEETINGS = 10.0
_SHOWN_PROBLEMS = 20


def verify_files(files: Mapping[Path, str | None], stop: StopRequest | None = None) -> None:
    """Check the SHA-256 of each file on one of the ranks; rank 0 prints progress to stderr if it takes long.

    Raises DataFormatError, the same on all ranks, naming the missing or changed files found so far; there may be more.
    Raises StoppedBeforeFirstStepError, on all ranks, if any rank was asked to stop. Communicates: all ranks,
    periodically, so that a rank that finishes early does not run into the timeout of collectives; 32 bytes, and what
    is wrong if there is anything.
    """
    whereabouts.phase("verification of the data")
    rank, size = dist.get_rank(), dist.get_world_size()
    # files of one kind have similar sizes; paths may differ between nodes, the order in the manifests does not
    mine = sorted(files, key=lambda file: file.suffix)[rank::size]
    reading = _read({file: files[file] for file in mine})
    done, problems, total = 0, list[str](), 0
    while True:
        is_done, deadline = False, time.monotonic() + _SECONDS_BETWEEN_MEETINGS
        for num_bytes, problem in reading:
            done += num_bytes
            problems += [problem] if problem else []
            if time.monotonic() > deadline or (stop is not None and stop.is_asked):
                break
        else:
            is_done = True
        is_stopping = stop is not None and stop.is_asked
        with patience():  # a file system may take longer than a collective for a single block
            of_all, wrong, unfinished, stopping = sums_of_ranks(done, len(problems), not is_done, is_stopping)
        if wrong:
            _raise(problems, wrong)
        if stopping:
            raise StoppedBeforeFirstStepError()
        if not unfinished:
            return
        if rank == 0:
            total = total or sum(file.stat().st_size for file in files if file.is_file())
            amount = f"{of_all / 1e9:,.1f} of {total / 1e9:,.1f} GB"
            print(f"verifying data: {amount} (runtime.verify_data=sizes skips this)", file=sys.stderr)


def verify_data(
    indexes: Sequence[PackedIndex],
    by: Literal["digests", "digests_at_every_start", "sizes"],
    stop: StopRequest | None = None,
    run_dir: Path | None = None,
) -> None:
    """Check all files of packed folders and their sources, each on one of the ranks.

    by: "digests" leaves out the files that an earlier start of the run has read and that have not changed since; it
    reads all without `run_dir`. Raises and communicates as `verify_files`; rank 0 tells which files have to be read,
    one bit for each.
    """
    if by == "sizes":
        check_shards({(shard.folder, shard.name): shard for index in indexes for shard in index.read_shards}.values())
        return
    files = {file: digest for index in indexes for file, digest in index.digests().items()}
    if by == "digests_at_every_start" or run_dir is None:
        verify_files(files, stop)
        return
    stamps = Stamps(run_dir)
    with patience():  # for so many files, on a slow file system
        unread, error = from_rank_0(lambda: stamps.bits_of_unread(files))
    if unread is None:
        raise DataFormatError(f"{run_dir}: {error}")
    verify_files({file: files[file] for n, file in enumerate(files) if unread[n // 8] >> n % 8 & 1}, stop)
    if dist.get_rank() == 0:
        stamps.keep()


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
    with patience():  # a file system may take its time to open thousands of files
        wrong = sums_of_ranks(len(problems))[0]
    if wrong:
        _raise(problems, wrong)


def _read(files: Mapping[Path, str | None]) -> Iterator[tuple[int, str | None]]:
    """Yields (bytes read, None) after each block and (0, problem) after a missing or changed file."""
    for file, digest in files.items():
        try:
            for num_bytes in check_digest_in_steps(file, digest):
                yield num_bytes, None
        except DataFormatError as error:
            yield 0, str(error)


def _raise(problems: list[str], of_all: int) -> None:
    """Raise DataFormatError with the first problems of all ranks, the same on each. of_all: how many there are."""
    mine = "\n".join(sorted(problems)[:_SHOWN_PROBLEMS]) or None
    told = sorted(line for _, text in texts_of_ranks(mine, most=_SHOWN_PROBLEMS) for line in text.split("\n"))
    shown = told[:_SHOWN_PROBLEMS]
    others = [f"and {of_all - len(shown)} more files"] if of_all > len(shown) else []
    raise DataFormatError("\n".join([*shown, *others]))
