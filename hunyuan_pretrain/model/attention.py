"""Grouped-query attention with cross-layer attention (CLA) over packed documents.

Source: the Hunyuan-Large paper (arXiv 2411.02265, section 2.1.3); the order of RoPE and QK norm follows the released
model code. A CLA group is `cla_share_factor` consecutive layers. The first one, the owner, projects keys and values;
the others, the borrowers, reuse them. A borrower's keys are the owner's raw keys after RoPE and the borrower's own key
norm. RoPE preserves the norm of a head, so the rotated, normalised keys of a group differ only in the elementwise key
norm weight. That weight moves to the query side: (w_q q_hat) . (w_k k_hat) = (w_q w_k q_hat) . k_hat. So the owner
computes k_hat and v once for the whole group.

Shapes: T tokens of this rank, S tokens of all context-parallel ranks, D hidden, N query heads and G key/value heads (of
this tensor-parallel rank), H head dim, R query heads per key/value head, X = R + 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.model.attention_backends import core_attention
from hunyuan_pretrain.model.dropout import Dropout
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.norm import HeadNorm, HeadWeights
from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks, packed_attention
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.model.varlen_attention import Blocks, Documents
from hunyuan_pretrain.parallel.context_parallel import (
    ContextSlice,
    gather_keys_values,
    heads_to_sequence,
    keys_values_to_heads,
    sequence_to_heads,
)


class SharedKV(NamedTuple):
    """What the layers of one CLA group attend to: rotated, normalised keys without the norm weight, and values; (S, G,
    H) each.

    Under context parallelism they are communicated once per group: with all_gather every rank gets all tokens of all
    heads, with all_to_all all tokens of some heads.
    """

    k_hat_SGH: Tensor
    v_SGH: Tensor


class AttentionPlan(NamedTuple):
    """Where the tokens of one micro-batch are and which of them attend to each other; the same for every layer."""

    rope_table: tuple[Tensor, Tensor]  # from norm.rope_table, for this rank's tokens
    blocks: Blocks
    context: ContextSlice | None


def attention_plan(
    rope_table: tuple[Tensor, Tensor], cu_seqlens: Sequence[int] | Documents, context: ContextSlice | None
) -> AttentionPlan:
    """`cu_seqlens` covers the tokens of all context-parallel ranks."""
    if isinstance(cu_seqlens, Documents):
        assert context is None, "the rows of a context-parallel rank depend on the documents"
        return AttentionPlan(rope_table, cu_seqlens, None)
    if context is None or context.method == "all_to_all":  # every rank has all tokens of some heads
        return AttentionPlan(rope_table, document_blocks(cu_seqlens), context)
    return AttentionPlan(rope_table, context_blocks(cu_seqlens, context.ranges), context)


class SelfAttention(torch.nn.Module):
    """Self-attention of one layer. An owner has `linear_qkv`, a borrower `linear_q`. `norm` normalises the layer's
    input."""

    def __init__(
        self, config: HunyuanConfig, layer: int, spec: Spec, groups: ProcessGroupCollection, norm: torch.nn.Module
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.is_owner = layer % config.model.cla_share_factor == 0
        tp_size = groups.tp.size()
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads // tp_size
        self.num_groups = config.num_query_groups // tp_size
        self.first_head = groups.tp.rank() * self.num_heads
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_query_groups * self.head_dim
        if self.is_owner:
            self.linear_qkv = spec.linear_after(norm, config, config.hidden_size, q_size + 2 * kv_size, groups)
        else:
            self.linear_q = spec.linear_after(norm, config, config.hidden_size, q_size, groups)
        if config.qk_layernorm:
            self.q_layernorm = HeadNorm(config)
            self.k_layernorm = HeadNorm(config)
        self.rope_norm, self.qkv_rope_norm = spec.functions.rope_norm, spec.functions.qkv_rope_norm
        self.core_attention = core_attention(config)
        self.linear_proj = spec.row_parallel_linear(config, q_size, config.hidden_size, groups)

    def forward(
        self, hidden_TD: Tensor, kv: SharedKV | None, plan: AttentionPlan, dropout: Dropout | None = None
    ) -> tuple[Tensor, SharedKV]:
        """Attend. `kv` is what the group's owner returned, None for the owner itself. Returns ((T, D), kv).

        Communicates: tensor-parallel group; context-parallel group: keys and values in the owner only, and with
        all_to_all the queries and outputs of every layer.
        """
        context = plan.context
        eps = self.config.layernorm_epsilon if self.config.qk_layernorm else None
        if self.is_owner:
            # megatron's interleaving: per key/value head, its query heads, then its key and value
            heads_of_group = self.num_heads // self.num_groups + 2
            qkv_TGXH = self.linear_qkv(hidden_TD)[0].view(-1, self.num_groups, heads_of_group, self.head_dim)
            q_TNH, k_hat_TGH, v_TGH = self.qkv_rope_norm(qkv_TGXH, plan.rope_table, self._weights(), eps)
            if context is not None:
                share = gather_keys_values if context.method == "all_gather" else keys_values_to_heads
                k_hat_TGH, v_TGH = share(k_hat_TGH, v_TGH, context)
            if v_TGH.device.type != "cpu":
                # slices of wider tensors: the kernels would copy them in every layer of the group, and the wider
                # tensors would stay in memory
                k_hat_TGH, v_TGH = k_hat_TGH.contiguous(), v_TGH.contiguous()
            kv = SharedKV(k_hat_TGH, v_TGH)
        else:
            assert kv is not None, "a borrower needs its group's keys and values"
            q_TNH = self.linear_q(hidden_TD)[0].view(-1, self.num_heads, self.head_dim)
            q_TNH = self.rope_norm(q_TNH, plan.rope_table, self._weights(), eps)
        drop = None if dropout is None else dropout.probabilities(self.layer, self.first_head)
        if drop is not None:
            assert not isinstance(plan.blocks, Documents), "config.recording_rules excludes dropout of attention"
            output_TNH = packed_attention(q_TNH, kv.k_hat_SGH, kv.v_SGH, plan.blocks, drop)
        elif context is not None and context.method == "all_to_all":
            all_q_SNH = sequence_to_heads(q_TNH, context)
            output_TNH = heads_to_sequence(self.core_attention(all_q_SNH, kv.k_hat_SGH, kv.v_SGH, plan.blocks), context)
        else:
            output_TNH = self.core_attention(q_TNH, kv.k_hat_SGH, kv.v_SGH, plan.blocks)
        return self.linear_proj(output_TNH.flatten(1))[0], kv

    def _weights(self) -> HeadWeights:
        """Those of both norms, which the queries carry."""
        return (self.q_layernorm(), self.k_layernorm()) if self.config.qk_layernorm else None
