"""The two-way mapping between Megatron's parameters and the tensors of a Hugging Face checkpoint, in ONE table.

Both sides are full tensors, not shards of a parallel layout. The Hugging Face names are those of Tencent's release.
Nothing here casts: the router's weight is fp32 on both sides, everything else keeps its dtype.

Shape letters: D hidden size, N query heads, G key/value heads, H head dimension, F and Fe SwiGLU width of the shared
and of a routed expert, E experts, V padded vocabulary size.
"""

from __future__ import annotations

import difflib
from collections import abc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.config.schema import ModelConfig

Shape = tuple[int, ...]


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter and the Hugging Face tensors that hold the same numbers.

    to_hf returns views of the parameter, in the order of hf_names. to_megatron joins them again (into a copy, or the
    tensor itself if there is only one).
    """

    megatron_name: str
    megatron_shape: Shape
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)
    to_megatron: Callable[[Sequence[Tensor]], Tensor] = _only

    @property
    def is_fp32(self) -> bool:
        """Whether the tensor stays fp32 in a checkpoint of any dtype: the router's weight."""
        return self.megatron_name.endswith(".mlp.router.weight")


def weight_map(model: ModelConfig) -> list[Mapping]:
    """The table: every parameter of the model once, in the order of the forward pass."""
    D, H, V = model.hidden_size, model.head_dim, model.padded_vocab_size
    N, G = model.num_attention_heads, model.num_query_groups
    F, Fe, E = model.ffn_hidden_size, model.expert_ffn_size, model.num_moe_experts
    table = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (V, D))]
    for layer in range(model.num_layers):
        ours, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        our_attention, hf_attention = ours + "self_attention.", hf + "self_attn."
        table.append(_same(ours + "input_layernorm.weight", hf + "input_layernorm.weight", (D,)))
        if layer % model.cla_share_factor == 0:
            table.append(_query_key_value(our_attention + "linear_qkv.weight", hf_attention, N, G, H, D))
        else:
            table.append(_same(our_attention + "linear_q.weight", hf_attention + "q_proj.weight", (N * H, D)))
        if model.qk_layernorm:
            table.append(_same(our_attention + "q_layernorm.weight", hf_attention + "query_layernorm.weight", (H,)))
            table.append(_same(our_attention + "k_layernorm.weight", hf_attention + "key_layernorm.weight", (H,)))
        table.append(_same(our_attention + "linear_proj.weight", hf_attention + "o_proj.weight", (D, N * H)))
        table.append(_same(ours + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", (D,)))
        table.append(_same(ours + "mlp.router.weight", hf + "mlp.gate.wg.weight", (E, D)))
        table.append(_gate_up(ours + "mlp.shared_experts.linear_fc1.weight", hf + "mlp.shared_mlp.", F, D))
        table.append(
            _same(ours + "mlp.shared_experts.linear_fc2.weight", hf + "mlp.shared_mlp.down_proj.weight", (D, F))
        )
        table.append(_expert_gate_up(ours + "mlp.experts.linear_fc1.weight", hf + "mlp.experts.", E, Fe, D))
        table.append(_expert_down(ours + "mlp.experts.linear_fc2.weight", hf + "mlp.experts.", E, Fe, D))
    table.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (D,)))
    if not model.share_embeddings_and_output_weights:
        table.append(_same("output_layer.weight", "lm_head.weight", (V, D)))
    return table


def by_expert(row: Mapping) -> list[Mapping]:
    """The row of a parameter of routed experts as one row an expert, whose parameter is (1, ...); any other row alone.
    So one expert can be converted without the others."""
    if len(row.megatron_shape) != 3:
        return [row]
    count = row.megatron_shape[0]
    each = len(row.hf_names) // count
    return [
        replace(
            row,
            megatron_shape=(1, *row.megatron_shape[1:]),
            hf_names=row.hf_names[expert * each : (expert + 1) * each],
            hf_shapes=row.hf_shapes[expert * each : (expert + 1) * each],
        )
        for expert in range(count)
    ]


def refuse_other_parameters(model: ModelConfig, shapes: abc.Mapping[str, Shape]) -> None:
    """Raise CheckpointError if these are not the names and shapes of the model's Megatron parameters."""
    expected = {row.megatron_name: row.megatron_shape for row in weight_map(model)}
    _refuse_other_names(set(expected), shapes.keys(), "Megatron parameters")
    for name, shape in expected.items():
        _refuse_other_shape(name, shapes[name], shape)


