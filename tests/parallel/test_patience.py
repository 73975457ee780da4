"""Ranks wait for each other's reading or writing: for hours if the other rank is working, but not if it is dead."""

from __future__ import annotations

import os
import signal
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.helpers.ranks import fork_ranks, forking

TIMEOUT_S = 2


def wait_for_rank_1(is_frozen: bool) -> float:
    """Seconds that this rank waited for rank 1."""
    import torch.distributed as dist

    from hunyuan_pretrain.parallel.agreement import patience
    from hunyuan_pretrain.parallel.groups import initialize_distributed

    initialize_distributed("gloo", TIMEOUT_S)
    dist.barrier()
    began = time.monotonic()
    with patience():
        if dist.get_rank() == 1 and is_frozen:
            os.kill(os.getpid(), signal.SIGSTOP)  # like a dead machine: its connections are not even closed
        elif dist.get_rank() == 1:
            time.sleep(2.5 * TIMEOUT_S)
        dist.barrier()
    return time.monotonic() - began


def frozen(rank: int, port: int, errors: Path) -> None:
    os.dup2(os.open(errors.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    wait_for_rank_1(is_frozen=True)


def read_slowly(folder: Path) -> None:
    """Rank 1 reads for longer than the time-out, in one block that does not come."""
    import torch.distributed as dist

    from hunyuan_pretrain.parallel.groups import initialize_distributed
    from hunyuan_pretrain.train import verification

    initialize_distributed("gloo", TIMEOUT_S)
    if dist.get_rank() == 1:
        read = verification.check_digest_in_steps

        def slow(*arguments: Any) -> Any:
            time.sleep(2 * TIMEOUT_S)
            return read(*arguments)

        verification.check_digest_in_steps = slow
    verification.verify_files({file: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()})


def test_data_that_is_read_slowly_is_waited_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert fork_ranks(2, read_slowly, tmp_path) == [None, None]


def test_a_rank_that_works_past_the_timeout_is_waited_for() -> None:
    assert min(fork_ranks(2, wait_for_rank_1, False)) > 2 * TIMEOUT_S


def test_a_dead_rank_ends_the_others_despite_their_patience(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [forking().Process(target=frozen, args=(rank, store.port, tmp_path / "errors")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        ranks[0].join(timeout=60)
        assert ranks[0].exitcode == 1
        text = (tmp_path / "errors.0").read_text()
        assert "rank 0 ends: no sign of life of rank 1 for 10 s (runtime.distributed_timeout_s)\n" in text
        assert "\n  rank 1 was last seen in start, at " in text
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
