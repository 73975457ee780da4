"""Chooses the attention backends of a run on a GPU, before its first step: the fastest that are right.

Each backend that this machine has (config/attention.py) computes attention of random numbers in the sizes of this rank,
with the documents of the first micro-batch, forward and backward. It is compared with `packed_attention` and timed.
Micro-batches whose documents all have one length may get a backend of their own. All ranks take the same: a backend is
as slow as on the slowest rank, and out if it is wrong on any.

The choice is recorded in the run's history. A run that resumes keeps it, so that it computes what it would have
computed without the interruption; where the recorded backend cannot be kept, the run stops, and only
runtime.attention_backend gives it another. Two fresh runs may choose differently where two backends are about as fast;
the setting fixes the choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.attention import KINDS, AttentionChoice, BackendName, Kind, candidates
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.loader import MicroBatch, StepLoader
from hunyuan_pretrain.model.attention_backends import BUILDERS, CoreAttention, Heads, heads_of, use_attention
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.packed_attention import (
    Block,
    context_blocks,
    document_blocks,
    is_uniform,
    packed_attention,
)
from hunyuan_pretrain.model.varlen_attention import Documents, padded, recorded_documents
from hunyuan_pretrain.parallel.agreement import give_back
from hunyuan_pretrain.parallel.comparison import sums_of_ranks, told_by, worst_of_ranks
from hunyuan_pretrain.parallel.context_parallel import rows_of_ranks
from hunyuan_pretrain.runtime.device import Machine, probe
from hunyuan_pretrain.runtime.handover import to_device
from hunyuan_pretrain.runtime.policy import attention_obstacles
from hunyuan_pretrain.train import resume
from hunyuan_pretrain.train.attention_check import ROUNDINGS, Compared, allowed_difference
from hunyuan_pretrain.train.recorded_step import CudaGraph, Graph
from hunyuan_pretrain.train.resume import Start

MARGIN = 0.05
"""A backend must be faster by more than this than one before it in config/attention.py: the noise of a measurement
should not decide."""
MOST_SCORES = 1 << 33
"""Where a rank has more queries x keys x heads in a micro-batch, fewer heads are measured. They take tens of
milliseconds on a Hopper GPU."""
Obstacles = Mapping[BackendName, str | None]
"""Why each backend is known not to run on this machine; None if nothing is known against it."""
WHAT: dict[Kind, str] = {"packed": "packs", "uniform": "documents of one length"}
REPLAY_DIFFERENCE = 2.0**-5
"""Of the largest value: what another order of sums explains in bf16. Other documents change all of it."""
make_graph: Callable[[], Graph] = CudaGraph
CALLS = (2, 5)
"""Timed calls: of a slow backend, and of one that takes less than SLOW_MS."""
SLOW_MS = 50.0


class Case(NamedTuple):
    """The attention of one rank in one kind of micro-batch."""

    blocks: Sequence[Block]
    num_keys: int
    heads: Heads
    dtype: torch.dtype
    device: torch.device
    longest: int
    """Length of a sequence."""
    room: int = 0
    """Documents that a recorded step has room for (runtime.cuda_graphs); 0: steps are not recorded."""


class Trial(NamedTuple):
    """What a backend did with a case."""

    milliseconds: float
    """Forward and backward; infinity if it failed or was wrong."""
    reason: str
    """Why it is out; "" if it is not."""
    lacks_memory: bool = False
    """Whether the reason is a want of memory, which says nothing about the backend."""


NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""In the errors of CUDA, cuBLAS and cuDNN; torch's own have a class."""


def settle(
    experiment: Experiment,
    groups: ProcessGroupCollection,
    chunks: Sequence[torch.nn.Module],
    loader: StepLoader,
    device: torch.device,
    start: Start,
) -> Start:
    """Choose the attention backends of a run and give them to its model. Returns `start` with the choice in its history
    and log lines. On a CPU the backend is per_document; nothing is tried and nothing recorded.

    Raises ConfigError, on every rank, if no backend that the setting allows can be used. Communicates: all ranks.
    """
    recorded = resume.attention_so_far(start)
    if device.type == "cpu":
        return resume.with_attention(start, {}, ()) if recorded else start
    config: Any = chunks[0].config
    step = min(start.first_step, loader.num_steps - 1)
    batch = loader.micro_batches(step)[0]
    room = loader.order.most_documents(step) if experiment.runtime.cuda_graphs else 0
    ranks = groups.cp.rank(), groups.cp.size()
    # cuDNN's kernels advance the generator, even without dropout; a resumed run has loaded its state already
    with torch.random.fork_rng(devices=[device]):
        choice, lines = choose(experiment, probe(), config, batch, ranks, device, recorded, room=room)
    use_attention(chunks, choice)
    return resume.with_attention(start, choice._asdict(), lines)