def to_hf(model: ModelConfig, megatron_tensors: abc.Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Full Megatron parameters -> (Hugging Face name, tensor), one parameter at a time, in the order of `weight_map`.

    Raises CheckpointError before the first tensor if a name is missing or unknown, and at the tensor if its shape is
    wrong. The tensors are views of the parameters.
    """
    table = weight_map(model)
    _refuse_other_names({row.megatron_name for row in table}, megatron_tensors.keys(), "Megatron parameters")
    for row in table:
        tensor = megatron_tensors[row.megatron_name]
        _refuse_other_shape(row.megatron_name, tuple(tensor.shape), row.megatron_shape)
        yield from zip(row.hf_names, row.to_hf(tensor), strict=True)


def to_megatron(model: ModelConfig, hf_tensors: abc.Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors -> (Megatron name, full parameter), one parameter at a time, in the order of `weight_map`.

    `hf_tensors` may read from disk on access. Raises CheckpointError as `to_hf` does.
    """
    table = weight_map(model)
    _refuse_other_names({name for row in table for name in row.hf_names}, hf_tensors.keys(), "Hugging Face tensors")
    for row in table:
        parts = [hf_tensors[name] for name in row.hf_names]
        for name, part, shape in zip(row.hf_names, parts, row.hf_shapes, strict=True):
            _refuse_other_shape(name, tuple(part.shape), shape)
        yield row.megatron_name, row.to_megatron(parts)


def refuse_other_tensors(model: ModelConfig, names: Collection[str], what: str) -> None:
    """Raise CheckpointError, which begins with `what`, if these are not the names of the model's Hugging Face
    tensors."""
    _refuse_other_names({name for row in weight_map(model) for name in row.hf_names}, names, what)


def _same(megatron_name: str, hf_name: str, shape: Shape) -> Mapping:
    return Mapping(megatron_name, shape, (hf_name,), (shape,))


def _query_key_value(megatron_name: str, hf_prefix: str, N: int, G: int, H: int, D: int) -> Mapping:
    """Megatron stores each group's query heads, key head and value head together, so that tensor parallelism splits
    between groups."""
    queries = N // G

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        groups = tensor.view(G, queries + 2, H, D)
        return tuple(groups[:, heads].reshape(-1, D) for heads in (slice(queries), slice(queries, -1), slice(-1, None)))

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(G, -1, H, D) for part in parts], dim=1).reshape(-1, D)

    names = tuple(f"{hf_prefix}{letter}_proj.weight" for letter in "qkv")
    return Mapping(megatron_name, (G * (queries + 2) * H, D), names, ((N * H, D), (G * H, D), (G * H, D)), split, join)


def _gate_up(megatron_name: str, hf_prefix: str, F: int, D: int) -> Mapping:
    names = (f"{hf_prefix}gate_proj.weight", f"{hf_prefix}up_proj.weight")
    return Mapping(
        megatron_name,
        (2 * F, D),
        names,
        ((F, D),) * 2,
        lambda tensor: tensor.chunk(2),
        lambda parts: torch.cat(list(parts)),
    )


def _expert_gate_up(megatron_name: str, hf_prefix: str, E: int, Fe: int, D: int) -> Mapping:
    names = tuple(f"{hf_prefix}{expert}.{half}_proj.weight" for expert in range(E) for half in ("gate", "up"))
    return Mapping(
        megatron_name,
        (E, 2 * Fe, D),
        names,
        ((Fe, D),) * (2 * E),
        lambda tensor: tensor.view(-1, Fe, D).unbind(),
        lambda parts: torch.stack(list(parts)).view(-1, 2 * Fe, D),
    )


def _expert_down(megatron_name: str, hf_prefix: str, E: int, Fe: int, D: int) -> Mapping:
    names = tuple(f"{hf_prefix}{expert}.down_proj.weight" for expert in range(E))
    return Mapping(
        megatron_name,
        (E, D, Fe),
        names,
        ((D, Fe),) * E,
        lambda tensor: tensor.unbind(),
        lambda parts: torch.stack(list(parts)),
    )


def _refuse_other_names(expected: set[str], given: Collection[str], what: str) -> None:
    missing, unknown = sorted(expected.difference(given)), sorted(set(given) - expected)
    if not missing and not unknown:
        return
    lines = [f"{name}: missing{_nearest(name, unknown)}" for name in missing]
    lines += [f"{name}: not a tensor of this model{_nearest(name, sorted(expected))}" for name in unknown]
    shown = lines[:10] + ([f"... and {len(lines) - 10} more"] if len(lines) > 10 else [])
    raise CheckpointError(f"{what} do not fit the model, {len(lines)} problems:\n  " + "\n  ".join(shown))


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {close[0]})" if close else ""


def _refuse_other_shape(name: str, given: Shape, shape: Shape) -> None:
    if given != shape:
        raise CheckpointError(f"{name}: shape {given}, but this model has {shape}")
