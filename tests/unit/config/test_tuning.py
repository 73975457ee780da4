"""Which weights are trained: names in closed form are those of the model, and patterns that cannot be meant are
refused."""

from __future__ import annotations

from typing import Any

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment, LoraConfig
from hunyuan_pretrain.config.training_rules import (
    attention_dropout_is_computed_by_torch,
    attention_dropout_knows_its_tokens,
)
from hunyuan_pretrain.config.tuning import is_trained, parameter_names, targets
from hunyuan_pretrain.plan.buffers import weights_of_stage
from tests.helpers import tiny
from tests.helpers.runs import experiment_fields

MODEL = tiny.tiny_model(share_embeddings_and_output_weights=False)


def experiment(tuning: dict[str, Any], **changes: Any) -> Experiment:
    from pathlib import Path

    fields = experiment_fields(Path("corpus"), Path("run"), tuning=tuning, **changes)
    fields["checkpoint"] = {"init_from": "base"} | fields["checkpoint"]
    return Experiment.model_validate(fields)


def lora(*modules: str, **fields: Any) -> LoraConfig:
    return LoraConfig(rank=4, alpha=8, target_modules=modules, **fields)


def test_names_are_those_of_the_model() -> None:
    built = [name for name, _ in tiny.build(MODEL).named_parameters()]
    assert parameter_names(MODEL) == built
    assert [weight.name for weight in weights_of_stage(MODEL, experiment({}).parallel, 0)] == built


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], {"self_attention.linear_qkv": ("q_proj",)}),
        (["k_proj", "o_proj"], {"self_attention.linear_qkv": ("k_proj",), "self_attention.linear_proj": ("o_proj",)}),
        (["self_attn.v_proj"], {"self_attention.linear_qkv": ("v_proj",)}),
        (["*.mlp.shared_mlp.*"], {
            "mlp.shared_experts.linear_fc1": ("gate_proj", "up_proj"), "mlp.shared_experts.linear_fc2": ("down_proj",),
        }),
        (["model.layers.*.mlp.experts.*.up_proj"], {"mlp.experts.linear_fc1": ("up_proj",)}),
        (["down_proj"], {"mlp.experts.linear_fc2": ("down_proj",), "mlp.shared_experts.linear_fc2": ("down_proj",)}),
        (["model.layers.1.self_attn.q_proj"], {}),
    ],
)  # fmt: skip
def test_patterns_name_the_parts_of_a_layer(patterns: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert targets(MODEL, lora(*patterns), 0) == expected


def test_attention_dropout_needs_known_tokens_and_warns_where_flash_kernels_would_run() -> None:
    def with_rate(rate: float, device: str = "cpu", **parallel: Any) -> Experiment:
        found = experiment({})
        stages = tuple(stage.model_copy(update={"attention_dropout": rate}) for stage in found.stages)
        changes = {
            "stages": stages,
            "parallel": found.parallel.model_copy(update=parallel),
            "runtime": found.runtime.model_copy(update={"device": device}),
        }
        return found.model_copy(update=changes)

    refused, warned = attention_dropout_knows_its_tokens, attention_dropout_is_computed_by_torch
    exchanged: dict[str, Any] = {"context_parallel_size": 2, "context_parallel_method": "all_to_all"}
    assert [one.path for one in refused(with_rate(0.1, **exchanged))][:1] == ["stages.0.attention_dropout"]
    for fine in (with_rate(0.1), with_rate(0.0, **exchanged), with_rate(0.1, context_parallel_size=2)):
        assert list(refused(fine)) == []
    assert len(list(warned(with_rate(0.1, "cuda")))) == 1
    assert list(warned(with_rate(0.1))) == list(warned(with_rate(0.0, "cuda"))) == []


def test_a_borrower_has_no_keys_and_values_to_adapt() -> None:
    assert targets(MODEL, lora("q_proj", "k_proj", "v_proj"), 1) == {"self_attention.linear_q": ("q_proj",)}


def test_frozen_routers_and_patterns() -> None:
    router, query = "decoder.layers.0.mlp.router.weight", "decoder.layers.1.self_attention.linear_q.weight"
    frozen = experiment({"freeze_router": True}).tuning
    assert (is_trained(frozen, router), is_trained(frozen, query)) == (False, True)
    attention = experiment({"trainable": ["*.self_attention.*"]}).tuning
    assert (is_trained(attention, router), is_trained(attention, query)) == (False, True)


@pytest.mark.parametrize(
    ("tuning", "changes", "expected"),
    [
        ({"trainable": ["*.attn.*"]}, {}, "tuning.trainable.0=*.attn.*: matches no parameter"),
        (
            {"lora": {"rank": 1, "alpha": 1, "target_modules": ["wq"]}},
            {},
            "tuning.lora.target_modules.0=wq: matches no linear layer",
        ),
        (
            {"lora": {"rank": 1, "alpha": 1, "target_modules": ["experts.0.up_proj"]}},
            {},
            "matches some routed experts of a layer and not the others; they are adapted together "
            "(use 'experts.*.up_proj')",
        ),
        ({"lora": {"rank": 1, "alpha": 1}, "trainable": ["*"]}, {}, "has no effect with tuning.lora"),
        ({"lora": {"rank": 1, "alpha": 1}}, {"checkpoint": {"init_from": None}}, "an adapter needs the weights"),
        (
            {"freeze_router": True},
            {"precision": {"dtype": "bf16", "fp8_recipe": "blockwise"}},
            "some weights are frozen",
        ),
        (
            {"trainable": ["decoder.layers.0.*"]},
            {"parallel": {"pipeline_model_parallel_size": 2}},
            "pipeline rank 1 would train nothing",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tuning: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.check(experiment(tuning, **changes))
    said = str(caught.value).replace("\n", " ")
    assert expected in " ".join(said.split()), said
