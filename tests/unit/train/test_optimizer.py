"""The routed experts' own learning rate, weight decay by group, and what the run says about them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.checkpoint.optimizer_state import reload_weights
from hunyuan_pretrain.config.derived import expert_lr_ratio
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.parity import compare, trace_steps
from hunyuan_pretrain.train.optimizer import (
    _divide,
    build_optimizer,
    describe_groups,
    gather_parameters,
    optimizer_step,
    set_learning_rate,
    wrap_data_parallel,
)
from tests.helpers import tiny
from tests.helpers.one_rank import on_this_rank
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

RATIO = 0.31
LAYOUTS = {"distributed optimizer": {}, "plain optimizer": {"use_distributed_optimizer": False}}
OFFLOADED = {"nothing offloaded": 0.0, "half offloaded": 0.5, "all offloaded": 1.0}


def fields(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    # the shared expert is as wide as a routed one, so that both can have the same weight and gradient
    return experiment_fields(corpus, run_dir, model__num_layers=2, model__ffn_hidden_size=40, **changes)


def updates_of_equal_experts(run: Any, expert_lr: float = RATIO) -> tuple[np.ndarray, np.ndarray]:
    """Give the shared and every routed expert the same weights and gradients, make one real step, and return both
    updates of fc1."""
    mlp = run.chunks[0].decoder.layers[1].mlp
    shared, routed = mlp.shared_experts.linear_fc1.weight, mlp.experts.linear_fc1.weight
    generator = torch.Generator().manual_seed(3)
    weight, gradient = (torch.randn(shared.shape, generator=generator) for _ in range(2))
    with torch.no_grad():
        shared.copy_(weight)
        routed.copy_(weight)
    reload_weights(run.optimizer)
    run.wrapped[0].zero_grad_buffer()
    shared.main_grad.copy_(gradient)
    routed.main_grad.copy_(gradient)
    set_learning_rate(run.optimizer, 1e-2, expert_lr)
    optimizer_step(run.optimizer)
    gather_parameters(run.wrapped)
    return (shared.detach() - weight).numpy(), (routed.detach() - weight).numpy()


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize(
    ("parallel", "offloaded"),
    [*((layout, 0.0) for layout in LAYOUTS.values()), ({}, 0.5), ({}, 1.0)],
    ids=[*LAYOUTS, *list(OFFLOADED)[1:]],
)
def test_the_update_of_a_routed_expert_is_the_ratio_times_the_shared_experts(
    corpus, tmp_path, parallel, offloaded, clip_grad
):
    optimizer = {"lr": 1e-2, "weight_decay": 0.0, "clip_grad": clip_grad, "cpu_offload_fraction": offloaded}
    shared, routed = updates_of_equal_experts(
        on_this_rank(fields(corpus, tmp_path, parallel=parallel, optimizer=optimizer))
    )
    assert np.abs(shared).min() > 1e-3
    for expert in routed:
        np.testing.assert_allclose(expert, RATIO * shared, rtol=1e-3, atol=1e-6)


def updates_under_expert_parallelism(layouts: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    from hunyuan_pretrain.train import setup

    found = []
    for layout in layouts:
        run = setup.prepare(Experiment.model_validate(layout))
        found.append((*updates_of_equal_experts(run), describe_groups(run.optimizer, 1e-2, RATIO)))
        setup.leave(run)
    return found


def test_the_ratio_holds_under_expert_parallelism(corpus, tmp_path):
    optimizer = {"lr": 1e-2, "weight_decay": 0.0, "clip_grad": 1.0}
    layouts = [
        fields(corpus, tmp_path, parallel={"expert_model_parallel_size": 2} | parallel, optimizer=optimizer)
        for parallel in LAYOUTS.values()
    ]
    for rank in fork_ranks(2, updates_under_expert_parallelism, layouts):
        for shared, routed, lines in rank:
            assert len(routed) == 2, "two of the four experts on each rank"
            for expert in routed:
                np.testing.assert_allclose(expert, RATIO * shared, rtol=1e-3, atol=1e-6)
            assert sum("routed experts" in line and "0.0031" in line for line in lines) == 1


def wrapped(corpus: Path, tmp_path: Path, **optimizer: Any):
    experiment = Experiment.model_validate(fields(corpus, tmp_path, optimizer={"lr": 1e-2} | optimizer))
    model = tiny.build(experiment.model)
    return model, build_optimizer(
        wrap_data_parallel([model], experiment, tiny.world_of_one()), experiment, tiny.world_of_one()
    )


def test_each_group_is_described_with_its_rate_and_weight_decay(corpus, tmp_path):
    model, optimizer = wrapped(corpus, tmp_path, weight_decay=0.1)
    lines = sorted(describe_groups(optimizer, 1e-2, RATIO))
    sizes = {"routed": 0, "norms": 0, "other": 0}
    for parameter in model.parameters():
        kind = (
            "routed" if getattr(parameter, "is_routed_expert", False) else "norms" if parameter.dim() == 1 else "other"
        )
        sizes[kind] += parameter.numel()
    assert lines == [
        f"all other weights: {sizes['other']:,} elements on this rank, peak learning rate 0.01, weight decay 0.1",
        f"norms: {sizes['norms']:,} elements on this rank, peak learning rate 0.01, weight decay 0",
        f"routed experts: {sizes['routed']:,} elements on this rank, peak learning rate 0.0031, weight decay 0.1",
    ]


def test_weight_decay_shrinks_matrices_and_leaves_norms(corpus, tmp_path):
    model, optimizer = wrapped(corpus, tmp_path, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.main_grad.zero_()
    set_learning_rate(optimizer, 1e-2, RATIO)
    optimizer_step(optimizer)
    for name, parameter in model.named_parameters():
        is_routed = getattr(parameter, "is_routed_expert", False)
        factor = 1.0 if parameter.dim() == 1 else 1 - 1e-2 * 0.5 * (RATIO if is_routed else 1.0)
        torch.testing.assert_close(
            parameter.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_clipping_divides_the_gradient_by_its_norm(corpus, tmp_path):
    """With a large epsilon Adam's first step is proportional to the gradient that reaches it: lr * g / (|g| + eps)."""
    model, optimizer = wrapped(corpus, tmp_path, weight_decay=0.0, clip_grad=2.0, adam_eps=1e6)
    generator = torch.Generator().manual_seed(1)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        gradients[name] = parameter.main_grad.double()
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    set_learning_rate(optimizer, 1e8, 1.0)
    assert optimizer_step(optimizer).item() == pytest.approx(expected, rel=1e-5)
    name = "decoder.final_layernorm.weight"
    update = model.get_parameter(name).detach().double() - before[name]
    torch.testing.assert_close(update, -1e2 * gradients[name] * 2.0 / expected, rtol=1e-3, atol=1e-4)


