"""The memory peak of each pipeline rank: against peaks measured on one H200, and part by part."""

from __future__ import annotations

from typing import Any

import pytest

from hunyuan_pretrain.plan.activations import activations
from hunyuan_pretrain.plan.counts import memory_of_ranks
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.memory import (
    COMMUNICATOR,
    CUDA_CONTEXT,
    EXCHANGE_PER_PEER,
    Peak,
    host_missing,
    missing,
    peaks,
)
from tests.helpers.planned import BENCH, LARGE, hunyuan_large, measured_on_an_h200

LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
}
RANKS = 512


def planned(imbalance: float = 1.0, **sections: Any) -> list[Peak]:
    experiment = hunyuan_large(**({"parallel": LAYOUT} | sections))
    return peaks(experiment, experiment.stages[0], RANKS, imbalance)


@pytest.mark.parametrize(
    ("shape", "recipe", "measured_gib"),
    [(LARGE, None, 51.0), (LARGE, "blockwise", 54.5), (BENCH, None, 27.7), (BENCH, "blockwise", 29.7)],
)
def test_the_measured_peaks_are_predicted(shape: dict[str, int], recipe: str | None, measured_gib: float) -> None:
    """torch.cuda.max_memory_allocated; the code of that day made larger temporary tensors in SwiGLU and the loss."""
    experiment = measured_on_an_h200(recipe, shape)
    (peak,) = peaks(experiment, experiment.stages[0], 1)
    assert peak.allocated / 2**30 == pytest.approx(measured_gib, rel=0.06)
    assert peak.outside == CUDA_CONTEXT, "one rank has no communicators"
    assert peak.messages == peak.update == 0
    assert (peak.fp8_weights > 0) == (recipe is not None)


def test_a_peak_is_the_sum_of_its_parts() -> None:
    experiment, found = hunyuan_large(parallel=LAYOUT), planned()
    for rank, peak in enumerate(found):
        parts = experiment.model, experiment.parallel, experiment.precision, RANKS, rank
        assert peak.kept == max(memory.total for memory in memory_of_ranks(*parts))
        assert peak.activations == activations(experiment, experiment.stages[0], RANKS, rank).device
        assert peak.allocated == peak.kept + peak.activations + peak.working + peak.messages
        assert peak.total == peak.allocated + peak.slack + peak.outside
    assert [peak.activations for peak in found] == sorted((peak.activations for peak in found), reverse=True)
    # groups: tp, pp, ep, dp, the 8 ranks of an expert, all
    assert found[0].outside == CUDA_CONTEXT + 6 * COMMUNICATOR + 7 * EXCHANGE_PER_PEER


def test_the_layers_output_is_held_by_the_schedule() -> None:
    """Of each pass in flight in a stage but the last: one row of hidden states per token of the rank."""
    group = 4 * 2 * 512 * 6400
    first = planned(parallel=LAYOUT | {"recompute": "cla_group"})[0]
    assert first.activations == 8 * (group + 2 * 512 * 6400)


def test_bf16_gradients_are_copied_during_the_update() -> None:
    bf16 = {"precision": {"grad_reduce_in_fp32": False}}
    copied = planned(**bf16)[0]
    assert copied.update == pytest.approx(copied.optimizer / 3, rel=0.01), "4 bytes beside 12"
    assert planned(**bf16, optimizer={"use_precision_aware_optimizer": True})[0].update == 0
    everything = planned(**bf16, parallel=LAYOUT | {"recompute": "cla_group"})[-1]
    assert everything.transient == max(
        everything.update, everything.activations + everything.working + everything.messages
    )


def test_uneven_routing_needs_memory_where_there_is_no_capacity() -> None:
    dropless = {"model": {"moe_expert_capacity_factor": None, "recycle_routing": False}}
    even, uneven = planned(**dropless)[0], planned(2.0, **dropless)[0]
    assert even.activations * 1.3 < uneven.activations < 2 * even.activations
    assert uneven.working > even.working
    assert uneven.messages > even.messages
    assert planned(2.0)[0] == planned()[0]


def recorded(is_recorded: bool = True, **sections: Any) -> Peak:
    """Four layers on 8 ranks, with two experts each."""
    parallel = {"expert_model_parallel_size": 8}
    validated: dict[str, Any] = {"evaluation": {"data": "heldout"}, "model": {"num_layers": 4}}
    experiment = hunyuan_large(parallel=parallel, runtime={"cuda_graphs": is_recorded}, **validated | sections)
    (peak,) = peaks(experiment, experiment.stages[0], 8)
    return peak


def test_a_recorded_step_keeps_the_memory_of_its_passes() -> None:
    """The update and a validation need their own, one after the other."""
    plain, held = recorded(False), recorded()
    assert plain.beside_recorded == 0
    assert held.allocated == plain.allocated, "torch counts what tensors use, not what a graph reserves"
    assert held.beside_recorded == held.validation
    assert held.total == plain.total + held.beside_recorded
    bf16 = {"precision": {"grad_reduce_in_fp32": False}, "evaluation": {}}
    plain, held = recorded(False, **bf16), recorded(**bf16)
    assert held.validation == 0, "nothing is validated"
    assert held.beside_recorded == held.update > 0
    assert held.total == held.kept + held.passes + held.update + held.slack + held.outside > plain.total


def test_a_validation_beside_a_recorded_step_keeps_no_activations() -> None:
    """One layer's at a time, or the logits of a chunk; of its own micro-batch, without a capacity and FP8."""
    one, two = recorded(), recorded(evaluation={"data": "heldout", "micro_batch_sequences": 2})
    logits = 4096 * 128_512 * 2
    assert logits <= (one.validation or 0) < one.activations
    assert one.validation == recorded(model={"num_layers": 8}).validation
    assert one.validation == recorded(precision={"fp8_recipe": "blockwise"}).validation
    assert one.validation == recorded(model={"num_layers": 4, "moe_expert_capacity_factor": 4.0}).validation
    assert (two.validation or 0) > (one.validation or 0)


def test_what_does_not_fit_is_said_in_bytes() -> None:
    (first, *_) = found = planned()
    assert missing(first, load("H200-141GB")) == round(first.total - 143_771 * 2**20) < 0
    flat = planned(parallel=LAYOUT | {"tensor_model_parallel_size": 1, "sequence_parallel": False})
    assert missing(flat[0], load("H100-80GB")) > 0
    assert host_missing(found, load("H100-80GB")) < 0
    offloaded = planned(parallel=LAYOUT | {"cpu_offloading_num_layers": 8})
    assert offloaded[0].host > found[0].host
    assert offloaded[0].activations < found[0].activations
