"""`doctor --cluster`: whether the ranks of a job are alike, and which of them is slow. Each rank runs this, under
torchrun or srun; rank 0 prints.

Three measurements, on the devices and with the library that training would use:
- each rank computes alone;
- all ranks reduce and exchange together, in messages of several sizes. A rate is bus bandwidth as nccl-tests defines
  it (its PERFORMANCE.md): bytes over time, times 2 (n - 1) / n for an all-reduce and (n - 1) / n for an all-to-all, so
  that it can be compared with the speed of the links whatever the number of ranks;
- pairs of nodes exchange, every rank with the rank at its place on the other node; within one node pairs of ranks do.
  A round-robin tournament gives each node another partner in each round, all at the same time. One slow partner makes
  one slow pair; a node whose median pair is slow is slow itself.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import with_absolute_paths
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.parallel.collectives import all_gather_rows
from hunyuan_pretrain.parallel.comparison import sums_of_ranks
from hunyuan_pretrain.parallel.groups import initialize_distributed
from hunyuan_pretrain.runtime.device import gpu_state, probe, usable_cores
from hunyuan_pretrain.train import same_start

TIMEOUT_S = 60
SERIES = 3
"""The fastest of so many counts, after one to warm up, of the collectives; the median exchange of a pair."""
BUDGET_S = 10.0
"""Most seconds for each size of a collective, and for the tournament; fewer calls and rounds are made if it is
short."""
MOST_ROUNDS = 16
"""Partners of a node; NCCL connects to each for the first time, which takes tens of milliseconds."""
SLOW = 0.7
"""A rank, or a node, with less than this share of the median rate is slow."""
NOISE_S = {"cuda": 1e-4, "cpu": 2e-3}
"""What takes longer by less than this is not slow: the system had something else to do."""
GPU_BYTES, CPU_BYTES = (2**20, 2**26, 2**29), (2**16, 2**20)
GPU_MATRIX, CPU_MATRIX = 8192, 384


Rows = list[tuple[str, str, str]]
"""(what, figure, note)."""


class Place(NamedTuple):
    """Where the ranks are."""

    rank: int
    world: int
    local: int
    """Place of this rank on its node."""
    per_node: int

    @property
    def units(self) -> int:
        """Nodes, or the ranks of a single node: what plays the tournament."""
        return self.world // self.per_node if self.world > self.per_node else self.world

    @property
    def unit(self) -> int:
        """The number of this rank's."""
        return self.rank // self.per_node if self.world > self.per_node else self.rank


class Found(NamedTuple):
    """What rank 0 prints."""

    rows: Rows
    slow: list[str]
    """A sentence for each slow rank or node."""


def join() -> tuple[Place, torch.device]:
    """Join the ranks that the environment names. Communicates: all ranks."""
    device = torch.device("cpu")
    if probe().gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    initialize_distributed("nccl" if device.type == "cuda" else "gloo", TIMEOUT_S)
    rank, world = dist.get_rank(), dist.get_world_size()
    local, per_node = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    is_odd = world % per_node != 0 or rank % per_node != local
    # nodes with different numbers of ranks have no rank at the same place: then each rank plays for itself
    return Place(rank, world, local, world if sums_of_ranks(is_odd)[0] else per_node), device


def measure(place: Place, device: torch.device, sizes: Sequence[int] = ()) -> Found:
    """Measure, within a minute. `sizes`: bytes of the messages, of which pairs exchange the middle one; default: by
    device.

    Communicates: all ranks.
    """
    sizes = sizes or (GPU_BYTES if device.type == "cuda" else CPU_BYTES)
    hosts = _hosts(place, device)
    seconds = _computing(device)
    rows, slow = _rows_of_computing(_all(seconds, device), hosts, NOISE_S[device.type])
    if place.world > 1:
        for size in sizes:
            rows += _collectives(size, place, device)
        more, slow_links = _tournament(_size_of_pairs(sizes), place, device, hosts)
        rows, slow = rows + more, slow + slow_links
    return Found(rows, slow)


def compare(experiment: Experiment | None) -> list[str]:
    """What differs between the ranks and keeps a run from starting, the same on every rank. Communicates: all ranks."""
    if experiment is None:
        return [str(problem) for problem in same_start.differing(same_start.facts_of_this_rank())]
    try:
        same_start.meet(with_absolute_paths(experiment))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    except DataFormatError as error:
        return [str(error)]
    return []


