"""The weight map: every parameter occurs once on each side, round trips are bitwise identical, and refusals name the
tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.hf_export import hf_config
from hunyuan_pretrain.checkpoint.weight_map import to_hf, to_megatron, weight_map
from hunyuan_pretrain.config.schema import ModelConfig


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small architectures over every feature that determines which tensors exist and their shapes."""
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, experts = groups * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return ModelConfig(
        num_layers=share * draw(st.integers(1, 2)),
        hidden_size=heads * 4,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([None, 2, 6])),
        ffn_hidden_size=draw(st.integers(1, 5)),
        moe_ffn_hidden_size=draw(st.sampled_from([None, 3])),
        num_moe_experts=experts,
        moe_router_topk=draw(st.integers(1, experts)),
        cla_share_factor=share,
        qk_layernorm=draw(st.booleans()),
        padded_vocab_size=11,
        share_embeddings_and_output_weights=draw(st.booleans()),
    )


def random_megatron_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    return {row.megatron_name: torch.randn(row.megatron_shape) for row in weight_map(model)}


@given(models())
@settings(max_examples=60, deadline=None)
def test_every_parameter_maps_to_hf_once(model: ModelConfig) -> None:
    table = weight_map(model)
    assert len({row.megatron_name for row in table}) == len(table)
    hf_names = [name for row in table for name in row.hf_names]
    assert len(set(hf_names)) == len(hf_names)
    for row in table:
        assert torch.Size(row.megatron_shape).numel() == sum(torch.Size(shape).numel() for shape in row.hf_shapes)


@given(models())
@settings(max_examples=60, deadline=None)
def test_round_trip_is_bitwise_identical(model: ModelConfig) -> None:
    megatron = random_megatron_tensors(model)
    hf = dict(to_hf(model, megatron))
    assert {name: tuple(tensor.shape) for name, tensor in hf.items()} == {
        name: shape for row in weight_map(model) for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    back = dict(to_megatron(model, hf))
    assert list(back) == list(megatron)
    assert all(torch.equal(back[name], megatron[name]) for name in megatron)
    again = dict(to_hf(model, back))
    assert all(torch.equal(again[name], hf[name]) for name in hf)


@given(models())
@settings(max_examples=30, deadline=None)
def test_hf_names_are_the_state_dict_of_our_hf_model(model: ModelConfig) -> None:
    from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
    from hunyuan_pretrain.checkpoint.modeling_hunyuan import HunYuanForCausalLM

    config = HunYuanConfig(**hf_config(model, rope_alpha=1.0, max_position_embeddings=64, dtype=torch.float32))
    with torch.device("meta"):
        state = HunYuanForCausalLM(config).state_dict()
    if model.share_embeddings_and_output_weights:
        del state["lm_head.weight"]  # the same tensor as the embedding, not stored
    expected = {
        name: shape for row in weight_map(model) for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_query_key_value_rows_are_interleaved_by_group() -> None:
    """Megatron's order for 4 query heads in 2 groups: q0 q1 k0 v0, q2 q3 k1 v1."""
    model = small_model()
    megatron = random_megatron_tensors(model)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    heads = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21], dtype=torch.float32)
    megatron[name] = heads.repeat_interleave(model.head_dim)[:, None].expand(-1, model.hidden_size).contiguous()
    hf = dict(to_hf(model, megatron))
    for letter, expected in (("q", [0, 1, 2, 3]), ("k", [10, 11]), ("v", [20, 21])):
        assert hf[f"model.layers.0.self_attn.{letter}_proj.weight"][:: model.head_dim, 0].tolist() == expected


def test_gate_rows_come_before_up_rows() -> None:
    model = small_model()
    megatron = random_megatron_tensors(model)
    hf = dict(to_hf(model, megatron))
    experts = megatron["decoder.layers.1.mlp.experts.linear_fc1.weight"]
    assert torch.equal(hf["model.layers.1.mlp.experts.2.gate_proj.weight"], experts[2, : model.expert_ffn_size])
    assert torch.equal(hf["model.layers.1.mlp.experts.2.up_proj.weight"], experts[2, model.expert_ffn_size :])


def test_borrowing_layers_have_no_key_and_value() -> None:
    names = {name for row in weight_map(small_model()) for name in row.hf_names}
    assert "model.layers.0.self_attn.k_proj.weight" in names
    assert "model.layers.1.self_attn.k_proj.weight" not in names
    assert "model.layers.1.self_attn.q_proj.weight" in names


def test_published_size_of_hunyuan_large() -> None:
    """388,698,128,640 parameters, with the embedding counted once."""
    large = ModelConfig(
        num_layers=64,
        hidden_size=6400,
        num_attention_heads=80,
        num_query_groups=8,
        ffn_hidden_size=18304,
        num_moe_experts=16,
        padded_vocab_size=128512,
    )
    assert sum(torch.Size(row.megatron_shape).numel() for row in weight_map(large)) == 388_698_128_640


def test_refuses_a_missing_tensor_and_names_it() -> None:
    model = small_model()
    megatron = random_megatron_tensors(model)
    megatron["decoder.layers.1.mlp.routr.weight"] = megatron.pop("decoder.layers.1.mlp.router.weight")
    with pytest.raises(CheckpointError) as error:
        next(to_hf(model, megatron))
    assert "decoder.layers.1.mlp.router.weight: missing (nearest: decoder.layers.1.mlp.routr.weight)" in str(
        error.value
    )
    assert (
        "decoder.layers.1.mlp.routr.weight: not a tensor of this model (nearest: decoder.layers.1.mlp.router.weight)"
        in str(error.value)
    )


def test_refuses_an_unread_hf_tensor_and_names_it() -> None:
    model = small_model()
    hf = dict(to_hf(model, random_megatron_tensors(model)))
    hf["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight: not a tensor of this model"
    ):
        dict(to_megatron(model, hf))


@pytest.mark.parametrize("name", ["decoder.final_layernorm.weight", "decoder.layers.0.mlp.experts.linear_fc1.weight"])
def test_refuses_a_wrong_shape(name: str) -> None:
    model = small_model()
    megatron = random_megatron_tensors(model)
    shape = tuple(megatron[name].shape)
    megatron[name] = megatron[name][1:]
    with pytest.raises(CheckpointError) as error:
        dict(to_hf(model, megatron))
    assert f"{name}: shape {(shape[0] - 1, *shape[1:])}, but this model has {shape}" in str(error.value)


def small_model() -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=12,
        moe_ffn_hidden_size=8,
        num_moe_experts=4,
        padded_vocab_size=32,
    )
