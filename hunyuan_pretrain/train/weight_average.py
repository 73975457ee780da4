"""The exponential moving average of the trained weights (optimizer.ema_decay).

After each update, average = decay * average + (1 - decay) * weight, in fp32, from the fp32 main weights, on the rank
and device that update them. It is in the optimizer's state beside the moments, under EMA, so it is sharded, saved and
resharded as they are. A step that is skipped, or an update that an offloaded optimizer leaves out, does not move it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from hunyuan_pretrain.checkpoint.optimizer_pieces import Piece, is_averaged, pieces_of
from hunyuan_pretrain.checkpoint.split_weights import REMAINDER, join
from hunyuan_pretrain.checkpoint.stored_weights import EMA

Averages = Sequence[tuple[Piece, Tensor]]

JOINED = 1 << 22
"""Elements of split main weights that are joined at once."""


def keep_average(chunks: Iterable[torch.nn.Module], decay: float) -> None:
    """Have `update` keep the average of every trained weight of these models."""
    for model in chunks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.ema_decay = decay  # type: ignore[attr-defined]


@torch.no_grad()
def averages_of(optimizer: MegatronOptimizer) -> Averages:
    """The averages of this rank's pieces, for `follow` after the update that comes next. The first time they are copies
    of the main weights; not in the optimizer's state yet, because Adam makes none for a weight that has some."""
    return [(piece, _average_of(piece)) for piece in pieces_of(optimizer) if is_averaged(piece.parameter)]


def _average_of(piece: Piece) -> Tensor:
    state = piece.owner.state.get(piece.main, {})
    found: Tensor | None = state.get(EMA)
    if found is not None:
        return found
    main = piece.main.detach()
    if not piece.is_split:
        return main.clone()
    average = torch.empty_like(main, dtype=torch.float32)
    join(main, state.get(REMAINDER), average)
    return average


@torch.no_grad()
def follow(averages: Averages) -> None:
    """Move the averages towards the weights after an update."""
    whole: dict[tuple[torch.device, float], tuple[list[Tensor], list[Tensor]]] = {}
    for piece, average in averages:
        piece.owner.state[piece.main][EMA] = average
        step = 1.0 - piece.parameter.ema_decay  # type: ignore[attr-defined]
        if piece.is_split:
            _follow_split(piece, average, step)
        else:
            mine = whole.setdefault((average.device, step), ([], []))
            mine[0].append(average)
            mine[1].append(piece.main.detach())
    for (_, step), (moved, mains) in whole.items():
        torch._foreach_lerp_(moved, mains, step)  # one launch for all


def _follow_split(piece: Piece, average: Tensor, step: float) -> None:
    """The main weights exist only joined: part by part, for the memory."""
    tensors = piece.main.detach(), piece.owner.state[piece.main][REMAINDER], average
    for weight, remainder, moved in zip(*(one.view(-1).split(JOINED) for one in tensors), strict=True):
        main = torch.empty_like(moved)
        join(weight, remainder, main)
        moved.lerp_(main, step)
