"""LoRA: low-rank adapters beside frozen linear layers, under every parallel layout.

Source: arXiv 2106.09685. W x becomes W x + alpha / rank * B A x. Each part of a fused layer (q, k and v; gate and up)
has its own A and B, as in adapters of other projects.

Under tensor parallelism B of a column-parallel layer and A of a row-parallel one are sharded as the layer is; their
partners are the same on all ranks, see only this rank's tokens, and so core sums their gradients as those of norms
(sequence_parallel). Under expert-tensor parallelism the ranks see the same rows, and the partner's gradient is summed
in the backward pass.

Shapes: T tokens of this rank, U tokens of all tensor-parallel ranks, R rows of experts, e experts of this rank, I
input and O output size on this rank, r rank, p parts of a fused layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from hunyuan_pretrain.config.schema import LoraConfig
from hunyuan_pretrain.config.tuning import ADAPTER, Linear, adapted_sizes, linears_of_layer, targets
from hunyuan_pretrain.model.dropout import Dropout
from hunyuan_pretrain.model.expert_rows import RowSplits
from hunyuan_pretrain.model.grouped_linear import grouped_matmul, mark_experts
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.parallel.sharding import mark_sharded
from hunyuan_pretrain.runtime.handover import handed_over

Join = Callable[[dict[str, Tensor]], Tensor]
"""The outputs of the parts of a fused layer -> their sum's place in its output; parts that are missing are 0."""


def add_adapters(model: Any, lora: LoraConfig) -> None:
    """Give the linear layers of a HunyuanModel that `lora` names an adapter each, uninitialised."""
    config: HunyuanConfig = model.config
    for layer in model.decoder.layers:
        found = targets(config.model, lora, layer.layer)
        for place, linear in enumerate(linears_of_layer(config.model, layer.layer)):
            if linear.name in found:
                module = layer.get_submodule(linear.name)
                kind = (
                    _GroupedAdapter if linear.is_routed else _RowAdapter if linear.is_row_parallel else _ColumnAdapter
                )
                module.adapter = kind(config, lora, linear, found[linear.name], model.groups)
                module.adapter.place = layer.layer, place
                module.register_forward_hook(_add_grouped if linear.is_routed else _add)


def drops_inputs(config: HunyuanConfig, layer: int, prefix: str) -> bool:
    """Whether adapters of linear layers whose names in the layer begin with `prefix` drop elements of their inputs."""
    lora = config.tuning.lora
    if lora is None or not lora.dropout:
        return False
    return any(name.startswith(prefix) for name in targets(config.model, lora, layer))


def drop_inputs(module: torch.nn.Module, dropout: Dropout | None) -> None:
    """From now on the adapters in `module` drop elements of their inputs; None: they do not. All parts of a fused layer
    share a mask. Called where `module` is computed, also again: other micro-batches come in between."""
    for one in module.modules():
        if isinstance(one, _Adapter):
            one.dropout = dropout


def is_zero_at_first(name: str) -> bool:
    """Whether the parameter of this name is a B, so that a fresh adapter changes nothing."""
    return ADAPTER in name and name.endswith(".b")


