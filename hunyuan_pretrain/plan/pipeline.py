"""The pipeline schedule as megatron-core runs it, simulated: when each forward and backward pass runs on each rank, how
long ranks wait, and how many passes wait for their backward pass.

`program` lists what a rank does, in core's order: `forward_backward_pipelining_without_interleaving` (1F1B, every
message is waited for) and `_with_interleaving` (messages of the steady state run beside computation), of megatron-core
0.16 to 0.19. `simulate` runs the programs of all ranks. As with NCCL, a message begins once both sides have reached it;
messages do not slow each other or computation down.

Stage s, in the order in which a token passes them, is chunk s // ranks of rank s % ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Message = Literal["send_next", "send_prev", "recv_prev", "recv_next"]
"""One end of a message: forward passes send to the next rank, backward passes to the previous one."""


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk."""

    kind: Literal["forward", "backward"]
    chunk: int
    micro_batch: int


class Exchange(NamedTuple):
    """A call that starts messages, and waits for them unless they are waited for later."""

    messages: tuple[Message, ...]
    is_waited_for: bool


class Wait(NamedTuple):
    """Wait for an earlier message: its Exchange is operation number `exchange` of the program."""

    exchange: int
    message: Message


Operation = Pass | Exchange | Wait


def program(rank: int, ranks: int, chunks: int, micro_batches: int) -> list[Operation]:
    """What one pipeline rank does in a step. `chunks` above 1: the interleaved schedule, for which micro_batches is a
    multiple of ranks."""
    if ranks == 1:
        passes = [(Pass("forward", 0, number), Pass("backward", 0, number)) for number in range(micro_batches)]
        return [one for both in passes for one in both]
    return (_Interleaved if chunks > 1 else _OneChunk)(rank, ranks, chunks, micro_batches).operations


class _Program(ABC):
    """Operations of one rank, in order."""

    def __init__(self, rank: int, ranks: int, chunks: int, micro_batches: int) -> None:
        self.ranks, self.chunks = ranks, chunks
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.operations: list[Operation] = []
        total = micro_batches * chunks
        self.warmup = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        self.warmup = min(self.warmup, total)
        # a chunk takes as many micro-batches in turn as there are ranks; the backward passes take the chunks in reverse
        self.order = [
            (chunk, micro_batch)
            for start in range(0, micro_batches, ranks)
            for chunk in range(chunks)
            for micro_batch in range(start, min(start + ranks, micro_batches))
        ]
        self.build(total - self.warmup)

    @abstractmethod
    def build(self, steady: int) -> None:
        """Add all operations. `steady`: forward passes after the warm-up."""

    def exchange(self, *messages: Message | None, is_waited_for: bool = True) -> int:
        """Add a call; None where there is no message, as at the ends of the pipeline. Returns its number."""
        found = tuple(message for message in messages if message is not None)
        if found:
            self.operations.append(Exchange(found, is_waited_for))
        return len(self.operations) - 1

    def forward(self, number: int) -> int:
        """Add the number-th forward pass; returns its chunk."""
        chunk, micro_batch = self.order[number]
        self.operations.append(Pass("forward", chunk, micro_batch))
        return chunk

    def backward(self, number: int) -> int:
        """Add the number-th backward pass; returns its chunk."""
        chunk, micro_batch = self.order[number]
        self.operations.append(Pass("backward", self.chunks - 1 - chunk, micro_batch))
        return self.chunks - 1 - chunk


class _OneChunk(_Program):
    """1F1B."""

    def build(self, steady: int) -> None:
        recv_prev: Message | None = None if self.is_first else "recv_prev"
        send_prev: Message | None = None if self.is_first else "send_prev"
        send_next: Message | None = None if self.is_last else "send_next"
        recv_next: Message | None = None if self.is_last else "recv_next"
        for number in range(self.warmup):
            self.exchange(recv_prev)
            self.forward(number)
            self.exchange(send_next)
        if steady:
            self.exchange(recv_prev)
        for number in range(steady):
            self.forward(self.warmup + number)
            self.exchange(send_next, recv_next)
            self.backward(number)
            self.exchange(send_prev, None if number == steady - 1 else recv_prev)
        for number in range(steady, steady + self.warmup):
            self.exchange(recv_next)
            self.backward(number)
            self.exchange(send_prev)