def choose(
    experiment: Experiment,
    machine: Machine,
    config: HunyuanConfig,
    batch: MicroBatch,
    ranks: tuple[int, int],
    device: torch.device,
    recorded: Mapping[str, str],
    room: int = 0,
) -> tuple[AttentionChoice, list[str]]:
    """(the backends of this run, lines for the log).

    batch: the first micro-batch of this rank. ranks: (number, size) in the context-parallel group. recorded: the choice
    of the run so far, {} if there is none; a backend of it is kept if the setting allows it. room: of Case. Raises
    ConfigError, on every rank, if a recorded backend that the setting allows is wrong or fails here, other than for
    want of memory, or if none can be used; on this rank alone if a kernel has left its GPU unusable. Communicates: all
    ranks.
    """
    setting = experiment.runtime.attention_backend
    obstacles = attention_obstacles(machine, experiment)
    names: dict[Kind, BackendName] = {}
    lines: list[str] = []
    for kind in KINDS:
        case = case_of(experiment, config, batch, ranks, device, kind)._replace(room=room)
        if kind == "uniform" and (room or not is_uniform(case.blocks, case.num_keys)):
            # a recorded step takes each micro-batch as packed; with context parallelism by all_gather none is uniform
            names[kind] = names["packed"]
            continue
        allowed = candidates(setting, kind)
        if recorded.get(kind) in allowed:
            names[kind], line = _kept(cast("BackendName", recorded[kind]), kind, case, obstacles, setting)
            lines.append(line)
            continue
        found = _try_all(allowed, case, obstacles)
        names[kind] = _fastest(found, setting)
        times = ", ".join(f"{name} {tried.milliseconds:.2f}" for name, tried in found.items() if not tried.reason)
        lines.append(f"attention of {WHAT[kind]}: {names[kind]} ({times} ms, forward and backward)")
        lines += [
            f"attention of {WHAT[kind]}: not {name}: {tried.reason}"
            for name, tried in found.items()
            if tried.reason and obstacles[name] is None
        ]
    return AttentionChoice(names["packed"], names["uniform"]), lines


def _kept(name: BackendName, kind: Kind, case: Case, obstacles: Obstacles, setting: str) -> tuple[BackendName, str]:
    """(the recorded backend, a line for the log). Without memory for a trial it is kept untried: it has computed the
    run so far, and training frees none of what the trial lacks."""
    tried = _try_all([name], case, obstacles)[name]
    if tried.reason and not tried.lacks_memory:
        others = [one for one in candidates("auto", kind) if one != name and obstacles[one] is None]
        rule = f"the run has computed attention of {WHAT[kind]} with {name} so far, and cannot here: {tried.reason}"
        hint = f"to go on with another, set runtime.attention_backend to {' or '.join(others)}; the history records it"
        raise ConfigError("this machine", [Problem("runtime.attention_backend", setting, rule, hint)])
    untried = f"; not tried: {tried.reason}" if tried.reason else ""
    return name, f"attention of {WHAT[kind]}: {name} (as in the run so far{untried})"


def _fastest(found: Mapping[BackendName, Trial], setting: str) -> BackendName:
    best = min(tried.milliseconds for tried in found.values())
    if not math.isfinite(best):
        rule = "; ".join(f"{name}: {tried.reason}" for name, tried in found.items())
        hint = "use auto" if setting != "auto" else "run `hunyuan-pretrain doctor` with this file on each node"
        raise ConfigError("this machine", [Problem("runtime.attention_backend", setting, rule, hint)])
    return next(name for name, tried in found.items() if tried.milliseconds * (1 - MARGIN) <= best)


# --- trials -----------------------------------------------------------------------------------------------------------