def test_the_ratio_follows_the_formula_if_it_is_not_fixed(corpus, tmp_path):
    """eps(B K / E) / eps(B), eps(B) = 2 / (sqrt(N / B) + sqrt(B / N)): sqrt(K / E) far below N, and 0.31 at B = 0.26 N
    for 16 experts."""
    settings = {"lr": 1e-2, "expert_lr_ratio": None, "expert_lr_noise_scale_tokens": 1e9}
    experiment = Experiment.model_validate(fields(corpus, tmp_path, optimizer=settings, model__num_moe_experts=16))
    assert expert_lr_ratio(experiment.model, experiment.optimizer, 1000) == pytest.approx(0.25, rel=1e-4)
    assert expert_lr_ratio(experiment.model, experiment.optimizer, 260_000_000) == pytest.approx(0.31, abs=0.003)


def three_steps(corpus: Path, tmp_path: Path, dtype: str, fraction: float) -> tuple[Any, list[Any]]:
    """A run with this fraction of its optimizer state offloaded, and what its first three steps computed."""
    settings = {"lr": 1e-2, "adam_eps": 1e-3, "clip_grad": 0.5, "cpu_offload_fraction": fraction}
    run = on_this_rank(fields(corpus, tmp_path, optimizer=settings, precision={"dtype": dtype}))
    return run, trace_steps(run, range(3))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_training_with_and_without_offload_is_equal(corpus, tmp_path, dtype, fraction):
    """Losses, clip norm, every gradient, moment and parameter. Clipping is core's here, not the kernel's, so equality
    is up to rounding. With a fraction of 0.01 the routers are on the host; fp32 weights are nearly all on the
    device."""
    _, expected = three_steps(corpus, tmp_path, dtype, 0.0)
    run, actual = three_steps(corpus, tmp_path, dtype, fraction)
    assert min(trace.scalars["grad_norm"] for trace in expected) > 0.5, "it is clipped"
    found = [difference for difference in compare(actual, expected) if not difference.is_within]
    if dtype == "bf16" and found:
        # A weight is the nearest bf16 to its fp32 main weight, so two main weights that differ in the last bit may
        # round to neighbours. Everything before that is within the tolerance; then a few weights are neighbours, and
        # the runs diverge.
        step = found[0].step
        assert {difference.kind for difference in found if difference.step == step} == {"parameter"}
        flipped = total = 0
        for name, value in expected[step].parameters.items():
            difference = np.abs(actual[step].parameters[name] - value)
            assert (difference <= 2**-7 * np.abs(value) + 1e-6).all(), name
            flipped += int((difference > 1e-4 * np.abs(value) + 1e-6).sum())
            total += value.size
        assert flipped < 1e-3 * total
        assert [trace.scalars["loss"] for trace in actual] == pytest.approx(
            [trace.scalars["loss"] for trace in expected], rel=2e-3
        )
    else:
        assert not found
    (inner,) = (part.optimizer for part in run.optimizer.chained_optimizers)
    sizes = {weight: weight.numel() for group in inner.param_groups for weight in group["params"]}
    offloaded = sum(sizes[weight] for weight in inner.gpu_params_map_cpu_copy)
    assert fraction * sum(sizes.values()) <= offloaded <= fraction * sum(sizes.values()) + max(sizes.values())
    assert (inner.gpu_optimizer is None) == (fraction == 1.0)


