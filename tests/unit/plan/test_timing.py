"""The time of a step: against steps measured on one H200, and what must hold for any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment, OptimizerConfig, RuntimeConfig
from hunyuan_pretrain.plan import links
from hunyuan_pretrain.plan.costs import run_costs
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.matmuls import Matmul, matmuls_of_layer, matmuls_of_output_layer
from hunyuan_pretrain.plan.memory import peaks
from hunyuan_pretrain.plan.passes import Assumptions
from hunyuan_pretrain.plan.timing import StepTime, step_time
from hunyuan_pretrain.plan.traffic import Traffic, optimizer_bytes, traffic
from tests.helpers.planned import BENCH, hunyuan_large, measured_on_an_h200

H200 = load("H200-141GB")
LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
}
RANKS = 512


def as_it_was(experiment: Experiment) -> Traffic:
    """What the code that was measured moved, besides its layers: 11,572 and 1,243 KB per token in the loss and the
    embedding at 128,512 rows of vocabulary and 8,192 tokens. In a layer it moved as much as torch's operations do
    today, in 182 and 60 kernels."""
    never = experiment.model_copy(update={"runtime": RuntimeConfig(kernels="never")})
    size = experiment.model.padded_vocab_size * experiment.model.hidden_size / (128_512 * 6400)
    row, row_then = 2 * experiment.model.hidden_size, 2 * 6400
    accumulated = 2 * 8 * 128_512 * 6400 / 8192  # main_grad, which loss_bytes adds
    return replace(
        traffic(never),
        layer_launches=(182, 60),
        logit_bytes=(11_572_000 - accumulated) / 128_512,
        embedding_bytes=(2 * row, (1_243_000 - 2 * row_then) * size),
    )


def large_as_it_was(experiment: Experiment) -> Traffic:
    """Of `large` more is known: 2,908 KB per token and layer besides two norms, counted from a trace, and 2,063 kernels
    in the step, of which 112 were matmuls and attention. All others are put into the 4 passes of a layer."""
    found = as_it_was(experiment)
    norms = 10 * 2 * experiment.model.hidden_size
    assert sum(found.layer_bytes) - norms == pytest.approx(2_908_000, rel=0.01)
    launches = (2063 - 112) / 4
    layer = 2_908_000 + norms
    return replace(
        found, layer_bytes=(layer * 0.4, layer * 0.6), layer_launches=(launches / 2, launches / 2), loss_launches=0
    )


def measured(fp8_recipe: str | None) -> StepTime:
    experiment = measured_on_an_h200(fp8_recipe)
    return step_time(experiment, experiment.stages[0], 1, H200, Assumptions(traffic=large_as_it_was(experiment)))


@pytest.mark.parametrize(("recipe", "measured_s", "tflops"), [(None, 0.395, 444.6), ("blockwise", 0.331, 530.4)])
def test_the_measured_steps_are_predicted(recipe: str | None, measured_s: float, tflops: float) -> None:
    """Independent of these steps: the rates of matmuls, copies and attention, the bytes. Taken from the bf16 one: the
    rate of elementwise kernels and the gaps between kernels. Nothing is taken from the one in FP8."""
    step = measured(recipe)
    assert step.seconds == pytest.approx(measured_s, rel=0.1)
    assert step.tflops_per_gpu == pytest.approx(tflops, rel=0.1)


@pytest.mark.parametrize(("recipe", "tokens_per_s"), [(None, 109_425), ("blockwise", 96_529)])
def test_so_are_the_steps_of_a_narrower_model(recipe: str | None, tokens_per_s: float) -> None:
    """Taken from them: the host's time for a launch, which limits the one in FP8."""
    experiment = measured_on_an_h200(recipe, BENCH)
    step = step_time(experiment, experiment.stages[0], 1, H200, Assumptions(traffic=as_it_was(experiment)))
    assert step.tokens_per_s == pytest.approx(tokens_per_s, rel=0.1)
    assert ("waiting for the host" in step.parts) or recipe is None
    recorded = experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"cuda_graphs": True})})
    step = step_time(recorded, experiment.stages[0], 1, H200, Assumptions(traffic=as_it_was(experiment)))
    assert "waiting for the host" not in step.parts


