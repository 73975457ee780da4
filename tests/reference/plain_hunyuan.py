"""Hunyuan-Large written as plainly as possible: the reference for the training model and for the exported one.

No cache, no folding, no batching of experts, no fused attention: one document at a time, one token at a time where it
matters. Everything runs in the dtype of the tensors (fp64 for an exact comparison); only RoPE's angles are fp32,
because the model is defined that way. Sources: report arXiv 2411.02265; Tencent's release for the order RoPE, then
norm, and for the unnormalised top-1 weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import ModelConfig


def plain_logits(
    model: ModelConfig,
    hf_tensors: Mapping[str, Tensor],
    tokens_S: Tensor,
    cu_seqlens: Tensor,
    rope_alpha: float,
    visit: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> Tensor:
    """Logits (S, V) of one packed sequence, without gradient tricks of any kind (autograd works).

    tokens_S: token ids (S,). cu_seqlens: (documents + 1,), first 0, last S; positions restart and attention ends at
    each.
    rope_alpha: the NTK-alpha of the stage. hf_tensors: names of the Hugging Face side, every dtype the same.
    visit: called after each layer with its number, its input and its output, each (S, D).
    """
    documents_S = torch.bucketize(torch.arange(len(tokens_S)), cu_seqlens[1:], right=True)
    positions_S = torch.arange(len(tokens_S)) - cu_seqlens[documents_S]
    order = torch.arange(len(tokens_S))
    visible_SS = (documents_S[:, None] == documents_S[None, :]) & (order[:, None] >= order[None, :])

    x_SD = hf_tensors["model.embed_tokens.weight"][tokens_S]
    for layer in range(model.num_layers):
        input_SD = x_SD
        weights = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in hf_tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed_SD = rms_norm(x_SD, weights["input_layernorm.weight"], model.layernorm_epsilon)
        if layer % model.cla_share_factor == 0:
            raw_k_SGH = (normed_SD @ weights["self_attn.k_proj.weight"].T).unflatten(
                -1, (model.num_query_groups, model.head_dim)
            )
            v_SGH = (normed_SD @ weights["self_attn.v_proj.weight"].T).unflatten(
                -1, (model.num_query_groups, model.head_dim)
            )
        x_SD = x_SD + attention(model, weights, normed_SD, raw_k_SGH, v_SGH, positions_S, visible_SS, rope_alpha)
        normed_SD = rms_norm(x_SD, weights["post_attention_layernorm.weight"], model.layernorm_epsilon)
        x_SD = x_SD + torch.stack([mixture_of_experts(model, weights, token_D) for token_D in normed_SD])
        visit(layer, input_SD, x_SD)
    x_SD = rms_norm(x_SD, hf_tensors["model.norm.weight"], model.layernorm_epsilon)
    head = "model.embed_tokens.weight" if model.share_embeddings_and_output_weights else "lm_head.weight"
    return x_SD @ hf_tensors[head].T


def attention(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    normed_SD: Tensor,
    raw_k_SGH: Tensor,
    v_SGH: Tensor,
    positions_S: Tensor,
    visible_SS: Tensor,
    rope_alpha: float,
) -> Tensor:
    """One layer's attention on its owner's raw keys and values: its own RoPE, its own norms, an explicit softmax."""
    q_SNH = (normed_SD @ weights["self_attn.q_proj.weight"].T).unflatten(
        -1, (model.num_attention_heads, model.head_dim)
    )
    q_SNH = rope(model, q_SNH, positions_S, rope_alpha)
    k_SGH = rope(model, raw_k_SGH, positions_S, rope_alpha)
    if model.qk_layernorm:
        q_SNH = rms_norm(q_SNH, weights["self_attn.query_layernorm.weight"], model.layernorm_epsilon)
        k_SGH = rms_norm(k_SGH, weights["self_attn.key_layernorm.weight"], model.layernorm_epsilon)
    heads = []
    for head in range(model.num_attention_heads):
        group = head // (model.num_attention_heads // model.num_query_groups)
        scores_SS = q_SNH[:, head] @ k_SGH[:, group].T / model.head_dim**0.5
        heads.append(scores_SS.masked_fill(~visible_SS, float("-inf")).softmax(-1) @ v_SGH[:, group])
    return torch.cat(heads, dim=-1) @ weights["self_attn.o_proj.weight"].T


def mixture_of_experts(model: ModelConfig, weights: Mapping[str, Tensor], token_D: Tensor) -> Tensor:
    """Shared expert plus the weighted routed experts of one token; no expert is ever full."""
    probabilities_E = (weights["mlp.gate.wg.weight"] @ token_D).softmax(-1)
    chosen = probabilities_E.topk(model.moe_router_topk)
    scale = chosen.values.sum() if model.moe_router_topk > 1 else 1.0
    out_D = swiglu(weights, "mlp.shared_mlp.", token_D)
    for probability, expert in zip(chosen.values, chosen.indices.tolist(), strict=True):
        out_D = out_D + probability / scale * swiglu(weights, f"mlp.experts.{expert}.", token_D)
    return out_D


def swiglu(weights: Mapping[str, Tensor], prefix: str, token_D: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))"""
    gate_F, up_F = weights[prefix + "gate_proj.weight"] @ token_D, weights[prefix + "up_proj.weight"] @ token_D
    return weights[prefix + "down_proj.weight"] @ (gate_F * torch.sigmoid(gate_F) * up_F)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon), over the last dimension"""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def rope(model: ModelConfig, x_SxH: Tensor, positions_S: Tensor, alpha: float) -> Tensor:
    """Rotates channel pairs (j, j + H/2) by position * base^(-2j/H), base = rotary_base * alpha^(H / (H - 2))."""
    half = model.head_dim // 2
    base = model.rotary_base * alpha ** (model.head_dim / (model.head_dim - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim))
    angles = (positions_S[:, None].to(torch.float32) * frequencies).to(x_SxH.dtype)[:, None, :]
    first, second = x_SxH[..., :half], x_SxH[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )
