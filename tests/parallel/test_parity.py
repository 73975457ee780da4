"""The comparison of layouts catches the bugs that others had, and its first difference locates each.

The bugs are from users' reports against Megatron-LM (issues 7452, 5916, 5956, 673, 1736), or mistakes that this code
could make itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.layouts import STEPS, Comparisons, Layout, Outcome, trace_in_jobs, until_failure

pytestmark = pytest.mark.slow


def experts_left_out_of_the_norm() -> AbstractContextManager[Any]:
    """Under TP and EP the gradient norm includes only the experts of the first tensor-parallel rank."""
    return patch("hunyuan_pretrain.model.grouped_linear.mark_sharded", lambda *arguments: None)


def expert_gradients_times_ep() -> AbstractContextManager[Any]:
    from hunyuan_pretrain.train import step

    right = step.finalize_model_grads

    def wrong(chunks: list[Any], *arguments: Any, **options: Any) -> None:
        right(chunks, *arguments, **options)
        for model in chunks:
            for name, parameter in model.named_parameters():
                if ".mlp.experts." in name:
                    parameter.main_grad.mul_(2)

    return patch.object(step, "finalize_model_grads", wrong)


def softmax_over_the_own_part_of_the_vocabulary() -> AbstractContextManager[Any]:
    import torch.distributed as dist

    from hunyuan_pretrain.model import cross_entropy

    right = cross_entropy.reduced
    return patch.object(
        cross_entropy, "reduced", lambda x, group, op: x if op == dist.ReduceOp.SUM else right(x, group, op)
    )


def loss_over_one_ranks_tokens() -> AbstractContextManager[Any]:
    """The loss is divided by the target tokens of one data-parallel rank (the mean over the ranks), so it is too large
    by the number of ranks."""
    import torch.distributed as dist

    from hunyuan_pretrain.train import step

    right = step.sum_over
    return patch.object(
        step, "sum_over", lambda group, value: right(group, value) / (1 if group is dist.group.WORLD else group.size())
    )


def recycling_numbers_the_groups_of_its_rank() -> AbstractContextManager[Any]:
    """The random draw of recycling depends on the layout."""
    import torch

    from hunyuan_pretrain.model import recycle_routing

    right = recycle_routing.slot_priorities

    def wrong(key: int | torch.Tensor, group_n: torch.Tensor, num_slots: int) -> torch.Tensor:
        return right(key, torch.arange(len(group_n)), num_slots)

    return patch.object(recycle_routing, "slot_priorities", wrong)


def copies_drift_apart() -> AbstractContextManager[Any]:
    """Gradients of weights replicated over tensor-parallel ranks are not summed over them."""
    # the package exports the module's function under this name
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    return patch.object(module, "_allreduce_non_tensor_model_parallel_grads", lambda *arguments, **options: None)


def gradients_reduced_too_early() -> AbstractContextManager[Any]:
    """Core reads the number of micro-batches per step only in the first stage."""
    from hunyuan_pretrain.train import setup

    right = setup.wrap_data_parallel

    def wrong(chunks: list[Any], *arguments: Any) -> list[Any]:
        wrapped = right(chunks, *arguments)
        chunks[0].config.no_sync_func = None
        return wrapped

    return patch.object(setup, "wrap_data_parallel", wrong)


Bug = Callable[[], AbstractContextManager[Any]]
TP_EP, DATA, MORE_MICRO_BATCHES = (
    Layout(tp=2, ep=2),
    Layout(dp=2),
    Layout(dp=2, micro_batch=4, later_micro_batch=1, overlap="gradients"),
)
FORWARD = ("activation", "routing")
BUGS: dict[Bug, tuple[Layout, tuple[int, str, str], tuple[str, ...]]] = {
    # bug: exposing layout, its first difference there (step, kind, name), kinds without a difference in that step
    experts_left_out_of_the_norm: (TP_EP, (0, "scalar", "grad_norm"), (*FORWARD, "gradient", "copies")),
    expert_gradients_times_ep: (
        TP_EP,
        (0, "gradient", "decoder.layers.7.mlp.experts.linear_fc2.weight"),
        (*FORWARD, "copies"),
    ),
    softmax_over_the_own_part_of_the_vocabulary: (TP_EP, (0, "scalar", "loss"), FORWARD),
    loss_over_one_ranks_tokens: (DATA, (0, "scalar", "loss"), (*FORWARD, "copies")),
    recycling_numbers_the_groups_of_its_rank: (DATA, (0, "routing", "decoder.layers.0.router"), ("copies",)),
    copies_drift_apart: (TP_EP, (0, "copies", "gradients of decoder.layers.0.input_layernorm.weight"), FORWARD),
    gradients_reduced_too_early: (MORE_MICRO_BATCHES, (1, "gradient", "decoder.final_layernorm.weight"), FORWARD),
}


def trace_with_bugs(work: list[tuple[Bug, Experiment]]) -> list[Outcome]:
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    def trace(job: tuple[Bug, Experiment]) -> list[Any]:
        with job[0]():
            return trace_layout(job[1], STEPS)

    return until_failure(work, trace)


@pytest.fixture(scope="module")
def differences(corpus, tmp_path_factory) -> dict[Bug, list[Any] | str]:
    """What each bug changes, in execution order."""
    from hunyuan_pretrain.diagnostics.parity import compare

    folder = tmp_path_factory.mktemp("bugs")
    reference = Comparisons(corpus, folder / "reference", [Layout()]).reference(Layout())
    work = [(bug, layout.experiment(corpus, folder / bug.__name__)) for bug, (layout, *_) in BUGS.items()]
    return {
        bug: traces
        if isinstance(traces, str)
        else [difference for difference in compare(traces, reference) if not difference.is_within]
        for bug, traces in zip(BUGS, trace_in_jobs(2, trace_with_bugs, work), strict=True)
    }


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_is_caught_and_localised(differences, bug):
    found, (_, expected, untouched) = differences[bug], BUGS[bug]
    assert not isinstance(found, str), found
    assert found, "not caught"
    assert (found[0].step, found[0].kind, found[0].name) == expected
    assert not [difference for difference in found if difference.step == found[0].step and difference.kind in untouched]


def test_scaled_expert_gradients_are_exactly_the_ones_that_differ(differences):
    names = [
        difference.name
        for difference in differences[expert_gradients_times_ep]
        if (difference.step, difference.kind) == (0, "gradient")
    ]
    wanted = {
        f"decoder.layers.{layer}.mlp.experts.{part}.weight"
        for layer in range(8)
        for part in ("linear_fc1", "linear_fc2")
    }
    assert len(names) == len(wanted)
    assert set(names) == wanted
    assert names[0].startswith("decoder.layers.7."), "the last layer's come first in the backward pass"
