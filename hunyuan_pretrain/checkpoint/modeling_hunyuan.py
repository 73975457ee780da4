"""Hunyuan-Large for transformers 5.x, with a key/value cache that cross-layer attention (CLA) really shrinks.

This file and configuration_hunyuan.py are copied into every export: they need torch and transformers and nothing else.
Architecture: report arXiv 2411.02265; tensor names: Tencent's release.

A borrowing layer attends to its owner's keys with its own key norm: RoPE first, then RMSNorm with the layer's weight w_k.
RoPE keeps a vector's length, so the normalised key k_hat is the same for all layers of a group and only w_k differs, and
(w_q * q_hat) . (w_k * k_hat) = (w_q * w_k * q_hat) . k_hat. The cache therefore holds k_hat and v of the owners only.

Shape suffixes: B batch, S query positions, L key positions, T = B*S tokens, D hidden, N query heads, G key/value heads,
H head width, F SwiGLU width, E experts, K experts of a token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hunyuan import HunYuanConfig


def _high_precision(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for a model in fp64."""
    return torch.promote_types(dtype, torch.float32)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    """x over the root mean square of its last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(x_BxSH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> Tensor:
    """RoPE in the rotate-half layout, for a tensor (B, heads, S, H)."""
    first, second = x_BxSH.chunk(2, dim=-1)
    return x_BxSH * cos_BSH.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BSH.unsqueeze(1)


class HunYuanRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in fp32, rounded once to the dtype of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        high = _high_precision(x.dtype)
        return (self.weight.to(high) * _unit_rms(x.to(high), self.eps)).to(x.dtype)


class HunYuanMLP(nn.Module):
    """SwiGLU: (..., D) -> (..., D). The shared expert and each routed expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HunYuanGate(nn.Module):
    """Router. Weight and logits are fp32 whatever the dtype of the model."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__()
        self.topk = config.moe_topk
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (T, D) -> combine weights (T, K) in fp32 and expert numbers (T, K)."""
        high = _high_precision(x_TD.dtype)
        probabilities_TE = F.linear(x_TD.to(high), self.wg.weight.to(high)).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.topk, dim=-1)
        if self.topk > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, experts_TK


