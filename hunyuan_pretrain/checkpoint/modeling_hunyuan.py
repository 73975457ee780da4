"""Hunyuan-Large for transformers 5.0 to 5.24. Only the layers that own keys and values (CLA) take space in the cache.

Every export of format hunyuan contains a copy of this file and of configuration_hunyuan.py. They need torch and
transformers and nothing else. transformers 5.24 renamed `past_key_values` to `cache`: both names are accepted, and
outputs use the name of the installed version. Unknown arguments are refused: an argument that a later version renames
must raise an error, not change the computation.
Architecture: report arXiv 2411.02265. Tensor names: Tencent's release.

In cross-layer attention (CLA) a borrowing layer attends to its owner's keys, but with its own key norm: RoPE first,
then RMSNorm with the layer's weight w_k. RoPE preserves a vector's length, so the normalised key k_hat is the same for
all layers of a group and only w_k differs: (w_q * q_hat) . (w_k * k_hat) = (w_q * w_k * q_hat) . k_hat. The cache
therefore holds only the owners' k_hat and v.

Shape suffixes: B batch, S query positions, L key positions, T = B*S tokens, D hidden size, N query heads, G key/value
heads, H head dimension, F SwiGLU width, E experts, K experts per token, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hunyuan import HunYuanConfig


def _name_of_cache() -> str:
    """The installed transformers' name for the cache, in the arguments of forward and in its outputs."""
    known = {field.name for field in fields(CausalLMOutputWithPast)}
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ImportError(
        f"transformers {transformers_version} calls the key/value cache neither `cache` nor `past_key_values` "
        "(its outputs have: "
        f"{', '.join(sorted(known))}), so generation would be wrong with this model code; install transformers "
        "5.0 to 5.24"
    )


CACHE_NAME = _name_of_cache()

HARMLESS_ARGUMENTS = frozenset({"cache_position", "max_length_q", "max_length_k"})
"""Arguments that others pass to forward unasked and that are not needed. cache_position (transformers up to 5.3) gives
the positions of the new tokens in the cache, which follow from its length; as a named parameter it would make later
versions warn. max_length_q and max_length_k come with cu_seq_lens_q and follow from it."""


def _refuse_unknown_arguments(others: dict[str, Any]) -> None:
    unknown = sorted(set(others) - HARMLESS_ARGUMENTS)
    if unknown:
        raise TypeError(
            f"HunYuan's forward() has no argument {', '.join(unknown)} (transformers {transformers_version})"
        )


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, under whichever name it was passed."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("two caches: give either `cache` or `past_key_values`")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, Cache):
        raise TypeError(f"the cache is a {type(given).__name__}; it must be one of transformers' Cache classes")
    return given


