"""FP8 settings that have no effect or cannot run are refused, with the reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment


def experiment(precision: dict[str, Any], model: dict[str, Any] | None = None, **parallel: Any) -> Experiment:
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "moe_ffn_hidden_size": 96,
        "num_moe_experts": 4,
        "padded_vocab_size": 512,
        "moe_routing_group_tokens": 32,
    }
    stage = {
        "name": "a",
        "tokens": 4096,
        "sequence_length": 256,
        "global_batch_sequences": 4,
        "lr_end": 1.0,
        "data": [{"path": "x"}],
    }
    return Experiment.model_validate(
        {
            "name": "test",
            "run_dir": "run",
            "tokenizer": "tokenizer",
            "model": fields | (model or {}),
            "parallel": parallel,
            "precision": precision,
            "optimizer": {"lr": 1e-3},
            "stages": [stage],
        }
    )


def refusal(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        rules.check(experiment(*arguments, **keywords))
    return str(caught.value)


@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise", "mxfp8"])
def test_every_recipe_is_legal_with_nothing_else_set(recipe: str | None) -> None:
    rules.check(experiment({"fp8_recipe": recipe}))


@pytest.mark.parametrize("recompute", ["swiglu", "norms", "selective+norms"])
def test_the_delayed_recipe_keeps_copies_that_recomputing_would_not_free(recompute: str) -> None:
    assert (
        f"parallel.recompute={recompute}: with fp8_recipe=delayed the linear layers keep FP8 copies of their inputs, "
        "which recomputing would not free (use selective or cla_group, or precision.fp8_recipe=tensorwise)"
    ) in refusal({"fp8_recipe": "delayed"}, recompute=recompute)
    for other in ("selective", "cla_group"):
        rules.check(experiment({"fp8_recipe": "delayed"}, recompute=other))
    rules.check(experiment({"fp8_recipe": "tensorwise"}, recompute=recompute))


def test_settings_of_the_delayed_recipe_are_refused_with_another() -> None:
    precision = {"fp8_recipe": "blockwise", "fp8_margin": 1, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    text = refusal(precision)
    for name in ("fp8_margin=1", "fp8_amax_history_len=16", "fp8_amax_compute_algo=max"):
        assert (
            f"precision.{name}: only the delayed recipe reads it (use null, or set precision.fp8_recipe to delayed)"
            in text
        )


def test_settings_of_fp8_are_refused_without_a_recipe() -> None:
    text = refusal({"fp8_format": "hybrid", "num_layers_at_start_in_bf16": 1})
    assert "precision.fp8_format=hybrid: fp8_recipe is null: nothing is quantised" in text
    assert "precision.num_layers_at_start_in_bf16=1: fp8_recipe is null: no layer is in FP8 (use 0)" in text


@pytest.mark.parametrize(
    ("precision", "others", "reason"),
    [
        ({"fp8_recipe": None}, {}, "fp8_recipe is null: nothing is quantised (use false, or choose a recipe)"),
        (
            {"fp8_recipe": "mxfp8"},
            {},
            "Transformer Engine 2.11 cannot place mxfp8 weights in the buffers that are gathered",
        ),
        ({"dtype": "fp32"}, {}, "with precision.dtype=fp32 the optimizer has no separate main weights"),
        ({}, {"parallel": {"use_distributed_optimizer": False}}, "only the distributed optimizer updates them"),
        (
            {},
            {"optimizer": {"lr": 1e-3, "cpu_offload_fraction": 0.5}},
            "the offloaded optimizer writes weights in bf16",
        ),
    ],
)
def test_parameters_in_fp8_need_main_weights(precision: dict[str, Any], others: dict[str, Any], reason: str) -> None:
    legal = experiment({"fp8_recipe": "blockwise", "fp8_parameters": True})
    rules.check(legal)
    fields = legal.model_dump(mode="json")
    fields["precision"] |= precision
    with pytest.raises(ConfigError) as caught:
        rules.check(Experiment.model_validate(fields | others))
    assert f"precision.fp8_parameters=true: {reason}" in str(caught.value)


SPLIT = {"lr": 1e-3, "use_precision_aware_optimizer": True}


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (
            {"precision": {"dtype": "fp32"}},
            "it splits fp32 main weights into bf16 weights and a rest (use precision.dtype=bf16, or false)",
        ),
        (
            {"parallel": {"use_distributed_optimizer": False}},
            "it takes its weights and gradients from the distributed optimizer (set "
            "parallel.use_distributed_optimizer to true, or this to false)",
        ),
        (
            {"optimizer": SPLIT | {"cpu_offload_fraction": 0.5}},
            "core's offloaded optimizer keeps moments and main weights in fp32 (use "
            "optimizer.cpu_offload_fraction=0, or false)",
        ),
        (
            {"precision": {"fp8_recipe": "blockwise", "fp8_parameters": True}},
            "there are no bf16 weights to keep with precision.fp8_parameters (use precision.fp8_parameters=false, or "
            "false)",
        ),
    ],
)
def test_main_weights_are_split_only_where_core_can(others: dict[str, Any], reason: str) -> None:
    fields = experiment({}).model_dump(mode="json") | {"optimizer": SPLIT}
    rules.check(Experiment.model_validate(fields))
    with pytest.raises(ConfigError) as caught:
        rules.check(Experiment.model_validate(fields | others))
    (line,) = [line for line in str(caught.value).splitlines() if "optimizer." in line]
    assert f"optimizer.use_precision_aware_optimizer=true: {reason}" in line


def test_moments_have_another_format_only_in_the_precision_aware_optimizer() -> None:
    fields = experiment({}).model_dump(mode="json")
    fields["optimizer"] |= {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    with pytest.raises(ConfigError) as caught:
        rules.check(Experiment.model_validate(fields))
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        assert (
            f"optimizer.{name}=bf16: only the precision-aware optimizer stores moments in another format than fp32 "
            "(set optimizer.use_precision_aware_optimizer to true, or this to fp32)"
        ) in str(caught.value)
    fields["optimizer"]["use_precision_aware_optimizer"] = True
    rules.check(Experiment.model_validate(fields))


def test_a_moment_that_rounding_would_keep_from_decaying_is_refused() -> None:
    fields = experiment({}).model_dump(mode="json")
    fields["optimizer"] = SPLIT | {"exp_avg_sq_dtype": "bf16", "adam_beta2": 0.999}
    with pytest.raises(ConfigError) as caught:
        rules.check(Experiment.model_validate(fields))
    assert (
        "optimizer.exp_avg_sq_dtype=bf16: with adam_beta2=0.999 a step takes less than 2^-8 from a moment; rounding "
        "to bf16 can undo that (use fp32, or adam_beta2 of at most 0.996)"
    ) in str(caught.value)
    fields["optimizer"]["adam_beta2"] = 0.996
    rules.check(Experiment.model_validate(fields))


@pytest.mark.parametrize("margin", [-1, 9])
def test_a_margin_out_of_range_is_refused(margin: int) -> None:
    assert f"precision.fp8_margin={margin}: headroom of 2^margin" in refusal(
        {"fp8_recipe": "delayed", "fp8_margin": margin}
    )


def test_most_recent_has_no_use_for_a_history() -> None:
    text = refusal({"fp8_recipe": "delayed", "fp8_amax_compute_algo": "most_recent", "fp8_amax_history_len": 16})
    assert "precision.fp8_amax_history_len=16: most_recent reads the last step only" in text
    rules.check(experiment({"fp8_recipe": "delayed", "fp8_amax_compute_algo": "most_recent"}))


def test_blocks_that_sequence_parallelism_gathers_must_be_whole() -> None:
    parallel: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    text = refusal({"fp8_recipe": "blockwise"}, {"hidden_size": 192}, **parallel)
    assert (
        "precision.fp8_recipe=blockwise: sequence parallelism gathers each token in blocks of 128, but "
        "hidden_size is 192" in text
    )
    text = refusal({"fp8_recipe": "blockwise"}, {"hidden_size": 128}, **parallel, context_parallel_size=4)
    assert "a rank has 32 tokens per micro-batch, but sequence parallelism gathers blockwise in blocks of 128" in text
    assert "(use a multiple of 1024, or tensorwise)" in text
    rules.check(experiment({"fp8_recipe": "blockwise"}, {"hidden_size": 128}, **parallel))
    rules.check(experiment({"fp8_recipe": "tensorwise"}, {"hidden_size": 192}, **parallel))


def test_some_layer_is_left_for_fp8() -> None:
    text = refusal({"fp8_recipe": "blockwise", "num_layers_at_start_in_bf16": 3, "num_layers_at_end_in_bf16": 1})
    assert (
        "precision.num_layers_at_start_in_bf16=3: with num_layers_at_end_in_bf16=1 none of the 4 layers is left for FP8"
        in text
    )
    rules.check(
        experiment({"fp8_recipe": "blockwise", "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1})
    )


def test_sizes_are_multiples_of_what_the_kernels_need() -> None:
    text = refusal({"fp8_recipe": "blockwise"}, {"moe_ffn_hidden_size": 40})
    assert (
        "precision.fp8_recipe=blockwise: blockwise needs matrix sizes that are multiples of 16, but "
        "moe_ffn_hidden_size 40 is 40" in text
    )
    sharded = refusal(
        {"fp8_recipe": "mxfp8"}, {"ffn_hidden_size": 96}, tensor_model_parallel_size=2, sequence_parallel=True
    )
    assert "ffn_hidden_size 96 over 2 ranks is 48 (use tensorwise or blockwise, which need multiples of 16)" in sharded
    rules.check(
        experiment(
            {"fp8_recipe": "tensorwise"}, {"ffn_hidden_size": 96}, tensor_model_parallel_size=2, sequence_parallel=True
        )
    )


def test_tokens_per_rank_are_multiples_too() -> None:
    changes = {"moe_routing_group_tokens": 8}
    text = refusal({"fp8_recipe": "mxfp8"}, changes, context_parallel_size=16)
    assert "stages.0.sequence_length=256: a rank has 16 tokens per micro-batch" in text
    assert "mxfp8 needs a multiple of 32 (use a multiple of 512)" in text
    rules.check(experiment({"fp8_recipe": "blockwise"}, changes, context_parallel_size=16))


def test_unknown_recipes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'delayed', 'tensorwise', 'blockwise' or 'mxfp8'"):
        experiment({"fp8_recipe": "block"})


def test_an_error_survives_pickling() -> None:
    error = ConfigError("run.yaml", [Problem("a.b", 3, "too many", "use 2"), Problem("c", Problem.NO_VALUE, "missing")])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "run.yaml: 2 problems\n  a.b=3: too many (use 2)\n  c: missing"
