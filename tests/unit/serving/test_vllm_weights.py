"""Strict loading, on a stand-in with the parameters that vLLM gives the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
from hunyuan_pretrain.checkpoint.weight_map import weight_map
from hunyuan_pretrain.serving.vllm_weights import full_shape, load_weights, shape_problem
from tests.helpers.tiny_export import tiny_model

MODEL = tiny_model(kv_channels=16, moe_ffn_hidden_size=40)
CONFIG = HunYuanConfig(
    vocab_size=480,
    hidden_size=32,
    intermediate_size=24,
    moe_intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
)

Loaded = list[tuple[str, Any, Any]]


def checkpoint() -> dict[str, Tensor]:
    """Every tensor of an export, by its name, whole."""
    return {
        name: torch.zeros(shape)
        for row in weight_map(MODEL)
        for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }


def module_at(root: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    return root


def stand_in(expert_map: Tensor | None = None) -> tuple[nn.Module, Loaded]:
    """Modules and parameters named as vLLM builds them, with cache scales; and the calls of vLLM's loaders."""
    model, loaded = nn.Module(), []

    def add(path: str, has_loader: bool = True, shape: tuple[int, ...] = (1,)) -> None:
        module, _, name = path.rpartition(".")
        parameter = nn.Parameter(torch.full(shape, torch.nan))

        def load(_: Tensor, tensor: Tensor, part: Any = None, *, shard_id: Any = None, expert_id: Any = None) -> None:
            loaded.append((path, shard_id if expert_id is not None else part, expert_id))

        if has_loader:
            parameter.weight_loader = load
        module_at(model, module).register_parameter(name, parameter)

    add("model.embed_tokens.weight")
    add("model.norm.weight", False, (32,))
    for layer in range(2):
        of = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{of}.{norm}.weight", False, (32,))
        for norm in ("query_layernorm", "key_layernorm"):
            add(f"{of}.self_attn.{norm}.weight", False, (16,))
        add(f"{of}.self_attn.{'q_proj' if layer else 'qkv_proj'}.weight")
        add(f"{of}.self_attn.o_proj.weight")
        for scale in ("q_scale", "k_scale", "v_scale", "k_zero_point"):
            add(f"{of}.self_attn.attn.{scale}")
        attention: Any = module_at(model, f"{of}.self_attn.attn")
        attention.layer_name = f"{of}.self_attn.attn"
        attention.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn" if layer else None
        add(f"{of}.mlp.gate.weight")
        add(f"{of}.mlp.shared_mlp.gate_up_proj.weight")
        add(f"{of}.mlp.shared_mlp.down_proj.weight")
        add(f"{of}.mlp.experts.routed_experts.w13_weight")
        add(f"{of}.mlp.experts.routed_experts.w2_weight")
        experts: Any = module_at(model, f"{of}.mlp.experts.routed_experts")
        experts.expert_map = expert_map
    return model, loaded


def load(
    model: nn.Module,
    tensors: dict[str, Tensor] | list[tuple[str, Tensor]],
    is_elsewhere: Callable[[str], bool] = lambda name: False,
    **options: bool,
) -> set[str]:
    options = {"has_cache_scales": False} | options
    pairs = list(tensors.items()) if isinstance(tensors, dict) else tensors
    return load_weights(model, CONFIG, pairs, is_elsewhere=is_elsewhere, **options)


def test_every_tensor_of_a_checkpoint_is_used_once() -> None:
    model, calls = stand_in()
    names = load(model, checkpoint())
    assert names == {name for name, _ in model.named_parameters()}
    assert len(calls) == len(set(calls))
    without_loader = sum(not hasattr(parameter, "weight_loader") for parameter in model.parameters())
    assert len(calls) + without_loader == len(checkpoint())
    assert ("model.layers.0.self_attn.qkv_proj.weight", "v", None) in calls
    assert ("model.layers.1.self_attn.q_proj.weight", None, None) in calls
    assert ("model.layers.1.mlp.shared_mlp.gate_up_proj.weight", 1, None) in calls
    assert ("model.layers.1.mlp.experts.routed_experts.w13_weight", "w3", 3) in calls
    assert ("model.layers.0.mlp.gate.weight", None, None) in calls
    assert not model.get_parameter("model.layers.1.self_attn.key_layernorm.weight").isnan().any()