def _high_precision(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for a model in fp64."""
    return torch.promote_types(dtype, torch.float32)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    """x divided by the root mean square of its last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(x_BxSH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> Tensor:
    """RoPE in the rotate-half layout, applied to a tensor (B, heads, S, H)."""
    first, second = x_BxSH.chunk(2, dim=-1)
    return x_BxSH * cos_BSH.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BSH.unsqueeze(1)


class _Mask:
    """Which keys each query may attend to. Built once the first layer has its keys, because only they show how many
    keys the cache returns: a static cache includes its unused slots."""

    def __init__(self, given: Tensor | None, documents: Tensor | None, cache_position: Tensor, num_cached: int) -> None:
        """given: attention_mask of forward. documents: (B or 1, S), or None. cache_position: (S,), positions of the
        queries among the keys."""
        self.given, self.documents, self.cache_position, self.num_cached = given, documents, cache_position, num_cached
        self.num_keys = 0
        self.seen: Tensor | None = None

    def of(self, k_BGLH: Tensor) -> Tensor | None:
        """Mask (B or 1, 1, S, L): bool, True where the query may attend to the key, or floating, added to the scores.
        None if the mask is purely causal, or if a single query attends to every key. Raises ValueError if the given
        mask has other lengths."""
        if k_BGLH.shape[2] != self.num_keys:
            self.num_keys = k_BGLH.shape[2]
            self.seen = (
                self._four_dimensional() if self.given is not None and self.given.dim() == 4 else self._from_padding()
            )
        return None if self.seen is None else self.seen.to(k_BGLH.device)

    def _four_dimensional(self) -> Tensor:
        assert self.given is not None
        if self.given.dtype != torch.bool and not self.given.is_floating_point():
            raise ValueError(f"a 4-dimensional attention_mask must be bool or floating, not {self.given.dtype}")
        expected = (len(self.cache_position), self.num_keys)
        if self.given.shape[2:] != expected:
            raise ValueError(
                f"attention_mask {tuple(self.given.shape)}: its last dimensions must be {expected}, new tokens and keys"
            )
        return self.given

    def _from_padding(self) -> Tensor | None:
        num_queries = len(self.cache_position)
        num_filled = self.num_cached + num_queries
        if self.given is not None and (self.given.dim() != 2 or self.given.shape[1] != num_filled):
            raise ValueError(
                f"attention_mask {tuple(self.given.shape)}: {self.num_cached} cached and {num_queries} new tokens "
                f"need (batch, {num_filled})"
            )
        has_padding = self.given is not None and not bool(self.given.all())
        is_plain = not has_padding and self.documents is None and self.num_keys == num_filled
        if is_plain and (num_queries == 1 or self.num_cached == 0):
            return None
        key = torch.arange(self.num_keys, device=self.cache_position.device)
        query = self.cache_position.unsqueeze(-1)
        seen = (key <= query)[None, None]
        unused = (0, self.num_keys - num_filled)
        if self.documents is not None:
            seen = seen & F.pad(self.documents.unsqueeze(-1) == self.documents.unsqueeze(-2), unused).unsqueeze(1)
        if has_padding:
            assert self.given is not None
            # A padding position attends to itself: for a row without any key, softmax would divide by zero.
            seen = (seen & F.pad(self.given.bool(), unused)[:, None, None]) | (key == query)
        return seen


class HunYuanRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in fp32, rounded once to the dtype of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, is_weight_only: bool = False) -> Tensor:
        """is_weight_only: multiply by the weight and do not normalise."""
        high = _high_precision(x.dtype)
        normed = x.to(high) if is_weight_only else _unit_rms(x.to(high), self.eps)
        return (self.weight.to(high) * normed).to(x.dtype)


class HunYuanMLP(nn.Module):
    """SwiGLU: (..., D) -> (..., D). The shared expert and each routed expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HunYuanRouterLinear(nn.Linear):
    """A linear layer without bias that computes in fp32 whatever the dtype of its input and of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        high = _high_precision(x.dtype)
        return F.linear(x.to(high), self.weight.to(high))


class HunYuanGate(nn.Module):
    """Router. Weight and logits are fp32 whatever the dtype of the model."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__()
        self.topk = config.moe_topk
        self.wg = HunYuanRouterLinear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (T, D) -> combine weights (T, K) in fp32 and expert numbers (T, K)."""
        probabilities_TE = self.wg(x_TD).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.topk, dim=-1)
        if self.topk > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, experts_TK


