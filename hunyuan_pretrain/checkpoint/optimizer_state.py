"""Moves weights and AdamW state between this rank's device and a checkpoint, for any layout and optimizer class.

A checkpoint holds the weight, both moments and, for bf16 weights, the fp32 main weight, in the parameter's shape and
under its name. Moments and main weights are fp32 there, however the optimizer stores them. Core's own format is not
used: it cannot be read with another expert-parallel size, mixes up parameter groups that differ only in learning rate,
and fails for torch's Adam and for models with fp32 routers among bf16 weights. Settings of parameter groups are not
saved: they come from the running experiment.

Each parameter has a home rank among the data-parallel ranks that share it. Only that rank holds it in host memory,
writes it, and reads it for the others. The device never holds more than one extra tensor of one parameter. Core's
wrappers for fully parallel saving and loading also split the work, but only after every rank holds every tensor, and
they keep what they exchange on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

# isort: split
import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from hunyuan_pretrain.checkpoint.host_memory import HostMemory, new_memory, rounded
from hunyuan_pretrain.checkpoint.optimizer_pieces import Piece, pieces_of, splits_main_weights
from hunyuan_pretrain.checkpoint.parallel_read import Region
from hunyuan_pretrain.checkpoint.split_weights import REMAINDER, join, remainder_of, round_into
from hunyuan_pretrain.config.tuning import ADAPTER
from hunyuan_pretrain.model.fp8.parameters import write, written_values
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import Failures
from hunyuan_pretrain.parallel.sharding import Placement

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"

Moments = tuple[str, dict[str, Tensor], Placement]


@torch.no_grad()
def full_moments(chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Iterator[Moments]:
    """(name, state, placement) of every parameter of this rank. The state is both moments and, for a bf16 weight, the
    fp32 main weight, each in the parameter's full local shape.

    Communicates: data-parallel groups of the parameters, if the distributed optimizer has sharded the state.
    """
    source, stage, failures = _Source(optimizer), Stage(chunks), Failures()
    for home in _homes(chunks):
        tensors = {kind: source.whole(home, kind, stage, failures).clone() for kind in _kinds(home.parameter)}
        failures.raise_first()
        yield home.name, tensors, home.placement


class HostTensor(NamedTuple):
    """A whole local tensor of one parameter in host memory, for a checkpoint."""

    key: str
    """Name of the whole tensor in the checkpoint."""
    tensor: Tensor
    placement: Placement
    kind: str
    """"weight", "main", or one of MOMENTS."""


@torch.no_grad()
def state_on_host(
    chunks: list[HunyuanModel], optimizer: MegatronOptimizer, stage: Stage, memory: HostMemory
) -> list[HostTensor]:
    """What this rank writes, copied to the host one tensor at a time. `memory` has room for it (`bytes_on_host`). Valid
    until `memory` is used again.

    Communicates: as full_moments. An error is raised after the last collective, so that the other ranks do not hang.
    """
    source, failures, state = _Source(optimizer), Failures(), list[HostTensor]()

    def keep(home: _Home, kind: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if home.is_written_here:
            on_host = _to_host(tensor, memory.empty(home.parameter.shape, dtype))
            state.append(HostTensor(home.prefix(kind) + home.placement.name, on_host, home.placement, kind))

    for home in _homes(chunks):
        is_quantised = is_float8tensor(home.parameter)
        if not is_quantised:
            failures.run(keep, home, WEIGHT, home.parameter, home.parameter.dtype)
        for kind in _kinds(home.parameter):
            tensor = source.whole(home, kind, stage, failures)
            failures.run(keep, home, kind, tensor, torch.float32)
            if is_quantised and kind == "main":  # rounded to the run's dtype, as in checkpoints of other runs
                failures.run(keep, home, WEIGHT, tensor, home.parameter.dtype)
    if stage.device.type == "cuda":  # after a failure too: the memory may be freed next
        torch.cuda.current_stream(stage.device).synchronize()
    failures.raise_first()
    return state


def bytes_on_host(chunks: list[HunyuanModel]) -> int:
    """Host memory for what this rank writes."""
    return sum(
        rounded(home.parameter.numel() * size)
        for home in _homes(chunks)
        if home.is_written_here
        for size in (home.parameter.dtype.itemsize, *(4 for _ in _kinds(home.parameter)))
    )


def wanted_state(chunks: list[HunyuanModel], with_optimizer: bool) -> tuple[dict[str, dict[str, Tensor]], list[Region]]:
    """What this rank reads for `restore_state`: (host buffers by parameter and kind, their places in a checkpoint). The
    buffers are uninitialised until the regions are read."""
    buffers: dict[str, dict[str, Tensor]] = {}
    regions: list[Region] = []
    for home in _homes(chunks, None if with_optimizer else False):
        if not home.is_here:
            continue
        for kind in (WEIGHT, *_kinds(home.parameter)) if with_optimizer else (WEIGHT,):
            buffer = None if with_optimizer else _in_place(home)
            buffer = buffers.setdefault(home.name, {})[kind] = _host_buffer(home, kind) if buffer is None else buffer
            placement = home.placement
            whole = buffer.view(placement.local_shape)
            key = home.prefix(kind) + placement.name
            regions += [
                Region(key, whole[part.local], placement.whole_shape, tuple(one.start for one in part.whole))
                for part in placement.parts
            ]
    return buffers, regions


@torch.no_grad()
def restore_state(
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer | None,
    loaded: dict[str, dict[str, Tensor]],
    num_updates: int,
    stage: Stage,
) -> None:
    """Give every rank what was read for it: the weights and, with `optimizer`, its share of the state and the number of
    updates made.

    Frees `loaded` on the way. Communicates: data-parallel groups of the parameters. An error is raised after the last
    collective.
    """
    pieces = {piece.parameter: piece for piece in pieces_of(optimizer)} if optimizer is not None else {}
    is_split = optimizer is not None and any(map(splits_main_weights, optimizer.chained_optimizers))
    failures = Failures()
    for home in _homes(chunks, False if optimizer is None else None):
        piece = pieces.get(home.parameter)
        for kind in (WEIGHT, *_kinds(home.parameter)) if optimizer is not None else (WEIGHT,):
            read = loaded[home.name].pop(kind).view(home.parameter.shape) if home.is_here else None
            is_own = read is not None and read.device == stage.device
            tensor = stage.tensor(home.parameter, home.parameter.dtype if kind == WEIGHT else torch.float32)
            if read is not None and is_own:
                tensor = read
            elif read is not None:
                failures.run(tensor.copy_, read)
            if home.group.size() > 1:
                dist.broadcast(tensor, src=dist.get_global_rank(home.group, home.rank), group=home.group)
            failures.run(_take, kind, tensor, home.parameter, piece, is_split, is_own)
        if piece is not None:
            failures.run(_count_updates, piece, num_updates)
    for part in optimizer.chained_optimizers if optimizer is not None else []:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            failures.run(part.optimizer._sync_sub_optimizers_state_to_hdo)  # as after every step
    failures.raise_first()


@torch.no_grad()
def reload_weights(optimizer: MegatronOptimizer) -> None:
    """Copy this rank's weights, after something else has changed them, into the main weights that the optimizer
    updates.

    Core's reload_model_params omits the offloaded copies of fp32 weights.
    """
    for piece in pieces_of(optimizer):
        if not piece.is_split:
            piece.main.copy_(piece.part_of(written_values(piece.parameter)))
        elif (remainder := piece.owner.state[piece.main].get(REMAINDER)) is not None:
            remainder.zero_()


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    if not parameter.requires_grad:  # frozen: no optimizer has state of it
        return ()
    return MOMENTS if parameter.dtype == torch.float32 else ("main", *MOMENTS)


def _to_host(tensor: Tensor, memory: Tensor) -> Tensor:
    """`memory` with a copy of the tensor, in the dtype of `memory`. From a GPU the copy is only queued."""
    return memory.copy_(tensor.detach(), non_blocking=True)


def _in_place(home: _Home) -> Tensor | None:
    """The weight itself, if it is in host memory: an exporting machine may hold a large model only once."""
    parameter = home.parameter
    is_as_stored = parameter.device.type == "cpu" and not is_float8tensor(parameter)
    return parameter.detach() if is_as_stored and home.group.size() == 1 else None


def _host_buffer(home: _Home, kind: str) -> Tensor:
    return new_memory(home.parameter.shape, home.parameter.dtype if kind == WEIGHT else torch.float32)


def _take(
    kind: str, tensor: Tensor, parameter: torch.nn.Parameter, piece: Piece | None, is_split: bool, is_own: bool
) -> None:
    """Copy a whole tensor that was read to where it belongs on this rank. is_split: the optimizer splits the main
    weights of bf16 weights. is_own: nothing else uses the memory of `tensor`, so the optimizer may keep it. Overwrites
    `tensor`."""
    if kind == WEIGHT:
        write(parameter, tensor)
    if piece is not None and (kind == "main" or (kind == WEIGHT and "main" not in _kinds(parameter))):
        piece.owner.state[piece.main] = {}
        if piece.is_split:
            piece.store(REMAINDER, remainder_of(piece.part_of(tensor)))
        else:
            piece.main.copy_(piece.part_of(tensor))
    elif piece is not None and kind != WEIGHT:
        piece.store(kind, piece.part_of(tensor), is_own=is_own and piece.main.numel() == tensor.numel())
    if kind == "main" and is_split:
        # On every rank that shares the parameter, not only where its main weights are: the weight in the checkpoint may
        # come from another optimizer, which rounds ties to even
        round_into(parameter.detach(), tensor)


def _count_updates(piece: Piece, num_updates: int) -> None:
    state = piece.owner.state[piece.main]
    if isinstance(piece.owner, torch.optim.Adam):
        state["step"] = torch.tensor(float(num_updates), device=piece.main.device)
    else:  # the fused ones of Apex and Transformer Engine count per group
        for group in piece.owner.param_groups:
            group["step"] = num_updates


class _Home(NamedTuple):
    """The one of the data-parallel ranks sharing a parameter that writes it, and reads it for the others."""

    name: str
    parameter: torch.nn.Parameter
    placement: Placement
    group: dist.ProcessGroup
    rank: int
    """Within `group`."""

    @property
    def is_here(self) -> bool:
        return self.group.rank() == self.rank

    @property
    def shared_placement(self) -> Placement:
        """`placement`, with this rank's number counted from the home rank."""
        copy, sharded, rank = self.placement.replica
        return replace(self.placement, replica=(copy, sharded, (rank - self.rank) % self.group.size()))

    @property
    def is_written_here(self) -> bool:
        return self.shared_placement.replica == (0, 0, 0)

    def prefix(self, kind: str) -> str:
        """Prefix of the parameter's name in a checkpoint."""
        return "" if kind == WEIGHT else f"optimizer.{kind}."


