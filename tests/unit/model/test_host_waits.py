"""The host runs ahead of the GPU: no operation of a step reads a tensor's values, except one in each layer without
capacity, and no gradient of a gather has to sort what it sums. Counted on the CPU by the operators called, since
nothing waits there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.model.routing import EVALUATION, EvaluationRouting
from tests.helpers.host_waits import Operations
from tests.helpers.ranks import fork_ranks
from tests.helpers.tiny import build, packed_inputs, tiny_model

DROPLESS = {"moe_expert_capacity_factor": None, "recycle_routing": False}


def looks_of_a_step(model: ModelConfig, is_counted: bool = False, **parallel: Any) -> Counter[str]:
    """Counts of a forward pass, and of a backward pass if there is one."""
    whole, inputs = build(model, **parallel), packed_inputs(model)
    if is_counted:
        inputs = replace(inputs, routing=EvaluationRouting(torch.arange(len(inputs.tokens_T)) % 3 > 0))
    with Operations() as operations, torch.set_grad_enabled(not is_counted):
        loss, _ = whole(inputs)
        if not is_counted:
            loss.backward()
    return operations.looks


@pytest.mark.parametrize(
    "changes", [{}, {"moe_router_topk": 2, "recycle_routing": False, "moe_z_loss_coeff": 0.1}], ids=["top 1", "top 2"]
)
@pytest.mark.parametrize("recompute", ["none", "cla_group"])
def test_a_step_with_capacity_never_makes_the_host_wait(changes: dict[str, Any], recompute: str) -> None:
    assert looks_of_a_step(tiny_model(**changes), recompute=recompute) == {}


def test_a_layer_without_capacity_waits_once_for_the_row_counts_of_its_experts() -> None:
    model = tiny_model(**DROPLESS)
    assert looks_of_a_step(model) == {"tolist": model.num_layers}
    assert looks_of_a_step(tiny_model(), is_counted=True) == {"tolist": model.num_layers}, (
        "a validation has no capacity"
    )


@pytest.mark.parametrize("count", ["bincount", "one_hot"])
def test_the_counter_sees_what_it_should_count(count: str) -> None:
    """Both kinds of operation were once in the router."""
    choice = torch.arange(4)
    with Operations() as operations:
        torch.bincount(choice, minlength=4) if count == "bincount" else torch.nn.functional.one_hot(choice, 4)
    assert operations.looks


def exchange(kinds: list[dict[str, Any]]) -> list[Any]:
    """On every rank, for the mixture of experts of a layer without capacity under each layout: reads, additions, and
    how much output and gradients differ from those of all experts on one rank."""
    from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed, leave_layout

    torch.use_deterministic_algorithms(True)
    initialize_distributed("gloo", 60)
    found = []
    for kind in kinds:
        results, operations = [], Operations()
        for layout in (
            {"tensor_model_parallel_size": kind.get("tensor_model_parallel_size", 1)} | _sequence_parallel(kind),
            kind,
        ):
            parallel = ParallelConfig(**layout)
            groups = build_groups(parallel, 60)
            config = transformer_config(tiny_model(**DROPLESS), parallel, PrecisionConfig(dtype="fp32"))
            (model,) = build_model(config, groups, 1)
            moe = model.decoder.layers[0].mlp
            generator = torch.Generator().manual_seed(torch.distributed.get_rank())
            x_TD = torch.randn(48, config.hidden_size, generator=generator).requires_grad_()
            plan = moe.router(x_TD, EVALUATION).plan
            with operations if layout is kind else Operations():
                none_TD = torch.zeros_like(x_TD)
                output_TD = moe.combine(
                    moe.experts(moe.permute(x_TD, plan)[0], plan), plan.weight_TK, plan, none_TD, none_TD
                )
                output_TD.backward(torch.ones_like(output_TD).cumsum(0))
            results.append((output_TD.detach(), x_TD.grad))
            leave_layout()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
        found.append((dict(operations.looks), dict(operations.adds), max(errors)))
    torch.distributed.destroy_process_group()
    return found


def _sequence_parallel(kind: dict[str, Any]) -> dict[str, Any]:
    return {"sequence_parallel": kind.get("sequence_parallel", False)}


def test_the_exchange_without_capacity_waits_once_and_gathers_gradients() -> None:
    shared = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}
    for rank in fork_ranks(2, exchange, [{"expert_model_parallel_size": 2}, shared]):
        (looks, adds, error), (shared_looks, shared_adds, shared_error) = rank
        assert looks == {"tolist": 1}
        assert shared_looks == {"tolist": 2}, "rows of its experts, and those of the other ranks"
        assert adds == shared_adds == {}
        assert max(error, shared_error) < 1e-6
