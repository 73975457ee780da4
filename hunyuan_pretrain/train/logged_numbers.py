"""What a rank adds to the numbers of a logged step: the norm of the gradient by part of the model, the bytes of text
behind the target tokens, and how long this rank's host was busy.

They travel with the sums of losses and router statistics (train.step), so a logged step has no further message, and the
host waits for nothing. The gradients are read once more, after their reduction and before the update: with the
distributed optimizer a rank reads its shard only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.parallel.sharding import placement_of
from hunyuan_pretrain.runtime.handover import to_device
from hunyuan_pretrain.train.noise_scale import reduced_gradients
from hunyuan_pretrain.train.optimizer import sum_of_squares

PARTS = ("embedding", "attention", "router", "shared_expert", "routed_experts", "norms", "output_layer", "other")
"""Of the model, by which its gradient is measured. A tied output layer is the embedding. `other`: what a model that was
extended has besides."""


class HostSeconds(NamedTuple):
    """Of one rank: what its host did before and while it launched a step."""

    data_wait: float
    """Until the batch was there."""
    launch: float
    """From the beginning of the step before, batch included, until its last operation was launched."""


@dataclass(frozen=True)
class LoggedNumbers:
    """Of a logged step, over all ranks."""

    part_norms: Mapping[str, float]
    """L2 norm of the gradient before clipping, of each of PARTS that is trained."""
    target_bytes: int
    """Bytes of text that the target tokens stand for."""
    host: tuple[HostSeconds, ...]
    """Of each rank."""


def part_of(name: str, weight: Tensor) -> str:
    """Which of PARTS a weight belongs to."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output_layer"
    if "norm" in name:
        return "norms"
    if ".router." in name:
        return "router"
    if getattr(weight, "is_routed_expert", False):
        return "routed_experts"
    if ".shared_experts." in name:
        return "shared_expert"
    return "attention" if ".self_attention." in name else "other"


class Logging:
    """Measures this rank's share of a step's `LoggedNumbers`."""

    def __init__(
        self, groups: ProcessGroupCollection, wrapped: Sequence[DistributedDataParallel], rank: int, world_size: int
    ) -> None:
        self._wrapped, self._rank, self._world_size = wrapped, rank, world_size
        self._copies = world_size // groups.dp.size()
        self._parts: dict[Tensor, str] = {}
        """The weights whose gradient, or shard of it, this rank counts."""
        for model in wrapped:
            is_sharded = model.ddp_config.use_distributed_optimizer
            for name, weight in model.module.named_parameters():
                is_copy = getattr(weight, "shared", False)  # core's mark of a tied weight's second copy
                later_stage, tensor_rank, data_rank = placement_of(name, weight, groups, is_copy).replica
                if not (later_stage or tensor_rank or (data_rank and not is_sharded)):
                    self._parts[weight] = part_of(name, weight)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return len(PARTS) + 1 + 2 * self._world_size

    def numbers(self, target_bytes: int, host: HostSeconds, device: torch.device) -> Tensor:
        """fp64 (size,) on the device, after the reduction of the gradients and before the update. Summed over all ranks
        they are whole. target_bytes: of this rank's batch."""
        own = torch.zeros(1 + 2 * self._world_size, dtype=torch.float64)
        own[0] = target_bytes / self._copies
        own[1 + 2 * self._rank], own[2 + 2 * self._rank] = host
        return torch.cat([self._squares(device), to_device(own, device)])

    def _squares(self, device: torch.device) -> Tensor:
        found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for weight, gradient in self._gradients():
            found[self._parts[weight]].append(gradient)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([sum_of_squares(of_part) if of_part else nothing for of_part in found.values()])

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weight, gradient in reduced_gradients(self._wrapped):
            if gradient.numel() and weight in self._parts:
                yield weight, gradient


def read(numbers: Sequence[float]) -> LoggedNumbers:
    """What `Logging.numbers` gave, summed over all ranks."""
    squares, target_bytes, seconds = numbers[: len(PARTS)], numbers[len(PARTS)], numbers[len(PARTS) + 1 :]
    norms = {part: square**0.5 for part, square in zip(PARTS, squares, strict=True) if square != 0}
    host = tuple(HostSeconds(*pair) for pair in zip(seconds[::2], seconds[1::2], strict=True))
    return LoggedNumbers(norms, round(target_bytes), host)
