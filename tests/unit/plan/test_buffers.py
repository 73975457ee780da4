"""The layout of the buffers, computed by hand; tests/parallel/test_traffic.py compares it with megatron-core's own."""

from __future__ import annotations

import pytest

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.plan import buffers
from hunyuan_pretrain.plan.buffers import Buffer, Weight, buffers_of_stage, weights_of_stage
from hunyuan_pretrain.plan.counts import parameters

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, moe_ffn_hidden_size=40,
    num_moe_experts=4, padded_vocab_size=96, moe_routing_group_tokens=32,
)  # fmt: skip
PIPELINE = ParallelConfig(pipeline_model_parallel_size=2)


def buffer(num_ranks: int, is_sharded: bool) -> Buffer:
    return Buffer("dp", num_ranks, weight_bytes=4, gradient_bytes=4, is_sharded=is_sharded)


def test_weights_are_laid_out_from_last_to_first_at_multiples_of_64() -> None:
    laid = buffers._lay_out([Weight(100), Weight(70), Weight(1)], buffer(3, True), None)
    assert laid.positions == [(0, 1), (64, 134), (192, 292)]
    assert laid.buckets == [(0, 384)], "292 to the next multiple of 3 and 128"
    assert laid.kept() == [1 + 64, 6 + 64, 36]


def test_without_the_distributed_optimizer_nothing_is_padded_and_every_rank_keeps_all() -> None:
    laid = buffers._lay_out([Weight(100), Weight(70), Weight(1)], buffer(3, False), None)
    assert (laid.positions, laid.buckets) == ([(0, 1), (1, 71), (71, 171)], [(0, 171)])
    assert laid.kept() == [171] * 3


def test_a_shared_embedding_has_its_own_bucket() -> None:
    laid = buffers._lay_out([Weight(500, is_shared_embedding=True), Weight(70)], buffer(2, True), None)
    assert laid.buckets == [(0, 128), (128, 640)]
    assert laid.kept() == [64 + 256, 6 + 244]
    assert buffers._lay_out([Weight(500, is_shared_embedding=True), Weight(70)], buffer(2, False), None).buckets == [
        (0, 570)
    ]


def test_full_buckets_are_closed() -> None:
    laid = buffers._lay_out([Weight(60), Weight(64), Weight(100)], buffer(2, False), 150)
    assert laid.buckets == [(0, 164), (164, 224)]


def test_only_the_first_pipeline_rank_has_buckets_to_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST_BUCKET", 1_000_000)
    model = MODEL.model_copy(
        update={"hidden_size": 1024, "ffn_hidden_size": 1024, "share_embeddings_and_output_weights": False}
    )
    parallel = PIPELINE.model_copy(update={"overlap_grad_reduce": True, "overlap_param_gather": False})
    first, last = (buffers_of_stage(model, parallel, PrecisionConfig(dtype="fp32"), 2, stage)[0] for stage in (0, 1))
    assert len(first.buckets) > len(last.buckets) == 1
    assert all(end - start >= 1_000_000 for start, end in first.buckets[:-1])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layout", [None, (2, 2), (2, 1, 1)])
def test_the_stages_together_hold_the_model(is_tied: bool, layout: tuple[int, ...] | None) -> None:
    model = MODEL.model_copy(update={"share_embeddings_and_output_weights": is_tied})
    stages = len(layout or (4,))
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, pipeline_layout=layout)
    weights = [weight for stage in range(stages) for weight in weights_of_stage(model, parallel, stage)]
    count, copy = parameters(model), parameters(model).embedding if is_tied and stages > 1 else 0
    assert sum(weight.size for weight in weights) == count.total + copy
    assert sum(weight.size for weight in weights if weight.is_routed_expert) == count.routed_experts
    assert sum(weight.size for weight in weights if weight.is_router) == count.router
    assert sum(weight.size for weight in weights if weight.is_replicated) == count.router + count.norms
    assert sum(weight.size for weight in weights if weight.is_shared_embedding) == 2 * copy


def test_router_weights_have_their_own_buffer_in_bf16() -> None:
    found = buffers_of_stage(MODEL, ParallelConfig(), PrecisionConfig(dtype="bf16", grad_reduce_in_fp32=False), 1, 0)
    assert {(x.weight_bytes, x.gradient_bytes) for x in found} == {(2, 2), (4, 4)}


def test_experts_have_their_own_buffers_if_their_data_parallel_group_differs() -> None:
    for parallel, ranks, axes in (
        (ParallelConfig(expert_model_parallel_size=2), 4, {"dp": 4, "expert_dp": 2}),
        (
            ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
            4,
            {"dp": 2},
        ),
        (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 4, {"dp": 2, "expert_dp": 4}),
    ):
        found = buffers_of_stage(MODEL, parallel, PrecisionConfig(dtype="fp32"), ranks, 0)
        assert {x.axis: x.num_ranks for x in found} == axes


def test_chunks_of_a_pipeline_rank() -> None:
    interleaved = PIPELINE.model_copy(update={"virtual_pipeline_model_parallel_size": 2})
    assert stages_of(MODEL, interleaved, 1) == {1: range(1, 2), 3: range(3, 4)}
    assert [grid(PIPELINE, 8).pipeline_rank(rank) for rank in range(8)] == [0] * 4 + [1] * 4