def _add(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return output[0] + linear.adapter(inputs[0]), output[1]


def _add_grouped(linear: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + linear.adapter(*inputs)


class _SummedGradient(torch.autograd.Function):
    """The weight; its gradient is summed over the ranks of `group`. Core's function for that loses the sum if the
    gradient is not contiguous, as that of one of several parts is not."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        handed_over("all_reduce", total, is_written=True)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Part(torch.nn.Module):
    """A and B of one part. Called, it returns both: core waits for a module's weights when that module is called."""

    def __init__(self, config: HunyuanConfig, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.b = (
            torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight_device(config)))
            for shape in (a, b)
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


class _Adapter(torch.nn.Module):
    """The adapters of one linear layer."""

    def __init__(
        self,
        config: HunyuanConfig,
        lora: LoraConfig,
        linear: Linear,
        parts: Sequence[str],
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.groups, self.parts, self.rank = groups, tuple(parts), lora.rank
        self.is_row_parallel = linear.is_row_parallel
        self.scale = lora.alpha / lora.rank
        self.place = (0, 0)  # its layer, and its number among the linear layers there
        self.dropout: Dropout | None = None
        size = groups.expt_tp.size() if linear.is_routed else groups.tp.size()
        experts = (config.num_moe_experts // groups.ep.size(),) if linear.is_routed else ()
        for name in parts:
            inputs, outputs = adapted_sizes(config.model, linear, name)
            inputs, outputs = (inputs // size, outputs) if linear.is_row_parallel else (inputs, outputs // size)
            part = _Part(config, (*experts, lora.rank, inputs), (*experts, outputs, lora.rank))
            self.add_module(name, part)
            self._mark(part, linear, config)
        self.join = _join_of(config, linear, groups)

    def _mark(self, part: _Part, linear: Linear, config: HunyuanConfig) -> None:
        """Mark what is sharded, and what is the same on all ranks."""
        sharded, same = (part.a, part.b) if linear.is_row_parallel else (part.b, part.a)
        dim = 1 if linear.is_row_parallel else 0
        if not linear.is_routed:
            mark_sharded(sharded, dim)
            same.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return
        mark_experts(sharded, self.groups, dim + 1)
        mark_experts(same, self.groups, dim + 1)
        same.is_same_in_experts = True  # type: ignore[attr-defined]
        # the gradient norm counts it on one of the ranks that hold the same
        same.shared = self.groups.expt_tp.rank() > 0  # type: ignore[attr-defined]

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of each part."""
        found = [self.get_submodule(name)() for name in self.parts]
        return [a for a, _ in found], [b for _, b in found]

    def _input(self, x: Tensor, first_channel: int | None) -> Tensor:
        """With dropout, as `Dropout.adapter`."""
        return x if self.dropout is None else self.dropout.adapter(x, *self.place, first_channel)

    def _joined(self, outputs: Sequence[Tensor]) -> Tensor:
        return self.join(dict(zip(self.parts, outputs, strict=True)))


class _ColumnAdapter(_Adapter):
    """(T, I) -> (U, O), of a column-parallel layer. Communicates: tensor-parallel group, an all-gather of (T, p r) and
    in the backward pass a reduce-scatter."""

    def forward(self, x_TI: Tensor) -> Tensor:
        a, b = self._factors()
        low_Tr = F.linear(self._input(x_TI, None), torch.cat(a)) * self.scale
        if self.groups.tp.size() > 1:
            low_Tr = gather_from_sequence_parallel_region(low_Tr, group=self.groups.tp)
        return self._joined([F.linear(low, one) for low, one in zip(low_Tr.split(self.rank, -1), b, strict=True)])


class _RowAdapter(_Adapter):
    """(U, I) -> (T, O), of a row-parallel layer. Communicates: tensor-parallel group, a reduce-scatter of (U, r) and in
    the backward pass an all-gather."""

    def forward(self, x_UI: Tensor) -> Tensor:
        (a,), (b,) = self._factors()
        x_UI = self._input(x_UI, self.groups.tp.rank() * x_UI.shape[1])
        low_Ur = F.linear(x_UI, a) * self.scale
        if self.groups.tp.size() > 1:
            low_Ur = reduce_scatter_to_sequence_parallel_region(low_Ur, group=self.groups.tp)
        return F.linear(low_Ur, b)


class _GroupedAdapter(_Adapter):
    """(R, I) -> (R, O), rows sorted by expert. Of a row-parallel layer the output is this rank's part of a sum, as the
    layer's own is. Communicates: expert-tensor-parallel group in the backward pass, the gradient of A or B."""

    def forward(self, x_RI: Tensor, splits: RowSplits) -> Tensor:
        a, b = self._factors()
        if self.groups.expt_tp.size() > 1:
            group = self.groups.expt_tp
            a, b = (
                [
                    _SummedGradient.apply(one, group) if getattr(one, "is_same_in_experts", False) else one
                    for one in ones
                ]
                for ones in (a, b)
            )
        first_channel = self.groups.expt_tp.rank() * x_RI.shape[1] if self.is_row_parallel else 0
        low_Rr = grouped_matmul(self._input(x_RI, first_channel), torch.cat(a, dim=1), splits) * self.scale
        lows = [low.contiguous() for low in low_Rr.split(self.rank, -1)]
        return self._joined([grouped_matmul(low, one, splits) for low, one in zip(lows, b, strict=True)])


def _join_of(config: HunyuanConfig, linear: Linear, groups: ProcessGroupCollection) -> Join:
    """Where the parts of a layer lie in its output."""
    if linear.name.endswith("linear_qkv"):
        # per key/value head: its query heads, then its key and value
        num_groups, head = config.num_query_groups // groups.tp.size(), config.kv_channels
        heads = {"q_proj": config.num_attention_heads // config.num_query_groups, "k_proj": 1, "v_proj": 1}

        def join(parts: dict[str, Tensor]) -> Tensor:
            some = next(iter(parts.values()))
            found = [
                parts[name].view(-1, num_groups, number, head)
                if name in parts
                else some.new_zeros(some.shape[0], num_groups, number, head)
                for name, number in heads.items()
            ]
            return torch.cat(found, dim=2).flatten(1)

        return join
    if len(linear.parts) == 1:
        return lambda parts: next(iter(parts.values()))

    def halves(parts: dict[str, Tensor]) -> Tensor:
        some = next(iter(parts.values()))
        return torch.cat([parts[name] if name in parts else torch.zeros_like(some) for name in linear.parts], dim=-1)

    return halves