def test_all_problems_are_in_one_message() -> None:
    tensors = checkpoint()
    missing = [name for name in tensors if ".experts.3." in name][:2]
    for name in missing:
        del tensors[name]
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(24, 32)
    pairs = [*tensors.items(), ("model.norm.weight", torch.zeros(32))]
    with pytest.raises(ValueError, match=r"does not fit its config\.json, 5 problems") as error:
        load(stand_in()[0], pairs)
    for problem in (
        f"{missing[0]}: missing",
        f"{missing[1]}: missing",
        "model.layers.1.self_attn.k_proj.weight: not a tensor of this model",
        "model.layers.0.mlp.experts.0.up_proj.weight: shape (24, 32), but this model has (40, 32)",
        "model.norm.weight: more than once",
    ):
        assert problem in str(error.value)


def test_a_long_list_of_problems_is_cut() -> None:
    with pytest.raises(ValueError, match=r"\d+ problems") as error:
        load(stand_in()[0], {})
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == f"  ... and {len(checkpoint()) - 10} more"


def test_experts_of_other_ranks_may_be_missing() -> None:
    """vLLM may read only a rank's own experts from disk."""
    tensors = {
        name: tensor for name, tensor in checkpoint().items() if not any(f".experts.{e}." in name for e in (2, 3))
    }
    load(stand_in(expert_map=torch.tensor([0, 1, -1, -1]))[0], tensors)
    with pytest.raises(ValueError, match="6 problems"):
        load(stand_in(expert_map=torch.tensor([0, 1, 2, -1]))[0], tensors)


def test_tensors_of_other_pipeline_stages_are_passed_over() -> None:
    model, calls = stand_in()
    del model.model.layers._modules["1"]
    load(model, checkpoint(), is_elsewhere=lambda name: name.startswith("model.layers.1."))
    assert calls


def test_a_borrowing_layer_gets_the_cache_scales_of_its_owner() -> None:
    model, _ = stand_in()
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            del parameter.weight_loader
    scales = {
        "model.layers.0.self_attn.k_scale": torch.tensor(0.5),
        "model.layers.0.self_attn.v_scale": torch.tensor([2.0]),
    }
    load(model, checkpoint() | scales, has_cache_scales=True)
    for layer in (0, 1):
        assert model.get_parameter(f"model.layers.{layer}.self_attn.attn.k_scale").item() == 0.5
        assert model.get_parameter(f"model.layers.{layer}.self_attn.attn.v_scale").item() == 2.0


def test_cache_scales_must_be_there_for_owners_and_only_for_them() -> None:
    scales = {f"model.layers.1.self_attn.{name}_scale": torch.ones(()) for name in "kv"}
    with pytest.raises(ValueError, match="4 problems") as error:
        load(stand_in()[0], checkpoint() | scales, has_cache_scales=True)
    assert "model.layers.0.self_attn.k_scale: missing" in str(error.value)
    assert "model.layers.1.self_attn.v_scale: not a tensor of this model" in str(error.value)


def test_a_part_may_be_updated_later() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    assert load(stand_in()[0], {name: checkpoint()[name]}, allow_part=True) == {
        "model.layers.0.self_attn.qkv_proj.weight"
    }


def test_shapes_are_those_of_the_export() -> None:
    for row in weight_map(MODEL):
        for name, shape in zip(row.hf_names, row.hf_shapes, strict=True):
            assert full_shape(name.removesuffix(".weight"), CONFIG) == shape


@pytest.mark.parametrize(
    ("kind", "tensor", "expected"),
    [
        ("weight_packed", torch.zeros(40, 8), None),
        ("weight_packed", torch.zeros(40, 4), None),
        ("weight_packed", torch.zeros(24, 8), "shape (24, 8), but this model has (40, 8) or (40, 4)"),
        ("weight_shape", torch.tensor([40, 32]), None),
        ("weight_shape", torch.tensor([24, 32]), "shape (24, 32), but this model has (40, 32)"),
        ("weight_scale", torch.zeros(40, 1), None),
        ("weight_scale", torch.zeros(()), None),
        ("weight_scale", torch.zeros(24, 1), "shape (24, 1), but this model has one scale, or 40 rows"),
        ("input_scale", torch.zeros(1), None),
    ],
)
def test_shapes_of_quantised_tensors(kind: str, tensor: Tensor, expected: str | None) -> None:
    name = f"model.layers.0.mlp.experts.1.gate_proj.{kind}"
    assert shape_problem(name, tensor, CONFIG) == (expected and f"{name}: {expected}")
