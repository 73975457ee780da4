"""Saving and loading a checkpoint against plain writes and reads of as many bytes, in one run; processor seconds, of
the whole and of each part; what training waits for in an asynchronous save; host memory; and how rank 0's work grows
with the ranks.

    python tests/benchmarks/checkpoints.py FOLDER [GIB] [RANKS...]

One rank, GIB of bf16 weights with AdamW's state in fp32 (2.5 unless given). The plain writes are two files by two
threads, 8 MiB at a time from memory that was touched before, each flushed; reads are cold: the files are dropped from
the file cache. All are repeated, alternating; the median counts. torch has a thread for each core, as by default. The
parts (copy, sha256, CRC, write, read, first touch of memory) are measured alone, in one thread, as the least of several
times: on a busy machine a processor second says more than one of the clock. Before a load, as much memory as it needs
is touched and freed: a virtual machine may have given free memory back to its host, and would fetch it again. RANKS (64
512 2048 unless given): reports of so many ranks, of 400 tensors each, are made up and joined.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()

from hunyuan_pretrain.checkpoint import save_load  # noqa: E402
from hunyuan_pretrain.checkpoint.host_memory import new_memory  # noqa: E402
from hunyuan_pretrain.checkpoint.joined_parts import JoinedParts  # noqa: E402
from hunyuan_pretrain.checkpoint.parallel_write import CHUNK, FILES_PER_RANK, REPORTS, write_report  # noqa: E402
from hunyuan_pretrain.checkpoint.saving import Saver  # noqa: E402
from hunyuan_pretrain.config.schema import Experiment  # noqa: E402
from hunyuan_pretrain.train import setup  # noqa: E402
from tests.helpers.runs import experiment_fields  # noqa: E402
from tests.helpers.tiny import world_of_one  # noqa: E402

TURNS = 3
PART_BYTES = 256 << 20
TENSORS_OF_RANK = 400


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def cpu_timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of all processors for this process."""
    started, worked = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - worked


class Discarded(io.RawIOBase):
    """A file that keeps nothing."""

    size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        length = len(memoryview(data).cast("B"))
        self.size += length
        return length