class HunYuanMoE(nn.Module):
    """Shared expert plus the weighted routed experts of each token: (B, S, D) -> (B, S, D). There is no capacity limit;
    no token is dropped."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__()
        self.gate = HunYuanGate(config)
        self.shared_mlp = HunYuanMLP(config.hidden_size, config.intermediate_size)
        self.experts = nn.ModuleList(
            HunYuanMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_TK, experts_TK = self.gate(x_TD)
        # Tokens are sorted by expert, so each expert runs once, on one contiguous slice. In training also one without
        # tokens: an optimizer skips a weight whose gradient is None, and ranks would wait for one that only some have.
        order = experts_TK.flatten().argsort(stable=True)
        token_of_slot = order // experts_TK.shape[1]
        weight_of_slot = weights_TK.flatten()[order].unsqueeze(-1)
        counts = experts_TK.flatten().bincount(minlength=len(self.experts)).tolist()
        routed_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
        start = 0
        for expert, count in enumerate(counts):
            if count or self.training:
                tokens = token_of_slot[start : start + count]
                routed_TD.index_add_(
                    0, tokens, self.experts[expert](x_TD[tokens]) * weight_of_slot[start : start + count]
                )
                start += count
        return (self.shared_mlp(x_TD) + routed_TD).to(x_BSD.dtype).view_as(x_BSD)


class HunYuanAttention(nn.Module):
    """Causal grouped-query attention. An owner layer computes k_hat and v for its CLA group; the other layers of the
    group receive them."""

    def __init__(self, config: HunYuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_owner = layer_idx % config.kv_share_factor == 0
        self.num_heads, self.num_groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
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
        mask: _Mask,
        cache: Cache | None,
        cache_position: Tensor,
        wants_weights: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """owner_kv: (k_hat, v) of the group's owner, which ignores it itself. rope: (cos, sin).

        cache_position: (S,), positions of the queries among the keys. Returns the output (B, S, D); (k_hat, v), each
        (B, G, L, H), cached positions included; and if wants_weights the attention weights (B, N, S, L), else None.
        """
        high = rope[0].dtype
        q_BNSH = _rotate(self._heads(self.q_proj(x_BSD), self.num_heads).to(high), *rope)
        if self.use_qk_norm:
            # Through the modules, never their weights alone: accelerate fetches offloaded weights when a module runs.
            q_BNSH = self.key_layernorm(self.query_layernorm(q_BNSH), is_weight_only=True)
        if self.is_owner:
            k_BGSH = _rotate(self._heads(self.k_proj(x_BSD), self.num_groups).to(high), *rope)
            k_hat = (_unit_rms(k_BGSH, self.eps) if self.use_qk_norm else k_BGSH).to(x_BSD.dtype)
            v = self._heads(self.v_proj(x_BSD), self.num_groups)
            # In transformers 5.0 to 5.3 a static cache writes to its start unless it is told the positions; later ones
            # count for themselves.
            places = {"cache_position": cache_position}
            owner_kv = (k_hat, v) if cache is None else cache.update(k_hat, v, self.layer_idx, places)
        assert owner_kv is not None
        k_BGLH, v_BGLH = owner_kv
        seen = mask.of(k_BGLH)
        if wants_weights:
            context, weights = self._attend_slowly(q_BNSH, k_BGLH, v_BGLH, seen)
            return self.o_proj(context.to(x_BSD.dtype).transpose(1, 2).flatten(2)), owner_kv, weights.to(x_BSD.dtype)
        is_grouped = self.num_groups != self.num_heads
        if seen is not None and is_grouped:
            # torch's memory-efficient kernels do not accept grouped keys together with a mask.
            k_BGLH, v_BGLH = (t.repeat_interleave(self.num_heads // self.num_groups, dim=1) for t in owner_kv)
            is_grouped = False
        context = F.scaled_dot_product_attention(
            q_BNSH.to(x_BSD.dtype),
            k_BGLH,
            v_BGLH,
            attn_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=seen is None and x_BSD.shape[1] > 1,
            enable_gqa=is_grouped,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2)), owner_kv, None

    def _attend_slowly(
        self, q_BNSH: Tensor, k_BGLH: Tensor, v_BGLH: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same attention, unfused: (B, N, S, H) and its weights (B, N, S, L), in the dtype of the queries."""
        k_BNLH, v_BNLH = (
            t.repeat_interleave(self.num_heads // self.num_groups, dim=1).to(q_BNSH.dtype) for t in (k_BGLH, v_BGLH)
        )
        scores_BNSL = q_BNSH @ k_BNLH.transpose(-1, -2) * self.head_dim**-0.5
        if seen is None and q_BNSH.shape[2] > 1:
            seen = torch.ones(scores_BNSL.shape[-2:], dtype=torch.bool, device=scores_BNSL.device).tril()
        if seen is not None:
            scores_BNSL = scores_BNSL.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores_BNSL + seen
        weights_BNSL = F.dropout(scores_BNSL.softmax(-1), self.dropout, self.training)
        return weights_BNSL @ v_BNLH, weights_BNSL

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
        mask: _Mask,
        cache: Cache | None,
        cache_position: Tensor,
        wants_weights: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        attended, owner_kv, weights = self.self_attn(
            self.input_layernorm(x_BSD), owner_kv, rope, mask, cache, cache_position, wants_weights
        )
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), owner_kv, weights


