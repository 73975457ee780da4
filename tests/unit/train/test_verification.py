"""Verifying the digests of the data before training: one rank reads each file, and all ranks learn of every problem."""

from __future__ import annotations

import hashlib
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch.distributed as dist

from hunyuan_pretrain.data import digests
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.train import verification
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