def _try_all(names: Sequence[BackendName], case: Case, obstacles: Obstacles) -> dict[BackendName, Trial]:
    """Try these backends; of each, the trial of the rank on which it is out, or else slowest: the same on all ranks.

    Raises ConfigError, on this rank alone, if a kernel has left its GPU unusable. Communicates: all ranks.
    """
    mine = [_trial_alone(name, case, obstacles[name]) for name in names]
    slowest = worst_of_ranks([tried.milliseconds for tried in mine])
    # 0: in order; 1: no memory for a trial, which counts only if there is nothing else; 2: out
    worst = worst_of_ranks([0.0 if not tried.reason else 1.0 if tried.lacks_memory else 2.0 for tried in mine])
    found: dict[BackendName, Trial] = {}
    for name, tried, (level, rank), (milliseconds, _) in zip(names, mine, worst, slowest, strict=True):
        found[name] = Trial(milliseconds, "") if level == 0 else _told(tried, rank, lacks_memory=level == 1)
    return found


def _told(mine: Trial, rank: int, lacks_memory: bool) -> Trial:
    """The trial of a rank on which the backend is out, on every rank; it is named unless all have the same reason."""
    reason = told_by(rank, mine.reason)
    others = sums_of_ranks(int(mine.reason != reason))[0]
    return Trial(math.inf, f"on rank {rank}: {reason}" if others else reason, lacks_memory)


def _trial_alone(name: BackendName, case: Case, obstacle: str | None) -> Trial:
    """As `trial`, unless there is an obstacle. Raises ConfigError if it leaves the GPU unusable, as a kernel does that
    uses a wrong address: this rank cannot take part in what follows."""
    if obstacle is not None:
        return Trial(math.inf, obstacle)
    tried = trial(name, case)
    try:
        give_back(case.device)
    except torch.AcceleratorError as error:
        rule = f"{name} has left the GPU of this rank unusable: {tried.reason or error}"
        problem = Problem("runtime.attention_backend", Problem.NO_VALUE, rule, "set another one")
        raise ConfigError("this machine", [problem]) from error
    return tried


def trial(name: BackendName, case: Case) -> Trial:
    """Compute, compare and time one backend on this rank. Whatever fails is a reason, not an error. Communicates
    nothing."""
    try:
        attend, qkv = BUILDERS[name](case.heads), _numbers(case)
        if case.room:
            if wrong := _replay_is_wrong(attend, qkv, case):
                return Trial(math.inf, wrong)
            attend = _as_recorded(attend, case)
        if attend is not packed_attention and (wrong := _wrong(attend, qkv, case)):
            return Trial(math.inf, wrong)
        return Trial(_milliseconds(attend, qkv, case), "")
    except Exception as error:  # whatever a package, a compiler or a driver raises: the other backends still run
        reason = f"it fails: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        is_memory = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
        return Trial(math.inf, reason, is_memory)


def _as_recorded(attend: CoreAttention, case: Case) -> CoreAttention:
    """`attend`, called as in a recorded step, whatever blocks it is given."""
    documents = _in_memory([0, *(block.q_end for block in case.blocks)], case)
    return lambda q_TNH, k_SGH, v_SGH, blocks: attend(q_TNH, k_SGH, v_SGH, documents)


def _in_memory(boundaries: Sequence[int], case: Case) -> Documents:
    return recorded_documents(to_device(padded(boundaries, case.room), case.device), case.num_keys, case.longest)