class _Interleaved(_Program):
    """Several chunks per rank; messages of the steady state overlap with computation."""

    def build(self, steady: int) -> None:
        self.sent: dict[Message, int] = {}
        self.received: dict[Message, list[int]] = {"recv_prev": [], "recv_next": []}
        total = self.warmup + steady
        self.exchange(None if self.is_first else "recv_prev")
        for number in range(self.warmup):
            chunk = self.forward(number)
            is_next = number < total - 1 and self.comes_in(number, is_forward=True)
            self.exchange(self.output_of(chunk), "recv_prev" if is_next else None)
        if steady and not self.is_last:
            self.begin("send_prev", "recv_next")
        for number in range(steady):
            self.wait_for_input(
                is_entry=self.is_first and self.order[self.warmup + number][0] == 0, message="recv_prev"
            )
            chunk = self.forward(self.warmup + number)
            is_next = number < steady - 1 and self.comes_in(self.warmup + number, is_forward=True)
            self.begin("send_next", self.output_of(chunk), "recv_prev" if is_next else None)
            self.wait_for_input(is_entry=self.is_last and self.order[number][0] == 0, message="recv_next")
            chunk = self.backward(number)
            is_next = self.comes_in(number, is_forward=False)
            self.begin("send_prev", self.gradient_of(chunk), "recv_next" if is_next else None)
        if not steady:
            self.exchange(None if self.is_last else "recv_next")
        for number in range(steady, total):
            if number:
                self.wait_for_input(is_entry=self.is_last and self.order[number][0] == 0, message="recv_next")
            chunk = self.backward(number)
            is_next = number < total - 1 and self.comes_in(number, is_forward=False)
            self.exchange(self.gradient_of(chunk), "recv_next" if is_next else None)
        if "send_prev" in self.sent:  # the last send_next has no wait of its own: its answer has come
            self.operations.append(Wait(self.sent["send_prev"], "send_prev"))

    def output_of(self, chunk: int) -> Message | None:
        return None if self.is_last and chunk == self.chunks - 1 else "send_next"

    def gradient_of(self, chunk: int) -> Message | None:
        return None if self.is_first and chunk == 0 else "send_prev"

    def comes_in(self, number: int, *, is_forward: bool) -> bool:
        """Whether this rank then receives the input of a later pass. The rank at the entry of the pipeline is as many
        passes ahead of the one at its exit as there are ranks, less one, and gets nothing from its last chunk."""
        if not (self.is_first if is_forward else self.is_last):
            return True
        behind = number - (self.ranks - 1)
        return behind >= 0 and self.order[behind][0] != self.chunks - 1

    def begin(self, direction: Message, *messages: Message | None) -> None:
        """Start messages beside computation; then wait for the send before this one in the same direction."""
        exchange = self.exchange(*messages, is_waited_for=False)
        for message in messages:
            if message in self.received:
                self.received[message].append(exchange)
        if direction in self.sent:
            self.operations.append(Wait(self.sent.pop(direction), direction))
        if direction in messages:
            self.sent[direction] = exchange

    def wait_for_input(self, *, is_entry: bool, message: Message) -> None:
        if not is_entry and self.received[message]:
            self.operations.append(Wait(self.received[message].pop(0), message))


