"""One cached key per CLA group: the inputs that the vLLM model gives to a plain attention kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanAttention, HunYuanModel, _Mask
from hunyuan_pretrain.serving import attention_inputs

TOKENS, HEADS, GROUPS, WIDTH = 7, 4, 2, 16
START = 250_000
"""Position of the first token: a rotation in less than fp32 would show."""


def config(use_qk_norm: bool) -> HunYuanConfig:
    return HunYuanConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        num_experts=2,
        use_qk_norm=use_qk_norm,
        rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    )


def two_layers(use_qk_norm: bool) -> tuple[HunYuanModel, Tensor]:
    """A CLA group of an owner and a borrower with other norm weights, and an input (1, T, D)."""
    torch.manual_seed(0)
    model = HunYuanModel(config(use_qk_norm))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model, torch.randn(1, TOKENS, 24)


def attend(q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
    """Plain causal attention, (T, N*H)."""
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k_TGH, v_TGH))
    scores = torch.einsum("tnh,snh->nts", q_TNH, k) * WIDTH**-0.5
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v).flatten(1)


def of_layer(layer: HunYuanAttention, x_TD: Tensor, owner: HunYuanAttention, rope: attention_inputs.Rope) -> Tensor:
    """Output of a layer whose kernel sees the owner's cached keys and values only."""
    q, k, v = (projection(x_TD).view(TOKENS, -1, WIDTH) for projection in (layer.q_proj, owner.k_proj, owner.v_proj))
    weights = (layer.query_layernorm.weight, layer.key_layernorm.weight) if layer.use_qk_norm else None
    cached = attention_inputs.key(k, rope, layer.use_qk_norm, layer.eps)
    return layer.o_proj(attend(attention_inputs.query(q, rope, weights, layer.eps), cached, v))


@pytest.mark.parametrize("use_qk_norm", [True, False])
@torch.inference_mode()
def test_layers_that_share_a_cache_compute_what_the_model_code_computes(use_qk_norm: bool) -> None:
    model, x_1TD = two_layers(use_qk_norm)
    positions = torch.arange(START, START + TOKENS)
    their_rope = model._rope(positions[None], x_1TD)
    our_rope = attention_inputs.rope_of(positions, attention_inputs.inverse_frequencies(WIDTH, model.config.rope_base))
    for ours, theirs in zip(our_rope, their_rope, strict=True):
        assert torch.equal(ours[:, 0], theirs[0])
    owner, borrower = (layer.self_attn for layer in model.layers)
    places = torch.arange(TOKENS)
    shared = None
    for layer in (owner, borrower):
        expected, shared, _ = layer(x_1TD, shared, their_rope, _Mask(None, None, places, 0), None, places, False)
        torch.testing.assert_close(of_layer(layer, x_1TD[0], owner, our_rope), expected[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_folding_the_key_norm_weight_into_the_query_changes_no_score() -> None:
    """Against the definition: each layer normalises the same rotated keys with its own weight."""
    torch.manual_seed(0)
    q, k = torch.randn(TOKENS, HEADS, WIDTH), torch.randn(TOKENS, HEADS, WIDTH)
    query_weight, key_weight = 1 + 0.3 * torch.randn(2, WIDTH)
    rope = attention_inputs.rope_of(torch.arange(TOKENS), attention_inputs.inverse_frequencies(WIDTH, 1e4))

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    rotated_q, rotated_k = (attention_inputs.key(x, rope, False, 1e-5) for x in (q, k))
    expected = torch.einsum("tnh,snh->nts", rms_norm(rotated_q, query_weight), rms_norm(rotated_k, key_weight))
    folded = attention_inputs.query(q, rope, (query_weight, key_weight), 1e-5)
    cached = attention_inputs.key(k, rope, True, 1e-5)
    torch.testing.assert_close(torch.einsum("tnh,snh->nts", folded, cached), expected, rtol=1e-5, atol=1e-5)
    unfolded = attention_inputs.query(q, rope, (query_weight, torch.ones(WIDTH)), 1e-5)
    assert (torch.einsum("tnh,snh->nts", unfolded, cached) - expected).abs().max() > 0.1


def test_keys_and_queries_are_rounded_once() -> None:
    """In bf16 they are what fp32 gives, rounded."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HEADS, WIDTH, dtype=torch.bfloat16)
    weights = (1 + 0.3 * torch.randn(WIDTH)).bfloat16(), (1 + 0.3 * torch.randn(WIDTH)).bfloat16()
    rope = attention_inputs.rope_of(torch.arange(TOKENS), attention_inputs.inverse_frequencies(WIDTH, 1e4))
    for of in (
        lambda t: attention_inputs.key(t, rope, True, 1e-5),
        lambda t: attention_inputs.query(t, rope, weights, 1e-5),
    ):
        assert torch.equal(of(x), of(x.float()).bfloat16())