def _replay_is_wrong(attend: CoreAttention, qkv: Sequence[Tensor], case: Case) -> str:
    """Record the backend on the documents of the case, and replay it on others; "" if it follows them."""
    documents = _in_memory([0, *(block.q_end for block in case.blocks)], case)
    others = _in_memory(range(0, case.num_keys + 1, max(1, case.longest // 2)), case)
    leaves = [x.detach().requires_grad_() for x in qkv]
    grad = torch.ones_like(leaves[0])

    def work() -> list[Tensor]:
        output = attend(leaves[0], leaves[1], leaves[2], documents)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    with _recordable_stream(case.device):
        work()
        graph = make_graph()
        actual = graph.record(work)
        graph.replay()
        documents.cu_seqlens_q.copy_(others.cu_seqlens_q)
        graph.replay()
        for found, expected in zip(actual, work(), strict=True):
            if not (found - expected).abs().max() <= REPLAY_DIFFERENCE * expected.abs().max():
                return "recorded, it does not follow the documents of later steps"
    return ""


def _recordable_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A context on a stream that can be recorded: the default one cannot."""
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def _wrong(attend: CoreAttention, qkv: Sequence[Tensor], case: Case) -> str:
    """How far the backend is from `packed_attention`, if rounding does not explain it, or what changes from run to
    run; "" if it is right."""
    q, k, v = qkv
    compared = Compared(attend, packed_attention)
    compared(q, k, v, case.blocks)
    longest = max(block.k_end - block.k_start for block in case.blocks)
    for what, difference in compared.differences.items():
        allowed = allowed_difference(ROUNDINGS[what], case.dtype, longest + case.heads.width)
        if not difference.item() <= allowed:
            return f"its {what} is wrong here by {difference.item():.2g}; rounding explains {allowed:.2g}, relative"
    if torch.are_deterministic_algorithms_enabled():
        repeated = Compared(attend, attend)
        repeated(q, k, v, case.blocks)
        if varying := [what for what, difference in repeated.differences.items() if difference.item() != 0]:
            return f"its {', '.join(varying)} vary from run to run, and runtime.deterministic is true"
    return ""


def _milliseconds(attend: CoreAttention, qkv: Sequence[Tensor], case: Case) -> float:
    """Forward and backward pass; the fastest of some calls after one that may compile."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    grad = torch.ones_like(leaves[0])

    def once() -> float:
        _wait(case.device)
        started = time.perf_counter()
        torch.autograd.grad(attend(leaves[0], leaves[1], leaves[2], case.blocks), leaves, grad)
        _wait(case.device)
        return 1000 * (time.perf_counter() - started)

    once()
    taken = [once() for _ in range(CALLS[0])]
    if min(taken) < SLOW_MS:
        taken += [once() for _ in range(CALLS[1] - CALLS[0])]
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- cases ------------------------------------------------------------------------------------------------------------


def case_of(
    experiment: Experiment,
    config: HunyuanConfig,
    batch: MicroBatch,
    ranks: tuple[int, int],
    device: torch.device,
    kind: Kind,
) -> Case:
    """The attention of this rank in such a micro-batch. Fewer heads stand for all if it is large (MOST_SCORES)."""
    (rank, size), cu_seqlens = ranks, cu_seqlens_of(batch, kind)
    if size > 1 and config.parallel.context_parallel_method == "all_gather":
        unit = experiment.model.moe_routing_group_tokens
        blocks = context_blocks(cu_seqlens, rows_of_ranks(cu_seqlens, len(batch.sequence_ids), size, unit)[rank])
    else:
        blocks = document_blocks(cu_seqlens)
    heads = _measured_heads(heads_of(config), blocks)
    num_tokens = len(batch.tokens_T)
    return Case(blocks, num_tokens, heads, config.params_dtype, device, num_tokens // len(batch.sequence_ids))


def cu_seqlens_of(batch: MicroBatch, kind: Kind) -> list[int]:
    """cu_seqlens of a micro-batch of this kind: of `batch` itself if it is one, else of one of its size.

    A uniform one has a document for each sequence. Where all documents of `batch` have one length, a packed one has
    four of different lengths in each sequence.
    """
    total, cu_seqlens = len(batch.tokens_T), batch.cu_seqlens.tolist()
    length = total // len(batch.sequence_ids)
    if is_uniform(document_blocks(cu_seqlens), total) == (kind == "uniform"):
        return cu_seqlens
    return list(range(0, total + 1, length)) if kind == "uniform" else _split(cu_seqlens, length)


def _split(cu_seqlens: Sequence[int], length: int) -> list[int]:
    """Documents of 1/8, 1/4, 1/8 and 1/2 of each sequence; shorter than 8 tokens they stay whole."""
    if length < 8:
        return list(cu_seqlens)
    within = [0, length // 8, 3 * length // 8, length // 2]
    return [start + offset for start in range(0, cu_seqlens[-1], length) for offset in within] + [cu_seqlens[-1]]


def _measured_heads(heads: Heads, blocks: Sequence[Block]) -> Heads:
    """All, or as many key/value heads with their query heads as keep to MOST_SCORES, at least one."""
    scores = sum((block.q_end - block.q_start) * (block.k_end - block.k_start) for block in blocks)
    shared = heads.queries // heads.groups
    kept = max(1, min(heads.groups, MOST_SCORES // (scores * shared)))
    return Heads(shared * kept, kept, heads.width)


def _numbers(case: Case) -> list[Tensor]:
    """q, k and v, contiguous, as a layer hands them over on a GPU."""
    generator = torch.Generator(case.device).manual_seed(1)
    shapes = ((case.blocks[-1].q_end, case.heads.queries), *[(case.num_keys, case.heads.groups)] * 2)
    return [
        torch.randn(*shape, case.heads.width, generator=generator, device=case.device).to(case.dtype)
        for shape in shapes
    ]