def rows_of_ranks(place: Place, device: torch.device) -> Rows:
    """Where the ranks are, and what each may use: cores by its affinity, threads. Communicates: all ranks."""
    cores = _all(usable_cores(), device)
    threads = _all(torch.get_num_threads(), device)
    nodes = len(set(_hosts(place, device)))
    return [
        ("ranks", f"{place.world} on {nodes} node{'s' if nodes > 1 else ''}", dist.get_backend()),
        ("device", gpu_state(device.index), "of rank 0"),
        ("cores that a rank may use", _span(cores), "by affinity and the container's quota"),
        ("threads of torch", _span(threads), "training on CPU sets its own: runtime.cpu_threads_per_rank"),
    ]


def _span(values: list[float]) -> str:
    least, most = int(min(values)), int(max(values))
    return f"{least}" if least == most else f"{least} to {most} (fewest: rank {values.index(min(values))})"


def end() -> None:
    """Leave the ranks once all are done. Communicates: all ranks."""
    dist.barrier()
    dist.destroy_process_group()


# --- each rank alone --------------------------------------------------------------------------------------------------


def _computing(device: torch.device) -> float:
    """Seconds of a matrix product on this rank."""
    size = GPU_MATRIX if device.type == "cuda" else CPU_MATRIX
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return min(_timed(partial(torch.mm, a, b), device) for _ in range(10))


def _rows_of_computing(of_ranks: list[float], hosts: list[str], noise_s: float) -> tuple[Rows, list[str]]:
    usual = statistics.median(of_ranks)
    slow = [
        f"rank {rank} on {hosts[rank]} computes at {usual / seconds:.0%} of the median rank's speed"
        for rank, seconds in enumerate(of_ranks)
        if usual / seconds < SLOW and seconds - usual > noise_s
    ]
    slowest = max(range(len(of_ranks)), key=of_ranks.__getitem__)
    note = f"slowest: rank {slowest} on {hosts[slowest]}, {1000 * of_ranks[slowest]:.3g} ms"
    return [("matrix product, each rank", f"median {1000 * usual:.3g} ms", note)], slow


# --- all ranks together -----------------------------------------------------------------------------------------------