# --- running the programs ---------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """A pass and when it ran, in seconds from the start of the step."""

    what: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every pipeline rank did in a step."""

    slots: tuple[tuple[Slot, ...], ...]
    """Of each rank, in order."""
    ends: tuple[float, ...]
    """When each rank had done everything, messages included."""

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(self.ends)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(sum(slot.end - slot.start for slot in slots) for slots in self.slots)

    @property
    def bubble(self) -> float:
        """Time beyond that of the rank that computes longest, as a share of it: with equal stages and instant messages
        (ranks - 1) / (chunks * micro-batches)."""
        return self.seconds / max(self.busy) - 1

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the time that each rank does not compute: bubble, messages, and smaller stages than others'."""
        return tuple(1 - busy / self.seconds for busy in self.busy)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Of each rank, the most forward passes that wait for their backward pass, over all of its chunks."""
        peaks = []
        for slots in self.slots:
            waiting, peak = 0, 0
            for slot in slots:
                waiting += 1 if slot.what.kind == "forward" else -1
                peak = max(peak, waiting)
            peaks.append(peak)
        return tuple(peaks)


@dataclass
class _Rank:
    operations: list[Operation]
    now: float = 0.0
    position: int = 0
    slots: list[Slot] = field(default_factory=list)
    begun: dict[int, dict[Message, int]] = field(default_factory=dict)
    """Operation number -> its messages, by their numbers on their channels."""


class _Channels:
    """Messages between neighbours. A channel goes one way between two ranks; its sends and receives meet in order."""

    def __init__(self, ranks: int, seconds: float) -> None:
        self.seconds = seconds
        self.ends: dict[tuple[int, Message], tuple[list[float], list[float]]] = {}
        """(rank, message) -> when its end of each message began, and the other end."""
        for rank in range(ranks):
            following = (rank + 1) % ranks
            onward: tuple[list[float], list[float]] = ([], [])
            back: tuple[list[float], list[float]] = ([], [])
            self.ends[rank, "send_next"], self.ends[following, "recv_prev"] = onward, onward[::-1]
            self.ends[following, "send_prev"], self.ends[rank, "recv_next"] = back, back[::-1]

    def post(self, rank: int, message: Message, now: float) -> int:
        """Begin a message; returns its number on its channel."""
        mine, _ = self.ends[rank, message]
        mine.append(now)
        return len(mine) - 1

    def arrival(self, rank: int, message: Message, number: int) -> float | None:
        """When the message is through; None if its other side has not begun it."""
        mine, others = self.ends[rank, message]
        return max(mine[number], others[number]) + self.seconds if number < len(others) else None


def simulate(
    forward_s: Sequence[float], backward_s: Sequence[float], ranks: int, micro_batches: int, message_s: float = 0.0
) -> Timeline:
    """Run a step. forward_s, backward_s: seconds of one micro-batch in each stage, in the order of the stages; their
    number is a multiple of `ranks`. message_s: seconds of a message between neighbouring stages."""
    chunks = len(forward_s) // ranks
    states = [_Rank(program(rank, ranks, chunks, micro_batches)) for rank in range(ranks)]
    channels = _Channels(ranks, message_s)
    seconds = {"forward": forward_s, "backward": backward_s}
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, state in enumerate(states):
            while state.position < len(state.operations) and _run_one(state, rank, ranks, channels, seconds):
                is_moving = True
    stuck = [rank for rank, state in enumerate(states) if state.position < len(state.operations)]
    assert not stuck, f"pipeline ranks {stuck} wait for each other"
    return Timeline(tuple(tuple(state.slots) for state in states), tuple(state.now for state in states))


def _run_one(state: _Rank, rank: int, ranks: int, channels: _Channels, seconds: dict[str, Sequence[float]]) -> bool:
    """Run a rank's next operation, or return False if it waits for another rank."""
    number = state.position
    operation = state.operations[number]
    if isinstance(operation, Pass):
        end = state.now + seconds[operation.kind][operation.chunk * ranks + rank]
        state.slots.append(Slot(operation, state.now, end))
        state.now = end
    elif isinstance(operation, Exchange):
        if number not in state.begun:
            state.begun[number] = {message: channels.post(rank, message, state.now) for message in operation.messages}
            if operation.is_waited_for:
                return True  # posted: others can go on, even if this rank cannot
        if operation.is_waited_for and not _wait(state, rank, channels, number, operation.messages):
            return False
    elif not _wait(state, rank, channels, operation.exchange, (operation.message,)):
        return False
    state.position += 1
    return True


def _wait(state: _Rank, rank: int, channels: _Channels, exchange: int, messages: tuple[Message, ...]) -> bool:
    arrivals = [channels.arrival(rank, message, state.begun[exchange][message]) for message in messages]
    if any(arrival is None for arrival in arrivals):
        return False
    state.now = max(state.now, *(arrival for arrival in arrivals if arrival is not None))
    return True