class HunYuanPreTrainedModel(PreTrainedModel):
    """Settings that transformers needs to create, load and place the model."""

    config_class = HunYuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HunYuanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["gate.wg"]


class HunYuanModel(HunYuanPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HunYuanDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Token ids (B, S) or embeddings (B, S, D) -> hidden states (B, S, D) after the final norm.

        attention_mask: (B, cached + S), 0 for padding; or (B, 1, S, L), bool (True: attend) or floating (added to the
        scores), used as given.
        position_ids: (B or 1, S), by default counted without the padding. If there is no mask, a position that does not
        follow its predecessor by one starts a new document of a packed sequence; documents do not attend to each other.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,), where the documents of one packed row begin and end, as trainers
        pass them for flash-attention; equal. seq_idx: (B or 1, S), the number of each token's document. Either decides
        which documents there are, whatever the positions.
        cache, past_key_values: the new and the old name of the same argument.
        Raises TypeError for an unknown argument, and ValueError for arguments that contradict each other.
        """
        _refuse_unknown_arguments(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache, num_cached = self._prepare_cache(_one_cache(past_key_values, cache), use_cache)
        cache_position = torch.arange(x_BSD.shape[1], device=x_BSD.device) + num_cached
        documents = _given_documents(cu_seq_lens_q, cu_seq_lens_k, seq_idx, x_BSD)
        position_ids, documents = _positions(position_ids, attention_mask, cache_position, documents)
        if documents is not None and (num_cached or (attention_mask is not None and attention_mask.dim() == 4)):
            raise ValueError(
                "packed documents (position_ids that restart, cu_seq_lens_q or seq_idx) cannot be combined with a "
                "cache that holds earlier tokens, or with a 4-dimensional attention_mask"
            )
        mask = _Mask(attention_mask, documents, cache_position, num_cached)
        rope = self._rope(position_ids, x_BSD)

        wants_weights = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        wants_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_hidden_states, all_weights = [], []
        owner_kv = None
        for layer in self.layers:
            all_hidden_states += [x_BSD] if wants_all else []
            x_BSD, owner_kv, weights = layer(x_BSD, owner_kv, rope, mask, cache, cache_position, wants_weights)
            all_weights.append(weights)
        x_BSD = self.norm(x_BSD)
        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            hidden_states=(*all_hidden_states, x_BSD) if wants_all else None,
            attentions=tuple(all_weights) if wants_weights else None,
            **named_cache,
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None) -> tuple[Cache | None, int]:
        """The cache to read and write, or None, and the number of positions it holds."""
        if self.gradient_checkpointing and self.training:
            # Recomputing a layer would write its keys a second time.
            if cache is not None or use_cache:
                raise ValueError(
                    "a cache cannot be used with gradient checkpointing in training; call eval(), or "
                    "generate(use_cache=False)"
                )
            return None, 0
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        return cache, int(cache.get_seq_length()) if cache is not None else 0

    def _rope(self, position_ids: Tensor, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (B or 1, S, H). Angles are fp32: at 256K positions another precision changes the model."""
        dim = self.config.head_dim
        # Computed on the CPU and not kept as a buffer: the bits are the same on every device, and no cast or meta
        # device can corrupt them.
        inv_freq = 1.0 / (self.config.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
        angles = position_ids.to(x_BSD.device, torch.float32).unsqueeze(-1) * inv_freq.to(x_BSD.device)
        angles = torch.cat((angles, angles), dim=-1).to(_high_precision(x_BSD.dtype))
        return angles.cos(), angles.sin()


class HunYuanForCausalLM(HunYuanPreTrainedModel, GenerationMixin):
    """HunYuanModel plus the output layer, which may be tied to the embedding."""

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """HunYuanModel.forward, then logits (B, S, V), or only of the last `logits_to_keep` positions if that is not 0.

        labels: (B, S), -100 where there is no loss. The loss is next-token cross entropy without a balance loss: the
        mean, or the sum divided by num_items_in_batch, as transformers' Trainer needs for gradient accumulation. Raises
        as HunYuanModel.forward.
        """
        _refuse_unknown_arguments(others)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache=cache,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        named_cache: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **named_cache,
        )
        return result.to_tuple() if return_dict is False else result

    def generate(self, *args: Any, **options: Any) -> Any:
        """As transformers' generate()."""
        # Up to 5.15 it keeps a static cache for the next call and asks each of its layers for a batch size, which
        # borrowing layers do not have.
        kept = getattr(self, "_cache", None)
        if hasattr(type(kept), "max_batch_size") and not hasattr(kept, "max_batch_size"):
            del self._cache
        return super().generate(*args, **options)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The mask of generate() for a static cache, unchanged: forward builds its own from the tokens' positions.

        The other arguments are for transformers' own mask builder, whose masks differ between versions.
        """
        return attention_mask


def _given_documents(
    cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, seq_idx: Tensor | None, x_BSD: Tensor
) -> Tensor | None:
    """The document of each token (B or 1, S) by what the caller passed, None if nothing was. Raises ValueError."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None if seq_idx is None else seq_idx.to(x_BSD.device)
    B, S = x_BSD.shape[:2]
    ends = cu_seq_lens_q
    is_whole = (
        ends is not None and ends.dim() == 1 and ends[[0, -1]].tolist() == [0, S] and bool((ends.diff() >= 0).all())
    )
    is_same = cu_seq_lens_k is None or (ends is not None and torch.equal(ends, cu_seq_lens_k))
    if ends is None or not is_whole or not is_same or B != 1:
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k must be equal and cover one row of {S} tokens, from 0 to {S}, "
            f"not {B} rows with {cu_seq_lens_q} and {cu_seq_lens_k}"
        )
    return torch.bucketize(torch.arange(S, device=x_BSD.device), ends[1:].to(x_BSD.device), right=True).unsqueeze(0)


def _positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, cache_position: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Positions for RoPE (B or 1, S), and the document of each token (B or 1, S), None unless rows hold several.
    documents: as the caller passed them."""
    if position_ids is None and documents is not None:
        # each document from 0: less the index at which the token's own began
        index = torch.arange(documents.shape[-1], device=documents.device).expand_as(documents)
        begins = F.pad(documents.diff(dim=-1) != 0, (1, 0))
        return index - (index * begins).cummax(-1).values, documents
    if position_ids is None:
        if attention_mask is None or attention_mask.dim() != 2:
            return cache_position.unsqueeze(0), None
        # RoPE is relative, but its angles are rounded, so a text with left padding keeps the positions that it has
        # without.
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -len(cache_position) :], None
    if attention_mask is None and documents is None:
        begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
        documents = begins.cumsum(-1) if bool(begins.any()) else None
    return position_ids, documents


__all__ = ["HunYuanForCausalLM", "HunYuanModel", "HunYuanPreTrainedModel"]
