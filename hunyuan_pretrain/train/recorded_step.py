"""Forward and backward passes of whole steps as CUDA graphs (runtime.cuda_graphs).

A graph holds all micro-batches of a step, their reductions included, up to the reduced gradients. The optimizer runs as
always: its learning rate is a number of the host. The first steps of a stage run as always too, on the memory that the
graph will read: they compile and load kernels and open NCCL's connections, none of which can be recorded. The next one
is recorded and replayed, the others are replayed.

What changes from step to step is written into that memory before: tokens, positions, labels, masks, numbers of routing
groups, boundaries of documents, the keys of recycle routing, the count of target tokens. Boundaries have room for as
many documents as a micro-batch of the stage can have. The room depends on the data of the stage only: some kernels sum
in another order for another number of documents, and NCCL may exchange addresses of buffers while it is recorded, so
all ranks record the same step.

megatron-core's FullCudaGraphWrapper is not used: it records one step per process, so it cannot go on to the next stage.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.varlen_attention import padded, recorded_documents
from hunyuan_pretrain.runtime.handover import recording
from hunyuan_pretrain.runtime.transfers import Resident
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.feed import SentBatch, Share, share_of
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import forward_and_backward, routing_of

R = TypeVar("R")
Result = tuple[list[Tensor], list[Tensor]]
"""Of `forward_and_backward`."""


class Graph(Protocol):
    """Recorded work of a device."""

    def record(self, work: Callable[[], R]) -> R:
        """Call `work` and record what it gives the device to do, without doing it. Returns what `work` returns; a
        replay writes the values."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph, of the current stream; this must not be the default stream."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], R]) -> R:
        # the stream of the run, and not one of its own: autograd adds up gradients on the stream on which the weights
        # were wrapped, and a recorded stream cannot wait for one that is not. thread_local: NCCL's watchdog asks for
        # events meanwhile
        stream = torch.cuda.current_stream()
        with uncollected(), torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside: freeing pinned memory or events there would end the recording."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Shape(NamedTuple):
    """What a recorded step takes from the host: a step of another shape needs another graph."""

    sequence_length: int
    micro_batch_sequences: int
    num_micro_batches: int
    rope_alpha: float
    global_batch_tokens: int
    hidden_dropout: float
    num_documents: int
    """Room for them in each micro-batch."""


COMPUTED = 2
"""Steps of a stage before the one that is recorded. In the first one with overlapped reductions core reduces at its
end; in the second as it will from then on."""


class Memory:
    """Where the recorded step reads its inputs."""

    def __init__(self, shape: Shape, shares: list[Share], key_L: Tensor, device: torch.device) -> None:
        self.shape = shape
        self.num_target_tokens = torch.zeros((), dtype=torch.float64, device=device)
        resident = self._resident = Resident(self._tensors(shares, key_L), device)
        *per_batch, self.key_L = resident.tensors
        width = len(shares[0].tensors) + 1
        num_tokens = len(shares[0].tensors[0])
        self.batches: list[SentBatch] = []
        for start in range(0, len(per_batch), width):
            *tensors, cu_seqlens = per_batch[start : start + width]
            documents = recorded_documents(cu_seqlens, num_tokens, shape.sequence_length)
            self.batches.append(SentBatch(partial(tuple, tensors), documents, None))

    def write(self, shares: list[Share], key_L: Tensor, num_target_tokens: Tensor) -> None:
        """The inputs of the next step; `num_target_tokens` is on the device."""
        self._resident.write(self._tensors(shares, key_L))
        self.num_target_tokens.copy_(num_target_tokens)

    def _tensors(self, shares: list[Share], key_L: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for share in shares:
            found += [*share.tensors, padded(share.cu_seqlens, self.shape.num_documents)]
        return [*found, key_L]


class RecordedSteps:
    """Runs the forward and backward passes of a run's steps, one graph at a time."""

    def __init__(self, make_graph: Callable[[], Graph] = CudaGraph) -> None:
        self._make_graph = make_graph
        self.close()

    def close(self) -> None:
        """Free the graph and its memory. NCCL's groups must outlive it."""
        self._memory: Memory | None = None
        self._computed = 0
        self._graph: Graph | None = None
        self._result: Result | None = None

    def forward_and_backward(
        self,
        run: Run,
        stage: StageConfig,
        step: int,
        batches: list[MicroBatch],
        num_target_tokens: Tensor,
        key_L: Tensor,
    ) -> Result:
        """As `forward_and_backward` of train/step.py, in the FP8 recipe of the run; `key_L` on the CPU. What it returns
        is valid until the next call. Raises TrainingError if the step cannot be recorded."""
        shape = shape_of(run, stage, step, len(batches))
        shares = [share_of(run, batch) for batch in batches]
        if self._memory is None or self._memory.shape != shape:
            self.close()
            self._memory = Memory(shape, shares, key_L, run.device)
        self._memory.write(shares, key_L, num_target_tokens)
        work = self._work(run, stage, step, self._memory)
        if self._computed < COMPUTED:
            self._computed += 1
            return work()
        if self._graph is None:
            self._record(run, step, work)
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        return self._result

    def _record(self, run: Run, step: int, work: Callable[[], Result]) -> None:
        graph, started = self._make_graph(), time.perf_counter()
        try:
            with recording():
                self._result = graph.record(work)
        except Exception as error:
            raise TrainingError(
                f"step {step + 1} cannot be recorded as a CUDA graph: {_first_reason(error)}; "
                "runtime.cuda_graphs=false trains without"
            ) from error
        self._graph = graph
        run.log.line(f"recorded step {step + 1} as a CUDA graph in {time.perf_counter() - started:.1f} s")

    def _work(self, run: Run, stage: StageConfig, step: int, memory: Memory) -> Callable[[], Result]:
        route: Any = partial(routing_of, run, stage, step, memory.key_L)
        return partial(
            forward_and_backward,
            run,
            stage,
            lambda: iter(memory.batches),
            len(memory.batches),
            memory.num_target_tokens,
            route,
            in_fp8=True,
        )


def shape_of(run: Run, stage: StageConfig, step: int, num_micro_batches: int) -> Shape:
    """The shape of a step; the same on all ranks."""
    return Shape(
        stage.sequence_length,
        stage.micro_batch_sequences,
        num_micro_batches,
        stage.rope_alpha,
        stage.global_batch_tokens,
        stage.hidden_dropout,
        run.loader.order.most_documents(step),
    )


def _first_reason(error: BaseException) -> str:
    """Of the error that came first: where one ends a recording, CUDA reports another at its end."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
