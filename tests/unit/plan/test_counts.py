"""The closed forms, checked against the published figures, against counts by hand, and against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hunyuan_pretrain.config.derived import expert_lr_ratio, grid, optimal_lr_factor
from hunyuan_pretrain.config.load import load_experiment, load_model
from hunyuan_pretrain.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.plan.counts import (
    flops_per_token,
    kv_cache_bytes_per_token,
    memory_of_ranks,
    memory_per_rank,
    parameters,
)

ROOT = Path(__file__).parents[3]
LARGE = load_model(ROOT / "configs/model/hunyuan_large.yaml")
TINY = load_model(ROOT / "configs/model/hunyuan_tiny.yaml")


def shapes(model: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of every weight of the model, written out layer by layer: an independent count."""
    hidden, width, heads = model.hidden_size, model.head_dim, model.num_attention_heads
    found: dict[str, list[tuple[int, ...]]] = {"dense": [(model.padded_vocab_size, hidden), (hidden,)], "routed": []}
    if not model.share_embeddings_and_output_weights:
        found["dense"].append((model.padded_vocab_size, hidden))
    for layer in range(model.num_layers):
        found["dense"] += [
            (heads * width, hidden),
            (hidden, heads * width),
            (hidden,),
            (hidden,),
            (model.num_moe_experts, hidden),
        ]
        if layer % model.cla_share_factor == 0:
            found["dense"] += [(model.num_query_groups * width, hidden)] * 2
        if model.qk_layernorm:
            found["dense"] += [(width,)] * 2
        found["dense"] += [(model.ffn_hidden_size, hidden)] * 2 + [(hidden, model.ffn_hidden_size)]
        found["routed"] += (
            [(model.expert_ffn_size, hidden)] * 2 + [(hidden, model.expert_ffn_size)]
        ) * model.num_moe_experts
    return found


def size(weights: list[tuple[int, ...]]) -> int:
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in weights)


def test_hunyuan_large_has_the_published_parameters() -> None:
    count = parameters(LARGE)
    assert count.total == 388_698_128_640
    assert count.active == 51_318_800_640
    assert count.dense + count.routed_experts == count.total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_embeddings_and_output_weights": False},
        {"qk_layernorm": False, "cla_share_factor": 1},
        {"cla_share_factor": 4, "moe_router_topk": 2},
        {"moe_ffn_hidden_size": None, "kv_channels": 64},
    ],
)
def test_parameters_equal_the_sum_over_all_weights(changes: dict[str, object]) -> None:
    model = TINY.model_copy(update=changes)
    count, listed = parameters(model), shapes(model)
    assert count.total == size(listed["dense"]) + size(listed["routed"])
    assert count.routed_experts == size(listed["routed"])
    unvisited = size(listed["routed"]) // model.num_moe_experts * (model.num_moe_experts - model.moe_router_topk)
    assert count.active == count.total - unvisited


def test_kv_cache_has_the_published_sizes() -> None:
    assert kv_cache_bytes_per_token(LARGE) == 81_920
    assert kv_cache_bytes_per_token(LARGE.model_copy(update={"cla_share_factor": 1})) == 163_840
    assert (
        kv_cache_bytes_per_token(LARGE.model_copy(update={"cla_share_factor": 1, "num_query_groups": 80})) == 1_638_400
    )
    assert kv_cache_bytes_per_token(LARGE, bytes_per_value=1) == 40_960


def test_matmul_flops_are_six_times_the_active_matrices() -> None:
    for model in (
        LARGE,
        TINY,
        TINY.model_copy(update={"share_embeddings_and_output_weights": False, "moe_router_topk": 2}),
    ):
        count, flops = parameters(model), flops_per_token(model, 4096)
        # A tied embedding is used twice, as a lookup and as the head, and only the head multiplies.
        assert flops.matmuls == 6 * (count.active - count.norms - count.output_head)
        assert flops.total == flops.matmuls + flops.attention_scores + flops.attention_values


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 20))
def test_attention_flops_count_the_pairs_that_the_mask_allows(documents: list[int], padding: int) -> None:
    length = sum(documents) + padding
    pairs = sum(1 for n in documents for query in range(n) for key in range(n) if key <= query)
    flops = flops_per_token(TINY, length, documents)
    # Forward 2 and backward 4 FLOPs for each pair, head channel and layer.
    assert flops.attention_scores * length == pytest.approx(
        6 * pairs * TINY.num_attention_heads * TINY.head_dim * TINY.num_layers
    )
    assert flops.attention_values == flops.attention_scores


