"""Forward and backward passes of whole steps as CUDA graphs (runtime.cuda_graphs).

A graph holds all micro-batches of a step, their reductions included, up to the reduced gradients. The optimizer runs as
always: its learning rate is a number of the host. The first step with a certain shape runs as always too, on the memory
that the graph will read: it compiles and loads kernels and opens NCCL's connections, none of which can be recorded. The
second one is recorded and replayed, the others are replayed.

What changes from step to step is written into that memory before: tokens, positions, labels, masks, numbers of routing
groups, boundaries of documents, the keys of recycle routing, the count of target tokens. Boundaries have room for the
next power of two of documents; a step with more of them starts again with more room. All ranks do so in the same step:
the room depends on the global batch, and NCCL exchanges addresses of buffers between ranks when it is recorded.

megatron-core's FullCudaGraphWrapper is not used: it records one step per process, so it cannot go on to the next stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.varlen_attention import padded, recorded_documents, room_for
from hunyuan_pretrain.runtime.handover import recording
from hunyuan_pretrain.runtime.transfers import Resident
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import SentBatch, Share, forward_and_backward, routing_of, share_of

Result = tuple[list[Tensor], list[Tensor]]
"""Of `forward_and_backward`."""


class Graph(Protocol):
    """Recorded work of a device."""

    def record(self, work: Callable[[], Result]) -> Result:
        """Call `work` and record what it gives the device to do, without doing it. Returns what `work` returns; a
        replay writes the values."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph, of the current stream; this must not be the default stream."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Result]) -> Result:
        # the stream of the run, and not one of its own: autograd adds up gradients on the stream on which the weights
        # were wrapped, and a recorded stream cannot wait for one that is not. thread_local: NCCL's watchdog asks for
        # events meanwhile
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class Shape(NamedTuple):
    """What a recorded step takes from the host: a step of another shape needs another graph."""

    sequence_length: int
    micro_batch_sequences: int
    num_micro_batches: int
    rope_alpha: float
    global_batch_tokens: int
    num_documents: int
    """Room for them in each micro-batch."""


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
        if self._memory is None or not _has_room(self._memory.shape, shape):
            self.close()
            memory = self._memory = Memory(shape, shares, key_L, run.device)
            memory.write(shares, key_L, num_target_tokens)
            return self._work(run, stage, step, memory)()
        self._memory.write(shares, key_L, num_target_tokens)
        if self._graph is None:
            self._record(step, self._work(run, stage, step, self._memory))
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        return self._result

    def _record(self, step: int, work: Callable[[], Result]) -> None:
        graph = self._make_graph()
        try:
            with recording():
                self._result = graph.record(work)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"step {step + 1} cannot be recorded as a CUDA graph: {reason}; runtime.cuda_graphs=false trains "
                "without, to the same numbers"
            ) from error
        self._graph = graph

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
        room_for(run.loader.order.most_documents(step)),
    )


def _has_room(recorded: Shape, wanted: Shape) -> bool:
    fixed = recorded._replace(num_documents=0) == wanted._replace(num_documents=0)
    return fixed and recorded.num_documents >= wanted.num_documents