def parts(folder: Path) -> None:
    """Print the processor seconds that each part of a save and a load takes for a GB."""
    folder.mkdir(parents=True)
    source, target, path = torch.randn(PART_BYTES // 4), torch.zeros(PART_BYTES // 4), folder / "part"
    content, room = (memoryview(tensor.numpy()).cast("B") for tensor in (source, target))

    def digest() -> None:
        sha256 = hashlib.sha256()
        for start in range(0, PART_BYTES, CHUNK):
            sha256.update(content[start : start + CHUNK])

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, PART_BYTES, CHUNK):
                file.write(content[start : start + CHUNK])

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            file.readinto(room)

    shape = torch.Size([PART_BYTES // 4])
    for name, action in {
        "copy in memory": lambda: target.copy_(source),
        "first touch of memory in small pages": lambda: torch.empty(shape).zero_(),
        "first touch of memory in huge pages": lambda: new_memory(shape, torch.float32).zero_(),
        "sha256": digest,
        "CRC, by torch.save": lambda: torch.save(source, Discarded()),  # type: ignore[arg-type]
        "write to the file cache": write,
        "read from the file cache": read,
    }.items():
        seconds = []
        for _ in range(5):
            worked = time.thread_time()
            action()
            seconds.append(time.thread_time() - worked)
        print(f"processor seconds per GB: {name} {min(seconds) / PART_BYTES * 1e9:.2f}")


def built(gib: float) -> tuple[Any, Any]:
    """Model chunks and optimizer after one update, 14 bytes per parameter in a checkpoint."""
    layers = max(2, 2 * round(gib * 2**30 / 14 / 17e6))
    shape = {"hidden_size": 512, "ffn_hidden_size": 1536, "moe_ffn_hidden_size": 1024, "num_layers": layers}
    fields = experiment_fields(Path("none"), Path("none"), precision={"dtype": "bf16"})
    fields["model"] |= shape | {"num_attention_heads": 8, "num_query_groups": 4}
    experiment = Experiment.model_validate(fields)
    chunks, wrapped = setup._build_model(experiment, world_of_one())
    optimizer = setup.build_optimizer(wrapped, experiment, world_of_one())
    for model in wrapped:
        model.zero_grad_buffer()
    optimizer.step()
    return chunks, optimizer


def prepared(saver: Saver) -> None:
    """As a run does in a thread."""
    saver.prepare()
    assert saver._preparing is not None
    saver._preparing.wait()


def side_by_side(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(FILES_PER_RANK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain_write(folder: Path, num_bytes: int, source: memoryview) -> None:
    def write(number: int) -> None:
        with (folder / f"plain_{number}").open("wb", buffering=0) as file:
            left = num_bytes // FILES_PER_RANK
            while left > 0:
                left -= file.write(source[: min(left, CHUNK)])
            os.fsync(file.fileno())

    side_by_side(write)


def plain_read(folder: Path) -> None:
    def read(number: int) -> None:
        room = bytearray(CHUNK)
        with (folder / f"plain_{number}").open("rb", buffering=0) as file:
            while file.readinto(room):
                pass

    side_by_side(read)


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def saving(folder: Path, gib: float) -> None:
    """Print a line per figure."""
    chunks, optimizer = built(gib)
    before, saver = peak_gib(), Saver(chunks, optimizer)
    took: dict[str, list[float]] = {}
    print(f"memory allocated beside training: {timed(lambda: prepared(saver)):.2f} s")
    saver.begin(folder, 1, None)
    saved = saver.finish()
    assert saved is not None
    size = sum(path.stat().st_size for path in saved.folder.iterdir())
    source = memoryview(bytearray(os.urandom(CHUNK)))
    print(f"checkpoint {size / 2**30:.2f} GiB, host memory {saver._memory.num_bytes / 2**30:.2f} GiB")
    print(f"first save {saved.seconds:.2f} s, copied in {saved.copy_seconds:.2f} s")
    print(f"peak of resident memory before {before:.2f} GiB, after the first save {peak_gib():.2f} GiB")
    worked: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], object]) -> None:
        seconds, of_processors = cpu_timed(action)
        took.setdefault(name, []).append(seconds)
        worked.setdefault(name, []).append(of_processors)

    def save(turn: int) -> None:
        note("stall of an asynchronous save", lambda: saver.begin(folder, 2 + turn, 1))
        saver.finish()

    for turn in range(TURNS):
        note("plain write", lambda: plain_write(folder, size, source))
        note("save", lambda turn=turn: save(turn))  # type: ignore[misc]
        drop_cache(folder)
        note("plain read", lambda: plain_read(folder))
        drop_cache(folder)
        new_memory(torch.Size([size]), torch.uint8).zero_()
        note("load", lambda: save_load.load_newest(folder, chunks, optimizer))
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    for name, seconds in took.items():
        each = ", ".join(f"{one:.2f}" for one in seconds)
        of_processors = statistics.median(worked[name]) / size * 1e9
        rate = size / middle[name] / 1e6
        print(f"{name}: {middle[name]:.2f} s ({each}), {rate:.0f} MB/s, {of_processors:.2f} processor seconds per GB")
    print(f"load of the machine: {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")
    print(f"save / plain write: {middle['plain write'] / middle['save']:.2f} of the disk's speed")
    print(f"load / plain read: {middle['plain read'] / middle['load']:.2f} of the disk's speed")
    print(f"stall / save: {middle['stall of an asynchronous save'] / middle['save']:.1%}")
    print(f"peak of resident memory {peak_gib():.2f} GiB")


def joining(folder: Path, ranks: int) -> None:
    """Print the seconds of rank 0 for the reports of `ranks` ranks: in the first save, and in a later one."""
    parts = JoinedParts()
    for turn in ("first", "later"):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / REPORTS).mkdir(parents=True)
        for rank in range(ranks):
            places = [
                [f"tensor_{number}", f"__{rank}_0.distcp", number, 1, "torch.float32", (ranks, 8), (rank, 0), (1, 8)]
                for number in range(TENSORS_OF_RANK)
            ]
            (folder / f"__{rank}_0.distcp").write_bytes(b"x")
            write_report(folder, rank, {f"__{rank}_0.distcp": {"bytes": 1, "sha256": ""}}, places)
        seconds, worked = cpu_timed(lambda: parts.join(folder, ranks))
        size = f".metadata {(folder / '.metadata').stat().st_size / 1e6:.1f} MB"
        took = f"{seconds:.2f} s, {worked:.2f} of a processor"
        print(f"{ranks} ranks, {turn} save: {took}, {size}, peak {peak_gib():.2f} GiB")


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    root, gib = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.5
    with tempfile.TemporaryDirectory(dir=root) as folder, contextlib.suppress(KeyboardInterrupt):
        parts(Path(folder) / "parts")
        torch.set_num_threads(os.cpu_count() or 1)
        if gib > 0:
            saving(Path(folder) / "run", gib)
        for ranks in map(int, sys.argv[3:] or ("64", "512", "2048")):
            joining(Path(folder) / "joined", ranks)


if __name__ == "__main__":
    main()