def _homes(chunks: list[HunyuanModel], of_adapters: bool | None = None) -> Iterator[_Home]:
    """Every parameter of this rank that a checkpoint of its run holds: with LoRA its adapters, else all. of_adapters:
    these, or those of the model itself.

    Its home is the rank of its group with the fewest elements so far; all ranks compute the same."""
    if of_adapters is None:
        of_adapters = chunks[0].config.tuning.lora is not None
    loads: dict[bool, list[int]] = {}
    for model in chunks:
        placements = model.placements()
        for name, parameter in model.named_parameters():
            if (ADAPTER in name) is not of_adapters:
                continue
            is_expert = getattr(parameter, "is_routed_expert", False)
            group = model.groups.expt_dp if is_expert else model.groups.dp_cp
            load = loads.setdefault(is_expert, [0] * group.size())
            home = load.index(min(load))
            load[home] += parameter.numel()
            yield _Home(name, parameter, placements[name], group, home)


class Stage:
    """Device memory for one tensor of any parameter; each use overwrites the previous one.

    Allocate it before the first collective: a rank that is out of memory then fails before the others wait for it in
    one.
    """

    def __init__(self, chunks: list[HunyuanModel]) -> None:
        parameters = [parameter for model in chunks for parameter in model.parameters()]
        self._memory = torch.empty(max(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def tensor(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The memory as a tensor in the shape of `parameter`."""
        return self._memory.view(dtype)[: parameter.numel()].view(parameter.shape)


class _Source:
    """Assembles whole tensors of the optimizer's state."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._pieces = {piece.parameter: piece for piece in pieces_of(optimizer)}
        self._is_sharded = any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)

    def whole(self, home: _Home, kind: str, stage: Stage, failures: Failures) -> Tensor:
        """One whole tensor of a parameter, to be read only and until the next call. Communicates even after a
        failure."""
        piece = self._pieces.get(home.parameter)
        is_assembled = self._is_sharded and home.group.size() > 1
        if not is_assembled and (found := self._as_stored(home.parameter, piece, kind, stage)) is not None:
            return found
        tensor = stage.tensor(home.parameter, torch.float32).zero_()
        failures.run(lambda: self._fill(tensor, piece, kind))
        if is_assembled:
            dist.all_reduce(tensor, group=home.group)  # every element is on one rank, the others add zero
        return tensor

    @staticmethod
    def _as_stored(parameter: Tensor, piece: Piece | None, kind: str, stage: Stage) -> Tensor | None:
        """The optimizer's own tensor, if it holds all of the parameter in fp32: it needs no copy."""
        if piece is None or (kind == "main" and piece.is_split):
            return None
        mine = piece.main if kind == "main" else piece.owner.state[piece.main].get(kind)
        if mine is None or mine.numel() != parameter.numel():
            return None
        if mine.dtype != torch.float32 or mine.device != stage.device:
            return None
        return mine.detach().view(parameter.shape)

    @staticmethod
    def _fill(tensor: Tensor, piece: Piece | None, kind: str) -> None:
        if piece is None:
            return
        state = piece.owner.state[piece.main]
        if kind == "main" and piece.is_split:
            join(piece.main.detach(), state.get(REMAINDER), piece.part_of(tensor))
            return
        # there are no moments before the first update: leave zero
        mine = piece.main if kind == "main" else state.get(kind)
        if mine is not None:
            piece.part_of(tensor).copy_(mine.detach())
