"""Weights and the state of AdamW, between this rank's device and what a checkpoint holds, whatever layout and optimizer
class holds them.

A checkpoint has the weight, both moments, and where the weight is bf16 the fp32 main weight, in the shape and under the
name of the parameter. Core's own form is not used: it cannot be read under another expert-parallel size, mixes up
parameter groups that differ only in their rate, and fails for torch's Adam and for models whose routers are fp32 among
bf16 weights. Settings of parameter groups are not saved at all: they are those of the running experiment.

Each parameter has a home among the data-parallel ranks that share it. Only that rank has it in its host memory, writes
it, and reads it for the others; on the device there is never more than one tensor of one parameter. Core's wrappers for
fully parallel saving and loading divide the work too, but only once every rank holds every tensor, and hold what they
exchange on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from hunyuan_pretrain.model.fp8.parameters import write, written_values
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import Failures
from hunyuan_pretrain.parallel.sharding import Placement, sharded_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"

Moments = tuple[str, dict[str, Tensor], Placement]
State = dict[str, dict[str, ShardedBase]]
"""Parameter -> kind ("weight", "main", and MOMENTS) -> its tensor, for megatron's distributed checkpoints."""


@torch.no_grad()
def full_moments(chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Iterator[Moments]:
    """(name, state, placement) of every parameter of this rank: both moments, and the fp32 weight where the model's is
    bf16, each in the parameter's full local shape.

    Communicates: data-parallel groups of the parameters, if the distributed optimizer has divided the state among their
    ranks.
    """
    source, stage, failures = _Source(optimizer), Stage(chunks), Failures()
    for home in _homes(chunks):
        tensors = {kind: source.whole(home, kind, stage, failures).clone() for kind in _kinds(home.parameter)}
        failures.raise_first()
        yield home.name, tensors, home.placement


@torch.no_grad()
def state_on_host(chunks: list[HunyuanModel], optimizer: MegatronOptimizer, stage: Stage) -> State:
    """What this rank writes, copied to the host tensor by tensor.

    Communicates: as full_moments. An error is raised after the last collective, so that ranks without one are not left
    waiting.
    """
    source, failures, state = _Source(optimizer), Failures(), State()

    def keep(home: _Home, kind: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        if home.is_written_here:
            on_host = _to_host(tensor)
            state.setdefault(home.name, {})[kind] = sharded_tensor(
                home.prefix(kind), on_host.to(dtype or on_host.dtype), home.shared_placement
            )

    for home in _homes(chunks):
        is_quantised = is_float8tensor(home.parameter)
        if not is_quantised:
            failures.run(keep, home, WEIGHT, home.parameter)
        for kind in _kinds(home.parameter):
            tensor = source.whole(home, kind, stage, failures)
            failures.run(keep, home, kind, tensor)
            if (
                is_quantised and kind == "main"
            ):  # as it is in checkpoints of other runs: rounded to the dtype of the run
                failures.run(keep, home, WEIGHT, tensor, home.parameter.dtype)
    failures.raise_first()
    return state


def wanted_state(chunks: list[HunyuanModel], with_optimizer: bool) -> State:
    """What this rank reads for `restore_state`, in host memory, uninitialised."""
    state = State()
    for home in _homes(chunks):
        if home.is_here:
            kinds = (WEIGHT, *_kinds(home.parameter)) if with_optimizer else (WEIGHT,)
            state[home.name] = {
                kind: sharded_tensor(home.prefix(kind), _host_buffer(home, kind), home.shared_placement)
                for kind in kinds
            }
    return state


@torch.no_grad()
def restore_state(
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer | None,
    loaded: dict[str, dict[str, Tensor]],
    num_updates: int,
    stage: Stage,
) -> None:
    """Give every rank what was read for it: the weights, and with `optimizer` its share of the state and the number of
    updates made.

    What was read is freed on the way. Communicates: data-parallel groups of the parameters. An error is raised after
    the last collective.
    """
    pieces = {piece.parameter: piece for piece in _pieces(optimizer)} if optimizer is not None else {}
    failures = Failures()
    for home in _homes(chunks):
        piece = pieces.get(home.parameter)
        for kind in (WEIGHT, *_kinds(home.parameter)) if optimizer is not None else (WEIGHT,):
            tensor = stage.tensor(home.parameter, home.parameter.dtype if kind == WEIGHT else torch.float32)
            if home.is_here:
                failures.run(_move, loaded, home.name, kind, tensor)
            if home.group.size() > 1:
                dist.broadcast(tensor, src=dist.get_global_rank(home.group, home.rank), group=home.group)
            failures.run(_take, kind, tensor, home.parameter, piece)
        if piece is not None:
            failures.run(_count_updates, piece, num_updates)
    for part in optimizer.chained_optimizers if optimizer is not None else []:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            failures.run(part.optimizer._sync_sub_optimizers_state_to_hdo)  # as after every step
    failures.raise_first()


@torch.no_grad()
def reload_weights(optimizer: MegatronOptimizer) -> None:
    """Copy this rank's weights, which something else has written, into what the optimizer updates in their place.

    Core's reload_model_params forgets the offloaded copies of fp32 weights.
    """
    for piece in _pieces(optimizer):
        piece.main.copy_(piece.part_of(written_values(piece.parameter)))


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else ("main", *MOMENTS)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    return tensor.detach().to("cpu", copy=True)


def _host_buffer(home: _Home, kind: str) -> Tensor:
    parameter = home.parameter
    if kind == WEIGHT:
        if home.group.size() == 1 and parameter.device.type == "cpu" and not is_float8tensor(parameter):
            return (
                parameter.detach()
            )  # it is in host memory already: a large model is exported on a machine that holds it once
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return torch.empty(parameter.shape, dtype=torch.float32, device="cpu")


def _move(loaded: dict[str, dict[str, Tensor]], name: str, kind: str, tensor: Tensor) -> None:
    tensor.copy_(loaded[name].pop(kind).view(tensor.shape))


def _take(kind: str, tensor: Tensor, parameter: torch.nn.Parameter, piece: _Piece | None) -> None:
    """Put a whole tensor that was read where it belongs on this rank."""
    if kind == WEIGHT:
        write(parameter, tensor)
    if piece is None:
        return  # another data-parallel rank updates this parameter
    if kind == "main" or (kind == WEIGHT and "main" not in _kinds(parameter)):
        piece.main.copy_(piece.part_of(tensor))
        piece.owner.state[piece.main] = {}
    elif kind != WEIGHT:
        piece.owner.state[piece.main][kind] = torch.empty_like(piece.main).copy_(piece.part_of(tensor))


def _count_updates(piece: _Piece, num_updates: int) -> None:
    state = piece.owner.state[piece.main]
    if isinstance(piece.owner, torch.optim.Adam):
        state["step"] = torch.tensor(float(num_updates), device=piece.main.device)
    else:  # the fused ones of Apex and Transformer Engine count for a group
        for group in piece.owner.param_groups:
            group["step"] = num_updates


class _Home(NamedTuple):
    """Which of the data-parallel ranks that share a parameter writes it, and reads it for the others."""

    name: str
    parameter: torch.nn.Parameter
    placement: Placement
    group: dist.ProcessGroup
    rank: int
    """In the group."""

    @property
    def is_here(self) -> bool:
        return self.group.rank() == self.rank

    @property
    def shared_placement(self) -> Placement:
        """`placement`, with this rank's number counted from the home."""
        copy, sharded, rank = self.placement.replica
        return replace(self.placement, replica=(copy, sharded, (rank - self.rank) % self.group.size()))

    @property
    def is_written_here(self) -> bool:
        return self.shared_placement.replica == (0, 0, 0)

    def prefix(self, kind: str) -> str:
        """What stands before the parameter's name in a checkpoint."""
        return "" if kind == WEIGHT else f"optimizer.{kind}."


def _homes(chunks: list[HunyuanModel]) -> Iterator[_Home]:
    """Every parameter of this rank; each goes to the rank of its group that has got least so far, which all of them
    reckon alike."""
    loads: dict[bool, list[int]] = {}
    for model in chunks:
        placements = model.placements()
        for name, parameter in model.named_parameters():
            is_expert = getattr(parameter, "is_routed_expert", False)
            group = model.groups.expt_dp if is_expert else model.groups.dp_cp
            load = loads.setdefault(is_expert, [0] * group.size())
            home = load.index(min(load))
            load[home] += parameter.numel()
            yield _Home(name, parameter, placements[name], group, home)


class Stage:
    """Memory on the device for one tensor of one parameter, whichever; each use overwrites the one before.

    It is made before the first collective, so that a rank whose memory is full says so before the others wait for it in
    one.
    """

    def __init__(self, chunks: list[HunyuanModel]) -> None:
        parameters = [parameter for model in chunks for parameter in model.parameters()]
        self._memory = torch.empty(max(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)

    def tensor(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """In the shape of `parameter`."""
        return self._memory.view(dtype)[: parameter.numel()].view(parameter.shape)


class _Source:
    """Where the whole tensors of the optimizer's state come from."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._pieces = {piece.parameter: piece for piece in _pieces(optimizer)}
        self._is_sharded = any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)

    def whole(self, home: _Home, kind: str, stage: Stage, failures: Failures) -> Tensor:
        """One tensor of a parameter, until the next one is asked for; communicates whatever has failed."""
        tensor = stage.tensor(home.parameter, torch.float32).zero_()
        failures.run(lambda: self._fill(tensor, self._pieces.get(home.parameter), kind))
        if self._is_sharded and home.group.size() > 1:
            dist.all_reduce(tensor, group=home.group)  # every element is on one rank, the others add zero
        return tensor

    @staticmethod
    def _fill(tensor: Tensor, piece: _Piece | None, kind: str) -> None:
        if piece is not None:
            # before the first update there are no moments: zero
            mine = piece.main if kind == "main" else piece.owner.state[piece.main].get(kind)
            if mine is not None:
                piece.part_of(tensor).copy_(mine.detach())


class _Piece(NamedTuple):
    """What the optimizer of this rank updates of one parameter."""

    parameter: torch.nn.Parameter
    main: Tensor
    """fp32; the parameter itself, a part of it, or a copy, which may be on the host (offloaded)."""
    owner: torch.optim.Optimizer
    """Whose state has the moments, under `main`."""
    first: int = 0
    """Element of the parameter with which it begins."""

    def part_of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor in the parameter's shape, as a view in the shape of `main`."""
        return tensor.detach().view(-1)[self.first : self.first + self.main.numel()].view_as(self.main)


def _pieces(optimizer: MegatronOptimizer) -> Iterator[_Piece]:
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            is_offloaded = isinstance(inner, HybridDeviceOptimizer)
            parameters = chain(*part.model_float16_groups, *part.model_fp32_groups)
            # with core's offloaded optimizer the distributed one has no main weights
            shards = chain(
                *(part.shard_float16_groups if is_offloaded else part.shard_fp32_from_float16_groups),
                *part.shard_fp32_groups,
            )
            owners = _owners(inner) if is_offloaded else {}
            for parameter, shard in zip(parameters, shards, strict=True):
                main = inner.param_to_inner_param[shard] if is_offloaded else shard
                yield _Piece(
                    parameter,
                    main,
                    owners[main] if is_offloaded else inner,
                    part._get_model_param_range_map(parameter)["param"].start,
                )
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for parameter, main in zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True):
                yield _Piece(parameter, main, inner)
            for parameter in chain(*part.fp32_from_fp32_groups):
                yield _Piece(parameter, parameter, inner)
        else:
            for parameter in part.get_parameters():
                yield _Piece(parameter, parameter, inner)


def _owners(optimizer: HybridDeviceOptimizer) -> dict[Tensor, torch.optim.Optimizer]:
    """Weight on the host or the device -> the one of the offloaded optimizer's own optimizers that updates it."""
    return {
        weight: owner
        for owner in optimizer.sub_optimizers
        for group in owner.param_groups
        for weight in group["params"]
    }