def test_core_would_not_update_fp32_weights_that_stay_on_the_device(corpus, tmp_path, monkeypatch):
    """This is why _hand_over_fp32_gradients exists."""
    monkeypatch.setattr("hunyuan_pretrain.train.optimizer._hand_over_fp32_gradients", lambda optimizer: None)
    _, (trace, _, last) = three_steps(corpus, tmp_path, "fp32", 0.5)
    stay = [name for name, value in trace.parameters.items() if (value == last.parameters[name]).all()]
    assert 0 < len(stay) < len(trace.parameters)


def test_core_offloads_only_what_counts_as_on_a_device(corpus, tmp_path, monkeypatch):
    """This is why weights_count_as_on_a_device exists."""
    monkeypatch.setattr("hunyuan_pretrain.train.optimizer.weights_count_as_on_a_device", nullcontext)
    with pytest.raises(KeyError):
        three_steps(corpus, tmp_path, "fp32", 0.5)


@pytest.mark.parametrize("fraction", OFFLOADED.values(), ids=OFFLOADED)
def test_a_non_finite_gradient_changes_nothing(corpus, tmp_path, fraction):
    model, optimizer = wrapped(corpus, tmp_path, cpu_offload_fraction=fraction)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    next(model.parameters()).main_grad.view(-1)[0] = float("nan")
    set_learning_rate(optimizer, 1e-2, RATIO)
    assert optimizer_step(optimizer).isnan()
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("divisor", [1.0, 1.7, 3e4])
def test_gradients_are_divided_by_a_tensor_as_by_the_number_in_it(divisor):
    """In every dtype, bitwise; torch would round a bf16 gradient's divisor to bf16."""
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(1000, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    expected = [gradient.clone() for gradient in gradients]
    torch._foreach_div_(expected, divisor)
    _divide(gradients, torch.tensor(divisor))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
