"""What a step communicates, computed by hand and from properties that must hold; tests/parallel/test_traffic.py
compares it with real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.load import load_model
from hunyuan_pretrain.config.schema import DataSource, ParallelConfig, PrecisionConfig, StageConfig
from hunyuan_pretrain.plan import communication
from hunyuan_pretrain.plan.communication import Communication, Messages, communication_per_rank
from hunyuan_pretrain.plan.counts import parameters

LARGE = load_model(Path(__file__).parents[3] / "configs/model/hunyuan_large.yaml")
STAGE = StageConfig(
    name="s",
    tokens=1,
    sequence_length=4096,
    global_batch_sequences=64,
    micro_batch_sequences=1,
    lr_end=1,
    data=(DataSource(path="x"),),
)
FP32 = PrecisionConfig(dtype="fp32")
TENSOR = {"tensor_model_parallel_size": 4, "sequence_parallel": True}


def of(world_size: int, pipeline_rank: int = 0, model: dict[str, Any] | None = None, **parallel: Any) -> Communication:
    changed = LARGE.model_copy(update=model or {})
    return communication_per_rank(
        changed, ParallelConfig(**parallel), PrecisionConfig(), STAGE, world_size, pipeline_rank
    )


def test_one_rank_sends_nothing() -> None:
    assert of(1).messages == {}
    assert of(1).sent_bytes() == 0


def test_a_plain_data_parallel_rank_sends_all_but_its_share_of_the_gradients_twice() -> None:
    parallel = ParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=False)
    found = communication_per_rank(LARGE, parallel, FP32, STAGE, 8)
    gradients = 2 * 4 * parameters(LARGE).total * 7 // 8
    assert found.messages["dp", "all_reduce"] == Messages(2, gradients + 2 * 8 * 7 // 8)
    assert set(found.messages) == {("dp", "all_reduce"), ("other", "all_reduce")}


def test_tokens_travel_to_the_experts_and_back_in_both_passes() -> None:
    found = of(16, expert_model_parallel_size=16).messages["ep", "all_to_all"]
    micro_batches, layers = 4, 64
    assert found.calls == 4 * layers * micro_batches
    assert found.bytes == found.calls * 4096 * 6400 * 2 * 15 // 16
    padded = of(16, model={"moe_expert_capacity_factor": 1.25}, expert_model_parallel_size=16).messages[
        "ep", "all_to_all"
    ]
    assert padded == Messages(found.calls, found.bytes * 5 // 4)


def test_without_a_capacity_the_bytes_are_those_of_even_routing() -> None:
    dropless = {"moe_expert_capacity_factor": None, "recycle_routing": False}
    fixed, free = (of(16, model=model, expert_model_parallel_size=16) for model in ({}, dropless))
    assert (fixed.is_exact, free.is_exact) == (True, False)
    calls, size = (free.messages["ep", "all_to_all"][i] - fixed.messages["ep", "all_to_all"][i] for i in (0, 1))
    assert (calls, size) == (64 * 4, 64 * 4 * 16 * 8 * 15 // 16), "the counts of the experts' tokens"
    assert of(16, model=dropless).is_exact, "no tokens travel"


@pytest.mark.parametrize("method", ["all_gather", "all_to_all"])
def test_cross_layer_attention_halves_the_traffic_of_keys_and_values(method: str) -> None:
    context = {"context_parallel_size": 8, "context_parallel_method": method}
    shared, own = (of(8, model={"cla_share_factor": factor}, **context) for factor in (2, 1))
    keys = 2 * 8 * 80 * 2 * 4096  # keys and values of a sequence, in bf16
    each = keys * 7 // 8 if method == "all_gather" else keys // 8 * 7 // 8
    assert own.sent_bytes("cp") - shared.sent_bytes("cp") == 32 * 64 * 2 * each, (
        "32 borrowers, 64 micro-batches, forward and backward"
    )
    if method == "all_gather":
        assert own.sent_bytes("cp") == 2 * shared.sent_bytes("cp")


def test_recompute_repeats_the_forward_pass_only() -> None:
    kinds = ("all_gather", "reduce_scatter")
    none, selective, whole = (of(4, recompute=what, **TENSOR) for what in ("none", "selective", "cla_group"))
    layers = 64 * 64
    for kind in kinds:
        calls = [found.messages["tp", kind].calls for found in (none, selective, whole)]
        assert (calls[1] - calls[0], calls[2] - calls[0]) == (layers, 2 * layers), kind


def test_neighbours_in_the_pipeline_send_one_message_each_way_for_each_micro_batch() -> None:
    pipeline = {"pipeline_model_parallel_size": 4}
    message = 4096 * 6400 * 2
    assert [of(4, pipeline_rank, **pipeline).messages["pp", "send"] for pipeline_rank in range(4)] == [
        Messages(64 * neighbours, 64 * neighbours * message) for neighbours in (1, 2, 2, 1)
    ]
    ends = [("embedding", "all_reduce") in of(4, pipeline_rank, **pipeline).messages for pipeline_rank in range(4)]
    assert ends == [True, False, False, True]
    interleaved = of(4, 0, virtual_pipeline_model_parallel_size=2, **pipeline)
    assert interleaved.messages["pp", "send"].calls == 64 * 3
    assert interleaved.messages["pp", "recv"] == interleaved.messages["pp", "send"]
    assert interleaved.sent_bytes("pp") == interleaved.messages["pp", "send"].bytes, "what is received is not sent"


def test_chunks_of_the_output_layer_change_the_calls_and_not_the_bytes() -> None:
    parallel = ParallelConfig(**TENSOR)
    few, many = (
        communication_per_rank(LARGE, parallel, PrecisionConfig(), STAGE, 4, 0, chunk) for chunk in (4096, 128)
    )
    assert few.sent_bytes() == many.sent_bytes()
    assert many.messages["tp", "all_reduce"].calls - few.messages["tp", "all_reduce"].calls == 64 * 2 * 31


def test_the_number_of_router_statistics_matches_the_model() -> None:
    from hunyuan_pretrain.model.routing import RouterStatistics

    assert RouterStatistics.packed_size(0) == communication.STATISTICS_BESIDE_LOAD


def test_the_number_of_sums_over_pairs_matches_the_model() -> None:
    from hunyuan_pretrain.model.preference import PairSums

    assert len(PairSums._fields) == communication.SUMS_OVER_PAIRS


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_sequences=64 is not a multiple of 3"):
        of(3)
    with pytest.raises(ValueError, match=r"a micro-batch of 4096 tokens is not a multiple of CP\*TP=3\*1"):
        of(3, context_parallel_size=3)