def test_documents_longer_than_the_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="document_lengths add up to 300 tokens, more than sequence_length=256"):
        flops_per_token(TINY, 256, [200, 100])
    assert flops_per_token(TINY, 256) == flops_per_token(TINY, 256, [256])


def test_memory_of_one_rank_includes_everything() -> None:
    count, plain_optimizer = parameters(TINY), ParallelConfig(use_distributed_optimizer=False)
    memory = memory_per_rank(TINY, plain_optimizer, PrecisionConfig(dtype="fp32"), 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count.total, 4 * count.total, 8 * count.total)
    memory = memory_per_rank(TINY, plain_optimizer, PrecisionConfig(dtype="bf16"), 1)
    plain, router = count.total - count.router, count.router
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        2 * plain + 4 * router,
        4 * count.total,
        12 * plain + 8 * router,
    )
    memory = memory_per_rank(TINY, plain_optimizer, PrecisionConfig(dtype="bf16", grad_reduce_in_fp32=False), 1)
    assert memory.gradients == 2 * plain + 4 * router


SPLIT = {"use_precision_aware_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "moments", "main", "gib"),
    [
        ({}, 8, 4, "8.6"),
        ({"ema_decay": 0.999}, 12, 4, "11.5"),
        (SPLIT, 8, 2, "7.2"),
        (SPLIT | {"exp_avg_dtype": "bf16"}, 6, 2, "5.7"),
        (SPLIT | {"exp_avg_sq_dtype": "bf16"}, 6, 2, "5.7"),
        (SPLIT | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 4, 2, "4.3"),
    ],
)
def test_optimizer_state_of_hunyuan_large_by_format(
    settings: dict[str, Any], moments: int, main: int, gib: str
) -> None:
    """Bytes per weight (`moments`: with the average), and GiB of the fullest of 512 ranks, as in docs/guide/layouts.md.
    The ranks together hold the state of each weight once, of the tied embedding twice, of norms and fp32 routers once
    per tensor-parallel rank."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=8,
        expert_model_parallel_size=8,
    )
    optimizer = OptimizerConfig.model_validate({"lr": 1e-4} | settings)
    parts = LARGE, parallel, PrecisionConfig(dtype="bf16"), 512
    ranks = [memory for stage in range(8) for memory in memory_of_ranks(*parts, stage, optimizer)]
    count = parameters(LARGE)
    sharded = count.total - count.norms - count.router + count.embedding
    expected = (moments + main) * (sharded + 8 * count.norms) + moments * 8 * count.router
    assert sum(memory.optimizer for memory in ranks) == expected
    assert f"{memory_per_rank(*parts, optimizer=optimizer).optimizer / 2**30:.1f}" == gib


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("world_size", "expert_parallel"), [(1, 1), (2, 2), (4, 2), (8, 8), (8, 1)])
def test_the_ranks_together_hold_each_shard_as_often_as_they_should(
    world_size: int, expert_parallel: int, dtype: str, is_distributed: bool
) -> None:
    count = parameters(TINY)
    parallel = ParallelConfig(expert_model_parallel_size=expert_parallel, use_distributed_optimizer=is_distributed)
    ranks = memory_of_ranks(TINY, parallel, PrecisionConfig(dtype=dtype), world_size, 0)
    copies_of_experts = world_size // expert_parallel
    weight = 2 if dtype == "bf16" else 4
    dense, router, routed = count.dense - count.router, count.router, count.routed_experts
    weights = world_size * (weight * dense + 4 * router) + copies_of_experts * weight * routed
    state = 12 if dtype == "bf16" else 8
    once = state * (dense + routed) + 8 * router
    often = world_size * (state * dense + 8 * router) + copies_of_experts * state * routed
    assert len(ranks) == world_size
    assert sum(memory.optimizer for memory in ranks) == (once if is_distributed else often)
    assert sum(memory.weights for memory in ranks) == pytest.approx(weights, rel=2e-4 if is_distributed else 0)
    fullest = memory_per_rank(TINY, parallel, PrecisionConfig(dtype=dtype), world_size)
    assert (
        fullest.total
        == max(memory.total for memory in ranks)
        == fullest.weights + fullest.gradients + fullest.optimizer
    )


LAYOUTS = st.builds(
    lambda tp, cp, pp, ep, etp, **others: ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        **others,
    ),
    *[st.sampled_from((1, 2))] * 3,
    st.sampled_from((1, 2, 4)),
    st.sampled_from((1, 2)),
    virtual_pipeline_model_parallel_size=st.just(1),
    use_distributed_optimizer=st.booleans(),
)


@given(LAYOUTS, st.booleans(), st.sampled_from((1, 2)))
def test_every_layout_shards_the_whole_model(parallel: ParallelConfig, is_tied: bool, times: int) -> None:
    """Optimizer state with the distributed optimizer, and weights without it, sum to one model over the ranks that do
    not hold copies."""
    model = TINY.model_copy(update={"share_embeddings_and_output_weights": is_tied})
    count, world_size = parameters(model), 16 * times
    shares, pipeline_ranks = grid(parallel, world_size), range(parallel.pipeline_model_parallel_size)
    ranks = [
        memory
        for pipeline_rank in pipeline_ranks
        for memory in memory_of_ranks(model, parallel, PrecisionConfig(dtype="fp32"), world_size, pipeline_rank)
    ]
    divided = parameters(model.model_copy(update={"num_layers": 2})).embedding  # the last stage's copy
    replicated = count.norms + count.router
    elements = (
        count.total
        - count.routed_experts
        + (shares.tp - 1) * replicated
        + (divided if is_tied and shares.pp > 1 else 0)
    )
    if parallel.use_distributed_optimizer:
        assert sum(memory.optimizer for memory in ranks) == 8 * (elements + count.routed_experts)
    else:
        expected = 4 * (shares.dp_cp * elements + shares.expert_dp * count.routed_experts)
        assert sum(memory.weights for memory in ranks) == expected == sum(memory.gradients for memory in ranks)


def test_the_fullest_rank_is_in_the_largest_stage() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout=(2, 2), use_distributed_optimizer=False)
    precision, count = PrecisionConfig(dtype="fp32"), parameters(TINY)
    first, last = (memory_per_rank(TINY, parallel, precision, 2, pipeline_rank) for pipeline_rank in (0, 1))
    assert last.weights - first.weights == 4 * TINY.hidden_size, "the final norm; both stages hold the embedding"
    assert first.weights + last.weights == 4 * (count.total + count.embedding)
    assert memory_per_rank(TINY, parallel, precision, 2) == last
    uneven = parallel.model_copy(update={"pipeline_layout": (4,), "pipeline_model_parallel_size": 1})
    assert memory_per_rank(TINY, uneven, precision, 1).weights == 4 * count.total


def test_memory_refuses_an_impossible_world_or_rank() -> None:
    with pytest.raises(
        ValueError, match=r"world_size=3 is not a multiple of TP\*CP\*PP=1\*1\*1=1 and of ETP\*EP\*PP=1\*2\*1=2"
    ):
        memory_per_rank(TINY, ParallelConfig(expert_model_parallel_size=2), PrecisionConfig(), 3)
    with pytest.raises(ValueError, match="pipeline_rank=1, but there are pipeline ranks 0 to 0"):
        memory_per_rank(TINY, ParallelConfig(), PrecisionConfig(), 1, 1)


def test_expert_lr_is_scaled_down_by_the_reports_ratio() -> None:
    noise = 1e6
    computed = OptimizerConfig(lr=1e-3, expert_lr_ratio=None, expert_lr_noise_scale_tokens=noise)
    assert expert_lr_ratio(LARGE, computed, int(0.26 * noise)) == pytest.approx(0.31, abs=0.005)
    assert expert_lr_ratio(LARGE, OptimizerConfig(lr=1e-3), 4096) == 0.31
    measured = OptimizerConfig(lr=1e-3, expert_lr_noise_scale_tokens="measured", measure_noise_scale_every_steps=1)
    assert expert_lr_ratio(LARGE, measured, int(0.26 * noise)) == 0.31, "until there is a value"
    at_once = expert_lr_ratio(LARGE, computed, 4096)
    assert expert_lr_ratio(LARGE, measured, 4096, measured=noise) == at_once
    # As printed in the report the ratio is the inverse, and 0.31 lies where routed experts would be scaled up.
    assert 1 / expert_lr_ratio(LARGE, computed, int(61.5 * noise)) == pytest.approx(0.31, abs=0.005)


def test_optimal_lr_peaks_at_the_noise_scale() -> None:
    assert optimal_lr_factor(1e6, 1e6) == 1.0
    assert optimal_lr_factor(1e5, 1e6) == pytest.approx(optimal_lr_factor(1e7, 1e6))
    assert optimal_lr_factor(1e5, 1e6) < 1


def test_dense_expert_split_of_the_demo_matches_its_layout() -> None:
    demo = load_experiment(ROOT / "configs/dev/demo_cpu.yaml")
    memory = memory_per_rank(demo.model, demo.parallel, demo.precision, 2)
    count = parameters(demo.model)
    held = 4 * (count.dense + count.routed_experts // 2)
    assert held < memory.weights < 1.001 * held, "and the padding of the distributed optimizer"
