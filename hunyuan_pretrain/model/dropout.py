"""Dropout whose masks are drawn anew wherever they are needed: no mask is kept, and no generator is used.

A mask is a hash of (seed, step, layer, place in the layer, token, channel), where a token is counted through the global
batch, as recycle routing's draw is (model/recycle_routing.py). So the backward pass, a recomputed layer, every parallel
layout and a resumed run have the same mask. Hidden states are dropped where megatron-core drops them: the embedding's
output, and each branch before it is added to the residual.

Rows of experts have left their tokens' order, and on another rank their tokens. Their number goes with them
(model/dispatch.py), and stands for the token in the key.

Shapes: T tokens of this rank, U tokens of all tensor-parallel ranks, C channels, K top-k, R rows of experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig, TuningConfig
from hunyuan_pretrain.model.packed_attention import Drop
from hunyuan_pretrain.model.permutation import choice_of_row
from hunyuan_pretrain.model.recycle_routing import draws, key_of
from hunyuan_pretrain.model.routing import Routing, RoutingPlan, TrainingRouting

EMBEDDING, ATTENTION, EXPERTS, PROBABILITIES, ADAPTERS = range(5)
"""Places in a layer. Those of adapters go on from the last."""

_BITS = 16
"""Random bits of one element, which is the resolution of a rate."""


class Rates(NamedTuple):
    """Probabilities that an element is dropped in a step."""

    hidden: float = 0.0
    adapter: float = 0.0
    """Of the input of a LoRA adapter."""
    attention: float = 0.0
    """Of attention's probabilities."""


NO_DROPOUT = Rates()


def rates_of(tuning: TuningConfig, stage: StageConfig) -> Rates:
    """Those of a stage's steps."""
    return Rates(stage.hidden_dropout, 0.0 if tuning.lora is None else tuning.lora.dropout, stage.attention_dropout)


class Dropout(NamedTuple):
    """Of one micro-batch in training."""

    rates: Rates
    routing: TrainingRouting
    """Holds the keys of the layers."""
    token_T: Tensor
    """int64 number of each token in the step's global batch."""
    token_U: Tensor
    """The same of all tensor-parallel ranks; without sequence parallelism, token_T."""

    def hidden(self, x_TC: Tensor, layer: int, place: int) -> Tensor:
        """Hidden states with `rates.hidden` of them dropped."""
        return dropped(x_TC, self._key(layer, place), self.token_T, self.rates.hidden)

    def adapter(self, x: Tensor, layer: int, place: int, first_channel: int | None) -> Tensor:
        """An adapter's input with `rates.adapter` of it dropped. first_channel: (U, C) from this channel on; None:
        (T, C), all channels. Of rows of experts (`of_rows`) both are (R, C)."""
        tokens = self.token_T if first_channel is None else self.token_U
        return dropped(x, self._key(layer, ADAPTERS + place), tokens, self.rates.adapter, first_channel or 0)

    def probabilities(self, layer: int, first_head: int) -> Drop | None:
        """What drops those of a layer's attention, whose heads are numbered from first_head on; None: nothing."""
        if not self.rates.attention:
            return None
        key = self._key(layer, PROBABILITIES)

        def drop(weights_1NnP: Tensor, first_query: int, first_key: int) -> Tensor:
            N, n, P = weights_1NnP.shape[1:]
            # a word for each query and head, as if it were a token; the keys of its document are the channels
            queries_n = self.token_U[first_query : first_query + n]
            rows_Nn = draws(key, queries_n, range(first_head, first_head + N)).mT
            weights = weights_1NnP.reshape(N * n, P)
            return _masked(weights, key, rows_Nn.reshape(-1), self.rates.attention, first_key).view_as(weights_1NnP)

        return drop

    def numbers(self, plan: RoutingPlan) -> Tensor:
        """(R, 1) int64: the number of the choice that each row of experts serves, counted through the global batch. It
        says of a row what a token's number says of a token. 0 for an empty slot, whose row is 0."""
        T, K = plan.row_TK.shape
        number_TK = self.token_T[:, None] * K + torch.arange(K, device=self.token_T.device)
        of_choices = torch.nn.functional.pad(number_TK.reshape(-1), (0, 1))
        return of_choices[choice_of_row(plan, T, K), None]

    def of_rows(self, number_R1: Tensor) -> Dropout:
        """The dropout of rows of experts with these numbers, in place of tokens."""
        number_R = number_R1.view(-1)
        return self._replace(token_T=number_R, token_U=number_R)

    @property
    def tensors(self) -> list[Tensor]:
        """All that masks are drawn from."""
        keys = [] if self.routing.key_L is None else [self.routing.key_L]
        return [self.token_T, self.token_U, *keys]

    def _key(self, layer: int, place: int) -> Tensor:
        # as of a routing group of a negative number, which none has
        number = self.token_T.new_full((1,), -1 - place)
        return draws(key_of(self.routing, layer), number, range(1)).view(())


def dropout_of(routing: Routing, rates: Rates, group_tokens: int, rank: int, size: int) -> Dropout | None:
    """The dropout of a micro-batch on one of `size` ranks that split its tokens evenly; None: nothing is dropped.
    group_tokens: of a routing group."""
    if not any(rates) or not isinstance(routing, TrainingRouting):
        return None
    offsets = torch.arange(group_tokens, device=routing.group_n.device)
    token_U = (routing.group_n[:, None] * group_tokens + offsets).reshape(-1)
    return Dropout(rates, routing, token_U.view(size, -1)[rank], token_U)


def dropped(x_TC: Tensor, key: Tensor, token_T: Tensor, rate: float, first_channel: int = 0) -> Tensor:
    """x_TC with about `rate` of its elements 0, and the others divided by the probability that they are kept; of the
    channels of a wider tensor from `first_channel` on. `rate` is rounded to a multiple of 2^-16."""
    if rate == 0:
        return x_TC
    return _Dropped.apply(x_TC, key, token_T, rate, first_channel)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, key: Tensor, token_T: Tensor, rate: float, first_channel: int) -> Tensor:
        ctx.save_for_backward(key, token_T)
        ctx.rate, ctx.first_channel = rate, first_channel
        return _masked(x_TC, key, token_T, rate, first_channel)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        key, token_T = ctx.saved_tensors
        return _masked(grad_TC, key, token_T, ctx.rate, ctx.first_channel), None, None, None, None


def _masked(x_TC: Tensor, key: Tensor, token_T: Tensor, rate: float, first_channel: int) -> Tensor:
    levels = 1 << _BITS
    # at least one level is kept: a rate that rounds to 1 would divide by 0
    below = min(round(rate * levels), levels - 1)
    is_dropped_TC = _bits(key, token_T, first_channel, x_TC.shape[-1]) < below - levels // 2
    return (x_TC * (levels / (levels - below))).masked_fill_(is_dropped_TC, 0)


def _bits(key: Tensor, token_T: Tensor, first: int, channels: int) -> Tensor:
    """(T, channels) int16, uniform: each word of a draw serves four channels."""
    each = 64 // _BITS
    words = range(first // each, -(-(first + channels) // each))
    start = first - words.start * each
    return draws(key, token_T, words).view(torch.int16)[:, start : start + channels]