@pytest.mark.parametrize(
    ("recipe", "matmuls", "of_gpt_model", "attention", "optimizer"),
    [(None, 0.243, 0.241, 0.021, 0.029), ("blockwise", 0.162, 0.165, 0.020, 0.029)],
)
def test_so_are_its_parts(
    recipe: str | None, matmuls: float, of_gpt_model: float, attention: float, optimizer: float
) -> None:
    """GPTModel's attention: its kernels do what a head width of 80 needs; the 29 ms of this project's were a generic
    kernel's. In FP8 the ceiling is of one scale per tensor, and blocks of scales reach less of it."""
    parts = measured(recipe).parts
    found = sum(parts[part] for part in ("attention projections", "router", "experts", "output layer"))
    assert found == pytest.approx(matmuls, rel=0.05 if recipe is None else 0.125)
    assert found == pytest.approx(of_gpt_model, rel=0.05 if recipe is None else 0.125)
    assert parts["attention"] == pytest.approx(attention, rel=0.1)
    quantised = 4 * 2 * (2 * 6400 * 6400 + 640 * 6400 + 3 * 3 * 6400 * 18304) / H200.elementwise_bytes_per_s
    assert parts["optimizer"] - (quantised if recipe else 0) == pytest.approx(optimizer, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "measured_s", "elementwise_s", "launches"),
    [(None, 0.384, 0.061 + 0.0053, 1510), ("blockwise", 0.313, 0.060 + 0.0052, 1654)],
)
def test_so_are_gpt_models_steps_but_for_its_elementwise_kernels(
    recipe: str | None, measured_s: float, elementwise_s: float, launches: int
) -> None:
    """The bytes that they move were not counted; their measured time stands for it."""
    parts = measured(recipe).parts
    same = sum(seconds for part, seconds in parts.items() if part not in ("elementwise", "gaps between kernels"))
    assert same + elementwise_s + launches * H200.kernel_gap_s == pytest.approx(measured_s, rel=0.1)


def step(ranks: int = RANKS, assumptions: Assumptions | None = None, **sections: Any) -> StepTime:
    experiment = hunyuan_large(**({"parallel": LAYOUT} | sections))
    return step_time(experiment, experiment.stages[0], ranks, H200, assumptions)


def changed(**parallel: Any) -> StepTime:
    return step(parallel=LAYOUT | parallel)


def test_the_parts_add_up() -> None:
    found = step()
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.tokens_per_s == pytest.approx(512 * 4096 / found.seconds)
    model_flops = flops_per_token(hunyuan_large().model, 4096).total
    assert found.mfu == pytest.approx(model_flops * found.tokens_per_s / RANKS / H200.peak_bf16_flops_per_s)
    assert found.timeline.bubble == pytest.approx(7 / 64, rel=0.25), "64 micro-batches in 8 stages, the last one longer"