class HunYuanMoE(nn.Module):
    """Shared expert plus the weighted routed experts of each token: (B, S, D) -> (B, S, D). No capacity, nothing is dropped."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__()
        self.gate = HunYuanGate(config)
        self.shared_mlp = HunYuanMLP(config.hidden_size, config.intermediate_size)
        self.experts = nn.ModuleList(HunYuanMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_TK, experts_TK = self.gate(x_TD)
        # Tokens sorted by expert: each expert that is hit runs once, on one contiguous slice.
        order = experts_TK.flatten().argsort(stable=True)
        token_of_slot = order // experts_TK.shape[1]
        weight_of_slot = weights_TK.flatten()[order].unsqueeze(-1)
        counts = experts_TK.flatten().bincount(minlength=len(self.experts)).tolist()
        routed_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                tokens = token_of_slot[start : start + count]
                routed_TD.index_add_(0, tokens, self.experts[expert](x_TD[tokens]) * weight_of_slot[start : start + count])
                start += count
        return (self.shared_mlp(x_TD) + routed_TD).to(x_BSD.dtype).view_as(x_BSD)


class HunYuanAttention(nn.Module):
    """Causal grouped-query attention; an owner layer computes k_hat and v for its CLA group, a borrower is given them."""

    def __init__(self, config: HunYuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_owner = layer_idx % config.kv_share_factor == 0
        self.num_heads, self.num_groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.use_qk_norm, self.eps, self.dropout = config.use_qk_norm, config.rms_norm_eps, config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        if self.is_owner:
            self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        if self.use_qk_norm:
            self.query_layernorm = HunYuanRMSNorm(self.head_dim, self.eps)
            self.key_layernorm = HunYuanRMSNorm(self.head_dim, self.eps)

    def forward(
        self,
        x_BSD: Tensor,
        owner_kv: tuple[Tensor, Tensor] | None,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states, (k_hat, v) of the group's owner (None in the owner itself), RoPE's (cos, sin), mask (B, 1, S, L) of bool.

        Returns the output (B, S, D) and (k_hat, v), each (B, G, L, H), cached positions included.
        """
        high = rope[0].dtype
        q_BNSH = _rotate(self._heads(self.q_proj(x_BSD), self.num_heads).to(high), *rope)
        if self.use_qk_norm:
            fold = self.query_layernorm.weight.to(high) * self.key_layernorm.weight.to(high)
            q_BNSH = fold * _unit_rms(q_BNSH, self.eps)
        if self.is_owner:
            k_BGSH = _rotate(self._heads(self.k_proj(x_BSD), self.num_groups).to(high), *rope)
            k_hat = (_unit_rms(k_BGSH, self.eps) if self.use_qk_norm else k_BGSH).to(x_BSD.dtype)
            v = self._heads(self.v_proj(x_BSD), self.num_groups)
            owner_kv = (k_hat, v) if past_key_values is None else past_key_values.update(k_hat, v, self.layer_idx)
        assert owner_kv is not None
        k_BGLH, v_BGLH = owner_kv
        is_grouped = self.num_groups != self.num_heads
        if mask is not None and is_grouped:
            # With a mask, torch's memory-efficient kernels take no grouped keys.
            k_BGLH, v_BGLH = (t.repeat_interleave(self.num_heads // self.num_groups, dim=1) for t in owner_kv)
            is_grouped = False
        context = F.scaled_dot_product_attention(
            q_BNSH.to(x_BSD.dtype),
            k_BGLH,
            v_BGLH,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and x_BSD.shape[1] > 1,
            enable_gqa=is_grouped,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2)), owner_kv

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        """(B, S, heads * H) -> (B, heads, S, H)"""
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


class HunYuanDecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += experts(norm(x))."""

    def __init__(self, config: HunYuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = HunYuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = HunYuanAttention(config, layer_idx)
        self.post_attention_layernorm = HunYuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = HunYuanMoE(config)

    def forward(
        self,
        x_BSD: Tensor,
        owner_kv: tuple[Tensor, Tensor] | None,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, owner_kv = self.self_attn(self.input_layernorm(x_BSD), owner_kv, rope, mask, past_key_values)
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), owner_kv


class HunYuanPreTrainedModel(PreTrainedModel):
    """What transformers must know to create, load and place the model."""

    config_class = HunYuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HunYuanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["gate.wg"]


class HunYuanModel(HunYuanPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HunYuanDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = HunYuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, S) or embeddings (B, S, D) -> hidden states (B, S, D) after the final norm.

        attention_mask: (B, cached + S), 0 for padding; or (B, 1, S, L) of bool, used as it is. position_ids: (B or 1, S).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            # The recomputation of a layer would write its keys a second time.
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(x_BSD.shape[1], device=x_BSD.device).unsqueeze(0) + num_cached
        is_static = getattr(past_key_values, "is_compileable", False)
        mask = _attention_mask(attention_mask, x_BSD, num_cached, is_static)
        rope = self._rope(position_ids, x_BSD)

        all_hidden_states = []
        owner_kv = None
        for layer in self.layers:
            all_hidden_states.append(x_BSD)
            x_BSD, owner_kv = layer(x_BSD, owner_kv, rope, mask, past_key_values=past_key_values)
        x_BSD = self.norm(x_BSD)
        wants_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden_states, x_BSD) if wants_all else None,
        )

    def _rope(self, position_ids: Tensor, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (B or 1, S, H). Angles are fp32: at 256K positions another precision is another model."""
        dim = self.config.head_dim
        # On the CPU and not kept as a buffer: the same bits on every device, and no dtype or meta device can spoil them.
        inv_freq = 1.0 / (self.config.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
        angles = position_ids.to(x_BSD.device, torch.float32).unsqueeze(-1) * inv_freq.to(x_BSD.device)
        angles = torch.cat((angles, angles), dim=-1).to(_high_precision(x_BSD.dtype))
        return angles.cos(), angles.sin()


class HunYuanForCausalLM(HunYuanPreTrainedModel, GenerationMixin):
    """HunYuanModel with the output layer, tied to the embedding or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__(config)
        self.model = HunYuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As HunYuanModel.forward, then logits (B, S, V), or of the last `logits_to_keep` positions if that is not 0.

        labels: (B, S), -100 where there is no loss; the loss is the mean cross entropy of the next token, without a balance loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BSV, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def _attention_mask(attention_mask: Tensor | None, x_BSD: Tensor, num_cached: int, is_static: bool) -> Tensor | None:
    """True where a query (row) may see a key (column): (B, 1, S, L). None: plainly causal, or one query that sees everything."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    num_queries = x_BSD.shape[1]
    if is_static and (attention_mask is not None or num_queries == 1 or num_cached > 0):
        raise ValueError("a static cache needs the 4-dimensional attention mask that generate() makes: its unused slots are no keys")
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    if not has_padding and (num_queries == 1 or num_cached == 0):
        return None
    key = torch.arange(num_cached + num_queries, device=x_BSD.device)
    query = key[num_cached:].unsqueeze(-1)
    visible = (key <= query)[None, None]
    if has_padding:
        assert attention_mask is not None
        # A padding position sees itself: a row without any key would be a division by zero.
        visible = (visible & attention_mask[:, None, None, : len(key)].bool()) | (key == query)
    return visible


__all__ = ["HunYuanForCausalLM", "HunYuanModel", "HunYuanPreTrainedModel"]
