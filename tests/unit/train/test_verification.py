"""Verifying the digests of the data before training: one rank reads each file, and all ranks learn of every problem."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from data_tools.packed_output import pack
from hunyuan_pretrain.data import digests
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import write_manifest
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TOKENIZED_VERSION, ShardWriter, TokenizedShard
from hunyuan_pretrain.data.packed_format import PackedIndex
from hunyuan_pretrain.train import data_stamps, verification
from tests.helpers.ranks import fork_ranks


def verify_on_this_rank(*cases: dict[Path, str | None]) -> tuple[list[tuple[list[str], str]], str]:
    """For each case, the names of the files that this rank reads, and its error; and this rank's stderr."""
    dist.init_process_group("gloo")
    digests._BLOCK_BYTES, verification._SECONDS_BETWEEN_MEETINGS = 10, -1.0  # a meeting after each block
    check = verification.check_digest_in_steps
    found, said = [], StringIO()
    for files in cases:
        read: list[str] = []
        verification.check_digest_in_steps = lambda file, digest, read=read: (
            read.append(file.name) or check(file, digest)
        )
        try:
            with redirect_stderr(said):
                verification.verify_files(files)
        except DataFormatError as error:
            found.append((read, str(error)))
        else:
            found.append((read, ""))
    return found, said.getvalue()


def make_files(folder: Path) -> dict[Path, str | None]:
    """Files of unequal length, the last one empty, and their digests."""
    files: dict[Path, str | None] = {}
    for number in range(7):
        content = bytes(range(60 - 10 * number))
        (folder / f"{number}.bin").write_bytes(content)
        files[folder / f"{number}.bin"] = hashlib.sha256(content).hexdigest()
    return files


def test_the_ranks_split_the_files_and_all_learn_of_every_problem(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    changed = files | {tmp_path / "1.bin": "0" * 64, tmp_path / "none.bin": "0" * 64}
    ranks = fork_ranks(2, verify_on_this_rank, files, changed)
    ((one, one_of_changed), said_by_one), ((other, other_of_changed), said_by_other) = ranks
    assert one == ([f"{number}.bin" for number in (0, 2, 4, 6)], "")
    assert other == ([f"{number}.bin" for number in (1, 3, 5)], "")
    assert one_of_changed[1] == other_of_changed[1]
    assert one_of_changed[1].startswith(f"{tmp_path}/1.bin: SHA-256 ")
    assert "verifying data: 0.0 of 0.0 GB (runtime.verify_data=sizes skips this)\n" in said_by_one
    assert said_by_other == "", "rank 0 speaks"


def check_on_this_rank(folder: Path) -> tuple[list[str], str]:
    """The shards that this rank maps, and its error."""
    dist.init_process_group("gloo")
    index, mapped = PackedIndex(folder), list[str]()
    map_files = TokenizedShard.map_files
    TokenizedShard.map_files = lambda shard: (mapped.append(shard.name), map_files(shard))[1]
    try:
        verification.verify_data([index, PackedIndex(folder)], "sizes")
    except DataFormatError as error:
        return mapped, str(error)
    return mapped, ""


def packed(folder: Path) -> Path:
    """A packed folder over five shards, in `folder`/t."""
    entries = []
    tokens = folder / "t"
    tokens.mkdir()
    for number in range(5):
        writer = ShardWriter(tokens, f"shard_{number:05}", 1000)
        writer.add(np.array([1, 2]), np.array([2]), np.array([[0, number]]))
        entries.append(writer.finish())
    manifest = {"format": TOKENIZED_FORMAT, "version": TOKENIZED_VERSION, "documents": 5, "tokens": 10}
    of_tokenizer = {"vocab_size": 1000, "pad_id": 999, "tokenizer_digest": "d" * 64, "files": ["x"]}
    write_manifest(tokens, {**manifest, **of_tokenizer, "shards": entries})
    pack([str(tokens)], 8, str(folder / "p"), seed=1)
    return folder / "p"


def test_the_ranks_split_the_shards_and_all_learn_of_every_damaged_one(tmp_path: Path) -> None:
    tokens = packed(tmp_path).with_name("t")
    names = [f"shard_{number:05}" for number in range(5)]
    assert fork_ranks(2, check_on_this_rank, tmp_path / "p") == [(names[::2], ""), (names[1::2], "")]
    (tokens / "shard_00003.bin").unlink()
    (tokens / "shard_00004.idx").write_bytes(b"")
    (_, one), (_, other) = fork_ranks(2, check_on_this_rank, tmp_path / "p")
    assert one == other
    assert [line.split(": ")[0] for line in one.splitlines()] == [
        str(tokens / "shard_00003.bin"),
        str(tokens / "shard_00004.idx"),
    ]


def starts_on_this_rank(folder: Path, run_dir: Path) -> list[tuple[list[str], str]]:
    """(files that this rank reads, error) of each start of a run; between them a file of the data changes."""
    dist.init_process_group("gloo")
    shard = folder.with_name("t") / "shard_00003.bin"
    check = verification.check_digest_in_steps
    found = []

    def start(by: Literal["digests", "digests_at_every_start"] = "digests") -> None:
        read: list[str] = []
        verification.check_digest_in_steps = lambda file, digest: read.append(file.name) or check(file, digest)
        try:
            verification.verify_data([PackedIndex(folder)], by, run_dir=run_dir)
        except DataFormatError as error:
            found.append((sorted(read), str(error)))
        else:
            found.append((sorted(read), ""))

    def meanwhile(change: Callable[[], object]) -> None:
        if dist.get_rank() == 0:
            change()
        dist.barrier()

    start()  # the files are new: no stamps yet
    data_stamps.SETTLED_S = -1.0
    start()
    start()
    start("digests_at_every_start")
    times, content = shard.stat(), shard.read_bytes()
    meanwhile(lambda: shard.write_bytes(content[::-1]))
    meanwhile(lambda: os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns)))  # as if nothing had happened
    start()
    meanwhile(lambda: shard.write_bytes(content))
    start()
    meanwhile(lambda: shutil.copy2(shard, shard.with_suffix(".copy")))
    meanwhile(lambda: shard.with_suffix(".copy").rename(shard))  # with the same times
    start()
    start()
    meanwhile(lambda: (run_dir / data_stamps.FILE).write_text("[1"))
    start()
    return found


def test_a_later_start_reads_only_what_has_changed(tmp_path: Path) -> None:
    folder, run_dir = packed(tmp_path), tmp_path / "run"
    run_dir.mkdir()
    one, other = fork_ranks(2, starts_on_this_rank, folder, run_dir)
    assert [error for _, error in one] == [error for _, error in other]
    starts = [sorted(a + b) for (a, _), (b, _) in zip(one, other, strict=True)]
    everything = sorted(file.name for file in PackedIndex(folder).digests())
    changed, nothing = ["shard_00003.bin"], list[str]()
    assert starts[:4] == [everything, everything, nothing, everything]
    assert starts[4:] == [changed, changed, changed, nothing, everything]
    assert all(names for names, _ in (one[0], other[0])), "the ranks share the work"
    errors = [error for _, error in one]
    assert errors[4].startswith(f"{tmp_path}/t/shard_00003.bin: SHA-256 ")
    assert errors[:4] + errors[5:] == [""] * 8