VARIANTS: dict[str, dict[str, Any]] = {
    "uneven": {"parallel": {"pipeline_layout": (10, 8, 8, 8, 8, 8, 8, 6)}},
    "interleaved": {"parallel": {"virtual_pipeline_model_parallel_size": 4}},
    "one stage": {"parallel": {"pipeline_model_parallel_size": 1}},
    "gathered context": {"parallel": {"context_parallel_size": 4}, "model": {"moe_routing_group_tokens": 128}},
    "exchanged context": {
        "parallel": {
            "context_parallel_size": 4,
            "context_parallel_method": "all_to_all",
            "tensor_model_parallel_size": 2,
        }
    },
    "shared experts' matrices": {"parallel": {"expert_tensor_parallel_size": 2, "expert_model_parallel_size": 4}},
    "no recompute of norms": {"parallel": {"recompute": "selective+norms"}},
    "offloaded": {"parallel": {"cpu_offloading_num_layers": 8}, "optimizer": {"cpu_offload_fraction": 0.5}},
    "plain data parallelism": {"parallel": {"use_distributed_optimizer": False}},
    "top 2": {"model": {"moe_router_topk": 2, "cla_share_factor": 1, "share_embeddings_and_output_weights": False}},
    "fp8 weights": {"precision": {"fp8_recipe": "blockwise", "fp8_parameters": True, "grad_reduce_in_fp32": False}},
    "torch's functions": {"runtime": {"kernels": "never"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_any_layout_is_planned(name: str) -> None:
    changes = dict(VARIANTS[name])
    experiment = hunyuan_large(**changes | {"parallel": LAYOUT | changes.get("parallel", {})})
    assert rules.find_problems(experiment, RANKS) == []
    found = step_time(experiment, experiment.stages[0], RANKS, H200)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(seconds > 0 for seconds in found.parts.values())
    assert 0.02 < found.mfu < 0.6
    assert found.timeline.seconds <= found.seconds
    for peak in peaks(experiment, experiment.stages[0], RANKS):
        assert 20e9 < peak.kept < peak.allocated < peak.total


def test_layers_can_be_moved_away_from_the_loss() -> None:
    """The last stage also computes the output layer; a CLA group costs more than that."""
    even, uneven = changed(), changed(pipeline_layout=(8, 8, 8, 8, 8, 8, 10, 6))
    assert even.seconds == changed(pipeline_layout=(8,) * 8).seconds
    assert even.timeline.busy[-1] == max(even.timeline.busy) > even.timeline.busy[0]
    assert uneven.timeline.busy[-1] < even.timeline.busy[-1] < uneven.timeline.busy[-2]


def test_the_matmuls_are_those_of_the_model() -> None:
    """Forward FLOPs of one rank times the ranks that share the work: a third of the model's matmul FLOPs."""
    experiment = hunyuan_large(parallel=LAYOUT)
    model, ranks = experiment.model, grid(experiment.parallel, RANKS)
    layers = sum(
        matmul.flops * ranks.tp
        for layer in range(model.num_layers)
        for matmul in matmuls_of_layer(experiment, experiment.stages[0], ranks, layer)
    )
    head = sum(times * one.flops * ranks.tp for one, times in matmuls_of_output_layer(model, 4096, ranks, 2))
    assert (layers + head) / 4096 * 3 == pytest.approx(flops_per_token(model, 4096).matmuls)


def test_a_matmul_with_few_rows_is_limited_by_its_weights() -> None:
    few, many = Matmul("x", 16, 6400, 6400), Matmul("x", 8192, 8192, 8192)
    assert few.seconds(H200) == pytest.approx(2 * 6400 * 6400 / H200.copy_bytes_per_s, rel=0.01)
    assert many.seconds(H200) == pytest.approx(2 * 8192**3 / 781e12, rel=1e-3)
    # 133 tiles need two waves of 132 multiprocessors
    one, two = (Matmul("x", 128 * tiles, 65_536, 256).seconds(H200) for tiles in (132, 133))
    assert two == pytest.approx(2 * one)


def test_recomputing_costs_a_forward_pass() -> None:
    plain, again = changed(), changed(recompute="cla_group")
    for part in ("attention projections", "experts", "messages, ep"):
        # three matmuls, of which two read and write main_grad or do not; two exchanges
        forward = 1 / 2 if "messages" in part else 0.28
        assert again.parts[part] == pytest.approx(plain.parts[part] * (1 + forward), rel=0.06)
    assert again.parts["output layer"] == plain.parts["output layer"]
    selective = changed(recompute="selective")
    assert plain.seconds < selective.seconds < again.seconds
    assert selective.parts["attention"] == plain.parts["attention"]


def test_short_documents_save_attention_only() -> None:
    whole, short = step(), step(assumptions=Assumptions(document_tokens=512))
    assert short.parts["attention"] == pytest.approx(whole.parts["attention"] * 513 / 4097)
    assert short.parts["experts"] == whole.parts["experts"]


def test_uneven_experts_delay_all_where_there_is_no_capacity() -> None:
    dropless = {"model": {"moe_expert_capacity_factor": None, "recycle_routing": False}}
    even, uneven = step(**dropless), step(**dropless, assumptions=Assumptions(imbalance=1.5))
    assert uneven.parts["experts"] == pytest.approx(even.parts["experts"] * 1.25, rel=0.05), "half are shared"
    assert uneven.parts["messages, ep"] == pytest.approx(even.parts["messages, ep"] * 1.5)
    assert uneven.parts["elementwise"] > even.parts["elementwise"]
    assert step(assumptions=Assumptions(imbalance=1.5)).seconds == step().seconds


def test_empty_slots_cost_as_much_as_full_ones() -> None:
    tight, loose = step(), step(model={"moe_expert_capacity_factor": 2.0})
    # the rows of one of two experts are doubled; its weights are read, and main_grad added to, as before
    assert 1.25 < loose.parts["experts"] / tight.parts["experts"] < 1.5
    assert loose.parts["messages, ep"] > 1.6 * tight.parts["messages, ep"]
    row, ffn = 2 * 6400, 2 * 18304
    bytes_of_a_slot = sum(
        after - before
        for before, after in zip(
            traffic(hunyuan_large()).layer_bytes,
            traffic(hunyuan_large(model={"moe_expert_capacity_factor": 2.0})).layer_bytes,
            strict=True,
        )
    )
    assert bytes_of_a_slot == pytest.approx(5 * row + 8 * ffn)


def test_what_overlaps_is_not_waited_for() -> None:
    one_stage = {"pipeline_model_parallel_size": 1}
    beside = changed(**one_stage)
    alone = changed(**one_stage, overlap_grad_reduce=False, overlap_param_gather=False)
    first, last = beside.timeline.slots[0][0], beside.timeline.slots[0][-1]
    for part, slot in (("gathering weights", first), ("reducing gradients", last)):
        assert alone.parts[part] - beside.parts[part] == pytest.approx(slot.end - slot.start, rel=0.05)  # more calls
    assert alone.seconds > beside.seconds
    without_tp = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    exchange = changed(**without_tp, overlap_shared_expert=False).parts["messages, ep"]
    assert changed(**without_tp, overlap_shared_expert=True).parts.get("messages, ep", 0) < exchange


def test_the_plan_overlaps_what_training_overlaps() -> None:
    """A recorded step gathers no weights beside computation. With more tensor than expert parallelism only the routed
    experts' gradients are reduced, beside computation too."""
    layout, graphs = LAYOUT | {"pipeline_model_parallel_size": 1}, {"cuda_graphs": True}
    recorded = hunyuan_large(parallel=layout, runtime=graphs)
    alone = hunyuan_large(parallel=layout | {"overlap_param_gather": False})
    gathers = [step_time(one, one.stages[0], RANKS, H200).parts["gathering weights"] for one in (recorded, alone)]
    assert gathers[0] == gathers[1] > changed(pipeline_model_parallel_size=1).parts["gathering weights"]
    experts = layout | {"expert_model_parallel_size": 1}
    beside, waited = hunyuan_large(parallel=experts), hunyuan_large(parallel=experts | {"overlap_grad_reduce": False})
    steps = [step_time(one, one.stages[0], 8, H200) for one in (beside, waited)]
    last, reduces = steps[0].timeline.slots[0][-1], [one.parts["reducing gradients"] for one in steps]
    assert reduces[1] - reduces[0] == pytest.approx(last.end - last.start, rel=0.05)  # more calls


def test_a_slow_network_is_felt_beyond_a_node() -> None:
    """Tensor parallelism stays in a node. Experts over 8 consecutive ranks do too, over 16 they do not."""
    experiment = hunyuan_large(parallel=LAYOUT)
    ranks = grid(experiment.parallel, RANKS)
    near, far = links.group_of("ep", ranks), links.group_of("dp", ranks)
    assert (near, far) == ((1, 8), (8, 8))
    assert links.bytes_per_s("all_to_all", near, H200) == 450e9 * 0.78
    assert links.bytes_per_s("all_to_all", links.Group(1, 16), H200) == pytest.approx(50e9 * 0.86 * 15 / 8)
    assert links.bytes_per_s("reduce_scatter", far, H200) == 50e9 * 0.86
    assert links.bytes_per_s("reduce_scatter", links.Group(1, 16), H200) == 8 * 50e9 * 0.86, "eight rings"
    assert links.bytes_per_s("all_to_all", links.Group(1, 16), load("GB200")) == 900e9 * 0.78
    assert changed(expert_model_parallel_size=16).parts["messages, ep"] > 2 * step().parts["messages, ep"]


def test_mxfp8_needs_hardware_for_it() -> None:
    experiment = hunyuan_large(parallel=LAYOUT, precision={"fp8_recipe": "mxfp8"})
    with pytest.raises(ConfigError, match="H200-141GB does not compute in mxfp8"):
        step_time(experiment, experiment.stages[0], RANKS, H200)
    on_b200 = step_time(experiment, experiment.stages[0], RANKS, load("B200"))
    assert on_b200.seconds < step().seconds


def test_a_run_costs_its_stages() -> None:
    experiment = hunyuan_large(parallel=LAYOUT)
    (stage, whole), (main,) = run_costs(experiment, RANKS, H200), experiment.stages
    assert stage.step is not None
    assert stage.days == whole.days == pytest.approx(main.num_steps * stage.step.seconds / 86400)
    assert whole.gpu_hours == pytest.approx(whole.days * 24 * RANKS)
    assert whole.kwh == pytest.approx(whole.gpu_hours * 1.275)


AVERAGE = {"ema_decay": 0.999}
AWARE = {"use_precision_aware_optimizer": True}
MOMENTS = AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("settings", "gradient_bytes", "expected"),
    [
        *(({}, 4, 50), ({}, 2, 54), (AWARE, 4, 44), (AWARE, 2, 34), (MOMENTS, 4, 36), (MOMENTS, 2, 26)),
        *((AVERAGE, 4, 62), (AWARE | AVERAGE, 4, 80)),
    ],
)
def test_the_optimizer_moves_the_counted_bytes(settings: dict[str, Any], gradient_bytes: int, expected: int) -> None:
    """The table of docs/benchmarks.md, which tests/benchmarks/optimizer_bytes.py counts."""
    optimizer = OptimizerConfig(lr=1.0, **settings)
    assert optimizer_bytes(optimizer, gradient_bytes, 1000, 1000) == expected * 1000
    whole = optimizer_bytes(optimizer, gradient_bytes, 8000, 1000)
    assert whole == (expected + 7 * gradient_bytes) * 1000, "the zeros are of the whole buffer"