def _collectives(size: int, place: Place, device: torch.device) -> Rows:
    n = place.world
    sent = torch.zeros(max(size // 4 // n, 1) * n, device=device)
    received = torch.empty_like(sent)
    num_bytes, rows = sent.numel() * 4, []
    for name, operation, factor in (
        ("all-reduce", partial(dist.all_reduce, sent), 2 * (n - 1) / n),
        ("all-to-all", partial(dist.all_to_all_single, received, sent), (n - 1) / n),
    ):
        seconds = _together(operation, device)
        rate = num_bytes / seconds * factor
        what = f"{name} of {_amount(num_bytes)}, {n} ranks"
        rows.append((what, f"{rate / 1e9:.3g} GB/s bus bandwidth", f"{1000 * seconds:.3g} ms on the slowest rank"))
    return rows


def _together(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the slowest rank; all ranks make the same number of calls."""
    best, began = float("inf"), time.perf_counter()
    for series in range(SERIES + 1):
        dist.barrier()
        slowest = torch.tensor([_timed(operation, device), time.perf_counter() - began], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds, so_far = slowest.tolist()
        best = min(best, seconds) if series or so_far > BUDGET_S else best
        if so_far > BUDGET_S:
            break
    return best


# --- pairs ------------------------------------------------------------------------------------------------------------


def rounds(units: int) -> Iterator[list[tuple[int, int]]]:
    """A round-robin tournament by the circle method: in each round every unit has at most one partner, and after all
    rounds each has met each other once."""
    circle: list[int | None] = list(range(units))
    circle += [None] if units % 2 else []
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle[1:] = [circle[-1], *circle[1:-1]]


def _tournament(size: int, place: Place, device: torch.device, hosts: list[str]) -> tuple[Rows, list[str]]:
    """Rows, and a sentence for each slow node, or for each slow rank of a single node."""
    sent = torch.zeros(max(size // 4, 1), device=device)
    received = torch.empty_like(sent)
    schedule = list(rounds(place.units))
    step = max(1, len(schedule) // MOST_ROUNDS)  # spread, so that partners are near and far
    of_pairs: dict[tuple[int, int], float] = {}
    began = time.perf_counter()
    for pairs in schedule[::step][:MOST_ROUNDS]:
        partner = next((a + b - place.unit for a, b in pairs if place.unit in (a, b)), None)
        seconds = 0.0 if partner is None else _exchange(_peer(place, partner), sent, received, device)
        of_ranks = _all(seconds, device)  # also a barrier: no pair disturbs another round
        for a, b in pairs:
            slowest = max(s for rank, s in enumerate(of_ranks) if _unit_of(place, rank) in (a, b))
            of_pairs[a, b] = sent.numel() * 4 / max(slowest, 1e-9)
        if max(_all(time.perf_counter() - began, device)) > BUDGET_S:
            break
    return _judged(of_pairs, place, hosts, sent.numel() * 4, NOISE_S[device.type])


def _peer(place: Place, partner: int) -> int:
    return partner * place.per_node + place.local if place.world > place.per_node else partner


def _unit_of(place: Place, rank: int) -> int:
    return rank // place.per_node if place.world > place.per_node else rank


def _exchange(peer: int, sent: Tensor, received: Tensor, device: torch.device) -> float:
    """Seconds in which two ranks send and receive at once; the median of some, after one to connect."""

    def exchange() -> None:
        messages = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    return statistics.median([_timed(exchange, device) for _ in range(SERIES + 1)][1:])


def _judged(
    of_pairs: dict[tuple[int, int], float], place: Place, hosts: list[str], num_bytes: int, noise_s: float
) -> tuple[Rows, list[str]]:
    """of_pairs: pair of units -> bytes per second each way, of its slowest rank."""
    is_nodes = place.world > place.per_node
    names = [f"node {hosts[u * place.per_node]}" if is_nodes else f"rank {u} on {hosts[u]}" for u in range(place.units)]
    rates = [[rate for pair, rate in of_pairs.items() if unit in pair] for unit in range(place.units)]
    # of two pairs one may be slow for its other end
    scores = [max(mine) if len(mine) < 3 else statistics.median_low(mine) for mine in rates]
    usual, (pair, worst) = statistics.median(scores), min(of_pairs.items(), key=lambda one: one[1])

    def is_slow(rate: float) -> bool:
        return rate < SLOW * usual and num_bytes / rate - num_bytes / usual > noise_s

    what = f"exchange of {_amount(num_bytes)} between {'nodes, each rank' if is_nodes else 'ranks'}"
    rows = [(what, f"median {usual / 1e9:.3g} GB/s each way", f"{len(of_pairs)} pairs")]
    rows.append(("slowest pair", f"{worst / 1e9:.3g} GB/s", " and ".join(sorted(names[unit] for unit in pair))))
    slow = [
        f"{name} exchanges at {score / usual:.0%} of the median rate"
        for name, score in zip(names, scores, strict=True)
        if is_slow(score)
    ]
    if not slow and is_slow(worst):
        slow.append(f"{names[pair[0]]} with {names[pair[1]]} exchanges at {worst / usual:.0%} of the median rate")
    return rows, slow


# --- common -----------------------------------------------------------------------------------------------------------


def _timed(operation: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    operation()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all(value: float, device: torch.device) -> list[float]:
    """The value of each rank: 8 bytes from each."""
    world = dist.group.WORLD
    assert world is not None
    found = all_gather_rows(torch.tensor([value], dtype=torch.float64, device=device), world)
    return [float(x) for x in found.tolist()]


def _hosts(place: Place, device: torch.device) -> list[str]:
    """The host name of each rank: 64 bytes from each."""
    world = dist.group.WORLD
    assert world is not None
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    mine = torch.frombuffer(bytearray(name.encode()[:64].ljust(64)), dtype=torch.uint8).to(device)
    found = all_gather_rows(mine[None], world).cpu()
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in found]


def _size_of_pairs(sizes: Sequence[int]) -> int:
    return sorted(sizes)[len(sizes) // 2]


def _amount(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
