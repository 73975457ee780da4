"""This project's Triton kernels, compiled, at the sizes of a layer. `make test-gpu` runs them, and the tests of
tests/unit/model/kernels/, which then use the GPU too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model import permutation as plain_permutation
from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.recycle_routing import assign_within_capacity as plain_assign
from hunyuan_pretrain.model.routing import RoutingPlan
from hunyuan_pretrain.train.kernel_probe import Inputs, compared, differences, tolerance
from tests.helpers import assignments
from tests.helpers.kernels import assert_rounded_once, random_plan, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTHS = [(6400, 18304), (2048, 5632)]
"""Hidden and FFN size: Hunyuan-Large's, and the one of tests/benchmarks/."""


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("ffn", [ffn for _, ffn in WIDTHS])
def test_swiglu_is_the_plain_function_rounded_once(ffn: int) -> None:
    from hunyuan_pretrain.model.kernels.swiglu import swiglu

    x_TF, grad = normal(4096, 2 * ffn, seed=0), normal(4096, ffn, seed=1)
    assert_rounded_once(swiglu, plain_functions().swiglu, [x_TF], grad)


@pytest.mark.parametrize(
    ("K", "R", "dropped"), [(1, 8192, 0), (1, 9000, 700), (2, 16384, 0), (4, 30000, 5000)], ids=str
)
@pytest.mark.parametrize("hidden", [hidden for hidden, _ in WIDTHS])
def test_permute_and_combine_are_the_plain_functions_rounded_once(hidden: int, K: int, R: int, dropped: int) -> None:
    from hunyuan_pretrain.model.kernels import permutation

    T = 8192
    plan = random_plan(T, K, R, dropped, "cuda")
    shared_TD, residual_TD, grad_TD = (normal(T, hidden, seed=seed) for seed in range(3))
    rows_RD, grad_RD = normal(R, hidden, seed=3), normal(R, hidden, seed=4)

    def of(module: object, rows: Tensor, weight: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        return module.combine(rows, weight, plan, shared, residual)  # type: ignore[attr-defined]

    combines = partial(of, permutation), partial(of, plain_permutation)
    inputs = [rows_RD, plan.weight_TK, shared_TD, residual_TD]
    assert_rounded_once(*combines, inputs, grad_TD)
    assert_rounded_once(
        lambda x: permutation.permute(x, plan),
        lambda x: plain_permutation.permute(x, plan),
        [shared_TD],
        (grad_RD, grad_TD),
    )
    first, second = results(combines[0], inputs, grad_TD), results(combines[0], inputs, grad_TD)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), "not the same twice"


def test_rows_past_2_to_the_31_numbers_are_reached() -> None:
    """4 GiB of rows: an offset in 32 bits would be negative."""
    from hunyuan_pretrain.model.kernels.permutation import permute
    from hunyuan_pretrain.model.kernels.swiglu import swiglu

    T, D = 16, 18304
    R = 2**31 // D + 1000
    token_R = torch.arange(R, device="cuda") % T
    plan = RoutingPlan(torch.ones(T, 1).cuda(), torch.arange(T, device="cuda")[:, None], token_R, None, False)
    hidden_TD = normal(T, D, seed=0)
    rows_RD, _ = permute(hidden_TD, plan)
    assert torch.equal(rows_RD[-T:], hidden_TD[token_R[-T:]])
    torch.testing.assert_close(swiglu(rows_RD)[-T:], swiglu(rows_RD[-T:]), rtol=0, atol=0)


@pytest.mark.parametrize("group_tokens", [1024, 4096])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_router_topk": 2}, {"moe_expert_capacity_factor": 1.25}, {"recycle_routing": False}],
    ids=["recycle", "top 2", "factor 1.25", "drop"],
)
def test_the_assignment_is_the_plain_function(changes: dict[str, Any], group_tokens: int) -> None:
    """16 experts and 16,384 tokens, bitwise."""
    from hunyuan_pretrain.model.kernels.assignment import assign_within_capacity

    arguments: dict[str, Any] = {"num_moe_experts": 16, "moe_routing_group_tokens": group_tokens} | changes
    for seed in (0, 1):
        assignments.assert_same(
            assign_within_capacity, plain_assign, assignments.case(seed, 16384 // group_tokens, "cuda", **arguments)
        )


# --- every function, with the arguments of the probe before training --------------------------------------------------

TOKENS = 8192
TOP_1 = {"moe_router_topk": 1}
TOP_2 = {"moe_router_topk": 2, "recycle_routing": False, "moe_z_loss_coeff": 0.001}
DROPLESS = TOP_2 | {"moe_expert_capacity_factor": None}


def model(heads: int, **routing: object) -> ModelConfig:
    """16 experts; 6400 channels in 80 heads of 80, or in 50 of 128."""
    return ModelConfig(
        num_layers=2,
        hidden_size=6400,
        num_attention_heads=heads,
        num_query_groups=heads // 10,
        ffn_hidden_size=18304,
        num_moe_experts=16,
        padded_vocab_size=1024,
        moe_routing_group_tokens=4096,
        **routing,
    )


@pytest.mark.parametrize("routing", [TOP_1, TOP_2, DROPLESS], ids=["top 1", "top 2", "dropless"])
@pytest.mark.parametrize("heads", [80, 50])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", Functions._fields)
def test_a_kernel_matches_its_plain_function(name: str, dtype: str, heads: int, routing: dict[str, object]) -> None:
    pytest.importorskip("triton")
    from hunyuan_pretrain.model.kernels import kernel_functions

    kernels, plain = kernel_functions(), plain_functions()
    assert getattr(kernels, name) is not getattr(plain, name)
    config = transformer_config(model(heads, **routing), ParallelConfig(), PrecisionConfig(dtype=dtype))
    arguments = Inputs(config, TOKENS, torch.device("cuda"), 1).of(name)
    if arguments is None:
        pytest.skip("this model does not use it")
    found = differences(compared(kernels, name), compared(plain, name), arguments, 2)
    assert max(found.values()) <= tolerance(config.params_dtype), found
